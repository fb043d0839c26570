#include "elementwise/elementwise_kernels.h"

namespace mlx_server {

namespace {

// Four floats: SSE2 and NEON, which every 64-bit processor has.
struct Baseline {
  static constexpr int kLanes = 4;
  typedef float Vec __attribute__((vector_size(kLanes * 4)));
  typedef std::int32_t Ints __attribute__((vector_size(kLanes * 4)));
};

}  // namespace

constinit const ElementwiseKernels kElementwiseBaseline{
    .name = "baseline", .rms_norm = rms_norm<Baseline>, .silu_mul = silu_mul<Baseline>};

}  // namespace mlx_server
