#include "linear/linear_tiles.h"

namespace mlx_server {

namespace {

// GCC's and Clang's vectors of four floats: every 64-bit processor's baseline has them. Products are rounded before
// they are added (the file is compiled without contraction), since a fused multiply-add may be a slow call.
struct Portable {
  typedef float Vec __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kDirectRows = 2;
  static constexpr int kPanelRows = 2;

  static Vec zero() { return Vec{}; }
  static Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

  static float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
  }

  struct Group {
    Vec scale, bias;
  };

  template <int kBits>
  struct Format {
    using Group = Portable::Group;

    static Group group(float scale, float bias) { return {Vec{} + scale, Vec{} + bias}; }
    static Vec dequantize(const Group& group, const std::uint8_t* packed) {
      return unpack(packed) * group.scale + group.bias;
    }
    static Vec in_order(Vec v) { return v; }
    static void pack(const float* x, float* packed) { __builtin_memcpy(packed, x, kBlock * sizeof(float)); }

   private:
    static Vec unpack(const std::uint8_t* packed) {
      // Each lane keeps its bits where they are and scales them down: shifts by lane are not in every baseline.
      typedef int Ints __attribute__((vector_size(16)));
      const int low = packed[0] | packed[1] << 8;
      if constexpr (kBits == 4) {
        const Ints digits = Ints{low, low, low, low} & Ints{0xf, 0xf0, 0xf00, 0xf000};
        return __builtin_convertvector(digits, Vec) * Vec{1, 1.0f / 16, 1.0f / 256, 1.0f / 4096};
      } else {
        const int high = packed[2] | packed[3] << 8;
        const Ints digits = Ints{low, low, high, high} & Ints{0xff, 0xff00, 0xff, 0xff00};
        return __builtin_convertvector(digits, Vec) * Vec{1, 1.0f / 256, 1, 1.0f / 256};
      }
    }
  };
};

}  // namespace

constinit const LinearKernels kLinearPortable = make_linear_kernels<Portable>("portable");

}  // namespace mlx_server
