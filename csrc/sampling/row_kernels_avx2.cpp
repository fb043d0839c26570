#if defined(__x86_64__)

#include "sampling/row_kernels_impl.h"

namespace mlx_server {

constinit const RowKernels kRowKernelsAvx2 = make_row_kernels("AVX2");

}  // namespace mlx_server

#endif
