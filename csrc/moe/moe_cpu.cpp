#include "moe/moe_cpu.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

namespace mlx_server {

namespace {

constexpr std::int64_t kSegmentRows = 128;  // a tile of y, of as many columns at most, stays in the L2 cache
constexpr std::int64_t kRouteChunk = 4096;  // logits for a thread's turn

void score(const float* logits, std::int64_t num_experts, bool softmax, float* scores) {
  if (!softmax) {
    std::transform(logits, logits + num_experts, scores, [](float x) { return 1.0f / (1.0f + std::exp(-x)); });
    return;
  }
  const float largest = *std::max_element(logits, logits + num_experts);
  double sum = 0;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    scores[e] = std::exp(logits[e] - largest);
    sum += scores[e];
  }
  if (std::isnan(sum)) {
    std::fill_n(scores, num_experts, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const auto scale = static_cast<float>(1 / sum);
  std::for_each(scores, scores + num_experts, [scale](float& s) { s *= scale; });
}

void route_token(const Route& op, std::int64_t token) {
  thread_local std::vector<float> scores;
  thread_local std::vector<std::uint64_t> keys;
  scores.resize(static_cast<std::size_t>(op.num_experts));
  keys.resize(scores.size());
  score(op.logits + token * op.num_experts, op.num_experts, op.softmax, scores.data());
  // Scores are not negative, so that their bits order them: the smallest key is the largest score with the lowest id.
  for (std::size_t e = 0; e < keys.size(); ++e) {
    keys[e] = std::uint64_t{~std::bit_cast<std::uint32_t>(scores[e])} << 32 | e;
  }
  std::partial_sort(keys.begin(), keys.begin() + op.top_k, keys.end());
  float sum = 0;
  for (std::int64_t j = 0; j < op.top_k; ++j) {
    const auto expert = static_cast<std::uint32_t>(keys[static_cast<std::size_t>(j)]);
    op.experts[token * op.top_k + j] = static_cast<std::int32_t>(expert);
    op.weights[token * op.top_k + j] = scores[expert];
    sum += scores[expert];
  }
  for (std::int64_t j = 0; op.normalize && j < op.top_k; ++j) {
    op.weights[token * op.top_k + j] /= sum;
  }
}

// Rows [begin, begin + rows) of the hidden features: tokens that one expert computes.
struct Segment {
  std::int64_t expert, begin, rows;
};

// The pairs (token, j), ordered by expert, then by token: one row of hidden features each.
struct Rows {
  std::vector<std::int32_t> tokens;
  std::vector<float> weights;
  std::vector<Segment> segments;
};

Rows group_by_expert(const MoeMlp& op) {
  const std::int64_t num_rows = op.tokens * op.top_k;
  std::vector<std::int64_t> next(static_cast<std::size_t>(op.num_experts) + 1);  // of each expert: its next free row
  for (std::int64_t i = 0; i < num_rows; ++i) {
    ++next[static_cast<std::size_t>(op.experts[i]) + 1];
  }
  Rows rows;
  for (std::int64_t e = 0; e < op.num_experts; ++e) {
    const std::int64_t begin = next[static_cast<std::size_t>(e)];
    const std::int64_t end = next[static_cast<std::size_t>(e) + 1] += begin;
    for (std::int64_t row = begin; row < end; row += kSegmentRows) {
      rows.segments.push_back({e, row, std::min(kSegmentRows, end - row)});
    }
  }
  rows.tokens.resize(static_cast<std::size_t>(num_rows));
  rows.weights.resize(static_cast<std::size_t>(num_rows));
  for (std::int64_t i = 0; i < num_rows; ++i) {
    const auto row = static_cast<std::size_t>(next[static_cast<std::size_t>(op.experts[i])]++);
    rows.tokens[row] = static_cast<std::int32_t>(i / op.top_k);
    rows.weights[row] = op.weights[i];
  }
  return rows;
}

// A thread's scratch memory for tiles of y.
float* tiles(std::int64_t size) {
  thread_local std::vector<float> memory;
  if (static_cast<std::size_t>(size) > memory.size()) {
    memory.resize(static_cast<std::size_t>(size));
  }
  return memory.data();
}

// y [rows, end - begin]: the segment's rows of x times rows [begin, end) of its expert's matrix, which has n.
void expert_tile(const float* x, const std::int32_t* x_rows, const Segment& segment, const LinearWeights& matrix,
                 std::int64_t n, std::int64_t begin, std::int64_t end, float* y, const LinearKernels& kernels) {
  const std::int64_t first = segment.expert * n;
  quantized_linear_tile(
      {.x = x, .w = matrix.rows(first + begin, first + end), .y = y, .rows = segment.rows, .x_rows = x_rows}, kernels);
}

// Columns [begin, end) of a segment's rows of hidden = silu(gate(x)) * up(x)
void hidden_tile(const MoeMlp& op, const Rows& rows, const Segment& segment, std::int64_t begin, std::int64_t end,
                 const LinearKernels& linear, const ElementwiseKernels& elementwise) {
  const std::int64_t columns = end - begin;
  float* gate = tiles(2 * segment.rows * columns);
  float* up = gate + segment.rows * columns;
  const std::int32_t* tokens = rows.tokens.data() + segment.begin;
  expert_tile(op.x, tokens, segment, op.gate, op.hidden_features(), begin, end, gate, linear);
  expert_tile(op.x, tokens, segment, op.up, op.hidden_features(), begin, end, up, linear);
  for (std::int64_t row = 0; row < segment.rows; ++row) {
    elementwise.silu_mul({.gate = gate + row * columns,
                          .up = up + row * columns,
                          .y = op.hidden + (segment.begin + row) * op.hidden_features() + begin,
                          .rows = 1,
                          .size = columns,
                          .stride = columns});
  }
}

// Columns [begin, end) of y. One thread adds up all experts: no two write to one place.
void output_tile(const MoeMlp& op, const Rows& rows, std::int64_t begin, std::int64_t end,
                 const LinearKernels& linear) {
  const std::int64_t columns = end - begin, d = op.d();
  for (std::int64_t token = 0; token < op.tokens; ++token) {
    float* y = op.y + token * d + begin;
    if (op.shared == nullptr) {
      std::fill_n(y, columns, 0.0f);
    } else {
      std::copy_n(op.shared + token * d + begin, columns, y);
    }
  }
  float* tile = tiles(kSegmentRows * columns);
  for (const Segment& segment : rows.segments) {
    expert_tile(op.hidden + segment.begin * op.down.k, nullptr, segment, op.down, d, begin, end, tile, linear);
    for (std::int64_t row = 0; row < segment.rows; ++row) {
      const auto i = static_cast<std::size_t>(segment.begin + row);
      float* y = op.y + rows.tokens[i] * d + begin;
      for (std::int64_t column = 0; column < columns; ++column) {
        y[column] += rows.weights[i] * tile[row * columns + column];
      }
    }
  }
}

}  // namespace

void route(const Route& op, ThreadPool& pool) {
  const std::int64_t step = std::max<std::int64_t>(kRouteChunk / op.num_experts, 1);
  pool.parallel_for(static_cast<int>((op.tokens + step - 1) / step), [&](int chunk) {
    for (std::int64_t token = chunk * step; token < std::min((chunk + 1) * step, op.tokens); ++token) {
      route_token(op, token);
    }
  });
}

void moe_mlp(const MoeMlp& op, ThreadPool& pool, const LinearKernels& linear, const ElementwiseKernels& elementwise) {
  const Rows rows = group_by_expert(op);
  const auto num_segments = static_cast<std::int64_t>(rows.segments.size());
  const std::int64_t n = op.hidden_features(), d = op.d();

  const std::int64_t hidden_columns = panel_columns(n * num_segments, op.gate.k, pool.num_threads());
  const std::int64_t tiles_per_segment = (n + hidden_columns - 1) / hidden_columns;
  pool.parallel_for(static_cast<int>(num_segments * tiles_per_segment), [&](int tile) {
    const std::int64_t begin = tile % tiles_per_segment * hidden_columns;
    hidden_tile(op, rows, rows.segments[static_cast<std::size_t>(tile / tiles_per_segment)], begin,
                std::min(begin + hidden_columns, n), linear, elementwise);
  });

  const std::int64_t columns = panel_columns(d, op.down.k, pool.num_threads());
  pool.parallel_for(static_cast<int>((d + columns - 1) / columns), [&](int tile) {
    output_tile(op, rows, tile * columns, std::min((tile + 1) * columns, d), linear);
  });
}

}  // namespace mlx_server
