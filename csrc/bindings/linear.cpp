#include "linear/linear.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>

#include "bindings/bindings.h"

namespace nb = nanobind;

namespace mlx_server {

void bind_linear(nb::module_& m) {
  using mlx::core::array;
  m.def(
      "linear", [](const array& x, const array& weight) { return linear(x, weight); }, nb::arg("x"), nb::arg("weight"));
  m.def(
      "quantized_linear",
      [](const array& x, const array& weight, const array& scales, const std::optional<array>& biases, int group_size,
         int bits,
         const std::string& mode) { return quantized_linear(x, weight, scales, biases, group_size, bits, mode); },
      nb::arg("x"), nb::arg("weight"), nb::arg("scales"), nb::arg("biases").none(), nb::kw_only(),
      nb::arg("group_size"), nb::arg("bits"), nb::arg("mode"));
}

}  // namespace mlx_server
