#include "linear/linear_cpu.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "common/cpu_info.h"
#include "linear/linear_isa.h"

namespace mlx_server {

namespace {

// Of weights in a tile: enough work for a thread's turn, small enough to balance.
constexpr std::int64_t kDirectTileBytes = 16 * 1024;
// Of x: it stays in the L1 cache, beside weights that pass through.
constexpr std::int64_t kNearBytes = 24 * 1024;
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

bool is_direct(const QuantizedLinear& op, const LinearKernels& kernels) {
  const bool is_near = op.rows * op.w.k * static_cast<std::int64_t>(sizeof(float)) <= kNearBytes;
  return op.rows <= (is_near ? kernels.max_near_rows : kernels.max_direct_rows);
}

template <typename Kernel>
void for_each_tile(std::int64_t n, std::int64_t columns, ThreadPool& pool, const Kernel& kernel) {
  pool.parallel_for(static_cast<int>((n + columns - 1) / columns),
                    [&](int tile) { kernel(tile * columns, std::min((tile + 1) * columns, n)); });
}

// Floats of 8 bits with 3 of mantissa, as mx.quantize writes them.
constexpr CodeValues e4m3_values(float nan) {
  CodeValues values{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    float value = static_cast<float>(exponent == 0 ? mantissa : mantissa + 8) / 512;  // a unit is 2^-9
    for (int i = 1; i < exponent; ++i) {
      value *= 2;
    }
    value = (code & 127) == 127 ? nan : value;
    values.of[code] = code < 128 ? value : -value;
  }
  return values;
}

// Powers of two from 2^-127 on; the last code is NaN's, which MLX takes for infinity.
constexpr CodeValues e8m0_values() {
  CodeValues values{{std::bit_cast<float>(std::uint32_t{1} << 22)}};
  for (std::uint32_t code = 1; code < 256; ++code) {
    values.of[code] = std::bit_cast<float>(code << 23);
  }
  return values;
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

constinit const float kE2m1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
constinit const CodeValues kE4m3 = e4m3_values(480);
constinit const CodeValues kE4m3Scales = e4m3_values(std::numeric_limits<float>::quiet_NaN());
constinit const CodeValues kE8m0Scales = e8m0_values();

LinearWeights LinearWeights::rows(std::int64_t begin, std::int64_t end) const {
  LinearWeights w = *this;
  w.n = end - begin;
  w.weight += begin * k * bits / 8;
  if (is_plain()) {
    return w;
  }
  const std::int64_t first_group = begin * (k / group_size);
  if (scale_codes != nullptr) {
    w.scale_codes += first_group;
  } else {
    w.scales += first_group;
    w.biases += first_group;
  }
  return w;
}

std::span<const LinearKernels* const> linear_kernels() {
  static const std::vector<const LinearKernels*> kernels = supported_kernels();
  return kernels;
}

std::int64_t panel_columns(std::int64_t n, std::int64_t k, int num_threads) {
  return tile_columns(kPanelBytes, k * static_cast<std::int64_t>(sizeof(float)), n, num_threads);
}

void quantized_linear_tile(const QuantizedLinear& op, const LinearKernels& kernels) {
  if (op.w.is_plain()) {
    kernels.plain(op, 0, op.w.n);
  } else if (is_direct(op, kernels)) {
    float* packed = scratch(op.rows * op.w.k);
    kernels.pack(op, packed);
    kernels.direct(op, packed, 0, op.w.n);
  } else {
    const std::int64_t columns =
        (op.w.n + LinearKernels::kColumns - 1) / LinearKernels::kColumns * LinearKernels::kColumns;
    kernels.panel(op, scratch(columns * op.w.k), 0, op.w.n);
  }
}

void quantized_linear(const QuantizedLinear& op, ThreadPool& pool, const LinearKernels& kernels) {
  if (op.rows == 0 || op.w.n == 0) {
    return;
  }
  const int threads = pool.num_threads();
  if (op.w.is_plain()) {
    for_each_tile(op.w.n, panel_columns(op.w.n, op.w.k, threads), pool,
                  [&](std::int64_t begin, std::int64_t end) { kernels.plain(op, begin, end); });
  } else if (is_direct(op, kernels)) {
    float* packed = scratch(op.rows * op.w.k);
    kernels.pack(op, packed);
    const std::int64_t columns = tile_columns(kDirectTileBytes, op.w.k * op.w.bits / 8, op.w.n, threads);
    for_each_tile(op.w.n, columns, pool,
                  [&](std::int64_t begin, std::int64_t end) { kernels.direct(op, packed, begin, end); });
  } else {
    const std::int64_t columns = panel_columns(op.w.n, op.w.k, threads);
    for_each_tile(op.w.n, columns, pool, [&](std::int64_t begin, std::int64_t end) {
      kernels.panel(op, scratch(columns * op.w.k), begin, end);
    });
  }
}

}  // namespace mlx_server
