#include "sampling/candidates.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

namespace mlx_server {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Distances below the largest logit are rounded when they are divided by the temperature.
constexpr float kRoundingSlack = 1.00001f;
// In units of the temperature: further below the largest logit there is hardly any weight.
constexpr float kNearlyAll = 10;

double count(const Mass& mass) { return static_cast<double>(mass.count); }
double weight(const Mass& mass) { return mass.weight; }
Mass operator+(const Mass& a, const Mass& b) { return {a.count + b.count, a.weight + b.weight}; }

Key key_of(float scaled) { return std::bit_cast<Key>(std::abs(scaled)); }

// The first block at which the running sum of block weights exceeds target, and the sum before it.
std::pair<std::size_t, double> find_block(std::span<const float> block_weights, double target) {
  double reached = 0;
  std::size_t block = 0;
  while (block + 1 < block_weights.size() && reached + block_weights[block] <= target) {
    reached += block_weights[block++];
  }
  return {block, reached};
}

// The first token at which the running sum exceeds target. The block's own sum was rounded differently: if the target
// is not quite reached, it is the block's last kept token.
std::size_t find_in_block(const Key* keys, const float* weights, Key end, double reached, double target) {
  std::size_t last = 0;
  for (std::size_t i = 0; i < kBlock && reached <= target; ++i) {
    if (keys[i] < end && weights[i] > 0) {
      reached += weights[i];
      last = i;
    }
  }
  return last;
}

double sum(std::span<const float> weights) {
  double total = 0;
  for (const float weight : weights) {
    total += weight;
  }
  return total;
}

// How far a token may be below the likeliest to be p times as likely, p in (0, 1].
float distance_of(float p) { return std::abs(std::log(std::min(p, 1.0f))); }

}  // namespace

float kth_largest_block(const Logits& logits, std::int32_t k, RowScratch& scratch) {
  scratch.sorted_maxima.assign(logits.block_maxima, logits.block_maxima + num_blocks(logits.size));
  const auto kth = scratch.sorted_maxima.begin() + (k - 1);
  std::nth_element(scratch.sorted_maxima.begin(), kth, scratch.sorted_maxima.end(), std::greater{});
  return *kth;
}

double sum_weights(const Logits& logits, float temperature, RowScratch& scratch, const RowKernels& kernels) {
  scratch.block_weights.resize(num_blocks(logits.size));
  kernels.weigh(logits.values, logits.size, logits.max, temperature, scratch.block_weights.data());
  return sum(scratch.block_weights);
}

std::uint32_t draw_unfiltered(const Logits& logits, float temperature, float u, RowScratch& scratch,
                              const RowKernels& kernels) {
  const double target = u * sum_weights(logits, temperature, scratch, kernels);
  const auto [block, reached] = find_block(scratch.block_weights, target);
  const std::size_t begin = block * kBlock;
  kernels.scale(logits.values + begin, std::min(kBlock, logits.size - begin), logits.max, temperature,
                scratch.keys.data(), scratch.weights.data());
  return static_cast<std::uint32_t>(
      begin + find_in_block(scratch.keys.data(), scratch.weights.data(), kKeyEnd, reached, target));
}

bool has_filters(const RowParams& params, float xtc_u) {
  return params.top_n_sigma > 0 || params.top_k > 0 || params.typical_p < 1 || params.top_p < 1 || params.min_p > 0 ||
         xtc_u < params.xtc_probability;
}

struct Candidates::Boundary {
  Key key;
  Mass below;             // of the tokens with smaller keys
  std::int64_t num_ties;  // tokens with this key
};

Candidates::Candidates(const Logits& logits, const RowParams& params, float xtc_u, RowScratch& scratch,
                       const RowKernels& kernels)
    : kernels_(kernels), scratch_(scratch) {
  gather(logits, params);
  if (params.top_k > 0 && static_cast<std::size_t>(params.top_k) < logits.size) {
    keep_until(count, params.top_k);
  }
  if (params.typical_p < 1) {
    keep_typical(params.typical_p);
  }
  if (params.top_p < 1) {
    keep_until(weight, params.top_p * (mass().weight + unseen_weight_));
  }
  if (params.min_p > 0) {
    keep_min_p(params.min_p);
  }
  if (xtc_u < params.xtc_probability) {
    exclude_top_choices(params.xtc_threshold);
  }
}

// Takes those tokens of the row that may pass the filters, few where that can be told in advance, and applies
// top-n-sigma.
void Candidates::gather(const Logits& logits, const RowParams& params) {
  float lowest = -kInfinity;
  if (params.top_n_sigma > 0) {
    const Moments moments = kernels_.moments(logits.values, logits.size, logits.max);
    const double mean = moments.sum / static_cast<double>(moments.count);
    const double variance = moments.sum_of_squares / static_cast<double>(moments.count) - mean * mean;
    const float distance = params.top_n_sigma * static_cast<float>(std::sqrt(std::max(variance, 0.0)));
    keep_below(key_of(distance / params.temperature) + 1);
    lowest = logits.max - distance * kRoundingSlack;
  }
  if (params.top_k > 0 && static_cast<std::size_t>(params.top_k) <= num_blocks(logits.size)) {
    lowest = std::max(lowest, kth_largest_block(logits, params.top_k, scratch_));
  }
  const bool top_p_is_first = !(params.top_n_sigma > 0 || params.top_k > 0 || params.typical_p < 1);
  if (top_p_is_first && params.top_p < 1) {
    const double total = sum_weights(logits, params.temperature, scratch_, kernels_);
    take(logits, params.temperature, logits.max - kNearlyAll * params.temperature);
    const double taken = mass().weight;
    if (taken >= params.top_p * total) {
      unseen_weight_ = std::max(total - taken, 0.0);
      return;
    }
  } else if (top_p_is_first && params.min_p > 0) {
    lowest = logits.max - distance_of(params.min_p) * params.temperature * kRoundingSlack;
  }
  take(logits, params.temperature, lowest);
}

void Candidates::take(const Logits& logits, float temperature, float lowest) {
  const float* values = logits.values;
  std::size_t size = logits.size;
  is_all_ = !(lowest > -kInfinity);
  if (!is_all_) {
    values = scratch_.values.data();
    size = kernels_.at_least(logits.values, logits.size, logits.block_maxima, lowest, scratch_.ids.data(),
                             scratch_.values.data());
  }
  size_ = padded(size);
  kernels_.scale(values, size, logits.max, temperature, scratch_.keys.data(), scratch_.weights.data());
}

// Meister et al., "Locally typical sampling", TACL 2023: keeps the tokens whose information is closest to its mean, the
// entropy. Information is -log p = |scaled| + a constant, so the closest are those whose |scaled| is nearest to its
// mean.
void Candidates::keep_typical(float p) {
  const Information information = kernels_.information(scratch_.keys.data(), scratch_.weights.data(), size_, end_);
  const float mean = static_cast<float>(information.weighted_distance / information.weight);
  scratch_.keys.swap(scratch_.distances);  // now `distances` has the keys, and `keys` the distances from the mean
  const Key before = end_;
  Key *distances = scratch_.keys.data(), *keys = scratch_.distances.data();
  for (std::size_t i = 0; i < size_; ++i) {
    const Key distance = key_of(std::bit_cast<float>(keys[i]) - mean);
    distances[i] = keys[i] < before ? distance : kKeyEnd;
  }
  end_ = kKeyEnd;
  keep_until(weight, p * information.weight);
  const Key end = end_;
  for (std::size_t i = 0; i < size_; ++i) {
    keys[i] = distances[i] < end ? keys[i] : kKeyEnd;
  }
  scratch_.keys.swap(scratch_.distances);
  end_ = kKeyEnd;
}

// At least p times as likely as the likeliest that is left.
void Candidates::keep_min_p(float p) {
  const Key likeliest =
      *std::min_element(scratch_.keys.begin(), scratch_.keys.begin() + static_cast<std::ptrdiff_t>(size_));
  keep_below(key_of(std::bit_cast<float>(likeliest) + distance_of(p)) + 1);
}

// "Exclude top choices" of p-e-w (text-generation-webui, pull request 6335): of the tokens with at least this
// probability only the last stays, the least likely, with the highest id among equals.
void Candidates::exclude_top_choices(float threshold) {
  const float least = static_cast<float>(threshold * mass().weight);
  const auto is_choice = [&](std::size_t i) {
    return scratch_.keys[i] < end_ && scratch_.weights[i] >= least && scratch_.weights[i] > 0;
  };
  std::size_t last = size_;
  for (std::size_t i = 0; i < size_; ++i) {
    if (is_choice(i) && (last == size_ || scratch_.keys[i] >= scratch_.keys[last])) {
      last = i;
    }
  }
  for (std::size_t i = 0; i < size_; ++i) {
    if (i != last && is_choice(i)) {
      scratch_.keys[i] = kKeyEnd;
    }
  }
}

// Keeps the tokens with the smallest keys, lower ids first among equals, until they measure at least target.
void Candidates::keep_until(Measure measure, double target) {
  const Boundary boundary = find_boundary(measure, target);
  keep_below(boundary.key + 1);
  if (boundary.num_ties < 2) {
    return;
  }
  Mass kept = boundary.below;
  for (std::size_t i = 0; i < size_; ++i) {
    if (scratch_.keys[i] == boundary.key) {
      if (kept.count > boundary.below.count && measure(kept) >= target) {
        scratch_.keys[i] = kKeyEnd;
      } else {
        kept = kept + Mass{1, scratch_.weights[i]};
      }
    }
  }
}

// The largest key such that the kept tokens with smaller keys measure less than target, found by bisection. Once few
// tokens are left between the two sides, they are copied out of the row: the further steps cost nearly nothing.
Candidates::Boundary Candidates::find_boundary(Measure measure, double target) {
  constexpr std::int64_t kNearFraction = 8;
  Tokens near = all();
  Mass skipped{};  // what is likelier than all of `near`
  Key begin = 0, end = end_;
  Mass below_begin{}, below_end = mass_below(near, end);
  while (end - begin > 1) {
    const std::int64_t num_near = below_end.count - below_begin.count;
    if (near.size > kBlock && num_near * kNearFraction <= static_cast<std::int64_t>(near.size)) {
      near = copy_between(near, begin, end);
      skipped = below_begin;
    }
    const Key middle = begin + (end - begin) / 2;
    const Mass below = skipped + mass_below(near, middle);
    if (measure(below) < target) {
      begin = middle;
      below_begin = below;
    } else {
      end = middle;
      below_end = below;
    }
  }
  return {begin, below_begin, below_end.count - below_begin.count};
}

Candidates::Tokens Candidates::copy_between(const Tokens& tokens, Key begin, Key end) {
  Key* keys = scratch_.near_keys.data();
  float* weights = scratch_.near_weights.data();
  const std::size_t size = kernels_.select(tokens.keys, tokens.weights, tokens.size, begin, end, keys, weights);
  return {keys, weights, padded(size)};
}

// Inverse of the cumulative distribution, in two steps: first over blocks, then within one.
std::uint32_t Candidates::draw(float u) const {
  scratch_.block_weights.clear();
  for (std::size_t begin = 0; begin < size_; begin += kBlock) {
    const Tokens block{scratch_.keys.data() + begin, scratch_.weights.data() + begin, kBlock};
    scratch_.block_weights.push_back(static_cast<float>(mass_below(block, end_).weight));
  }
  const double target = u * sum(scratch_.block_weights);
  const auto [block, reached] = find_block(scratch_.block_weights, target);
  const std::size_t begin = block * kBlock;
  return id(begin +
            find_in_block(scratch_.keys.data() + begin, scratch_.weights.data() + begin, end_, reached, target));
}

}  // namespace mlx_server
