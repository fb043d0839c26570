// Samples one token from one row of logits on a CPU: plain pointers, no MLX. sampling.h says what is computed.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "sampling/row_kernels.h"

namespace mlx_server {

// A row's parameters, as the rows of SampleInputs::rows hold them: 32-bit words in this order.
struct RowParams {
  std::array<std::uint32_t, 2> seed{};  // low word first
  std::uint32_t position = 0;
  std::int32_t given_token = -1;   // a token that is not drawn, only scored; -1: draw
  std::int32_t num_logprobs = -1;  // log-probabilities: -1 none, 0 of the token, N of the N likeliest as well
  std::int32_t processed_logprobs = 0;
  std::int32_t mask_row = -1;                         // of SampleInputs::masks; -1: all tokens are allowed
  std::int32_t bias_begin = 0, bias_end = 0;          // of bias_ids and bias_values
  std::int32_t repetition_begin = 0;                  // repetition_penalty: history from here to history_end
  std::int32_t output_begin = 0;                      // frequency_penalty, presence_penalty
  std::int32_t dry_begin = 0;                         // dry_multiplier
  std::int32_t history_end = 0;                       // of history
  std::int32_t breakers_begin = 0, breakers_end = 0;  // of breakers
  float repetition_penalty = 1;
  float frequency_penalty = 0, presence_penalty = 0;
  float dry_multiplier = 0, dry_base = 1.75f;
  std::int32_t dry_allowed_length = 2;
  float top_n_sigma = 0;
  float temperature = 1;
  std::int32_t top_k = 0;
  float typical_p = 1;
  float top_p = 1;
  float min_p = 0;
  float xtc_probability = 0, xtc_threshold = 0.1f;
};
inline constexpr int kRowParamsWords = 29;
static_assert(sizeof(RowParams) == 4 * kRowParamsWords);

// What all rows of a batch share.
struct SampleTables {
  const std::uint32_t* masks;  // [M, mask_words]
  std::size_t mask_words;
  const std::int32_t* bias_ids;
  const float* bias_values;
  const std::int32_t* history;
  const std::int32_t* breakers;
};

inline constexpr int kMaxTopLogprobs = 20;
// What a row gives whose logits are not all below +infinity (or NaN), or of which nothing finite is left.
inline constexpr std::uint32_t kInvalidToken = 0xFFFFFFFF;

struct SampledToken {
  SampledToken() { top_logprobs.fill(-std::numeric_limits<float>::infinity()); }

  std::uint32_t id = kInvalidToken;
  float logprob = 0;
  std::array<std::uint32_t, kMaxTopLogprobs> top_ids{};  // likeliest first, lower ids first among equals
  std::array<float, kMaxTopLogprobs> top_logprobs;       // -infinity where fewer are asked for or left
};

// Memory that a thread keeps from row to row.
struct RowScratch {
  std::vector<float> logits;                          // [V] with bias, mask and penalties
  std::vector<float> raw_block_maxima, block_maxima;  // [num_blocks(V)] of the model's logits, and of those above
  std::vector<float> block_weights, sorted_maxima;    // [num_blocks(V)]
  std::vector<std::int32_t> ids;                      // [padded(V)] of the candidates
  std::vector<float> values;                          // [padded(V)]
  std::vector<Key> keys, near_keys, distances;        // [padded(V)]
  std::vector<float> weights, near_weights;           // [padded(V)]
  std::vector<std::int32_t> counts;                   // [V], zeros between two rows

  void resize(std::size_t vocab_size);
};

SampledToken sample_row(std::span<const float> logits, const RowParams& params, const SampleTables& tables,
                        RowScratch& scratch, const RowKernels& kernels = *row_kernels()[0]);

}  // namespace mlx_server
