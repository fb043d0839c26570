#include "elementwise/elementwise.h"

#include <nanobind/stl/variant.h>

#include "bindings/bindings.h"

namespace nb = nanobind;

namespace mlx_server {

using mlx::core::array;

void bind_elementwise(nb::module_& m) {
  m.def(
      "rms_norm", [](const array& x, const array& weight, float eps) { return rms_norm(x, weight, eps); }, nb::arg("x"),
      nb::arg("weight"), nb::arg("eps"));
  m.def(
      "silu_mul", [](const array& gate, const array& up) { return silu_mul(gate, up); }, nb::arg("gate"),
      nb::arg("up"));
  m.def(
      "gelu_mul", [](const array& gate, const array& up) { return gelu_mul(gate, up); }, nb::arg("gate"),
      nb::arg("up"));
  m.def(
      "rope",
      [](const array& x, const array& positions, const array& freqs, bool traditional) {
        return rope(x, positions, freqs, traditional);
      },
      nb::arg("x"), nb::arg("positions"), nb::arg("freqs"), nb::kw_only(), nb::arg("traditional"));
  m.def(
      "silu_mul_fallback", [](const array& gate, const array& up) { return silu_mul_fallback(gate, up); },
      nb::arg("gate"), nb::arg("up"));
  m.def(
      "gelu_mul_fallback", [](const array& gate, const array& up) { return gelu_mul_fallback(gate, up); },
      nb::arg("gate"), nb::arg("up"));
  m.def(
      "rope_fallback",
      [](const array& x, const array& positions, const array& freqs, bool traditional) {
        return rope_fallback(x, positions, freqs, traditional);
      },
      nb::arg("x"), nb::arg("positions"), nb::arg("freqs"), nb::kw_only(), nb::arg("traditional"));
}

}  // namespace mlx_server
