#include "paged_attention/paged_attention_impl.h"

namespace mlx_server {

// On arm64 this is NEON already, on x86-64 SSE2.
constinit const AttentionKernel kAttentionPortable = {"portable", attend};

}  // namespace mlx_server
