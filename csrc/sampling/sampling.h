// Draws the next token of each row of a batch.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

namespace mlx_server {

// What `sample` needs beside the logits, one entry for each row.
struct SampleParams {
  mlx::core::array temperature;  // [B] float32; 0 is greedy
  mlx::core::array top_k;        // [B] int32; 0 keeps all
  mlx::core::array top_p;        // [B] float32
  mlx::core::array min_p;        // [B] float32
  mlx::core::array seed;         // [B] uint64
  mlx::core::array position;     // [B] uint32
};

// logits [B, V] -> token ids uint32 [B]. Rows are independent of each other. For each:
//
// 1. temperature: scaled = (logit - max) / temperature, weight = exp(scaled). Temperature 0 takes the largest logit.
// 2. Three filters, each on what the one before has left. They keep the likeliest tokens, lower ids first among equals:
//    top_k keeps k of them; top_p keeps as few as reach a share p of the weight; min_p keeps all with scaled >= log(p),
//    that is at least p times as likely as the likeliest.
// 3. One draw: the first token, in the order of ids, at which the running sum of the kept weights exceeds a share u of
// the
//    whole. u is the first word of Philox4x32-10 with the seed as key and the position as counter, its upper 24 bits as
//    a fraction: a pure function of seed and position.
//
// A row with a logit that is NaN or +infinity, or without a finite one, gives kInvalidToken; -infinity is never drawn.
mlx::core::array sample(const mlx::core::array& logits, const SampleParams& params, mlx::core::StreamOrDevice s = {});

// Throws std::invalid_argument if a shape or dtype does not fit.
void check_sample(const mlx::core::array& logits, const SampleParams& params);

// The specification: the same from MLX's own ops, on any device.
mlx::core::array sample_fallback(const mlx::core::array& logits, const SampleParams& params,
                                 mlx::core::StreamOrDevice s = {});

}  // namespace mlx_server
