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

using GatedMulKernel = void (*)(const GatedMul& op);

// Rows are shared out, and parts of one where there is no other.
void gated_mul(const GatedMul& op, ThreadPool& pool, GatedMulKernel kernel) {
  if (op.rows == 1) {
    for_each_chunk(op.size, 1, pool, [&](std::int64_t begin, std::int64_t end) {
      kernel({op.gate + begin, op.up + begin, op.y + begin, 1, end - begin, op.stride});
    });
    return;
  }
  for_each_chunk(op.rows, op.size, pool, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t first = begin * op.stride;
    kernel({op.gate + first, op.up + first, op.y + begin * op.size, end - begin, op.size, op.stride});
  });
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
  gated_mul(op, pool, kernels.silu_mul);
}

void gelu_mul(const GatedMul& op, ThreadPool& pool, const ElementwiseKernels& kernels) {
  gated_mul(op, pool, kernels.gelu_mul);
}

void qkv_rope(const QkvRope& op, ThreadPool& pool, const ElementwiseKernels& kernels) {
  for_each_chunk(op.tokens, (op.heads + 2 * op.kv_heads) * op.d, pool, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> cosines(static_cast<std::size_t>(op.half)), sines(cosines.size());
    for (std::int64_t token = begin; token < end; ++token) {
      for (std::size_t i = 0; i < cosines.size(); ++i) {
        const float angle = static_cast<float>(op.positions[token]) / op.freqs[i];
        cosines[i] = std::cos(angle) * op.length_factor;
        sines[i] = std::sin(angle) * op.length_factor;
      }
      kernels.qkv_rope(op, token, cosines.data(), sines.data());
    }
  });
}

}  // namespace mlx_server
