#if defined(__x86_64__)

#include "sampling/row_kernels_impl.h"

namespace mlx_server {

constinit const RowKernels kRowKernelsAvx512 = make_row_kernels("AVX-512");

}  // namespace mlx_server

#endif
