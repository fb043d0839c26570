// What the machine offers: cores this process may use, and instruction sets.
#pragma once

namespace mlx_server {

// Physical cores that the scheduler may give this process: affinity mask, cgroup quota and SMT siblings respected. At
// least 1.
int available_cores();

bool cpu_has_avx2();    // AVX2, FMA and F16C
bool cpu_has_avx512();  // AVX-512 F, BW, DQ and VL

}  // namespace mlx_server
