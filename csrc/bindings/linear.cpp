#include "linear/linear.h"

#include <nanobind/stl/variant.h>

#include "bindings/bindings.h"

namespace nb = nanobind;

namespace mlx_server {

void bind_linear(nb::module_& m) {
  m.def(
      "quantized_linear",
      [](const mlx::core::array& x, const mlx::core::array& weight, const mlx::core::array& scales,
         const mlx::core::array& biases, int group_size,
         int bits) { return quantized_linear(x, weight, scales, biases, group_size, bits); },
      nb::arg("x"), nb::arg("weight"), nb::arg("scales"), nb::arg("biases"), nb::kw_only(), nb::arg("group_size"),
      nb::arg("bits"));
}

}  // namespace mlx_server
