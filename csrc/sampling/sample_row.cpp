#include "sampling/sample_row.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "common/cpu_info.h"
#include "sampling/philox.h"

namespace mlx_server {

namespace {

// What a search weighs the tokens by.
using Measure = double (*)(const Mass&);
double count(const Mass& mass) { return static_cast<double>(mass.count); }
double weight(const Mass& mass) { return mass.weight; }

Mass operator+(const Mass& a, const Mass& b) { return {a.count + b.count, a.weight + b.weight}; }

// Some tokens of a row. size is padded.
struct Tokens {
  const Key* keys;
  const float* weights;
  std::size_t size;
};

struct Boundary {
  Key key;
  Mass below;             // of the tokens with smaller keys
  std::int64_t num_ties;  // tokens with this key
  float tie_weight;       // of each of them
};

// A row of the vocabulary from which filters drop tokens. What is kept has key < end_.
class Row {
 public:
  Row(std::span<const float> logits, float max, float temperature, RowScratch& scratch, const RowKernels& kernels)
      : kernels_(kernels), scratch_(scratch), size_(padded(logits.size())) {
    scratch.keys.resize(size_);
    scratch.weights.resize(size_);
    scratch.near_keys.resize(size_);
    scratch.near_weights.resize(size_);
    kernels.scale(logits.data(), logits.size(), max, temperature, scratch.keys.data(), scratch.weights.data());
  }

  void keep_top_k(std::int32_t k) { keep_until(count, k); }

  void keep_top_p(float p) { keep_until(weight, p * mass_below(all(), end_).weight); }

  void keep_min_p(float p) {
    const float lowest =
        std::abs(std::log(std::min(p, 1.0f)));  // |scaled| of a token p times as likely as the likeliest
    end_ = std::min(end_, std::bit_cast<Key>(lowest) + 1);
  }

  std::uint32_t draw(float u);

 private:
  Tokens all() const { return {scratch_.keys.data(), scratch_.weights.data(), size_}; }

  Mass mass_below(const Tokens& tokens, Key end) const {
    return kernels_.mass_below(tokens.keys, tokens.weights, tokens.size, end);
  }

  void keep_until(Measure measure, double target);
  Boundary find_boundary(Measure measure, double target);
  Tokens copy_between(const Tokens& tokens, Key begin, Key end);

  const RowKernels& kernels_;
  RowScratch& scratch_;
  std::size_t size_;
  Key end_ = kKeyEnd;
};

// Keeps the likeliest tokens, lower ids first among equals, until they measure at least target.
void Row::keep_until(Measure measure, double target) {
  const Boundary boundary = find_boundary(measure, target);
  end_ = boundary.key + 1;
  const double missing = (target - measure(boundary.below)) / measure({1, boundary.tie_weight});
  const double num_kept = std::max(std::ceil(missing), 1.0);
  if (num_kept < static_cast<double>(boundary.num_ties)) {
    auto left = static_cast<std::int64_t>(num_kept);
    for (Key& key : scratch_.keys) {
      if (key == boundary.key && --left < 0) {
        key = kKeyEnd;
      }
    }
  }
}

// The largest key such that the kept tokens with smaller keys measure less than target, found by bisection. Once few
// tokens are left between the two sides, they are copied out of the row: the further steps cost nearly nothing.
Boundary Row::find_boundary(Measure measure, double target) {
  constexpr std::int64_t kNearFraction = 8;
  Tokens near = all();
  Mass skipped{};  // what is likelier than all of `near`
  Key begin = 0, end = end_;
  Mass below_begin{}, below_end = mass_below(near, end);
  while (end - begin > 1) {
    const std::int64_t num_near = below_end.count - below_begin.count;
    if (near.size > kRowPadding && num_near * kNearFraction <= static_cast<std::int64_t>(near.size)) {
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
  const Key* tie = std::find(near.keys, near.keys + near.size, begin);
  const float tie_weight = tie == near.keys + near.size ? 0 : near.weights[tie - near.keys];
  return {begin, below_begin, below_end.count - below_begin.count, tie_weight};
}

Tokens Row::copy_between(const Tokens& tokens, Key begin, Key end) {
  Key* keys = scratch_.near_keys.data();
  float* weights = scratch_.near_weights.data();
  const std::size_t size = kernels_.select(tokens.keys, tokens.weights, tokens.size, begin, end, keys, weights);
  return {keys, weights, padded(size)};
}

// Inverse of the cumulative distribution: the first token, in the order of ids, at which the weight of the kept tokens
// exceeds a share u of the whole. In two steps, first over blocks, then within one.
std::uint32_t Row::draw(float u) {
  scratch_.block_weights.clear();
  double total = 0;
  for (std::size_t begin = 0; begin < size_; begin += kRowPadding) {
    const Tokens block{scratch_.keys.data() + begin, scratch_.weights.data() + begin, kRowPadding};
    scratch_.block_weights.push_back(mass_below(block, end_).weight);
    total += scratch_.block_weights.back();
  }
  const double target = u * total;
  double reached = 0;
  std::size_t block = 0;
  while (reached + scratch_.block_weights[block] <= target) {
    reached += scratch_.block_weights[block++];
  }
  // The block's own sum was rounded differently: if the target is not quite reached, it is the block's last kept token.
  std::size_t last = block * kRowPadding;
  for (std::size_t id = last; id < (block + 1) * kRowPadding && reached <= target; ++id) {
    if (scratch_.keys[id] < end_ && scratch_.weights[id] > 0) {
      reached += scratch_.weights[id];
      last = id;
    }
  }
  return static_cast<std::uint32_t>(last);
}

}  // namespace

std::span<const RowKernels* const> row_kernels() {
#if defined(__x86_64__)
  static const RowKernels* const all[] = {&kRowKernelsAvx2, &kRowKernelsPortable};
  return std::span(all).subspan(cpu_has_avx2() ? 0 : 1);
#else
  static const RowKernels* const all[] = {&kRowKernelsPortable};
  return all;
#endif
}

std::uint32_t sample_row(std::span<const float> logits, const RowParams& params, RowScratch& scratch,
                         const RowKernels& kernels) {
  const RowMax max = kernels.max(logits.data(), logits.size());
  if (max.has_nan || !std::isfinite(max.value)) {
    return kInvalidToken;
  }
  if (!(params.temperature > 0)) {
    return static_cast<std::uint32_t>(kernels.find(logits.data(), logits.size(), max.value));
  }
  Row row(logits, max.value, params.temperature, scratch, kernels);
  if (params.top_k > 0 && static_cast<std::size_t>(params.top_k) < logits.size()) {
    row.keep_top_k(params.top_k);
  }
  if (params.top_p < 1) {
    row.keep_top_p(params.top_p);
  }
  if (params.min_p > 0) {
    row.keep_min_p(params.min_p);
  }
  return row.draw(philox_uniform(params.seed, params.position));
}

}  // namespace mlx_server
