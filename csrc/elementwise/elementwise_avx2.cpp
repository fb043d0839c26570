#if defined(__x86_64__)

#include "elementwise/elementwise_impl.h"

namespace mlx_server {

constinit const ElementwiseKernels kElementwiseAvx2 = {"AVX2", rms_norm_kernel, silu_mul_kernel, gelu_mul_kernel,
                                                       qkv_rope_kernel};

}  // namespace mlx_server

#endif
