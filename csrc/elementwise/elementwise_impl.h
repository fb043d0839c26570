// The kernels, written once; each instruction set's file includes and compiles them.
#pragma once

#include "common/simd.h"
#include "elementwise/elementwise_cpu.h"

namespace mlx_server {

namespace {

constexpr int kVector = static_cast<int>(kLanes);

// Vectors up to the end of an array: of the last one only the lanes inside are read and written; the others are 0.
inline void load_part(Floats& v, const float* p, std::int64_t count) {
  if (count >= kVector) {
    load(v, p);
  } else {
    v = Floats{};
    std::memcpy(&v, p, static_cast<std::size_t>(count) * sizeof(float));
  }
}

inline void store_part(float* p, const Floats& v, std::int64_t count) {
  if (count >= kVector) {
    store(p, v);
  } else {
    std::memcpy(p, &v, static_cast<std::size_t>(count) * sizeof(float));
  }
}

void silu_mul_kernel(const SiluMul& op) {
  for (std::int64_t i = 0; i < op.size; i += kVector) {
    Floats gate, up;
    load_part(gate, op.gate + i, op.size - i);
    load_part(up, op.up + i, op.size - i);
    // sigmoid(x) is 1 / (1 + e^-x), and e^x / (1 + e^x), which can't overflow, where x is negative.
    const Ints is_negative = gate < 0;
    Floats e = is_negative ? gate : -gate;
    exp_of(e);
    const Floats numerator = is_negative ? e : Floats{} + 1.0f;
    store_part(op.y + i, gate * (numerator / (e + 1.0f)) * up, op.size - i);
  }
}

void rms_norm_kernel(const RmsNorm& op) {
  for (std::int64_t row = 0; row < op.rows; ++row) {
    const float* x = op.x + row * op.d;
    float* y = op.y + row * op.d;
    Floats squares{};
    for (std::int64_t i = 0; i < op.d; i += kVector) {
      Floats v;
      load_part(v, x + i, op.d - i);
      squares += v * v;
    }
    float sum = 0;
    for (int lane = 0; lane < kVector; ++lane) {
      sum += squares[lane];
    }
    const float scale = 1.0f / __builtin_sqrtf(sum / static_cast<float>(op.d) + op.eps);
    for (std::int64_t i = 0; i < op.d; i += kVector) {
      Floats v, weight;
      load_part(v, x + i, op.d - i);
      load_part(weight, op.weight + i, op.d - i);
      store_part(y + i, v * scale * weight, op.d - i);
    }
  }
}

}  // namespace

}  // namespace mlx_server
