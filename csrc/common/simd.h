// Eight floats at once, on the vector types of GCC and Clang. For files that are compiled once for each instruction
// set: everything is in an unnamed namespace, so that no two of them share code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mlx_server {

namespace {

constexpr std::size_t kLanes = 8;
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Ints = std::int32_t __attribute__((vector_size(kLanes * sizeof(std::int32_t))));

// A vector in memory, at any address.
template <typename Vec>
struct [[gnu::packed, gnu::may_alias]] Unaligned {
  Vec v;
};

// Vectors are passed by reference: by value, the calling convention would depend on the instruction set.
template <typename Vec, typename T>
inline void load(Vec& v, const T* p) {
  v = reinterpret_cast<const Unaligned<Vec>*>(p)->v;
}

template <typename Vec, typename T>
inline void store(T* p, const Vec& v) {
  reinterpret_cast<Unaligned<Vec>*>(p)->v = v;
}

// x = exp(x) for x <= 0, relative error below 2e-7; 0 where the result would be subnormal, exactly 1 for 0, NaN for
// NaN. Cody and Waite's reduction x = n * ln 2 + r, |r| <= ln 2 / 2, and the polynomial for exp(r) of Cephes' expf.
inline void exp_of(Floats& x) {
  constexpr float kSmallest = -87.0f;
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, which then stands in the low bits
  const Ints too_small = x < kSmallest;
  x = too_small ? Floats{} : x;
  const Floats shifted = x * 0x1.715476p0f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints scaled = (Ints)p + ((Ints)shifted << 23);  // times 2^n
  x = (Floats)(scaled & ~too_small);
}

}  // namespace

}  // namespace mlx_server
