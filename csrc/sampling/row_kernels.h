// The loops of sampling that touch a whole row of logits, for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace mlx_server {

// A token's key is the bit pattern of |scaled|, where scaled = (logit - max) / temperature <= 0. Non-negative floats
// order as their bits do, so keys order the tokens: 0 is the likeliest.
using Key = std::int32_t;
inline constexpr Key kKeyEnd = 0x7f800001;  // above the key of -infinity

// A row is looked at in blocks of this many tokens. Arrays of keys and weights have whole blocks; padding is never
// kept: key kKeyEnd, weight 0.
inline constexpr std::size_t kBlock = 256;
constexpr std::size_t num_blocks(std::size_t n) { return (n + kBlock - 1) / kBlock; }
constexpr std::size_t padded(std::size_t n) { return num_blocks(n) * kBlock; }

struct RowMax {
  float value;  // NaN left out
  bool has_nan;
};

struct Mass {
  std::int64_t count;
  double weight;
};

// Of some tokens: their weight, and the sum of weight times |scaled|.
struct Information {
  double weight, weighted_distance;
};

// Of max - logit, over the logits that are finite.
struct Moments {
  std::int64_t count;
  double sum, sum_of_squares;
};

struct RowKernels {
  const char* name;
  // Over n logits, and over each of their blocks.
  RowMax (*max)(const float* logits, std::size_t n, float* block_maxima);
  // Copies n logits, those whose bit in mask (null: all bits are set) is 0 as -infinity.
  void (*copy_allowed)(const float* logits, const std::uint32_t* mask, std::size_t n, float* out);
  // First index of `value`, which is one of the n logits.
  std::size_t (*find)(const float* logits, std::size_t n, float value);
  // The logits that are at least `lowest`, in order, and their ids, with room for padded(n); their number.
  std::size_t (*at_least)(const float* logits, std::size_t n, const float* block_maxima, float lowest,
                          std::int32_t* ids, float* values);
  // Sum of exp(scaled) of each block of n logits.
  void (*weigh)(const float* logits, std::size_t n, float max, float temperature, float* block_weights);
  Moments (*moments)(const float* logits, std::size_t n, float max);
  // Keys and weights exp(scaled) of n logits, and their padding.
  void (*scale)(const float* logits, std::size_t n, float max, float temperature, Key* keys, float* weights);
  // Number and weight of the tokens with key < end; n is padded.
  Mass (*mass_below)(const Key* keys, const float* weights, std::size_t n, Key end);
  // Of the tokens with key < end; n is padded.
  Information (*information)(const Key* keys, const float* weights, std::size_t n, Key end);
  // The tokens with begin <= key < end, in order, written to other arrays with room for n; their number.
  std::size_t (*select)(const Key* keys, const float* weights, std::size_t n, Key begin, Key end, Key* out_keys,
                        float* out_weights);
};

// The kernels that this processor can run, best first.
std::span<const RowKernels* const> row_kernels();

extern const RowKernels kRowKernelsAvx2, kRowKernelsAvx512, kRowKernelsPortable;

}  // namespace mlx_server
