#if defined(__x86_64__)

#include "elementwise/elementwise_kernels.h"

namespace mlx_server {

namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  typedef float Vec __attribute__((vector_size(kLanes * 4)));
  typedef std::int32_t Ints __attribute__((vector_size(kLanes * 4)));
};

}  // namespace

constinit const ElementwiseKernels kElementwiseAvx2{
    .name = "AVX2", .rms_norm = rms_norm<Avx2>, .silu_mul = silu_mul<Avx2>};

}  // namespace mlx_server

#endif
