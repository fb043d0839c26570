#include "sampling/sample_row.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/cpu_info.h"
#include "sampling/adjust_row.h"
#include "sampling/candidates.h"
#include "sampling/philox.h"

namespace mlx_server {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Scored {
  std::uint32_t id;
  float scaled;  // log-probability up to a constant
};

// Writes the log-probabilities of the token and of the likeliest of `tokens`, which are reordered.
void write_logprobs(std::vector<Scored>& tokens, double log_weight, float token_scaled, int num_top,
                    SampledToken& out) {
  const auto logprob = [&](float scaled) { return static_cast<float>(scaled - log_weight); };
  out.logprob = logprob(token_scaled);
  const auto by_likelihood = [](const Scored& a, const Scored& b) {
    return a.scaled > b.scaled || (a.scaled == b.scaled && a.id < b.id);
  };
  const std::size_t count = std::min(tokens.size(), static_cast<std::size_t>(std::min(num_top, kMaxTopLogprobs)));
  std::partial_sort(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(count), tokens.end(), by_likelihood);
  for (std::size_t i = 0; i < count && tokens[i].scaled > -kInfinity; ++i) {
    out.top_ids[i] = tokens[i].id;
    out.top_logprobs[i] = logprob(tokens[i].scaled);
  }
}

// Of all tokens of the row.
void score(const Logits& logits, float temperature, int num_top, RowScratch& scratch, const RowKernels& kernels,
           SampledToken& out) {
  const auto scaled = [&](float logit) { return (logit - logits.max) / temperature; };
  const double log_weight = std::log(sum_weights(logits, temperature, scratch, kernels));
  std::vector<Scored> likeliest;
  if (num_top > 0) {
    const bool has_blocks = static_cast<std::size_t>(num_top) <= num_blocks(logits.size);
    const float lowest = has_blocks ? kth_largest_block(logits, num_top, scratch) : -kInfinity;
    const std::size_t count = kernels.at_least(logits.values, logits.size, logits.block_maxima, lowest,
                                               scratch.ids.data(), scratch.values.data());
    for (std::size_t i = 0; i < count; ++i) {
      likeliest.push_back({static_cast<std::uint32_t>(scratch.ids[i]), scaled(scratch.values[i])});
    }
  }
  write_logprobs(likeliest, log_weight, scaled(logits.values[out.id]), num_top, out);
}

// Of what the filters have left.
void score(const Candidates& candidates, int num_top, SampledToken& out) {
  std::vector<Scored> kept;
  float token_scaled = -kInfinity;
  candidates.for_each([&](std::uint32_t id, float scaled) {
    kept.push_back({id, scaled});
    token_scaled = id == out.id ? scaled : token_scaled;
  });
  write_logprobs(kept, std::log(candidates.total_weight()), token_scaled, num_top, out);
}

// The token, and its log-probabilities if they are asked for after the filters.
SampledToken choose(const Logits& logits, const RowParams& params, bool wants_logprobs, RowScratch& scratch,
                    const RowKernels& kernels) {
  SampledToken out;
  const bool is_given = params.given_token >= 0;
  if (is_given) {
    out.id = std::min(static_cast<std::uint32_t>(params.given_token), static_cast<std::uint32_t>(logits.size - 1));
  }
  const bool is_greedy = !(params.temperature > 0);
  const float temperature = is_greedy ? 1 : params.temperature;
  const Uniforms u = philox_uniforms(params.seed, params.position);
  if (!is_greedy && has_filters(params, u.xtc) && (!is_given || wants_logprobs)) {
    const Candidates candidates(logits, params, u.xtc, scratch, kernels);
    out.id = is_given ? out.id : candidates.draw(u.draw);
    if (wants_logprobs) {
      score(candidates, params.num_logprobs, out);
    }
    return out;
  }
  if (!is_given) {
    out.id = is_greedy ? static_cast<std::uint32_t>(kernels.find(logits.values, logits.size, logits.max))
                       : draw_unfiltered(logits, temperature, u.draw, scratch, kernels);
  }
  if (wants_logprobs) {
    score(logits, temperature, params.num_logprobs, scratch, kernels, out);
  }
  return out;
}

}  // namespace

void RowScratch::resize(std::size_t vocab_size) {
  const std::size_t blocks = num_blocks(vocab_size), size = padded(vocab_size);
  logits.resize(vocab_size);
  for (auto* array : {&raw_block_maxima, &block_maxima}) {
    array->resize(blocks);
  }
  for (auto* array : {&keys, &near_keys, &distances}) {
    array->resize(size);
  }
  for (auto* array : {&values, &weights, &near_weights}) {
    array->resize(size);
  }
  ids.resize(size);
  counts.resize(vocab_size);
}

std::span<const RowKernels* const> row_kernels() {
#if defined(__x86_64__)
  static const RowKernels* const all[] = {&kRowKernelsAvx512, &kRowKernelsAvx2, &kRowKernelsPortable};
  return std::span(all).subspan(cpu_has_avx512() ? 0 : cpu_has_avx2() ? 1 : 2);
#else
  static const RowKernels* const all[] = {&kRowKernelsPortable};
  return all;
#endif
}

SampledToken sample_row(std::span<const float> logits, const RowParams& params, const SampleTables& tables,
                        RowScratch& scratch, const RowKernels& kernels) {
  const std::size_t size = logits.size();
  scratch.resize(size);
  const RowMax raw_max = kernels.max(logits.data(), size, scratch.raw_block_maxima.data());
  if (raw_max.has_nan || !std::isfinite(raw_max.value)) {
    return {};
  }
  const Logits raw{logits.data(), size, raw_max.value, scratch.raw_block_maxima.data()};
  Logits adjusted = raw;
  if (is_adjusted(params)) {
    adjust_row(logits, params, tables, scratch, kernels);
    const RowMax max = kernels.max(scratch.logits.data(), size, scratch.block_maxima.data());
    if (!std::isfinite(max.value)) {
      return {};
    }
    adjusted = {scratch.logits.data(), size, max.value, scratch.block_maxima.data()};
  }
  const bool has_logprobs = params.num_logprobs >= 0, processed = params.processed_logprobs != 0;
  SampledToken token = choose(adjusted, params, has_logprobs && processed, scratch, kernels);
  if (has_logprobs && !processed) {
    score(raw, 1, params.num_logprobs, scratch, kernels, token);
  }
  return token;
}

}  // namespace mlx_server
