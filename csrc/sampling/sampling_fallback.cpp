#include <limits>

#include <mlx/ops.h>

#include "sampling/philox.h"
#include "sampling/sample_row.h"
#include "sampling/sampling.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

mx::array column(const mx::array& param, mx::Stream s) { return mx::expand_dims(param, 1, s); }  // [B] -> [B, 1]

mx::array mass_below(const mx::array& keys, const mx::array& mass, const mx::array& end, mx::Stream s) {
  return mx::sum(mx::where(mx::less(keys, end, s), mass, mx::array(0.0f), s), 1, /*keepdims=*/true, s);  // [B, 1]
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
  const auto ties_before = mx::cumsum(mx::where(is_tie, mass, mx::array(0.0f), s), 1, /*reverse=*/false,
                                      /*inclusive=*/false, s);
  // The first tie is kept whatever rounding says.
  const auto kept_tie = mx::logical_and(
      is_tie, mx::logical_or(mx::less(ties_before, missing, s), mx::equal(ties_before, mx::array(0.0f), s), s), s);
  return mx::logical_or(mx::less(keys, boundary, s), kept_tie, s);
}

// philox_uniform of each row, [B, 1]. The two products of a round are computed side by side.
mx::array uniform(const mx::array& seed, const mx::array& position, mx::Stream s) {
  const int batch_size = seed.shape(0);
  auto part = [&](const mx::array& words, int i) { return mx::slice(words, {0, 0, i}, {batch_size, 2, i + 1}, s); };
  const auto multipliers = mx::array({kPhiloxMultipliers[0], kPhiloxMultipliers[1]}, {1, 2, 1}, mx::uint32);
  const auto weyl = mx::array({kPhiloxWeyl[0], kPhiloxWeyl[1]}, {1, 2, 1}, mx::uint32);
  const auto wide_multipliers = mx::astype(multipliers, mx::uint64, s);

  auto key = mx::reshape(mx::view(seed, mx::uint32, s), {batch_size, 2, 1}, s);
  const auto zero = mx::zeros({batch_size, 1}, mx::uint32, s);
  auto even = mx::expand_dims(mx::concatenate({column(position, s), zero}, 1, s), 2, s);  // counters 0, 2: [B, 2, 1]
  auto odd = mx::zeros({batch_size, 2, 1}, mx::uint32, s);                                // counters 1, 3
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const auto products = mx::multiply(mx::astype(even, mx::uint64, s), wide_multipliers, s);
    const auto swapped = mx::slice(products, {0, 1, 0}, {batch_size, -3, 1}, {1, -1, 1}, s);
    const auto halves = mx::view(mx::contiguous(swapped, false, s), mx::uint32, s);  // [B, 2, low and high]
    even = mx::bitwise_xor(mx::bitwise_xor(part(halves, 1), odd, s), key, s);
    odd = part(halves, 0);
    key = mx::add(key, weyl, s);
  }
  const auto word = mx::slice(even, {0, 0, 0}, {batch_size, 1, 1}, s);
  const auto fraction = mx::astype(mx::right_shift(word, mx::array(8u), s), mx::float32, s);
  return mx::reshape(mx::multiply(fraction, mx::array(0x1p-24f), s), {batch_size, 1}, s);
}

// The first id at which the running sum of weights [B, V] exceeds a share u [B, 1] of the whole  ->  uint32 [B]
mx::array draw(const mx::array& weights, const mx::array& u, mx::Stream s) {
  const auto is_kept = mx::greater(weights, mx::array(0.0f), s);
  const auto sums = mx::where(is_kept, mx::cumsum(weights, 1, false, true, s), mx::array(0.0f), s);
  const auto target = mx::multiply(u, mx::max(sums, 1, /*keepdims=*/true, s), s);
  return mx::argmax(mx::greater(sums, target, s), 1, false, s);
}

}  // namespace

mx::array sample_fallback(const mx::array& logits, const SampleParams& params, mx::StreamOrDevice s_) {
  check_sample(logits, params);
  const mx::Stream s = mx::to_stream(s_);
  if (logits.shape(0) == 0) {
    return mx::zeros({0}, mx::uint32, s);
  }
  const auto x = mx::astype(logits, mx::float32, s);
  const auto max = mx::max(x, 1, /*keepdims=*/true, s);
  const auto temperature = column(params.temperature, s);
  const auto is_greedy = mx::logical_not(mx::greater(params.temperature, mx::array(0.0f), s), s);

  // Keys order tokens by likelihood, see sampling/row_kernels.h.
  const auto divisor = mx::where(mx::greater(temperature, mx::array(0.0f), s), temperature, mx::array(1.0f), s);
  const auto scaled = mx::divide(mx::subtract(x, max, s), divisor, s);  // [B, V]
  const auto keys = mx::view(mx::abs(scaled, s), mx::uint32, s);
  auto weights = mx::exp(scaled, s);
  auto keep = [&](const mx::array& kept) { weights = mx::where(kept, weights, mx::array(0.0f), s); };

  const auto k = mx::astype(column(params.top_k, s), mx::float32, s);
  const auto all = mx::array(kInfinity);
  keep(keep_until(keys, mx::ones_like(weights, s), mx::where(mx::greater(k, mx::array(0.0f), s), k, all, s), s));

  const auto p = column(params.top_p, s);
  const auto share = mx::multiply(p, mx::sum(weights, 1, true, s), s);
  keep(keep_until(keys, weights, mx::where(mx::less(p, mx::array(1.0f), s), share, all, s), s));

  const auto min_p = mx::minimum(column(params.min_p, s), mx::array(1.0f), s);
  keep(mx::greater_equal(scaled, mx::log(min_p, s), s));

  const auto drawn = draw(weights, uniform(params.seed, params.position, s), s);
  const auto token = mx::where(is_greedy, mx::argmax(x, 1, false, s), drawn, s);
  const auto no_nan_or_inf = mx::all(mx::less(x, mx::array(kInfinity), s), 1, false, s);
  const auto is_valid =
      mx::logical_and(no_nan_or_inf, mx::greater(mx::squeeze(max, 1, s), mx::array(-kInfinity), s), s);
  return mx::where(is_valid, token, mx::array(kInvalidToken), s);
}

}  // namespace mlx_server
