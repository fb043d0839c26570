#include <mlx/array.h>

#include "bindings/bindings.h"

namespace nb = nanobind;

NB_MODULE(_ext, m) {
  m.doc() = "The C++ core of mlx-server.";
  m.def("array_size", &mlx::core::array::size, nb::arg("array"),
        "Number of elements. The import's self-check calls it: it fails if mx.array is a foreign type here.");
  mlx_server::bind_copy_rows(m);
  mlx_server::bind_kernels(m);
  mlx_server::bind_kv(m);
  mlx_server::bind_elementwise(m);
  mlx_server::bind_gated_delta(m);
  mlx_server::bind_linear(m);
  mlx_server::bind_moe(m);
  mlx_server::bind_paged_attention(m);
  mlx_server::bind_sampling(m);
}
