#include "sampling/row_kernels_impl.h"

namespace mlx_server {

// On arm64 these are NEON already, on x86-64 SSE2.
constinit const RowKernels kRowKernelsPortable = make_row_kernels("portable");

}  // namespace mlx_server
