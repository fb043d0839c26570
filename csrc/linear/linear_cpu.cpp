#include "linear/linear_cpu.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "common/cpu_info.h"
#include "linear/linear_isa.h"

namespace mlx_server {

namespace {

// Of weights in a tile: enough work for a thread's turn, small enough to balance.
constexpr std::int64_t kDirectTileBytes = 16 * 1024;
// Of dequantized weights: they stay in the L2 cache.
constexpr std::int64_t kPanelBytes = 192 * 1024;

// A thread's scratch memory. It grows to the largest panel or packed x that the thread has seen, both bounded by k.
float* scratch(std::int64_t size) {
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<float[], Free> buffer;
  thread_local std::int64_t capacity = 0;
  if (size > capacity) {
    buffer.reset(new (std::align_val_t{64}) float[size]);
    capacity = size;
  }
  return buffer.get();
}

// Columns in a tile: a multiple of kColumns that fills bytes, at most what gives each thread several tiles.
std::int64_t tile_columns(std::int64_t bytes, std::int64_t bytes_per_column, std::int64_t n, int num_threads) {
  constexpr std::int64_t kTilesPerThread = 4;
  const std::int64_t balanced = n / (num_threads * kTilesPerThread);
  const std::int64_t columns =
      std::min({bytes / std::max<std::int64_t>(bytes_per_column, 1), balanced, std::int64_t{128}});
  return std::max<std::int64_t>(columns / LinearKernels::kColumns, 1) * LinearKernels::kColumns;
}

template <typename Kernel>
void for_each_tile(std::int64_t n, std::int64_t columns, ThreadPool& pool, const Kernel& kernel) {
  pool.parallel_for(static_cast<int>((n + columns - 1) / columns),
                    [&](int tile) { kernel(tile * columns, std::min((tile + 1) * columns, n)); });
}

std::vector<const LinearKernels*> supported_kernels() {
  std::vector<const LinearKernels*> kernels;
#if defined(__x86_64__)
  if (cpu_has_avx512()) {
    kernels.push_back(&kLinearAvx512);
  }
  if (cpu_has_avx2()) {
    kernels.push_back(&kLinearAvx2);
  }
#elif defined(__aarch64__)
  kernels.push_back(&kLinearNeon);
#endif
  kernels.push_back(&kLinearPortable);
  return kernels;
}

}  // namespace

std::span<const LinearKernels* const> linear_kernels() {
  static const std::vector<const LinearKernels*> kernels = supported_kernels();
  return kernels;
}

std::int64_t panel_columns(std::int64_t n, std::int64_t k, int num_threads) {
  return tile_columns(kPanelBytes, k * static_cast<std::int64_t>(sizeof(float)), n, num_threads);
}

void quantized_linear_tile(const QuantizedLinear& op, const LinearKernels& kernels) {
  if (op.bits == 32) {
    kernels.plain(op, 0, op.n);
  } else if (op.rows <= kernels.max_direct_rows) {
    float* packed = scratch(op.rows * op.k);
    kernels.pack(op, packed);
    kernels.direct(op, packed, 0, op.n);
  } else {
    const std::int64_t columns =
        (op.n + LinearKernels::kColumns - 1) / LinearKernels::kColumns * LinearKernels::kColumns;
    kernels.panel(op, scratch(columns * op.k), 0, op.n);
  }
}

void quantized_linear(const QuantizedLinear& op, ThreadPool& pool, const LinearKernels& kernels) {
  if (op.rows == 0 || op.n == 0) {
    return;
  }
  const int threads = pool.num_threads();
  if (op.rows <= kernels.max_direct_rows) {
    float* packed = scratch(op.rows * op.k);
    kernels.pack(op, packed);
    const std::int64_t columns = tile_columns(kDirectTileBytes, op.k * op.bits / 8, op.n, threads);
    for_each_tile(op.n, columns, pool,
                  [&](std::int64_t begin, std::int64_t end) { kernels.direct(op, packed, begin, end); });
  } else {
    const std::int64_t columns = panel_columns(op.n, op.k, threads);
    for_each_tile(op.n, columns, pool, [&](std::int64_t begin, std::int64_t end) {
      kernels.panel(op, scratch(columns * op.k), begin, end);
    });
  }
}

}  // namespace mlx_server
