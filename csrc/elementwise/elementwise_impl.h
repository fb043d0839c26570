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

// inner(gate, x): turns a copy x of the gate into what its sigmoid is taken of.
template <typename Inner>
inline void gated_mul(const GatedMul& op, const Inner& inner) {
  for (std::int64_t row = 0; row < op.rows; ++row) {
    for (std::int64_t i = 0; i < op.size; i += kVector) {
      Floats gate, up;
      load_part(gate, op.gate + row * op.stride + i, op.size - i);
      load_part(up, op.up + row * op.stride + i, op.size - i);
      Floats share = gate;
      inner(gate, share);
      sigmoid_of(share);
      store_part(op.y + row * op.size + i, gate * share * up, op.size - i);
    }
  }
}

void silu_mul_kernel(const GatedMul& op) {
  gated_mul(op, [](const Floats&, Floats&) {});
}

void gelu_mul_kernel(const GatedMul& op) {
  gated_mul(op, [](const Floats& gate, Floats& x) {
    x = gate * (gate * gate * (kGeluScale * kGeluCube) + kGeluScale);  // (1 + tanh(x)) / 2 is sigmoid(2 * x)
  });
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

// A head x [d], normalised if `norm` [d] is not null, and turned -> y [d]
inline void turn_head(const QkvRope& op, const float* x, const float* norm, const float* cosines, const float* sines,
                      float* y) {
  if (norm != nullptr) {
    rms_norm_kernel({x, norm, y, 1, op.d, op.eps});
    x = y;
  }
  for (std::int64_t i = 0; i < op.half; i += kVector) {
    const std::int64_t count = op.half - i;
    Floats a, b, cosine, sine;
    load_part(a, x + i, count);
    load_part(b, x + op.half + i, count);
    load_part(cosine, cosines + i, count);
    load_part(sine, sines + i, count);
    store_part(y + i, a * cosine - b * sine, count);
    store_part(y + op.half + i, a * sine + b * cosine, count);
  }
  if (x != y) {
    std::memcpy(y + 2 * op.half, x + 2 * op.half, static_cast<std::size_t>(op.d - 2 * op.half) * sizeof(float));
  }
}

void qkv_rope_kernel(const QkvRope& op, std::int64_t token, const float* cosines, const float* sines) {
  const std::int64_t q_stride = op.gated ? 2 * op.d : op.d, kv_size = op.kv_heads * op.d;
  const float* x = op.x + token * op.token_stride;
  for (std::int64_t head = 0; head < op.heads; ++head, x += q_stride) {
    turn_head(op, x, op.norms, cosines, sines, op.q + (token * op.heads + head) * op.d);
  }
  for (std::int64_t head = 0; head < op.kv_heads; ++head, x += op.d) {
    turn_head(op, x, op.norms == nullptr ? nullptr : op.norms + op.d, cosines, sines,
              op.k + token * kv_size + head * op.d);
  }
  std::memcpy(op.v + token * kv_size, x, static_cast<std::size_t>(kv_size) * sizeof(float));
}

}  // namespace

}  // namespace mlx_server
