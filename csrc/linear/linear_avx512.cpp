#if defined(__x86_64__)

#include <immintrin.h>

#include "linear/linear_tiles.h"

namespace mlx_server {

namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kDirectRows = 8;
  static constexpr int kNearRows = kDirectRows;
  static constexpr int kPanelRows = 6;  // 6 x 4 sums, 4 weights and one x in 32 registers

  static constexpr int direct_columns(int rows) { return rows <= 5 ? 4 : 2; }  // 5 x 4 or 8 x 2 sums in 32 registers

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

  static __m128 quarter_sums(Vec v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    const __m128 ab = _mm_hadd_ps(quarter_sums(a), quarter_sums(b));
    const __m128 cd = _mm_hadd_ps(quarter_sums(c), quarter_sums(d));
    _mm_storeu_ps(out, _mm_hadd_ps(ab, cd));
  }

  template <int kBits, bool kIsFloat>
  struct Format {
    struct Group {
      __m512 scale, bias;
    };

    static Group group(float scale, float bias) { return {_mm512_set1_ps(scale), _mm512_set1_ps(bias)}; }
    static Vec dequantize(const Group& group, const std::uint8_t* packed) {
      return fma(_mm512_cvtepi32_ps(unpack(packed)), group.scale, group.bias);
    }
    static Vec in_order(Vec v) { return v; }
    static Vec packed_order(Vec v) { return v; }

   private:
    static __m512i unpack(const std::uint8_t* packed) {
      if constexpr (kBits == 8) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
      }
      constexpr Places kPlaces = places();
      const __m512i bytes = _mm512_broadcast_i32x4(_mm_maskz_loadu_epi8((1 << 2 * kBits) - 1, packed));
      const __m512i words = _mm512_shuffle_epi8(bytes, _mm512_loadu_si512(kPlaces.bytes));
      return _mm512_and_si512(_mm512_srlv_epi32(words, _mm512_loadu_si512(kPlaces.shifts)),
                              _mm512_set1_epi32((1 << kBits) - 1));
    }

    // For each lane: the two bytes that hold its value, and zeros; how far up it lies in them.
    struct Places {
      std::uint8_t bytes[64];
      std::int32_t shifts[16];
    };
    static constexpr Places places() {
      using Place = BitPlace<Avx512, kBits>;
      Places places{};
      for (int i = 0; i < 16; ++i) {
        places.bytes[4 * i] = Place::byte(i);
        places.bytes[4 * i + 1] = Place::byte(i) + 1;
        places.bytes[4 * i + 2] = places.bytes[4 * i + 3] = 0x80;
        places.shifts[i] = Place::shift(i);
      }
      return places;
    }
  };
};

// A group's 16 possible weights are a table in one register. Lanes 2j and 2j + 1 hold elements j and j + 8: one
// broadcast of 64 bits brings all of them to where a shift suffices.
template <>
struct Avx512::Format<4, false> {
  using Group = __m512;

  static Group group(float scale, float bias) {
    const __m512 q = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_fmadd_ps(q, _mm512_set1_ps(scale), _mm512_set1_ps(bias));
  }
  static Vec dequantize(Group table, const std::uint8_t* packed) {
    long long words;
    __builtin_memcpy(&words, packed, sizeof(words));
    const __m512i shifts = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi64(words), shifts), table);
  }
  static Vec in_order(Vec v) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15), v);
  }
  static Vec packed_order(Vec v) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15), v);
  }
};

template <>
struct Avx512::Format<4, true> : Avx512::Format<4, false> {
  static Group group(float scale, float) { return _mm512_mul_ps(load(kE2m1), _mm512_set1_ps(scale)); }
};

// Half precision has an e4m3's bits at the top of its own, and an exponent that is 8 higher.
template <>
struct Avx512::Format<8, true> : Avx512::Format<8, false> {
  using Group = __m512;

  static Group group(float scale, float) { return _mm512_set1_ps(scale); }
  static Vec dequantize(Group scale, const std::uint8_t* packed) {
    const __m256i codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0x80)), 8);
    const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0x7f)), 7);
    const Vec v = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, rest)), _mm512_set1_ps(256));
    return _mm512_mul_ps(v, scale);
  }
};

}  // namespace

constinit const LinearKernels kLinearAvx512 = make_linear_kernels<Avx512>("AVX-512");

}  // namespace mlx_server

#endif
