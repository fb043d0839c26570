// The attention kernel, written once; each instruction set's file includes and compiles it.
//
// Keys are taken in chunks that stay in the L1 cache while all queries of a tile that share them pass over them, up to
// four heads at a time, with an online softmax (Milakov and Gimelshein 2018). Splits and chunks end at fixed positions
// and a head's sums have one order, so its result depends neither on the batch nor on how a prompt was cut.
//
// A token's key/value heads lie side by side, and memory is twice as fast when they are read so: the next chunk of all
// of a tile's heads is asked for early, in the order of its addresses.
#pragma once

#include <algorithm>
#include <limits>

#include "common/simd.h"
#include "paged_attention/paged_attention_cpu.h"
#include "paged_attention/paged_attention_keys.h"

namespace mlx_server {

namespace {

constexpr int kVector = static_cast<int>(kLanes);
// Some heads over a chunk wait for memory, more of them for products, which need more sums at once.
constexpr int kFewHeads = 7;
constexpr int kFewSums = 8;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The sums of the lanes of eight vectors.
inline void sum_lanes(const Floats* v, Floats& sums) {
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

// scores[h][i] = q[h] · keys[i] of kHeads heads q [kHeads, D] and num_keys keys, in registers for kNumSums of them
// at once.
template <int kHeads, int kNumSums>
inline void dot_keys(const float* q, const float* const* keys, int num_keys, int head_dim, Prefetcher& prefetcher,
                     float (&scores)[kHeads][kMaxChunkSize]) {
  constexpr int kKeys = kNumSums / kHeads;
  for (int i = 0; i < num_keys; i += kKeys) {
    prefetcher.step();
    Floats sums[kNumSums] = {};
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
    float dots[kNumSums];
    for (int first = 0; first < kNumSums; first += kVector) {
      Floats part;
      sum_lanes(sums + first, part);
      store(dots + first, part);
    }
    for (int h = 0; h < kHeads; ++h) {
      std::memcpy(scores[h] + i, dots + h * kKeys, kKeys * sizeof(float));
    }
  }
}

// acc[h][offset … offset + kVectors * 8) += sum of weights[h][i] * values[i][offset … offset + kVectors * 8)
template <int kHeads, int kVectors>
inline void add_values(const float (&weights)[kHeads][kMaxChunkSize], const float* const* values, int num_values,
                       int offset, float* acc, int head_dim, Prefetcher& prefetcher) {
  Floats sums[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (int j = 0; j < kVectors; ++j) {
      load(sums[h][j], acc + h * head_dim + offset + j * kVector);
    }
  }
  const auto add = [&](int i) {
    Floats value[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      load(value[j], values[i] + offset + j * kVector);
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int j = 0; j < kVectors; ++j) {
        sums[h][j] += value[j] * weights[h][i];
      }
    }
  };
  int i = 0;
  for (; i + 4 <= num_values; i += 4) {
    prefetcher.step();
    add(i);
    add(i + 1);
    add(i + 2);
    add(i + 3);
  }
  for (; i < num_values; ++i) {
    add(i);
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int j = 0; j < kVectors; ++j) {
      store(acc + h * head_dim + offset + j * kVector, sums[h][j]);
    }
  }
}

template <int kHeads, int kNumSums>
inline void add_all_values(const float (&weights)[kHeads][kMaxChunkSize], const float* const* values, int num_values,
                           float* acc, int head_dim, Prefetcher& prefetcher) {
  constexpr int kVectors = kNumSums / kHeads;
  int d = 0;
  for (; d + kVectors * kVector <= head_dim; d += kVectors * kVector) {
    add_values<kHeads, kVectors>(weights, values, num_values, d, acc, head_dim, prefetcher);
  }
  for (; d < head_dim; d += kVector) {
    add_values<kHeads, 1>(weights, values, num_values, d, acc, head_dim, prefetcher);
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
  const auto pad = [&](float value) {
    for (int i = num_seen; i % kVector != 0; ++i) {
      scores[i] = value;
    }
  };
  if (op.softcap > 0) {
    pad(0);
    for (int i = 0; i < num_seen; i += kVector) {
      Floats x;
      load(x, scores + i);
      cap_scores(x, op.softcap);
      store(scores + i, x);
    }
  }
  pad(-kInfinity);
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
template <int kHeads, int kNumSums>
inline void attend_chunk(const PagedAttention& op, const float* q, const Chunk& chunk, int first, int num_seen,
                         OnlineSoftmax* softmax, float* acc, Prefetcher& prefetcher) {
  alignas(64) float scores[kHeads][kMaxChunkSize];
  dot_keys<kHeads, kNumSums>(q, chunk.keys + first, num_seen, op.head_dim, prefetcher, scores);
  for (int h = 0; h < kHeads; ++h) {
    update(op, scores[h], num_seen, softmax[h], acc + h * op.head_dim);
  }
  add_all_values<kHeads, kNumSums>(scores, chunk.values + first, num_seen, acc, op.head_dim, prefetcher);
}

// All queries over a chunk of one key/value head. q and acc [num_queries * group, D], softmax [num_queries * group].
inline void attend_queries(const PagedAttention& op, const AttentionTile& tile, const Chunk& chunk, const float* q,
                           OnlineSoftmax* softmax, float* acc, Prefetcher& prefetcher) {
  const int group = op.num_heads / op.num_kv_heads, num_heads = tile.num_queries * group;
  const auto attend_heads = [&]<int kHeads, int kNumSums = kFewSums>(int i, int first, int end) {
    attend_chunk<kHeads, kNumSums>(op, q + i * op.head_dim, chunk, first - chunk.begin, end - first, softmax + i,
                                   acc + i * op.head_dim, prefetcher);
  };
  for (int i = 0; i < num_heads;) {
    // The first of some heads sees the fewest of the last keys, the last of them the fewest of the first keys.
    const int seen_end = tile.first_pos + i / group + 1;
    const auto see_all = [&](int heads) {
      const int last_end = tile.first_pos + (i + heads - 1) / group + 1;
      return i + heads <= num_heads && seen_end >= chunk.end && last_end - op.window <= chunk.begin;
    };
    if (see_all(4)) {
      num_heads <= kFewHeads ? attend_heads.template operator()<4>(i, chunk.begin, chunk.end)
                             : attend_heads.template operator()<4, kMaxSums>(i, chunk.begin, chunk.end);
      i += 4;
    } else if (see_all(2)) {
      attend_heads.template operator()<2>(i, chunk.begin, chunk.end);
      i += 2;
    } else {
      const int first = std::max(chunk.begin, seen_end - op.window), seen = std::min(chunk.end, seen_end);
      if (first < seen) {
        attend_heads.template operator()<1>(i, first, seen);
      }
      ++i;
    }
  }
}

// Scales the tile's queries into scaled_q, in the order of `part`, which is emptied.
inline void begin_part(const PagedAttention& op, const AttentionTile& tile, float* scaled_q,
                       const AttentionPart& part) {
  const int group = op.num_heads / op.num_kv_heads, size = group * op.head_dim;
  for (int head = 0; head < tile.num_kv_heads; ++head) {
    for (int query = 0; query < tile.num_queries; ++query) {
      const std::ptrdiff_t token = tile.first_token + query;
      const float* q = op.q + (token * op.num_kv_heads + tile.first_kv_head + head) * size;
      for (int i = 0; i < size; ++i) {
        *scaled_q++ = q[i] * op.scale;
      }
    }
  }
  const int num_heads = tile.num_kv_heads * tile.num_queries * group;
  for (int i = 0; i < num_heads; ++i) {
    part.softmax[i] = {-kInfinity, 0};
  }
  for (int i = 0; i < num_heads * op.head_dim; ++i) {
    part.acc[i] = 0;
  }
}

void attend(const PagedAttention& op, const AttentionTile& tile, int split, float* scratch, const AttentionPart& part) {
  const int num_heads = tile.num_queries * (op.num_heads / op.num_kv_heads);  // of one key/value head
  float *scaled_q = scratch, *chunk_scratch = scratch + num_heads * tile.num_kv_heads * op.head_dim;
  begin_part(op, tile, scaled_q, part);
  const int first = std::max(tile.first_pos + 1 - op.window, split * kSplitSize);
  const int end = std::min(tile.first_pos + tile.num_queries, (split + 1) * kSplitSize);
  const int chunk_size = attention_chunk_size(op.head_dim);
  const auto end_of_chunk = [&](int begin) { return std::min((begin / chunk_size + 1) * chunk_size, end); };
  Prefetcher prefetcher(op, tile, first);
  prefetcher.add(end_of_chunk(first) - first);
  prefetcher.finish();
  for (int begin = first; begin < end; begin = end_of_chunk(begin)) {
    const int chunk_end = end_of_chunk(begin);
    if (chunk_end < end) {
      prefetcher.add(end_of_chunk(chunk_end) - chunk_end);
    }
    for (int head = 0; head < tile.num_kv_heads; ++head) {
      Chunk chunk;
      locate(op, tile, tile.first_kv_head + head, begin, chunk_end, chunk_scratch, chunk);
      attend_queries(op, tile, chunk, scaled_q + head * num_heads * op.head_dim, part.softmax + head * num_heads,
                     part.acc + head * num_heads * op.head_dim, prefetcher);
    }
    prefetcher.finish();
  }
}

}  // namespace

}  // namespace mlx_server
