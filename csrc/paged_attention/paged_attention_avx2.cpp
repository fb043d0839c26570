#if defined(__x86_64__)

#include "paged_attention/paged_attention_impl.h"

namespace mlx_server {

constinit const AttentionKernel kAttentionAvx2 = {"AVX2", attend};

}  // namespace mlx_server

#endif
