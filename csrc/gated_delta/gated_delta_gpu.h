// gated_delta on GPUs.
#pragma once

#include <tuple>

#include "gated_delta/gated_delta.h"

namespace mlx_server {

// gated_delta of inputs that have been checked, on a GPU stream; the state has at least 8 elements: Metal keeps smaller
// inputs where kernels can't write.
std::tuple<mlx::core::array, mlx::core::array, mlx::core::array> gated_delta_gpu(const GatedDeltaInputs& given,
                                                                                 mlx::core::Stream s);

}  // namespace mlx_server
