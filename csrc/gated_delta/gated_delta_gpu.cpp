// Rows of few tokens take one launch, gated_delta_step; all rows in the batch-invariant mode. Prompts take three:
// gated_delta_conv, then gated_delta_chunk for all chunks at once, then gated_delta_scan, which carries the states
// through the chunks.
#include "gated_delta/gated_delta_gpu.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <mlx/ops.h>

#include "common/write_rows.h"
#include "kernel_sources.h"
#include "kernels/kernel_use.h"
#include "kernels/launch.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr int kChunk = 64;     // tokens, as in the kernels
constexpr int kFewTokens = 8;  // up to here one by one is faster
constexpr int kMaxChunkedKeyDim = 128;

using Outputs = std::tuple<mx::array, mx::array, mx::array>;
using Constants = std::vector<std::pair<std::string, mx::fast::TemplateArg>>;

// [N, columns]; padded to 8 numbers, so that MLX does not compile another kernel for less (kernels/README.md).
mx::array make_table(std::vector<int> values, int columns) {
  while (values.size() < 8 || static_cast<int>(values.size()) % columns != 0) {
    values.push_back(0);
  }
  return mx::array(values.data(), {static_cast<int>(values.size()) / columns, columns}, mx::int32);
}

// Rows of the batch that take the same way, R of them in N chunks.
struct Rows {
  int num_rows, num_chunks;
  mx::array places;  // [R], in the batch
  mx::array rows;    // [R, 5]: place, first token, number of tokens, whether the row is fresh, first chunk
  mx::array chunks;  // [N, 3]: row, first token, number of tokens
};

Rows make_rows(const GatedDeltaInputs& in, const std::vector<bool>& is_wanted) {
  std::vector<int> places, rows, chunks;
  int first = 0;
  for (std::size_t b = 0; b < in.query_lens.size(); first += in.query_lens[b++]) {
    if (is_wanted[b]) {
      const int row = static_cast<int>(places.size()), n = in.query_lens[b];
      places.push_back(static_cast<int>(b));
      rows.insert(rows.end(), {places.back(), first, n, in.fresh[b], static_cast<int>(chunks.size() / 3)});
      for (int t = 0; t < n; t += kChunk) {
        chunks.insert(chunks.end(), {row, first + t, std::min(n - t, kChunk)});
      }
    }
  }
  const int num_rows = static_cast<int>(places.size());
  return {num_rows, static_cast<int>(chunks.size() / 3), mx::array(places.data(), {num_rows}, mx::int32),
          make_table(rows, 5), make_table(chunks, 3)};
}

struct Plan {
  std::vector<int> query_lens;
  std::vector<bool> fresh;
  bool can_chunk;
  Rows few, many;         // rows of few tokens and of many
  mx::array is_few_rows;  // bool [T, 1, 1], the token's row
};

Plan make_plan(const GatedDeltaInputs& in, bool can_chunk) {
  std::vector<bool> few, many;
  std::vector<char> tokens;
  for (const int n : in.query_lens) {
    few.push_back(!can_chunk || n <= kFewTokens);
    many.push_back(!few.back());
    tokens.insert(tokens.end(), static_cast<std::size_t>(n), few.back());
  }
  const mx::array is_few(tokens.data(), {static_cast<int>(tokens.size()), 1, 1}, mx::bool_);
  return {in.query_lens, in.fresh, can_chunk, make_rows(in, few), make_rows(in, many), is_few};
}

// The plan is the same for all layers of a step, and for all steps of plain decoding. CUDA moves what the host has
// written when a kernel first reads it, which takes longer than a decode.
const Plan& plan_of(const GatedDeltaInputs& in) {
  static thread_local std::optional<Plan> last;
  const bool can_chunk = !is_batch_invariant() && in.key_head_dim <= kMaxChunkedKeyDim && in.key_head_dim % 16 == 0 &&
                         in.state.shape(2) % 4 == 0 &&
                         are_enabled({"gated_delta_conv", "gated_delta_chunk", "gated_delta_scan"});
  if (!last || last->query_lens != in.query_lens || last->fresh != in.fresh || last->can_chunk != can_chunk) {
    last.emplace(make_plan(in, can_chunk));
  }
  return *last;
}

Constants constants(const GatedDeltaInputs& in) {
  return {{"T", in.qkv.dtype()},           {"C", in.conv_state.dtype()}, {"TAPS", in.conv_weight.shape(1)},
          {"KEY_HEADS", in.num_key_heads}, {"KEY_DIM", in.key_head_dim}, {"VALUE_HEADS", in.state.shape(1)},
          {"VALUE_DIM", in.state.shape(2)}};
}

// conv_state with the rows' new values [R, K - 1, C].
mx::array write_conv_state(const GatedDeltaInputs& in, const Rows& rows, const mx::array& values, mx::Stream s) {
  const bool is_all = rows.num_rows == in.slots.shape(0);
  return write_rows(in.conv_state, is_all ? in.slots : mx::take(in.slots, rows.places, 0, s), values, s);
}

// The state after a kernel that has updated it in place, which would be half of a decode's traffic otherwise. MLX has
// not seen that; writing one row [1, Dk] of it again, values that the kernel hands out, tells it what later reads wait
// for.
mx::array updated_state(const mx::array& state, const mx::array& row, const mx::array& values, mx::Stream s) {
  const mx::array all_rows = mx::reshape(state, {-1, state.shape(3)}, s);
  return mx::reshape(write_rows(all_rows, row, values, s), state.shape(), s);
}

Outputs steps(const GatedDeltaInputs& in, const Rows& rows, mx::Stream s) {
  constexpr int kThreads = 128, kValues = kThreads / 4;
  const int num_tokens = in.qkv.shape(0), channels = in.qkv.shape(1), history = in.conv_state.shape(1);
  const int heads = in.state.shape(1), value_dim = in.state.shape(2);
  const auto out = launch(
      kernel_sources::gated_delta_step,
      {.inputs = {in.qkv, in.conv_weight, in.a, in.b, in.a_log, in.dt_bias, in.conv_state, in.state, in.slots,
                  rows.rows},
       .output_shapes = {{num_tokens, heads, value_dim}, {rows.num_rows, history, channels}, {1}, {1, in.key_head_dim}},
       .output_dtypes = {in.qkv.dtype(), in.conv_state.dtype(), mx::int32, mx::float32},
       .constants = constants(in),
       .groups = {(value_dim + kValues - 1) / kValues, heads, rows.num_rows},
       .threads = kThreads},
      s);
  return {out[0], write_conv_state(in, rows, out[1], s), updated_state(in.state, out[2], out[3], s)};
}

Outputs chunks(const GatedDeltaInputs& in, const Rows& rows, mx::Stream s) {
  constexpr int kConvThreads = 128, kThreads = 256, kValues = 32;
  const int num_tokens = in.qkv.shape(0), channels = in.qkv.shape(1), history = in.conv_state.shape(1);
  const int heads = in.state.shape(1), value_dim = in.state.shape(2), key_dim = in.key_head_dim, n = rows.num_chunks;
  const auto conv = launch(kernel_sources::gated_delta_conv,
                           {.inputs = {in.qkv, in.conv_weight, in.conv_state, in.slots, rows.rows, rows.chunks},
                            .output_shapes = {{num_tokens, channels}, {rows.num_rows, history, channels}},
                            .output_dtypes = {mx::float32, in.conv_state.dtype()},
                            .constants = constants(in),
                            .groups = {2 * in.num_key_heads + heads, n, 1},
                            .threads = kConvThreads},
                           s);
  const auto parts = launch(
      kernel_sources::gated_delta_chunk,
      {.inputs = {conv[0], in.a, in.b, in.a_log, in.dt_bias, rows.chunks},
       .output_shapes = {{n, heads, 3 * kChunk * key_dim + kChunk * kChunk}, {n, heads, kChunk, value_dim}, {n, heads}},
       .output_dtypes = std::vector<mx::Dtype>(3, mx::float32),
       .constants = constants(in),
       .groups = {heads, n, 1},
       .threads = kThreads},
      s);
  const auto scan = launch(kernel_sources::gated_delta_scan,
                           {.inputs = {parts[0], parts[1], parts[2], in.state, in.slots, rows.rows},
                            .output_shapes = {{num_tokens, heads, value_dim}, {1}, {1, key_dim}},
                            .output_dtypes = {in.qkv.dtype(), mx::int32, mx::float32},
                            .constants = constants(in),
                            .groups = {(value_dim + kValues - 1) / kValues, heads, rows.num_rows},
                            .threads = kThreads},
                           s);
  return {scan[0], write_conv_state(in, rows, conv[1], s), updated_state(in.state, scan[1], scan[2], s)};
}

}  // namespace

Outputs gated_delta_gpu(const GatedDeltaInputs& given, mx::Stream s) {
  GatedDeltaInputs in = given;
  in.state = mx::contiguous(in.state, /*allow_col_major=*/false, s);  // else a kernel would get, and update, a copy
  const Plan& plan = plan_of(in);
  if (plan.few.num_rows > 0 && !are_enabled({"gated_delta_step"})) {
    return gated_delta_fallback(in, s);
  }
  if (plan.many.num_rows == 0) {
    return steps(in, plan.few, s);
  }
  if (plan.few.num_rows == 0) {
    return chunks(in, plan.many, s);
  }
  const auto [few_y, conv_state, state] = steps(in, plan.few, s);
  in.conv_state = conv_state;
  in.state = state;
  const auto [many_y, new_conv_state, new_state] = chunks(in, plan.many, s);
  return {mx::where(plan.is_few_rows, few_y, many_y, s), new_conv_state, new_state};
}

}  // namespace mlx_server
