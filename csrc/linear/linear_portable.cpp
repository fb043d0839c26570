#include "linear/linear_tiles.h"

namespace mlx_server {

namespace {

// GCC's and Clang's vectors of four floats: every 64-bit processor's baseline has them. Products are rounded before
// they are added (the file is compiled without contraction), since a fused multiply-add may be a slow call.
struct Portable {
  typedef float Floats __attribute__((vector_size(16)));
  typedef int Ints __attribute__((vector_size(16)));
  // Eight lanes, since eight weights of any number of bits are whole bytes.
  struct Vec {
    Floats low, high;
  };
  static constexpr int kLanes = 8;
  static constexpr int kDirectRows = 1;  // 1 x 4 sums, two registers each, in 16
  static constexpr int kNearRows = kDirectRows;
  static constexpr int kPanelRows = 1;

  static constexpr int direct_columns(int) { return LinearKernels::kColumns; }

  static Vec zero() { return Vec{}; }
  static Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static Vec fma(Vec a, Vec b, Vec c) { return {a.low * b.low + c.low, a.high * b.high + c.high}; }

  static float sum(Vec v) {
    const Floats half = v.low + v.high;
    return (half[0] + half[2]) + (half[1] + half[3]);
  }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
  }

  struct Group {
    Floats scale, bias;
  };

  template <int kBits, bool kIsFloat>
  struct Format {
    using Group = Portable::Group;

    static Group group(float scale, float bias) { return {Floats{} + scale, Floats{} + bias}; }
    static Vec dequantize(const Group& group, const std::uint8_t* packed) {
      const Vec q = unpack(packed);
      return {q.low * group.scale + group.bias, q.high * group.scale + group.bias};
    }
    static Vec in_order(Vec v) { return v; }
    static Vec packed_order(Vec v) { return v; }

   private:
    static Vec unpack(const std::uint8_t* packed) {
      if constexpr (kBits == 8) {
        return {four_bytes(packed), four_bytes(packed + 4)};
      } else {
        const std::uint64_t word = load_bytes<Portable, kBits>(packed);
        return {four(word), four(word >> 4 * kBits)};
      }
    }
    static Floats four(std::uint64_t word) {
      constexpr int kMask = (1 << kBits) - 1;
      const int w = static_cast<int>(word & ((1 << 4 * kBits) - 1));
      return __builtin_convertvector(
          Ints{w & kMask, w >> kBits & kMask, w >> 2 * kBits & kMask, w >> 3 * kBits & kMask}, Floats);
    }
    static Floats four_bytes(const std::uint8_t* p) {
      return __builtin_convertvector(Ints{p[0], p[1], p[2], p[3]}, Floats);
    }
  };
};

template <>
struct Portable::Format<4, true> : Portable::Format<4, false> {
  using Group = float;

  static Group group(float scale, float) { return scale; }
  static Vec dequantize(float scale, const std::uint8_t* p) {
    return {Floats{kE2m1[p[0] & 15], kE2m1[p[0] >> 4], kE2m1[p[1] & 15], kE2m1[p[1] >> 4]} * scale,
            Floats{kE2m1[p[2] & 15], kE2m1[p[2] >> 4], kE2m1[p[3] & 15], kE2m1[p[3] >> 4]} * scale};
  }
};

template <>
struct Portable::Format<8, true> : Portable::Format<8, false> {
  using Group = float;

  static Group group(float scale, float) { return scale; }
  static Vec dequantize(float scale, const std::uint8_t* p) {
    return {Floats{kE4m3.of[p[0]], kE4m3.of[p[1]], kE4m3.of[p[2]], kE4m3.of[p[3]]} * scale,
            Floats{kE4m3.of[p[4]], kE4m3.of[p[5]], kE4m3.of[p[6]], kE4m3.of[p[7]]} * scale};
  }
};

}  // namespace

constinit const LinearKernels kLinearPortable = make_linear_kernels<Portable>("portable");

}  // namespace mlx_server
