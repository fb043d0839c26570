// The kernels, written once in GCC's and Clang's vector types; each elementwise_<isa>.cpp includes this and is compiled
// with its own flags. As in linear_tiles.h, all templates depend on a type in an anonymous namespace, and nothing here
// is an inline function that another file could also emit.
//
// Simd has Vec and Ints, vectors of kLanes floats and 32-bit integers.
#pragma once

#include "elementwise/elementwise_cpu.h"

namespace mlx_server {

extern const ElementwiseKernels kElementwiseAvx2, kElementwiseBaseline;

// The first `count` floats at p; the other lanes are 0.
template <typename Simd>
inline typename Simd::Vec load(const float* p, std::int64_t count) {
  typename Simd::Vec v{};
  if (count >= Simd::kLanes) {
    __builtin_memcpy(&v, p, sizeof(v));
  } else {
    __builtin_memcpy(&v, p, count * sizeof(float));
  }
  return v;
}

template <typename Simd>
inline void store(float* p, typename Simd::Vec v, std::int64_t count) {
  if (count >= Simd::kLanes) {
    __builtin_memcpy(p, &v, sizeof(v));
  } else {
    __builtin_memcpy(p, &v, count * sizeof(float));
  }
}

// e^x within 2 units in the last place where that is a normal number; the nearest such number elsewhere. e^x = 2^n e^r
// with |r| <= ln(2) / 2, and e^r is a polynomial (S. Moshier, Cephes, expf).
template <typename Simd>
inline typename Simd::Vec exp(typename Simd::Vec x) {
  using Vec = typename Simd::Vec;
  using Ints = typename Simd::Ints;
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: floats this large have no fraction
  const Vec low = Vec{} - 87.0f, high = Vec{} + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec shifted = x * kLog2E + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (x - n * kLn2High) - n * kLn2Low;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  // shifted holds n in its lowest bits: move it into the exponent.
  const Ints power = ((Ints)shifted << 23) + (127 << 23);
  return p * (Vec)power;
}

template <typename Simd>
void silu_mul(const SiluMul& op) {
  using Vec = typename Simd::Vec;
  for (std::int64_t i = 0; i < op.size; i += Simd::kLanes) {
    const Vec gate = load<Simd>(op.gate + i, op.size - i), up = load<Simd>(op.up + i, op.size - i);
    store<Simd>(op.y + i, gate / (1.0f + exp<Simd>(-gate)) * up, op.size - i);
  }
}

template <typename Simd>
void rms_norm(const RmsNorm& op) {
  using Vec = typename Simd::Vec;
  for (std::int64_t row = 0; row < op.rows; ++row) {
    const float* x = op.x + row * op.d;
    Vec squares{};
    for (std::int64_t i = 0; i < op.d; i += Simd::kLanes) {
      const Vec v = load<Simd>(x + i, op.d - i);
      squares += v * v;
    }
    float sum = 0;
    for (int lane = 0; lane < Simd::kLanes; ++lane) {
      sum += squares[lane];
    }
    const float scale = 1.0f / __builtin_sqrtf(sum / static_cast<float>(op.d) + op.eps);
    for (std::int64_t i = 0; i < op.d; i += Simd::kLanes) {
      const Vec v = load<Simd>(x + i, op.d - i), weight = load<Simd>(op.weight + i, op.d - i);
      store<Simd>(op.y + row * op.d + i, v * scale * weight, op.d - i);
    }
  }
}

}  // namespace mlx_server
