#if defined(__x86_64__)

#include "paged_attention/paged_attention_impl.h"

namespace mlx_server {

constinit const AttentionKernel kAttentionAvx512 = {"AVX-512", attend};

}  // namespace mlx_server

#endif
