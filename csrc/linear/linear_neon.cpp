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
      const uint16x8_t q = vmovl_u8(unpack(packed));
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
    static uint8x8_t unpack(const std::uint8_t* packed) {
      if constexpr (kBits == 4) {
        std::uint32_t word;
        __builtin_memcpy(&word, packed, sizeof(word));
        const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(word));
        return vzip1_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4));
      } else {
        return vld1_u8(packed);
      }
    }
  };
};

}  // namespace

constinit const LinearKernels kLinearNeon = make_linear_kernels<Neon>("NEON");

}  // namespace mlx_server

#endif
