#include "bindings/bindings.h"

NB_MODULE(_ext, m) {
  m.doc() = "The C++ core of mlx-server.";
  mlx_server::bind_kv(m);
  mlx_server::bind_linear(m);
  mlx_server::bind_paged_attention(m);
}
