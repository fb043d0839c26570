// The attention kernel, written once; each instruction set's file includes and compiles it.
//
// Keys are taken in chunks that stay in the L1 cache while all queries of a tile pass over them, with an online softmax
// (Milakov and Gimelshein 2018). Splits and chunks end at fixed positions and each query is computed on its own, so its
// result depends neither on the batch nor on how a prompt was cut.
#pragma once

#include <algorithm>
#include <limits>

#include "common/simd.h"
#include "paged_attention/paged_attention_cpu.h"

namespace mlx_server {

namespace {

constexpr int kVector = static_cast<int>(kLanes);
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Where the keys and values of one chunk lie: the only thing that knows of blocks.
struct Chunk {
  int size;
  const float* keys[kChunkSize + kVector - 1];
  const float* values[kChunkSize];
};

// A row of `rows`, made of integers in `scratch` if it is not there as floats.
inline const float* float_row(const CachedRows& rows, std::ptrdiff_t row, int head_dim, float* __restrict scratch) {
  if (rows.floats != nullptr) {
    return rows.floats + row * head_dim;
  }
  const std::int8_t* integers = rows.integers + row * head_dim;
  const float scale = rows.scales[row];
  // A plain loop: GCC converts vectors of 8 bytes element by element.
  for (int d = 0; d < head_dim; ++d) {
    scratch[d] = static_cast<float>(integers[d]) * scale;
  }
  return scratch;
}

// scratch [2 * kChunkSize, D]
inline void locate(const PagedAttention& op, const AttentionTile& tile, int begin, int end, float* scratch,
                   Chunk& chunk) {
  const std::int32_t* table = op.block_tables + static_cast<std::ptrdiff_t>(tile.row) * op.max_blocks;
  chunk.size = end - begin;
  for (int i = 0; i < chunk.size; ++i) {
    const int position = begin + i;
    const std::ptrdiff_t slot =
        static_cast<std::ptrdiff_t>(table[position / op.block_size]) * op.block_size + position % op.block_size;
    const std::ptrdiff_t row = slot * op.num_kv_heads + tile.kv_head;
    chunk.keys[i] = float_row(op.keys, row, op.head_dim, scratch + i * op.head_dim);
    chunk.values[i] = float_row(op.values, row, op.head_dim, scratch + (kChunkSize + i) * op.head_dim);
  }
  // Scores are computed kVector at a time; what is too much repeats the last key and is dropped.
  for (int i = chunk.size; i < chunk.size + kVector - 1; ++i) {
    chunk.keys[i] = chunk.keys[chunk.size - 1];
  }
}

// The sums of the lanes of eight vectors.
inline void sum_lanes(const Floats (&v)[kLanes], Floats& sums) {
  Floats pairs[4], quads[2];
  for (int i = 0; i < 4; ++i) {
    const Floats &a = v[2 * i], &b = v[2 * i + 1];
    pairs[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    const Floats &a = pairs[2 * i], &b = pairs[2 * i + 1];
    quads[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  sums = __builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// scores = q · keys[i] for eight keys.
inline void dot_keys(const float* q, const float* const* keys, int head_dim, Floats& scores) {
  Floats sums[kLanes] = {};
  for (int d = 0; d < head_dim; d += kVector) {
    Floats x;
    load(x, q + d);
    for (std::size_t i = 0; i < kLanes; ++i) {
      Floats key;
      load(key, keys[i] + d);
      sums[i] += x * key;
    }
  }
  sum_lanes(sums, scores);
}

// acc[0 … kVectors * 8) += sum of weights[i] * values[i][0 … kVectors * 8)
template <int kVectors>
inline void add_values(const float* weights, const float* const* values, int num_values, int offset, float* acc) {
  Floats sums[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    load(sums[j], acc + offset + j * kVector);
  }
  for (int i = 0; i < num_values; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      Floats value;
      load(value, values[i] + offset + j * kVector);
      sums[j] += value * weights[i];
    }
  }
  for (int j = 0; j < kVectors; ++j) {
    store(acc + offset + j * kVector, sums[j]);
  }
}

inline void add_values(const float* weights, const float* const* values, int num_values, int head_dim, float* acc) {
  int d = 0;
  for (; d + 8 * kVector <= head_dim; d += 8 * kVector) {
    add_values<8>(weights, values, num_values, d, acc);
  }
  for (; d + 2 * kVector <= head_dim; d += 2 * kVector) {
    add_values<2>(weights, values, num_values, d, acc);
  }
  if (d < head_dim) {
    add_values<1>(weights, values, num_values, d, acc);
  }
}

// x = cap * tanh(x / cap)
inline void cap_scores(Floats& x, float cap) {
  Floats e = x * (2 / cap);
  const Ints is_negative = e < 0.0f;
  e = is_negative ? e : -e;
  exp_of(e);  // exp(-2 |x / cap|)
  const Floats capped = (1.0f - e) / (1.0f + e) * cap;
  x = is_negative ? -capped : capped;
}

// Turns num_seen scores into weights relative to a new maximum, to which sum and acc are rescaled.
inline void update(OnlineSoftmax& softmax, float* scores, int num_seen, float* acc, int head_dim) {
  float max = softmax.max;
  for (int i = 0; i < num_seen; ++i) {
    max = scores[i] > max ? scores[i] : max;
  }
  if (max > softmax.max) {
    Floats change = Floats{} + (softmax.max - max);
    exp_of(change);
    softmax.sum *= change[0];
    for (int d = 0; d < head_dim; ++d) {
      acc[d] *= change[0];
    }
    softmax.max = max;
  }
  Floats sums{};
  for (int i = 0; i < num_seen; i += kVector) {
    Floats x;
    load(x, scores + i);
    x -= max;
    exp_of(x);
    store(scores + i, x);
    sums += x;
  }
  float sum = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    sum += sums[lane];
  }
  softmax.sum += sum;
}

// One query over the part [first, first + num_seen) of a chunk that it may see.
inline void attend_chunk(const PagedAttention& op, const float* q, const Chunk& chunk, int first, int num_seen,
                         OnlineSoftmax& softmax, float* acc) {
  alignas(64) float scores[kChunkSize];
  for (int i = 0; i < num_seen; i += kVector) {
    Floats x;
    dot_keys(q, chunk.keys + first + i, op.head_dim, x);
    if (op.softcap > 0) {
      cap_scores(x, op.softcap);
    }
    store(scores + i, x);
  }
  for (int i = num_seen; i % kVector != 0; ++i) {
    scores[i] = -kInfinity;
  }
  update(softmax, scores, num_seen, acc, op.head_dim);
  add_values(scores, chunk.values + first, num_seen, op.head_dim, acc);
}

void attend(const PagedAttention& op, const AttentionTile& tile, int split, float* scratch, const AttentionPart& part) {
  const int group = op.num_heads / op.num_kv_heads, head_dim = op.head_dim;
  const std::ptrdiff_t first_head = static_cast<std::ptrdiff_t>(tile.first_token) * op.num_heads + tile.kv_head * group;
  const int num_heads = tile.num_queries * group;  // query by query
  float *scaled_q = scratch, *chunk_scratch = scratch + num_heads * head_dim;
  for (int i = 0; i < num_heads; ++i) {
    const float* q = op.q + (first_head + static_cast<std::ptrdiff_t>(i / group) * op.num_heads + i % group) * head_dim;
    part.softmax[i] = {-kInfinity, 0};
    for (int d = 0; d < head_dim; ++d) {
      scaled_q[i * head_dim + d] = q[d] * op.scale;
      part.acc[i * head_dim + d] = 0;
    }
  }
  const int end = std::min(tile.first_pos + tile.num_queries, (split + 1) * kSplitSize);
  for (int begin = std::max(tile.first_pos + 1 - op.window, split * kSplitSize); begin < end;) {
    const int chunk_end = std::min((begin / kChunkSize + 1) * kChunkSize, end);
    Chunk chunk;
    locate(op, tile, begin, chunk_end, chunk_scratch, chunk);
    for (int i = 0; i < num_heads; ++i) {
      const int seen_end = tile.first_pos + i / group + 1, first = std::max(begin, seen_end - op.window) - begin;
      const int num_seen = std::min(chunk_end, seen_end) - begin - first;
      if (num_seen > 0) {
        attend_chunk(op, scaled_q + i * head_dim, chunk, first, num_seen, part.softmax[i], part.acc + i * head_dim);
      }
    }
    begin = chunk_end;
  }
}

}  // namespace

}  // namespace mlx_server
