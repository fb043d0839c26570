// The kernels, written once; each instruction set's file includes and compiles them.
#pragma once

#include "common/simd.h"
#include "elementwise/elementwise_cpu.h"

namespace mlx_server {

namespace {

constexpr int kVector = static_cast<int>(kLanes);
constexpr float kGeluScale = 1.5957691216f, kGeluCube = 0.044715f;  // sqrt(8 / pi)

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

// x = 1 / (1 + e^-x), or e^x / (1 + e^x), which can't overflow, where x is negative.
inline void sigmoid_of(Floats& x) {
  const Ints is_negative = x < 0;
  Floats e = is_negative ? x : -x;
  exp_of(e);
  const Floats numerator = is_negative ? e : Floats{} + 1.0f;
  x = numerator / (e + 1.0f);
}

void silu_mul_kernel(const GatedMul& op) {
  for (std::int64_t i = 0; i < op.size; i += kVector) {
    Floats gate, up;
    load_part(gate, op.gate + i, op.size - i);
    load_part(up, op.up + i, op.size - i);
    Floats share = gate;
    sigmoid_of(share);
    store_part(op.y + i, gate * share * up, op.size - i);
  }
}

void gelu_mul_kernel(const GatedMul& op) {
  for (std::int64_t i = 0; i < op.size; i += kVector) {
    Floats gate, up;
    load_part(gate, op.gate + i, op.size - i);
    load_part(up, op.up + i, op.size - i);
    // (1 + tanh(x)) / 2 is sigmoid(2 * x).
    Floats share = gate * (gate * gate * (kGeluScale * kGeluCube) + kGeluScale);
    sigmoid_of(share);
    store_part(op.y + i, gate * share * up, op.size - i);
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
