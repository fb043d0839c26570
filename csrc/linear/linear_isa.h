// The kernels of each instruction set; linear_kernels() says which of them this processor can run.
#pragma once

#include "linear/linear_cpu.h"

namespace mlx_server {

extern const LinearKernels kLinearAvx512, kLinearAvx2, kLinearNeon, kLinearPortable;

}  // namespace mlx_server
