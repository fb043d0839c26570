#include "elementwise/elementwise_impl.h"

namespace mlx_server {

// On arm64 this is NEON already, on x86-64 SSE2.
constinit const ElementwiseKernels kElementwisePortable = {"portable", rms_norm_kernel, silu_mul_kernel,
                                                           gelu_mul_kernel, qkv_rope_kernel};

}  // namespace mlx_server
