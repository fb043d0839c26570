#include <cstddef>
#include <limits>

#include <mlx/ops.h>

#include "sampling/adjust_row.h"
#include "sampling/philox.h"
#include "sampling/sample_row.h"
#include "sampling/sampling.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The rows' parameters as columns.
class Params {
 public:
  Params(const mx::array& rows, mx::Stream s) : rows_(rows), s_(s) {}

  mx::array words(std::size_t offset, int count) const {  // offset in RowParams  ->  uint32 [B, count]
    const int word = static_cast<int>(offset / 4);
    return mx::slice(rows_, {0, word}, {rows_.shape(0), word + count}, s_);
  }
  mx::array integer(std::size_t offset) const { return mx::view(words(offset, 1), mx::int32, s_); }     // [B, 1]
  mx::array floating(std::size_t offset) const { return mx::view(words(offset, 1), mx::float32, s_); }  // [B, 1]

 private:
  mx::array rows_;
  mx::Stream s_;
};

#define INTEGER(name) params.integer(offsetof(RowParams, name))
#define FLOATING(name) params.floating(offsetof(RowParams, name))

mx::array select(const mx::array& condition, const mx::array& x, float otherwise, mx::Stream s) {
  return mx::where(condition, x, mx::array(otherwise), s);
}

mx::array positive(const mx::array& x, mx::Stream s) { return mx::greater(x, mx::array(0, x.dtype()), s); }

mx::array sum_rows(const mx::array& x, mx::Stream s) { return mx::sum(x, 1, /*keepdims=*/true, s); }  // [B, 1]

mx::array both(const mx::array& a, const mx::array& b, mx::Stream s) { return mx::logical_and(a, b, s); }

// --- Step 1: single logits change ---

// Which of n positions lie in [begin, end): begin, end [B, 1]  ->  bool [B, n]
mx::array in_range(int n, const mx::array& begin, const mx::array& end, mx::Stream s) {
  const auto at = mx::arange(n, s);
  return both(mx::greater_equal(at, begin, s), mx::less(at, end, s), s);
}

// For each token the sum of `values` of its ids, where `counts`.  ids [n], values [n], counts [B, n]  ->  [B, V]
mx::array sum_at(const mx::array& ids, const mx::array& values, const mx::array& counts, int vocab_size, mx::Stream s) {
  const int batch_size = counts.shape(0);
  const auto zeros = mx::zeros({batch_size, vocab_size}, mx::float32, s);
  if (ids.size() == 0) {
    return zeros;
  }
  const auto is_id = both(mx::greater_equal(ids, mx::array(0), s), mx::less(ids, mx::array(vocab_size), s), s);
  const auto indices = mx::broadcast_to(mx::where(is_id, ids, mx::array(0), s), counts.shape(), s);
  const auto updates = mx::where(both(counts, is_id, s), values, mx::array(0.0f), s);
  return mx::scatter_add_axis(zeros, indices, updates, 1, s);
}

// How often each token is in its row's range: [B, V] float32
mx::array count_tokens(const mx::array& ids, const mx::array& begin, const mx::array& end, int vocab_size,
                       mx::Stream s) {
  const auto ones = mx::ones(ids.shape(), mx::float32, s);
  return sum_at(ids, ones, in_range(ids.shape(0), begin, end, s), vocab_size, s);
}

// Whether a token [B, n] is one of its row's breakers.
mx::array is_breaker(const mx::array& tokens, const SampleInputs& in, const Params& params, mx::Stream s) {
  if (in.breakers.size() == 0) {
    return mx::zeros(tokens.shape(), mx::bool_, s);
  }
  const auto is_its_own = in_range(in.breakers.shape(0), INTEGER(breakers_begin), INTEGER(breakers_end), s);  // [B, S]
  const auto equal = mx::equal(mx::expand_dims(tokens, 2, s), in.breakers, s);
  return mx::any(both(equal, mx::expand_dims(is_its_own, 1, s), s), 2, false, s);
}

// The length of the repetition that each token would make longer: float32 [B, V], 0 if there is none.
mx::array repetition_lengths(const SampleInputs& in, const Params& params, int vocab_size, mx::Stream s) {
  const int batch_size = in.rows.shape(0), n = in.history.shape(0);
  const auto begin = INTEGER(dry_begin), end = INTEGER(history_end);
  const auto at = mx::arange(n, s);
  const auto token_at = [&](const mx::array& index) {
    return mx::take(in.history, mx::clip(index, mx::array(0), mx::array(n - 1), s), s);
  };
  auto lengths = mx::zeros({batch_size, n}, mx::int32, s);
  auto goes_on = mx::less(at, mx::subtract(end, mx::array(1), s), s);  // [B, n]
  for (int k = 0; k < kMaxDryLength; ++k) {
    const auto earlier = mx::subtract(at, mx::array(k), s);
    const auto last = token_at(mx::subtract(end, mx::array(k + 1), s));  // [B, 1]
    const auto is_same = both(mx::greater_equal(earlier, begin, s), mx::equal(token_at(earlier), last, s), s);
    goes_on = both(goes_on, both(is_same, mx::logical_not(is_breaker(last, in, params, s), s), s), s);
    lengths = mx::add(lengths, mx::astype(goes_on, mx::int32, s), s);
  }
  const auto next = token_at(mx::add(at, mx::array(1), s));
  const auto is_id = both(mx::greater_equal(next, mx::array(0), s), mx::less(next, mx::array(vocab_size), s), s);
  const auto columns = mx::broadcast_to(mx::where(is_id, next, mx::array(0), s), {batch_size, n}, s);
  const auto rows = mx::broadcast_to(mx::expand_dims(mx::arange(batch_size, s), 1, s), {batch_size, n}, s);
  const auto updates = mx::where(is_id, lengths, mx::array(0), s);
  return mx::scatter_max(mx::zeros({batch_size, vocab_size}, mx::int32, s), {rows, columns},
                         mx::reshape(updates, {batch_size, n, 1, 1}, s), {0, 1}, s);
}

mx::array dry_penalties(const SampleInputs& in, const Params& params, int vocab_size, mx::Stream s) {
  const auto lengths = repetition_lengths(in, params, vocab_size, s);
  const auto allowed = INTEGER(dry_allowed_length), base = FLOATING(dry_base);
  auto penalty = mx::broadcast_to(FLOATING(dry_multiplier), lengths.shape(), s);
  for (int i = 0; i < kMaxDryLength; ++i) {
    const auto counts = both(mx::less(mx::array(i), lengths, s), mx::greater_equal(mx::array(i), allowed, s), s);
    penalty = mx::where(counts, mx::multiply(penalty, base, s), penalty, s);
  }
  const auto breakers = count_tokens(in.breakers, INTEGER(breakers_begin), INTEGER(breakers_end), vocab_size, s);
  const auto is_penalized = both(both(positive(lengths, s), mx::greater_equal(lengths, allowed, s), s),
                                 mx::logical_not(positive(breakers, s), s), s);
  return select(is_penalized, mx::minimum(penalty, mx::array(std::numeric_limits<float>::max()), s), 0, s);
}

mx::array add_bias_and_mask(mx::array x, const SampleInputs& in, const Params& params, mx::Stream s) {
  const int vocab_size = x.shape(1);
  if (in.bias_ids.size() > 0) {
    const auto is_its_own = in_range(in.bias_ids.shape(0), INTEGER(bias_begin), INTEGER(bias_end), s);
    x = mx::add(x, sum_at(in.bias_ids, in.bias_values, is_its_own, vocab_size, s), s);
  }
  if (in.masks.size() > 0) {
    const auto mask_row = INTEGER(mask_row);
    const auto words = mx::take(in.masks, mx::maximum(mx::squeeze(mask_row, 1, s), mx::array(0), s), 0, s);
    const auto bits =
        mx::bitwise_and(mx::right_shift(mx::expand_dims(words, 2, s), mx::arange(0, 32, mx::uint32, s), s),
                        mx::array(1u), s);  // [B, words, 32]
    const auto is_allowed = mx::slice(mx::flatten(bits, 1, 2, s), {0, 0}, x.shape(), s);
    const auto passes = mx::logical_or(mx::less(mask_row, mx::array(0), s), positive(is_allowed, s), s);
    x = select(passes, x, -kInfinity, s);
  }
  return x;
}

mx::array adjust(mx::array x, const SampleInputs& in, const Params& params, mx::Stream s) {
  const int vocab_size = x.shape(1);
  x = add_bias_and_mask(x, in, params, s);
  if (in.history.size() == 0) {
    return x;
  }
  const auto count_from = [&](const mx::array& begin) {
    return count_tokens(in.history, begin, INTEGER(history_end), vocab_size, s);
  };
  const auto penalty = FLOATING(repetition_penalty);
  const auto penalized = mx::where(positive(x, s), mx::divide(x, penalty, s), mx::multiply(x, penalty, s), s);
  x = mx::where(positive(count_from(INTEGER(repetition_begin)), s), penalized, x, s);
  const auto counts = count_from(INTEGER(output_begin));
  const auto penalties = mx::add(mx::multiply(FLOATING(frequency_penalty), counts, s), FLOATING(presence_penalty), s);
  x = mx::subtract(x, select(positive(counts, s), penalties, 0, s), s);
  return mx::subtract(x, dry_penalties(in, params, vocab_size, s), s);
}

// --- Steps 3 to 5: filters ---

mx::array mass_below(const mx::array& keys, const mx::array& mass, const mx::array& end, mx::Stream s) {
  return sum_rows(select(mx::less(keys, end, s), mass, 0, s), s);
}

// Which tokens to keep so that their mass reaches target: smallest keys first, lower ids first among equals.
// keys uint32 [B, V], mass float32 [B, V], target float32 [B, 1]  ->  bool [B, V]
mx::array keep_until(const mx::array& keys, const mx::array& mass, const mx::array& target, mx::Stream s) {
  // The largest key such that less than target lies below it, bit by bit: no sort of the vocabulary.
  auto boundary = mx::zeros({keys.shape(0), 1}, mx::uint32, s);
  for (int bit = 30; bit >= 0; --bit) {
    const auto candidate = mx::bitwise_or(boundary, mx::array(1u << bit), s);
    boundary = mx::where(mx::less(mass_below(keys, mass, candidate, s), target, s), candidate, boundary, s);
  }
  const auto missing = mx::subtract(target, mass_below(keys, mass, boundary, s), s);
  const auto is_tie = mx::equal(keys, boundary, s);
  const auto ties_before = mx::cumsum(select(is_tie, mass, 0, s), 1, /*reverse=*/false, /*inclusive=*/false, s);
  // The first tie is kept whatever rounding says.
  const auto kept_tie =
      both(is_tie, mx::logical_or(mx::less(ties_before, missing, s), mx::equal(ties_before, mx::array(0.0f), s), s), s);
  return mx::logical_or(mx::less(keys, boundary, s), kept_tie, s);
}

// The same for a share [B, 1] of the mass; shares of 1 keep all.
mx::array keep_share(const mx::array& keys, const mx::array& mass, const mx::array& share, mx::Stream s) {
  const auto target = mx::multiply(share, sum_rows(mass, s), s);
  return keep_until(keys, mass, select(mx::less(share, mx::array(1.0f), s), target, kInfinity, s), s);
}

// How far below the largest logit top-n-sigma keeps tokens, [B, 1]; infinity where it is off.
mx::array sigma_distance(const mx::array& x, const mx::array& max, const mx::array& n, mx::Stream s) {
  const auto is_finite = mx::greater(x, mx::array(-kInfinity), s);
  const auto num_finite = sum_rows(mx::astype(is_finite, mx::float32, s), s);
  const auto distance = select(is_finite, mx::subtract(max, x, s), 0, s);
  const auto mean = mx::divide(sum_rows(distance, s), num_finite, s);
  const auto deviation = select(is_finite, mx::subtract(distance, mean, s), 0, s);
  const auto variance = mx::divide(sum_rows(mx::square(deviation, s), s), num_finite, s);
  return select(positive(n, s), mx::multiply(n, mx::sqrt(variance, s), s), kInfinity, s);
}

// Which tokens XTC leaves.
mx::array exclude_top_choices(const mx::array& keys, const mx::array& weights, const mx::array& threshold,
                              mx::Stream s) {
  const auto least = mx::multiply(threshold, sum_rows(weights, s), s);
  const auto is_choice = both(positive(weights, s), mx::greater_equal(weights, least, s), s);
  const auto none = mx::array(-1);
  const auto signed_keys = mx::view(keys, mx::int32, s);
  const auto last_key = mx::max(mx::where(is_choice, signed_keys, none, s), 1, true, s);
  const auto ids = mx::arange(keys.shape(1), s);
  const auto is_last_key = both(is_choice, mx::equal(signed_keys, last_key, s), s);
  const auto last_id = mx::max(mx::where(is_last_key, ids, none, s), 1, true, s);
  return mx::logical_or(mx::logical_not(is_choice, s), mx::equal(ids, last_id, s), s);
}

// Which tokens are kept, bool [B, V]. scaled [B, V], distance [B, 1] of top-n-sigma, xtc_u [B, 1].
mx::array filter(const mx::array& scaled, const mx::array& distance, const mx::array& xtc_u, const Params& params,
                 mx::Stream s) {
  const auto below = mx::abs(scaled, s);
  const auto keys = mx::view(below, mx::uint32, s);  // order tokens by likelihood, see row_kernels.h
  const auto all_weights = mx::exp(scaled, s);
  auto kept = both(mx::less(below, mx::array(kInfinity), s), mx::less_equal(below, distance, s), s);
  auto weights = select(kept, all_weights, 0, s);
  const auto keep = [&](const mx::array& passes) {
    kept = both(kept, passes, s);
    weights = select(kept, all_weights, 0, s);
  };

  const auto k = mx::astype(INTEGER(top_k), mx::float32, s);
  keep(keep_until(keys, mx::astype(kept, mx::float32, s), select(positive(k, s), k, kInfinity, s), s));

  const auto weighted = mx::multiply(weights, select(kept, below, 0, s), s);
  const auto mean = mx::divide(sum_rows(weighted, s), sum_rows(weights, s), s);
  const auto typical_keys = mx::view(mx::abs(mx::subtract(below, mean, s), s), mx::uint32, s);
  keep(keep_share(typical_keys, weights, FLOATING(typical_p), s));

  keep(keep_share(keys, weights, FLOATING(top_p), s));

  const auto likeliest = mx::min(select(kept, below, kInfinity, s), 1, true, s);
  const auto min_p = mx::minimum(FLOATING(min_p), mx::array(1.0f), s);
  keep(mx::less_equal(below, mx::add(likeliest, mx::abs(mx::log(min_p, s), s), s), s));

  const auto is_off = mx::greater_equal(xtc_u, FLOATING(xtc_probability), s);
  keep(mx::logical_or(is_off, exclude_top_choices(keys, weights, FLOATING(xtc_threshold), s), s));
  return kept;
}

// --- Step 6: the draw ---

// philox_uniforms of each row, [B, 1] each. The two products of a round are computed side by side.
std::pair<mx::array, mx::array> uniforms(const Params& params, mx::Stream s) {
  const auto position = params.words(offsetof(RowParams, position), 1);
  const int batch_size = position.shape(0);
  auto part = [&](const mx::array& words, int i) { return mx::slice(words, {0, 0, i}, {batch_size, 2, i + 1}, s); };
  const auto multipliers = mx::array({kPhiloxMultipliers[0], kPhiloxMultipliers[1]}, {1, 2, 1}, mx::uint32);
  const auto weyl = mx::array({kPhiloxWeyl[0], kPhiloxWeyl[1]}, {1, 2, 1}, mx::uint32);
  const auto wide_multipliers = mx::astype(multipliers, mx::uint64, s);

  auto key = mx::expand_dims(params.words(offsetof(RowParams, seed), 2), 2, s);
  const auto zero = mx::zeros({batch_size, 1}, mx::uint32, s);
  auto even = mx::expand_dims(mx::concatenate({position, zero}, 1, s), 2, s);  // counters 0, 2: [B, 2, 1]
  auto odd = mx::zeros({batch_size, 2, 1}, mx::uint32, s);                     // counters 1, 3
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const auto products = mx::multiply(mx::astype(even, mx::uint64, s), wide_multipliers, s);
    const auto swapped = mx::slice(products, {0, 1, 0}, {batch_size, -3, 1}, {1, -1, 1}, s);
    const auto halves = mx::view(mx::contiguous(swapped, false, s), mx::uint32, s);  // [B, 2, low and high]
    even = mx::bitwise_xor(mx::bitwise_xor(part(halves, 1), odd, s), key, s);
    odd = part(halves, 0);
    key = mx::add(key, weyl, s);
  }
  const auto fraction = [&](const mx::array& words) {
    const auto word = mx::slice(words, {0, 0, 0}, {batch_size, 1, 1}, s);
    const auto bits = mx::astype(mx::right_shift(word, mx::array(8u), s), mx::float32, s);
    return mx::reshape(mx::multiply(bits, mx::array(0x1p-24f), s), {batch_size, 1}, s);
  };
  return {fraction(even), fraction(odd)};
}

// The first id at which the running sum of weights [B, V] exceeds a share u [B, 1] of the whole  ->  uint32 [B, 1]
mx::array draw(const mx::array& weights, const mx::array& u, mx::Stream s) {
  const auto sums = select(positive(weights, s), mx::cumsum(weights, 1, false, true, s), 0, s);
  const auto target = mx::multiply(u, mx::max(sums, 1, /*keepdims=*/true, s), s);
  return mx::argmax(mx::greater(sums, target, s), 1, true, s);
}

// --- Log-probabilities ---

// scaled [B, V], -infinity where a token is not kept; token [B, 1]
Sampled score(const mx::array& token, const mx::array& scaled, const Params& params, const mx::array& is_valid,
              mx::Stream s) {
  const auto logprobs = mx::subtract(scaled, mx::log(sum_rows(mx::exp(scaled, s), s), s), s);
  const auto num_top = INTEGER(num_logprobs);
  const auto none = mx::array(-kInfinity);
  const auto ids = mx::arange(0, scaled.shape(1), mx::uint32, s);
  const auto index = mx::minimum(token, mx::array(static_cast<std::uint32_t>(scaled.shape(1) - 1)), s);
  const auto is_scored = both(is_valid, mx::greater_equal(num_top, mx::array(0), s), s);
  const auto logprob = select(is_scored, mx::take_along_axis(logprobs, index, 1, s), 0, s);
  auto left = logprobs;
  std::vector<mx::array> top_ids, top_logprobs;
  for (int i = 0; i < kMaxTopLogprobs; ++i) {
    const auto best = mx::argmax(left, 1, /*keepdims=*/true, s);
    const auto value = select(both(is_valid, mx::greater(num_top, mx::array(i), s), s),
                              mx::take_along_axis(left, best, 1, s), -kInfinity, s);
    top_ids.push_back(mx::where(mx::greater(value, none, s), best, mx::array(0u), s));
    top_logprobs.push_back(value);
    left = mx::where(mx::equal(ids, best, s), none, left, s);
  }
  return {mx::squeeze(token, 1, s), mx::squeeze(logprob, 1, s), mx::concatenate(top_ids, 1, s),
          mx::concatenate(top_logprobs, 1, s)};
}

}  // namespace

Sampled sample_fallback(const SampleInputs& in, mx::StreamOrDevice s_) {
  check_sample(in);
  const mx::Stream s = mx::to_stream(s_);
  const int batch_size = in.logits.shape(0), vocab_size = in.logits.shape(1);
  if (batch_size == 0) {
    return {mx::zeros({0}, mx::uint32, s), mx::zeros({0}, mx::float32, s),
            mx::zeros({0, kMaxTopLogprobs}, mx::uint32, s), mx::zeros({0, kMaxTopLogprobs}, mx::float32, s)};
  }
  const Params params(in.rows, s);
  const auto raw = mx::astype(in.logits, mx::float32, s);
  const auto x = adjust(raw, in, params, s);
  const auto max = mx::max(x, 1, /*keepdims=*/true, s);
  const auto temperature = FLOATING(temperature);
  const auto is_greedy = mx::logical_not(positive(temperature, s), s);
  const auto divisor = mx::where(is_greedy, mx::array(1.0f), temperature, s);
  const auto [u, xtc_u] = uniforms(params, s);
  const auto scaled = mx::divide(mx::subtract(x, max, s), divisor, s);
  const auto distance = mx::divide(sigma_distance(x, max, FLOATING(top_n_sigma), s), divisor, s);
  const auto kept = mx::logical_or(is_greedy, filter(scaled, distance, xtc_u, params, s), s);
  const auto weights = select(kept, mx::exp(scaled, s), 0, s);

  const auto chosen = mx::where(is_greedy, mx::argmax(x, 1, true, s), draw(weights, u, s), s);
  const auto given = INTEGER(given_token);
  const auto token = mx::where(mx::less(given, mx::array(0), s), chosen,
                               mx::astype(mx::minimum(given, mx::array(vocab_size - 1), s), mx::uint32, s), s);
  const auto raw_max = mx::max(raw, 1, true, s);
  const auto is_valid = both(mx::all(mx::less(raw, mx::array(kInfinity), s), 1, true, s),
                             both(mx::isfinite(raw_max, s), mx::isfinite(max, s), s), s);

  const auto is_processed = mx::not_equal(INTEGER(processed_logprobs), mx::array(0), s);
  const auto scored = mx::where(is_processed, select(kept, scaled, -kInfinity, s), mx::subtract(raw, raw_max, s), s);
  return score(mx::where(is_valid, token, mx::array(kInvalidToken), s), scored, params, is_valid, s);
}

}  // namespace mlx_server
