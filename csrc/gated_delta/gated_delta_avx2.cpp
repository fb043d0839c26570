#if defined(__x86_64__)

#include "gated_delta/gated_delta_impl.h"

namespace mlx_server {

constinit const GatedDeltaKernel kGatedDeltaAvx2 = {"AVX2", convolve, scan};

}  // namespace mlx_server

#endif
