// What changes single logits before anything else looks at the row: bias, mask and penalties.
#pragma once

#include "sampling/sample_row.h"

namespace mlx_server {

// The longest repetition that DRY tells from longer ones: bounds the search and the penalty.
inline constexpr int kMaxDryLength = 50;

// Whether adjust_row changes anything.
bool is_adjusted(const RowParams& params);

// logits to scratch.logits. Ids outside the vocabulary are skipped.
void adjust_row(std::span<const float> logits, const RowParams& params, const SampleTables& tables, RowScratch& scratch,
                const RowKernels& kernels);

}  // namespace mlx_server
