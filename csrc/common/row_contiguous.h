// For eval_cpu of our primitives, whose kernels want rows without gaps.
#pragma once

#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>

namespace mlx_server {

// a itself, or a copy of it that lives until the tasks dispatched on s so far and next have run.
inline mlx::core::array row_contiguous(const mlx::core::array& a, mlx::core::Stream s) {
  if (a.flags().row_contiguous) {
    return a;
  }
  // MLX's own strided copy is not exported, but the primitive that calls it is reachable.
  std::vector<mlx::core::array> copy{mlx::core::contiguous(a, /*allow_col_major=*/false, s)};
  copy[0].primitive().eval_cpu({a}, copy);
  mlx::core::cpu::get_command_encoder(s).add_temporary(copy[0]);
  return copy[0];
}

}  // namespace mlx_server
