// Chooses the next token of each row of a batch, and gives log-probabilities.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

namespace mlx_server {

// Rows are independent of each other: each has its parameters, and its ranges of the flat arrays.
struct SampleInputs {
  mlx::core::array logits;       // [B, V] floating point
  mlx::core::array rows;         // [B, kRowParamsWords] uint32: a RowParams (sample_row.h) each
  mlx::core::array masks;        // [M, ceil(V / 32)] uint32: bit t % 32 of word t / 32 is set if token t is allowed
  mlx::core::array bias_ids;     // [N] int32
  mlx::core::array bias_values;  // [N] float32
  mlx::core::array history;      // [H] int32: tokens of prompts and outputs
  mlx::core::array breakers;     // [S] int32
};

struct Sampled {
  mlx::core::array token_ids;     // [B] uint32
  mlx::core::array logprobs;      // [B] float32
  mlx::core::array top_ids;       // [B, kMaxTopLogprobs] uint32
  mlx::core::array top_logprobs;  // [B, kMaxTopLogprobs] float32
};

// For each row, in this order:
//
// 1. Single logits x change, in float32. Ids outside the vocabulary are skipped.
//    - bias: x + value for each entry of the row's range; -infinity forbids a token.
//    - mask: tokens that are not allowed get -infinity.
//    - repetition_penalty r, for each token of its range of the history: x / r if x > 0, else x * r.
//    - frequency_penalty f and presence_penalty p: x - (f * count + p), count in their range of the history.
//    - dry: a token that follows an earlier occurrence of the history's last tokens, the longest of which is `length`
//      tokens long (at most kMaxDryLength, no breaker among them), loses
//      multiplier * base^(length - allowed length) if length >= allowed length and it is no breaker itself.
// 2. Temperature 0 takes the largest logit, the lowest id among equals.
// 3. top_n_sigma: keeps x >= max - n * (standard deviation of the finite x).
// 4. temperature: scaled = (x - max) / temperature, weight = exp(scaled).
// 5. Filters, each on what the one before has left. Tokens are ordered, the likeliest first, lower ids first among
//    equals.
//    - top_k keeps the first k.
//    - typical_p keeps as few as reach a share p of the weight, those first whose -log(probability) is closest to the
//      entropy.
//    - top_p keeps as few as reach a share p of the weight, in order.
//    - min_p keeps all that are at least p times as likely as the likeliest.
//    - XTC, if the second random number is below xtc_probability: of the tokens with a probability of at least
//      xtc_threshold only the last stays.
// 6. One draw: the first token, in the order of ids, at which the running sum of the kept weights exceeds a share u of
//    the whole. The random numbers are the first two words of Philox4x32-10 with the seed as key and the position as
//    counter, their upper 24 bits as fractions: a pure function of seed and position.
//
// A row with given_token >= 0 takes that token instead of a choice. Log-probabilities, where num_logprobs >= 0, are of
// the row as it came, or if processed_logprobs is set of what is drawn from (greedy: of the logits after step 1): the
// token's own, and the num_logprobs likeliest in order, then -infinity.
//
// A row with a logit that is NaN or +infinity, or without a finite one after step 1, gives kInvalidToken; -infinity is
// never drawn.
Sampled sample(const SampleInputs& in, mlx::core::StreamOrDevice s = {});

// Throws std::invalid_argument if a shape or dtype does not fit.
void check_sample(const SampleInputs& in);

// The kernels for GPUs, V < kMaxGpuVocab. s is a GPU stream; the arguments have been checked.
inline constexpr int kMaxGpuVocab = 1 << 19;
Sampled sample_gpu(const SampleInputs& in, mlx::core::Stream s);

// The specification: the same from MLX's own ops, on any device. Slow.
Sampled sample_fallback(const SampleInputs& in, mlx::core::StreamOrDevice s = {});

}  // namespace mlx_server
