// The attention kernel, written once; each instruction set's file includes and compiles it.
//
// Keys are taken in chunks that stay in the L1 cache while all queries of a tile pass over them, up to four heads at a
// time, with an online softmax (Milakov and Gimelshein 2018). Splits and chunks end at fixed positions and a head's
// sums have one order, so its result depends neither on the batch nor on how a prompt was cut.
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
  int begin = 0, end = 0;
  const float* keys[kMaxChunkSize + kVector - 1];
  const float* values[kMaxChunkSize];

  int size() const { return end - begin; }
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

// The keys and values [begin, end), asked for from memory. scratch [2 * kMaxChunkSize, D]: of those made from integers.
inline void locate(const PagedAttention& op, const AttentionTile& tile, int begin, int end, float* scratch,
                   Chunk& chunk) {
  const std::int32_t* block = op.block_tables + static_cast<std::ptrdiff_t>(tile.row) * op.max_blocks;
  block += begin / op.block_size;
  int offset = begin % op.block_size;
  chunk.begin = begin;
  chunk.end = end;
  for (int i = 0; i < chunk.size(); ++i) {
    const std::ptrdiff_t slot = static_cast<std::ptrdiff_t>(*block) * op.block_size + offset;
    const std::ptrdiff_t row = slot * op.num_kv_heads + tile.kv_head;
    chunk.keys[i] = float_row(op.keys, row, op.head_dim, scratch + i * op.head_dim);
    chunk.values[i] = float_row(op.values, row, op.head_dim, scratch + (kMaxChunkSize + i) * op.head_dim);
    if (++offset == op.block_size) {
      offset = 0;
      ++block;
    }
  }
  // Scores are computed kVector at a time; what is too much repeats the last key and is dropped.
  for (int i = chunk.size(); i < chunk.size() + kVector - 1; ++i) {
    chunk.keys[i] = chunk.keys[chunk.size() - 1];
  }
}

inline void prefetch(const Chunk& chunk, int head_dim) {
  for (int i = 0; i < chunk.size(); ++i) {
    for (int d = 0; d < head_dim; d += 16) {
      __builtin_prefetch(chunk.keys[i] + d);
      __builtin_prefetch(chunk.values[i] + d);
    }
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

// scores[h][i] = q[h] · keys[i] of kHeads heads q [kHeads, D] and num_keys keys, in registers for eight of them at
// once.
template <int kHeads>
inline void dot_keys(const float* q, const float* const* keys, int num_keys, int head_dim,
                     float (&scores)[kHeads][kMaxChunkSize]) {
  constexpr int kKeys = kVector / kHeads;
  for (int i = 0; i < num_keys; i += kKeys) {
    Floats sums[kLanes] = {};
    for (int d = 0; d < head_dim; d += kVector) {
      Floats x[kHeads];
      for (int h = 0; h < kHeads; ++h) {
        load(x[h], q + h * head_dim + d);
      }
      for (int j = 0; j < kKeys; ++j) {
        Floats key;
        load(key, keys[i + j] + d);
        for (int h = 0; h < kHeads; ++h) {
          sums[h * kKeys + j] += x[h] * key;
        }
      }
    }
    Floats dots;
    sum_lanes(sums, dots);
    for (int h = 0; h < kHeads; ++h) {
      std::memcpy(scores[h] + i, reinterpret_cast<const float*>(&dots) + h * kKeys, kKeys * sizeof(float));
    }
  }
}

// acc[h][offset … offset + kVectors * 8) += sum of weights[h][i] * values[i][offset … offset + kVectors * 8)
template <int kHeads, int kVectors>
inline void add_values(const float (&weights)[kHeads][kMaxChunkSize], const float* const* values, int num_values,
                       int offset, float* acc, int head_dim) {
  Floats sums[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (int j = 0; j < kVectors; ++j) {
      load(sums[h][j], acc + h * head_dim + offset + j * kVector);
    }
  }
  for (int i = 0; i < num_values; ++i) {
    Floats value[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      load(value[j], values[i] + offset + j * kVector);
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int j = 0; j < kVectors; ++j) {
        sums[h][j] += value[j] * weights[h][i];
      }
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int j = 0; j < kVectors; ++j) {
      store(acc + h * head_dim + offset + j * kVector, sums[h][j]);
    }
  }
}

template <int kHeads>
inline void add_values(const float (&weights)[kHeads][kMaxChunkSize], const float* const* values, int num_values,
                       float* acc, int head_dim) {
  constexpr int kVectors = kVector / kHeads;
  int d = 0;
  for (; d + kVectors * kVector <= head_dim; d += kVectors * kVector) {
    add_values<kHeads, kVectors>(weights, values, num_values, d, acc, head_dim);
  }
  for (; d < head_dim; d += kVector) {
    add_values<kHeads, 1>(weights, values, num_values, d, acc, head_dim);
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
inline void update(const PagedAttention& op, float* scores, int num_seen, OnlineSoftmax& softmax, float* acc) {
  for (int i = 0; i < num_seen && op.softcap > 0; i += kVector) {
    Floats x;
    load(x, scores + i);
    cap_scores(x, op.softcap);
    store(scores + i, x);
  }
  for (int i = num_seen; i % kVector != 0; ++i) {
    scores[i] = -kInfinity;
  }
  Floats maxima = Floats{} + softmax.max;
  for (int i = 0; i < num_seen; i += kVector) {
    Floats x;
    load(x, scores + i);
    maxima = x > maxima ? x : maxima;
  }
  float max = softmax.max;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    max = maxima[lane] > max ? maxima[lane] : max;
  }
  if (max > softmax.max) {
    Floats change = Floats{} + (softmax.max - max);
    exp_of(change);
    softmax.sum *= change[0];
    for (int d = 0; d < op.head_dim; ++d) {
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

// kHeads heads over the part [first, first + num_seen) of a chunk, which they all may see.
template <int kHeads>
inline void attend_chunk(const PagedAttention& op, const float* q, const Chunk& chunk, int first, int num_seen,
                         OnlineSoftmax* softmax, float* acc) {
  alignas(64) float scores[kHeads][kMaxChunkSize];
  dot_keys<kHeads>(q, chunk.keys + first, num_seen, op.head_dim, scores);
  for (int h = 0; h < kHeads; ++h) {
    update(op, scores[h], num_seen, softmax[h], acc + h * op.head_dim);
  }
  add_values<kHeads>(scores, chunk.values + first, num_seen, acc, op.head_dim);
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
  const auto attend_heads = [&]<int kHeads>(const Chunk& chunk, int i, int first, int end) {
    attend_chunk<kHeads>(op, scaled_q + i * head_dim, chunk, first - chunk.begin, end - first, part.softmax + i,
                         part.acc + i * head_dim);
  };
  const int end = std::min(tile.first_pos + tile.num_queries, (split + 1) * kSplitSize);
  const int chunk_size = attention_chunk_size(head_dim);
  const auto locate_from = [&](int begin, int slot, Chunk& chunk) {
    const int chunk_end = std::min((begin / chunk_size + 1) * chunk_size, end);
    locate(op, tile, begin, chunk_end, chunk_scratch + slot * 2 * kMaxChunkSize * head_dim, chunk);
    prefetch(chunk, head_dim);
  };
  Chunk chunks[2];
  locate_from(std::max(tile.first_pos + 1 - op.window, split * kSplitSize), 0, chunks[0]);
  for (int turn = 0;; ++turn) {
    const Chunk& chunk = chunks[turn % 2];
    if (chunk.end < end) {
      locate_from(chunk.end, (turn + 1) % 2, chunks[(turn + 1) % 2]);
    }
    for (int i = 0; i < num_heads;) {
      // The first of some heads sees the fewest of the last keys, the last of them the fewest of the first keys.
      const int seen_end = tile.first_pos + i / group + 1;
      const auto see_all = [&](int heads) {
        const int last_end = tile.first_pos + (i + heads - 1) / group + 1;
        return i + heads <= num_heads && seen_end >= chunk.end && last_end - op.window <= chunk.begin;
      };
      if (see_all(4)) {
        attend_heads.template operator()<4>(chunk, i, chunk.begin, chunk.end);
        i += 4;
      } else if (see_all(2)) {
        attend_heads.template operator()<2>(chunk, i, chunk.begin, chunk.end);
        i += 2;
      } else {
        const int first = std::max(chunk.begin, seen_end - op.window), seen = std::min(chunk.end, seen_end);
        if (first < seen) {
          attend_heads.template operator()<1>(chunk, i, first, seen);
        }
        ++i;
      }
    }
    if (chunk.end == end) {
      return;
    }
  }
}

}  // namespace

}  // namespace mlx_server
