// The kernels of each instruction set; linear_kernels() says which of them this processor can run.
#pragma once

#include "linear/linear_cpu.h"

namespace mlx_server {

// The values of floating point codes: elements in 4 and 8 bits, scales in groups of 32 and of 16.
struct CodeValues {
  float of[256];
};
extern const CodeValues kE4m3, kE8m0Scales, kE4m3Scales;
extern const float kE2m1[16];

extern const LinearKernels kLinearAvx512, kLinearAvx2, kLinearNeon, kLinearPortable;

}  // namespace mlx_server
