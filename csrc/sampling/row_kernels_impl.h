// The row kernels, written once; each instruction set's file includes and compiles them.
#pragma once

#include <limits>

#include "common/simd.h"
#include "sampling/row_kernels.h"

namespace mlx_server {

namespace {

RowMax max_of(const float* logits, std::size_t n) {
  Floats best = Floats{} - std::numeric_limits<float>::infinity();
  Ints nan{};
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Floats x;
    load(x, logits + i);
    nan |= x != x;
    best = x > best ? x : best;
  }
  RowMax result{-std::numeric_limits<float>::infinity(), false};
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    result.value = best[lane] > result.value ? best[lane] : result.value;
    result.has_nan |= nan[lane] != 0;
  }
  for (; i < n; ++i) {
    result.value = logits[i] > result.value ? logits[i] : result.value;
    result.has_nan |= logits[i] != logits[i];
  }
  return result;
}

std::size_t find_first(const float* logits, std::size_t n, float value) {
  constexpr std::size_t kChunk = 8 * kLanes;
  std::size_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    Ints found{};
    for (std::size_t j = 0; j < kChunk; j += kLanes) {
      Floats x;
      load(x, logits + i + j);
      found |= x == value;
    }
    std::int32_t any = 0;
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      any |= found[lane];
    }
    if (any != 0) {
      break;
    }
  }
  while (logits[i] != value) {
    ++i;
  }
  return i;
}

inline void scale_lanes(const float* logits, float max, float temperature, Key* keys, float* weights) {
  Floats x;
  load(x, logits);
  x = (x - max) / temperature;
  store(keys, (Ints)x & 0x7fffffff);
  exp_of(x);
  store(weights, x);
}

void scale(const float* logits, std::size_t n, float max, float temperature, Key* keys, float* weights) {
  const std::size_t whole = n / kLanes * kLanes;
  for (std::size_t i = 0; i < whole; i += kLanes) {
    scale_lanes(logits + i, max, temperature, keys + i, weights + i);
  }
  if (whole < n) {
    float rest[kLanes];
    for (float& logit : rest) {
      logit = max;
    }
    std::memcpy(rest, logits + whole, (n - whole) * sizeof(float));
    scale_lanes(rest, max, temperature, keys + whole, weights + whole);
  }
  for (std::size_t i = n; i < padded(n); ++i) {
    keys[i] = kKeyEnd;
    weights[i] = 0;
  }
}

Mass mass_below(const Key* keys, const float* weights, std::size_t n, Key end) {
  Mass mass{};
  // A block's weights are added in float32, the blocks' sums in float64: exact enough for any vocabulary.
  for (std::size_t block = 0; block < n; block += kRowPadding) {
    Ints count{};
    Floats sums[4] = {};
    for (std::size_t i = block; i < block + kRowPadding; i += 4 * kLanes) {
      for (std::size_t j = 0; j < 4; ++j) {
        Ints key, weight;
        load(key, keys + i + j * kLanes);
        load(weight, weights + i + j * kLanes);
        const Ints is_below = key < end;
        count -= is_below;
        sums[j] += (Floats)(weight & is_below);
      }
    }
    const Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      mass.count += count[lane];
      mass.weight += static_cast<double>(sum[lane]);
    }
  }
  return mass;
}

std::size_t select(const Key* keys, const float* weights, std::size_t n, Key begin, Key end, Key* out_keys,
                   float* out_weights) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < n; ++i) {
    // Without a branch, which would be mispredicted often: what is not selected is overwritten by the next.
    out_keys[count] = keys[i];
    out_weights[count] = weights[i];
    count += static_cast<std::size_t>(keys[i] >= begin && keys[i] < end);
  }
  for (std::size_t i = count; i < padded(count); ++i) {
    out_keys[i] = kKeyEnd;
    out_weights[i] = 0;
  }
  return count;
}

constexpr RowKernels make_row_kernels(const char* name) {
  return {name, max_of, find_first, scale, mass_below, select};
}

}  // namespace

}  // namespace mlx_server
