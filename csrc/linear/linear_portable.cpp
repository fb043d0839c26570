#include "linear/linear_tiles.h"

namespace mlx_server {

namespace {

// Lanes are plain arrays: compilers turn these loops into whatever vectors the baseline processor has. Products are
// rounded before they are added (the file is compiled without contraction), since a fused multiply-add may be a slow
// call.
struct Portable {
  static constexpr int kLanes = 8;
  struct Vec {
    float lanes[kLanes];
  };
  static constexpr int kDirectRows = 1;
  static constexpr int kPanelRows = 1;

  static Vec zero() { return {}; }
  static Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(float* p, const Vec& v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static Vec fma(const Vec& a, const Vec& b, const Vec& c) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) {
      v.lanes[i] = a.lanes[i] * b.lanes[i] + c.lanes[i];
    }
    return v;
  }

  static float sum(const Vec& v) {
    const float* l = v.lanes;
    return ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
  }
  static void sum4(const Vec& a, const Vec& b, const Vec& c, const Vec& d, float* out) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
  }

  struct Group {
    float scale, bias;
  };

  template <int kBits>
  struct Format {
    using Group = Portable::Group;

    static Group group(float scale, float bias) { return {scale, bias}; }
    static Vec dequantize(const Group& group, const std::uint8_t* packed) {
      Vec v;
      for (int i = 0; i < kLanes; ++i) {
        const int q = kBits == 4 ? (packed[i / 2] >> (i % 2 * 4)) & 15 : packed[i];
        v.lanes[i] = static_cast<float>(q) * group.scale + group.bias;
      }
      return v;
    }
    static Vec in_order(const Vec& v) { return v; }
    static void pack(const float* x, float* packed) { __builtin_memcpy(packed, x, kBlock * sizeof(float)); }
  };
};

}  // namespace

constinit const LinearKernels kLinearPortable = make_linear_kernels<Portable>("portable");

}  // namespace mlx_server
