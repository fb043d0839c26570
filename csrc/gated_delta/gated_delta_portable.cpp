#include "gated_delta/gated_delta_impl.h"

namespace mlx_server {

constinit const GatedDeltaKernel kGatedDeltaPortable = {"portable", convolve, scan};

}  // namespace mlx_server
