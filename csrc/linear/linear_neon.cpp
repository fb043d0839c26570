#if defined(__aarch64__)

#include <arm_neon.h>

#include "linear/linear_tiles.h"

namespace mlx_server {

namespace {

struct Neon {
  // Two registers, so that four columns keep eight multiply-adds in flight.
  struct Vec {
    float32x4_t low, high;
  };
  static constexpr int kLanes = 8;
  static constexpr int kDirectRows = 2;
  static constexpr int kNearRows = kDirectRows;
  static constexpr int kPanelRows = 2;  // 2 x 4 sums, 4 weights and one x, two registers each, in 32

  static constexpr int direct_columns(int) { return LinearKernels::kColumns; }

  static Vec zero() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
  static Vec load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static void store(float* p, Vec v) {
    vst1q_f32(p, v.low);
    vst1q_f32(p + 4, v.high);
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }

  static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    const float32x4_t ab = vpaddq_f32(vaddq_f32(a.low, a.high), vaddq_f32(b.low, b.high));
    const float32x4_t cd = vpaddq_f32(vaddq_f32(c.low, c.high), vaddq_f32(d.low, d.high));
    vst1q_f32(out, vpaddq_f32(ab, cd));
  }

  struct Group {
    float32x4_t scale, bias;
  };

  template <int kBits, bool kIsFloat>
  struct Format {
    using Group = Neon::Group;

    static Group group(float scale, float bias) { return {vdupq_n_f32(scale), vdupq_n_f32(bias)}; }
    static Vec dequantize(const Group& group, const std::uint8_t* packed) {
      const uint16x8_t q = unpack(packed);
      return {vfmaq_f32(group.bias, vcvtq_f32_u32(vmovl_u16(vget_low_u16(q))), group.scale),
              vfmaq_f32(group.bias, vcvtq_f32_u32(vmovl_high_u16(q)), group.scale)};
    }
    static Vec in_order(Vec v) { return v; }
    static Vec packed_order(Vec v) { return v; }

   private:
    static uint16x8_t unpack(const std::uint8_t* packed) {
      if constexpr (kBits == 8) {
        return vmovl_u8(vld1_u8(packed));
      }
      const std::uint64_t word = load_bytes<Neon, kBits>(packed);
      if constexpr (kBits == 4) {
        const uint8x8_t bytes = vcreate_u8(word);
        return vmovl_u8(vzip1_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4)));
      }
      // For each lane: the two bytes that hold its value; how far up it lies in them.
      using Place = BitPlace<Neon, kBits>;
      constexpr auto bytes = [](int i) {
        return static_cast<std::uint16_t>((Place::byte(i) + 1) << 8 | Place::byte(i));
      };
      constexpr std::uint16_t kBytes[] = {bytes(0), bytes(1), bytes(2), bytes(3),
                                          bytes(4), bytes(5), bytes(6), bytes(7)};
      constexpr std::int16_t kShifts[] = {-Place::shift(0), -Place::shift(1), -Place::shift(2), -Place::shift(3),
                                          -Place::shift(4), -Place::shift(5), -Place::shift(6), -Place::shift(7)};
      const uint8x16_t order = vreinterpretq_u8_u16(vld1q_u16(kBytes));
      const uint8x16_t words = vqtbl1q_u8(vcombine_u8(vcreate_u8(word), vdup_n_u8(0)), order);
      return vandq_u16(vshlq_u16(vreinterpretq_u16_u8(words), vld1q_s16(kShifts)), vdupq_n_u16((1 << kBits) - 1));
    }
  };
};

// Twice an e2m1 is a whole number: a table of bytes holds all 16.
template <>
struct Neon::Format<4, true> : Neon::Format<4, false> {
  using Group = float32x4_t;

  static Group group(float scale, float) { return vdupq_n_f32(scale / 2); }
  static Vec dequantize(Group half_scale, const std::uint8_t* packed) {
    constexpr std::int8_t kTwice[] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    std::uint32_t word;
    __builtin_memcpy(&word, packed, sizeof(word));
    const uint8x8_t bytes = vcreate_u8(word);
    const uint8x8_t codes = vzip1_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4));
    const int16x8_t v = vmovl_s8(vqtbl1_s8(vld1q_s8(kTwice), codes));
    return {vmulq_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(v))), half_scale),
            vmulq_f32(vcvtq_f32_s32(vmovl_high_s16(v)), half_scale)};
  }
};

// Half precision has an e4m3's bits at the top of its own, and an exponent that is 8 higher.
template <>
struct Neon::Format<8, true> : Neon::Format<8, false> {
  using Group = float32x4_t;

  static Group group(float scale, float) { return vdupq_n_f32(scale); }
  static Vec dequantize(Group scale, const std::uint8_t* packed) {
    const uint16x8_t codes = vmovl_u8(vld1_u8(packed));
    const uint16x8_t sign = vshlq_n_u16(vandq_u16(codes, vdupq_n_u16(0x80)), 8);
    const uint16x8_t rest = vshlq_n_u16(vandq_u16(codes, vdupq_n_u16(0x7f)), 7);
    const float16x8_t v = vreinterpretq_f16_u16(vorrq_u16(sign, rest));
    const float32x4_t unit = vdupq_n_f32(256);
    return {vmulq_f32(vmulq_f32(vcvt_f32_f16(vget_low_f16(v)), unit), scale),
            vmulq_f32(vmulq_f32(vcvt_high_f32_f16(v), unit), scale)};
  }
};

}  // namespace

constinit const LinearKernels kLinearNeon = make_linear_kernels<Neon>("NEON");

}  // namespace mlx_server

#endif
