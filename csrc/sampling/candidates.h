// The tokens of a row that may still be drawn: filters drop some, then one is drawn.
#pragma once

#include <algorithm>
#include <bit>

#include "sampling/sample_row.h"

namespace mlx_server {

// A row of logits, and what is known of it.
struct Logits {
  const float* values;
  std::size_t size;
  float max;                  // finite
  const float* block_maxima;  // [num_blocks(size)]
};

// The k-th largest block maximum, k <= num_blocks: at least k of the logits are as large.
float kth_largest_block(const Logits& logits, std::int32_t k, RowScratch& scratch);

// The whole weight of exp((logit - max) / temperature); each block's is in scratch.block_weights.
double sum_weights(const Logits& logits, float temperature, RowScratch& scratch, const RowKernels& kernels);

// A draw from all tokens.
std::uint32_t draw_unfiltered(const Logits& logits, float temperature, float u, RowScratch& scratch,
                              const RowKernels& kernels);

bool has_filters(const RowParams& params, float xtc_u);

// What filters leave. Kept is what has key < end_.
class Candidates {
 public:
  // xtc_u: uniform in [0, 1); XTC applies if it is below the row's xtc_probability.
  Candidates(const Logits& logits, const RowParams& params, float xtc_u, RowScratch& scratch,
             const RowKernels& kernels);

  std::uint32_t draw(float u) const;
  double total_weight() const { return mass().weight; }
  // Calls visit(id, scaled) for each kept token, in the order of ids.
  template <typename Visit>
  void for_each(const Visit& visit) const {
    for (std::size_t i = 0; i < size_; ++i) {
      if (scratch_.keys[i] < end_) {
        visit(id(i), -std::bit_cast<float>(scratch_.keys[i]));
      }
    }
  }

 private:
  // Some tokens of a row. size is padded.
  struct Tokens {
    const Key* keys;
    const float* weights;
    std::size_t size;
  };
  struct Boundary;
  using Measure = double (*)(const Mass&);

  Tokens all() const { return {scratch_.keys.data(), scratch_.weights.data(), size_}; }
  Mass mass() const { return kernels_.mass_below(scratch_.keys.data(), scratch_.weights.data(), size_, end_); }
  Mass mass_below(const Tokens& tokens, Key end) const {
    return kernels_.mass_below(tokens.keys, tokens.weights, tokens.size, end);
  }
  std::uint32_t id(std::size_t index) const {
    return is_all_ ? static_cast<std::uint32_t>(index) : static_cast<std::uint32_t>(scratch_.ids[index]);
  }

  void gather(const Logits& logits, const RowParams& params);
  void take(const Logits& logits, float temperature, float lowest);
  void keep_below(Key end) { end_ = std::min({end_, end, kKeyEnd}); }
  void keep_typical(float p);
  void keep_min_p(float p);
  void exclude_top_choices(float threshold);
  void keep_until(Measure measure, double target);
  Boundary find_boundary(Measure measure, double target);
  Tokens copy_between(const Tokens& tokens, Key begin, Key end);

  const RowKernels& kernels_;
  RowScratch& scratch_;
  std::size_t size_ = 0;      // padded
  bool is_all_ = false;       // candidates are the whole row: an index is an id
  double unseen_weight_ = 0;  // of the tokens that are no candidates, though only top-p drops them
  Key end_ = kKeyEnd;
};

}  // namespace mlx_server
