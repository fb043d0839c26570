#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "common/write_rows.h"

namespace nb = nanobind;

namespace mlx_server {

void bind_copy_rows(nb::module_& m) {
  m.def(
      "copy_rows",
      [](const mlx::core::array& pool, const std::vector<std::int32_t>& from_rows,
         const std::vector<std::int32_t>& to_rows) { return copy_rows(pool, from_rows, to_rows); },
      nb::arg("pool"), nb::arg("from_rows"), nb::arg("to_rows"), "ops.copy_rows documents it.");
}

}  // namespace mlx_server
