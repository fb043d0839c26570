#include <mlx/ops.h>

#include "kernel_sources.h"
#include "kernels/kernel_use.h"
#include "kernels/launch.h"
#include "sampling/sample_row.h"
#include "sampling/sampling.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr int kChunk = 2048;  // CHUNK of sampling_adjust

// An array that the kernel may read, whatever its size.
mx::array not_empty(const mx::array& a, mx::Stream s) { return a.size() > 0 ? a : mx::zeros({8}, a.dtype(), s); }

}  // namespace

Sampled sample_gpu(const SampleInputs& in, mx::Stream s) {
  const int batch_size = in.logits.shape(0), vocab_size = in.logits.shape(1);
  const bool is_adjusted = in.masks.size() + in.bias_ids.size() + in.history.size() > 0;
  if (!are_enabled({"sampling_choose"}) || (is_adjusted && !are_enabled({"sampling_adjust"}))) {
    return sample_fallback(in, s);
  }
  mx::array logits = in.logits;
  if (is_adjusted) {
    logits = launch(kernel_sources::sampling_adjust,
                    {.inputs = {in.logits, in.rows, not_empty(in.masks, s), not_empty(in.bias_ids, s),
                                not_empty(in.bias_values, s), not_empty(in.history, s), not_empty(in.breakers, s)},
                     .output_shapes = {in.logits.shape()},
                     .output_dtypes = {mx::float32},
                     .constants = {{"T", in.logits.dtype()}},
                     .groups = {(vocab_size + kChunk - 1) / kChunk, batch_size, 1},
                     .threads = 256},
                    s)[0];
  }
  const mx::Shape top_shape{batch_size, kMaxTopLogprobs};
  // 512 threads: with more, a thread has too few registers.
  const auto out = launch(kernel_sources::sampling_choose,
                          {.inputs = {in.logits, logits, in.rows},
                           .output_shapes = {{batch_size}, {batch_size}, top_shape, top_shape},
                           .output_dtypes = {mx::uint32, mx::float32, mx::uint32, mx::float32},
                           .constants = {{"T", in.logits.dtype()}, {"X", logits.dtype()}},
                           .groups = {batch_size, 1, 1},
                           .threads = 512},
                          s);
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace mlx_server
