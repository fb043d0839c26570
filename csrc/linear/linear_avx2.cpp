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
      if constexpr (kBits == 8) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
      }
      const std::uint64_t word = load_bytes<Avx2, kBits>(packed);
      if constexpr (kBits <= 4) {
        const __m256i shifts =
            _mm256_setr_epi32(0, kBits, 2 * kBits, 3 * kBits, 4 * kBits, 5 * kBits, 6 * kBits, 7 * kBits);
        return low_bits(_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), shifts));
      }
      using Place = BitPlace<Avx2, kBits>;
      const auto bytes = [](int i) { return 0x80800000 | (Place::byte(i) + 1) << 8 | Place::byte(i); };
      const __m256i order =
          _mm256_setr_epi32(bytes(0), bytes(1), bytes(2), bytes(3), bytes(4), bytes(5), bytes(6), bytes(7));
      const __m256i shifts = _mm256_setr_epi32(Place::shift(0), Place::shift(1), Place::shift(2), Place::shift(3),
                                               Place::shift(4), Place::shift(5), Place::shift(6), Place::shift(7));
      const __m256i words = _mm256_set1_epi64x(static_cast<long long>(word));
      return low_bits(_mm256_srlv_epi32(_mm256_shuffle_epi8(words, order), shifts));
    }
    static __m256i low_bits(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi32((1 << kBits) - 1)); }
  };
};

}  // namespace

constinit const LinearKernels kLinearAvx2 = make_linear_kernels<Avx2>("AVX2");

}  // namespace mlx_server

#endif
