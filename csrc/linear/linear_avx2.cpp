#if defined(__x86_64__)

#include <immintrin.h>

#include "linear/linear_tiles.h"

namespace mlx_server {

namespace {

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kDirectRows = 3;
  static constexpr int kPanelRows = 3;  // 3 x 4 sums in 16 registers; weights come from memory

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

  static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
  }

  struct Group {
    __m256 scale, bias;
  };

  template <int kBits>
  struct Format {
    using Group = Avx2::Group;

    static Group group(float scale, float bias) { return {_mm256_set1_ps(scale), _mm256_set1_ps(bias)}; }
    static Vec dequantize(const Group& group, const std::uint8_t* packed) {
      return fma(_mm256_cvtepi32_ps(unpack(packed)), group.scale, group.bias);
    }
    static Vec in_order(Vec v) { return v; }
    static void pack(const float* x, float* packed) {
      for (int i = 0; i < kBlock; i += kLanes) {
        store(packed + i, load(x + i));
      }
    }

   private:
    static __m256i unpack(const std::uint8_t* packed) {
      if constexpr (kBits == 4) {
        int word;
        __builtin_memcpy(&word, packed, sizeof(word));
        const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
        return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), shifts), _mm256_set1_epi32(15));
      } else {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
      }
    }
  };
};

}  // namespace

constinit const LinearKernels kLinearAvx2 = make_linear_kernels<Avx2>("AVX2");

}  // namespace mlx_server

#endif
