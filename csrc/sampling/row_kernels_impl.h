// The row kernels, written once; each instruction set's file includes and compiles them.
#pragma once

#if defined(__AVX512VL__)
#include <immintrin.h>
#endif

#include <limits>

#include "common/simd.h"
#include "sampling/row_kernels.h"

namespace mlx_server {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

constexpr Ints kLaneIds{0, 1, 2, 3, 4, 5, 6, 7};

// The next kLanes of n logits, -infinity beyond their end.
inline void load_some(Floats& x, const float* logits, std::size_t n) {
  if (n >= kLanes) {
    load(x, logits);
    return;
  }
  x = Floats{} + kMinusInfinity;
  for (std::size_t lane = 0; lane < n; ++lane) {
    x[lane] = logits[lane];
  }
}

struct LaneMax {
  Floats best = Floats{} + kMinusInfinity;
  Ints nan{};

  void take(const Floats& x) {
    nan |= x != x;
    best = x > best ? x : best;
  }
};

RowMax max_of_block(const float* logits, std::size_t n) {
  LaneMax lanes[4];
  Floats x;
  std::size_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (std::size_t j = 0; j < 4; ++j) {
      load(x, logits + i + j * kLanes);
      lanes[j].take(x);
    }
  }
  for (; i < n; i += kLanes) {
    load_some(x, logits + i, n - i);
    lanes[0].take(x);
  }
  RowMax result{kMinusInfinity, false};
  for (const LaneMax& lane_max : lanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      result.value = lane_max.best[lane] > result.value ? lane_max.best[lane] : result.value;
      result.has_nan |= lane_max.nan[lane] != 0;
    }
  }
  return result;
}

RowMax max_of(const float* logits, std::size_t n, float* block_maxima) {
  RowMax result{kMinusInfinity, false};
  for (std::size_t begin = 0; begin < n; begin += kBlock) {
    const RowMax block = max_of_block(logits + begin, n - begin < kBlock ? n - begin : kBlock);
    *block_maxima++ = block.value;
    result.value = block.value > result.value ? block.value : result.value;
    result.has_nan |= block.has_nan;
  }
  return result;
}

void copy_allowed(const float* logits, const std::uint32_t* mask, std::size_t n, float* out) {
  if (mask == nullptr) {
    std::memcpy(out, logits, n * sizeof(float));
    return;
  }
  const Ints bits{1, 2, 4, 8, 16, 32, 64, 128};
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Ints byte = Ints{} + static_cast<std::int32_t>(mask[i / 32] >> i % 32 & 0xff);
    Floats x;
    load(x, logits + i);
    x = (byte & bits) != 0 ? x : Floats{} + kMinusInfinity;
    store(out + i, x);
  }
  for (; i < n; ++i) {
    out[i] = (mask[i / 32] >> i % 32 & 1) != 0 ? logits[i] : kMinusInfinity;
  }
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

// Writes the lanes of a and b where `selected` has all bits set, one behind the other, and maybe what follows them up
// to kLanes; their number.
inline std::size_t compress(const Ints& selected, const Ints& a, const Ints& b, std::int32_t* out_a,
                            std::int32_t* out_b) {
#if defined(__AVX512VL__)
  const __mmask8 mask = _mm256_movepi32_mask((__m256i)selected);
  // Compressed in a register and stored whole: a compressing store is slow on some processors.
  store(out_a, (Ints)_mm256_maskz_compress_epi32(mask, (__m256i)a));
  store(out_b, (Ints)_mm256_maskz_compress_epi32(mask, (__m256i)b));
  return static_cast<std::size_t>(__builtin_popcount(mask));
#else
  std::size_t count = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    // Without a branch, which would be mispredicted often: what is not selected is overwritten by the next.
    store(out_a + count, std::int32_t{a[lane]});
    store(out_b + count, std::int32_t{b[lane]});  // what lies there may be floats
    count += static_cast<std::size_t>(selected[lane] != 0);
  }
  return count;
#endif
}

std::size_t at_least(const float* logits, std::size_t n, const float* block_maxima, float lowest, std::int32_t* ids,
                     float* values) {
  std::size_t count = 0;
  for (std::size_t begin = 0; begin < n; begin += kBlock) {
    if (*block_maxima++ < lowest) {
      continue;
    }
    const std::size_t end = n - begin < kBlock ? n : begin + kBlock;
    for (std::size_t i = begin; i < end; i += kLanes) {
      Floats x;
      load_some(x, logits + i, end - i);
      const Ints lane_ids = kLaneIds + static_cast<std::int32_t>(i);
      const Ints selected = (x >= lowest) & (lane_ids < static_cast<std::int32_t>(n));
      count += compress(selected, lane_ids, (Ints)x, ids + count, (std::int32_t*)values + count);
    }
  }
  return count;
}

// x = exp((x - max) / temperature); keys beside it if they are asked for.
inline void weigh_lanes(Floats& x, float max, float temperature, Key* keys) {
  x = (x - max) / temperature;
  if (keys != nullptr) {
    store(keys, (Ints)x & 0x7fffffff);
  }
  exp_of(x);
}

void weigh(const float* logits, std::size_t n, float max, float temperature, float* block_weights) {
  for (std::size_t begin = 0; begin < n; begin += kBlock) {
    const std::size_t end = n - begin < kBlock ? n : begin + kBlock;
    Floats sums[4] = {}, x;
    std::size_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      for (std::size_t j = 0; j < 4; ++j) {
        load(x, logits + i + j * kLanes);
        weigh_lanes(x, max, temperature, nullptr);
        sums[j] += x;
      }
    }
    for (; i < end; i += kLanes) {
      load_some(x, logits + i, end - i);
      weigh_lanes(x, max, temperature, nullptr);
      sums[0] += x;
    }
    const Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float total = 0;
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      total += sum[lane];
    }
    *block_weights++ = total;
  }
}

Moments moments(const float* logits, std::size_t n, float max) {
  Moments result{};
  for (std::size_t begin = 0; begin < n; begin += kBlock) {
    const std::size_t end = n - begin < kBlock ? n : begin + kBlock;
    Ints count{};
    Floats sum{}, squares{};
    for (std::size_t i = begin; i < end; i += kLanes) {
      Floats x;
      load_some(x, logits + i, end - i);
      const Ints is_finite = x > Floats{} + kMinusInfinity;
      const Floats distance = (Floats)((Ints)(max - x) & is_finite);
      count -= is_finite;
      sum += distance;
      squares += distance * distance;
    }
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      result.count += count[lane];
      result.sum += static_cast<double>(sum[lane]);
      result.sum_of_squares += static_cast<double>(squares[lane]);
    }
  }
  return result;
}

void scale(const float* logits, std::size_t n, float max, float temperature, Key* keys, float* weights) {
  Floats x;
  for (std::size_t i = 0; i < n; i += kLanes) {
    load_some(x, logits + i, n - i);
    weigh_lanes(x, max, temperature, keys + i);
    store(weights + i, x);
  }
  for (std::size_t i = n; i < padded(n); ++i) {
    keys[i] = kKeyEnd;
    weights[i] = 0;
  }
}

Mass mass_below(const Key* keys, const float* weights, std::size_t n, Key end) {
  Mass mass{};
  // A block's weights are added in float32, the blocks' sums in float64: exact enough for any vocabulary.
  for (std::size_t block = 0; block < n; block += kBlock) {
    Ints count{};
    Floats sums[4] = {};
    for (std::size_t i = block; i < block + kBlock; i += 4 * kLanes) {
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

Information information(const Key* keys, const float* weights, std::size_t n, Key end) {
  Information result{};
  for (std::size_t block = 0; block < n; block += kBlock) {
    Floats sums[4] = {}, products[4] = {};
    for (std::size_t i = block; i < block + kBlock; i += 4 * kLanes) {
      for (std::size_t j = 0; j < 4; ++j) {
        Ints key;
        Floats weight;
        load(key, keys + i + j * kLanes);
        load(weight, weights + i + j * kLanes);
        const Ints counts = (key < end) & (weight > 0);  // infinity times 0 is NaN
        sums[j] += (Floats)((Ints)weight & counts);
        products[j] += (Floats)((Ints)(weight * (Floats)key) & counts);
      }
    }
    const Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    const Floats product = (products[0] + products[1]) + (products[2] + products[3]);
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      result.weight += static_cast<double>(sum[lane]);
      result.weighted_distance += static_cast<double>(product[lane]);
    }
  }
  return result;
}

std::size_t select(const Key* keys, const float* weights, std::size_t n, Key begin, Key end, Key* out_keys,
                   float* out_weights) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < n; i += kLanes) {
    Ints key, weight;
    load(key, keys + i);
    load(weight, weights + i);
    count += compress((key >= begin) & (key < end), key, weight, out_keys + count, (std::int32_t*)out_weights + count);
  }
  for (std::size_t i = count; i < padded(count); ++i) {
    out_keys[i] = kKeyEnd;
    out_weights[i] = 0;
  }
  return count;
}

constexpr RowKernels make_row_kernels(const char* name) {
  return {name, max_of, copy_allowed, find_first, at_least, weigh, moments, scale, mass_below, information, select};
}

}  // namespace

}  // namespace mlx_server
