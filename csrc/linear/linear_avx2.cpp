#if defined(__x86_64__)

#include <immintrin.h>

#include "linear/linear_tiles.h"

namespace mlx_server {

namespace {

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kDirectRows = 4;
  static constexpr int kNearRows = 8;
  static constexpr int kPanelRows = 3;  // 3 x 4 sums in 16 registers; weights come from memory

  static constexpr int direct_columns(int rows) { return rows == 1 ? 4 : rows <= 4 ? 2 : 1; }

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

  template <int kBits, bool kIsFloat>
  struct Format {
    using Group = Avx2::Group;

    static Group group(float scale, float bias) { return {_mm256_set1_ps(scale), _mm256_set1_ps(bias)}; }
    static Vec dequantize(const Group& group, const std::uint8_t* packed) {
      return fma(_mm256_cvtepi32_ps(unpack(packed)), group.scale, group.bias);
    }
    static Vec in_order(Vec v) { return v; }
    static Vec packed_order(Vec v) { return v; }

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

// A group's 8 possible absolute values are a table in one register.
template <>
struct Avx2::Format<4, true> : Avx2::Format<4, false> {
  using Group = __m256;

  static Group group(float scale, float) { return _mm256_mul_ps(load(kE2m1), _mm256_set1_ps(scale)); }
  static Vec dequantize(Group table, const std::uint8_t* packed) {
    int word;
    __builtin_memcpy(&word, packed, sizeof(word));
    const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(8)), 28);
    return _mm256_xor_ps(_mm256_permutevar8x32_ps(table, codes), _mm256_castsi256_ps(sign));
  }
};

// Half precision has an e4m3's bits at the top of its own, and an exponent that is 8 higher.
template <>
struct Avx2::Format<8, true> : Avx2::Format<8, false> {
  using Group = __m256;

  static Group group(float scale, float) { return _mm256_set1_ps(scale); }
  static Vec dequantize(Group scale, const std::uint8_t* packed) {
    const __m128i codes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(codes, _mm_set1_epi16(0x80)), 8);
    const __m128i rest = _mm_slli_epi16(_mm_and_si128(codes, _mm_set1_epi16(0x7f)), 7);
    const Vec v = _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, rest)), _mm256_set1_ps(256));
    return _mm256_mul_ps(v, scale);
  }
};

}  // namespace

constinit const LinearKernels kLinearAvx2 = make_linear_kernels<Avx2>("AVX2");

}  // namespace mlx_server

#endif
