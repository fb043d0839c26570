#include "elementwise/elementwise_cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/cpu_info.h"

namespace mlx_server {

namespace {

constexpr std::int64_t kChunk = 16 * 1024;  // elements for a thread's turn: some 5 microseconds

// Calls body(begin, end) for parts of [0, size) of about kChunk elements, `width` of them to each index.
template <typename Body>
void for_each_chunk(std::int64_t size, std::int64_t width, ThreadPool& pool, const Body& body) {
  const std::int64_t step = std::max<std::int64_t>(kChunk / std::max<std::int64_t>(width, 1), 1);
  pool.parallel_for(static_cast<int>((size + step - 1) / step),
                    [&](int chunk) { body(chunk * step, std::min((chunk + 1) * step, size)); });
}

// cosines and sines: [half]
void rotate_token(const Rope& op, std::int64_t token, const float* cosines, const float* sines) {
  // Pair i of a head is (first + i * step, second + i * step).
  const std::int64_t step = op.traditional ? 2 : 1, second = op.traditional ? 1 : op.half;
  for (std::int64_t head = 0; head < op.heads; ++head) {
    const float* x = op.x + token * op.token_stride + head * op.d;
    float* y = op.y + (token * op.heads + head) * op.d;
    for (std::int64_t i = 0; i < op.half; ++i) {
      const float a = x[i * step], b = x[i * step + second];
      y[i * step] = a * cosines[i] - b * sines[i];
      y[i * step + second] = a * sines[i] + b * cosines[i];
    }
    std::copy(x + 2 * op.half, x + op.d, y + 2 * op.half);
  }
}

}  // namespace

std::span<const ElementwiseKernels* const> elementwise_kernels() {
#if defined(__x86_64__)
  static const ElementwiseKernels* const all[] = {&kElementwiseAvx2, &kElementwisePortable};
  return std::span(all).subspan(cpu_has_avx2() ? 0 : 1);
#else
  static const ElementwiseKernels* const all[] = {&kElementwisePortable};
  return all;
#endif
}

void rms_norm(const RmsNorm& op, ThreadPool& pool, const ElementwiseKernels& kernels) {
  for_each_chunk(op.rows, op.d, pool, [&](std::int64_t begin, std::int64_t end) {
    kernels.rms_norm({op.x + begin * op.d, op.weight, op.y + begin * op.d, end - begin, op.d, op.eps});
  });
}

void silu_mul(const GatedMul& op, ThreadPool& pool, const ElementwiseKernels& kernels) {
  for_each_chunk(op.size, 1, pool, [&](std::int64_t begin, std::int64_t end) {
    kernels.silu_mul({op.gate + begin, op.up + begin, op.y + begin, end - begin});
  });
}

void gelu_mul(const GatedMul& op, ThreadPool& pool, const ElementwiseKernels& kernels) {
  for_each_chunk(op.size, 1, pool, [&](std::int64_t begin, std::int64_t end) {
    kernels.gelu_mul({op.gate + begin, op.up + begin, op.y + begin, end - begin});
  });
}

void rope(const Rope& op, ThreadPool& pool) {
  for_each_chunk(op.tokens, op.heads * op.d, pool, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> cosines(static_cast<std::size_t>(op.half)), sines(cosines.size());
    for (std::int64_t token = begin; token < end; ++token) {
      for (std::int64_t i = 0; i < op.half; ++i) {
        const float angle = static_cast<float>(op.positions[token]) / op.freqs[i];
        cosines[static_cast<std::size_t>(i)] = std::cos(angle);
        sines[static_cast<std::size_t>(i)] = std::sin(angle);
      }
      rotate_token(op, token, cosines.data(), sines.data());
    }
  });
}

}  // namespace mlx_server
