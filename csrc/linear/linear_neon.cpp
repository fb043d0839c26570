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
  static constexpr int kPanelRows = 2;  // 2 x 4 sums, 4 weights and one x, two registers each, in 32

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

  template <int kBits>
  struct Format {
    using Group = Neon::Group;

    static Group group(float scale, float bias) { return {vdupq_n_f32(scale), vdupq_n_f32(bias)}; }
    static Vec dequantize(const Group& group, const std::uint8_t* packed) {
      const uint16x8_t q = unpack(packed);
      return {vfmaq_f32(group.bias, vcvtq_f32_u32(vmovl_u16(vget_low_u16(q))), group.scale),
              vfmaq_f32(group.bias, vcvtq_f32_u32(vmovl_high_u16(q)), group.scale)};
    }
    static Vec in_order(Vec v) { return v; }
    static void pack(const float* x, float* packed) {
      for (int i = 0; i < kBlock; i += kLanes) {
        store(packed + i, load(x + i));
      }
    }

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

}  // namespace

constinit const LinearKernels kLinearNeon = make_linear_kernels<Neon>("NEON");

}  // namespace mlx_server

#endif
