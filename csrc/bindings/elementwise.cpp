#include "elementwise/elementwise.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>

#include "bindings/bindings.h"

namespace nb = nanobind;

namespace mlx_server {

using mlx::core::array;

namespace {

template <auto kOp>
void bind_qkv_rope(nb::module_& m, const char* name) {
  m.def(
      name,
      [](const array& qkv, const array& positions, const array& freqs, const std::optional<array>& norms, int num_heads,
         int num_kv_heads, float eps, float length_factor, bool gated) {
        const auto y = kOp(qkv, positions, freqs, {num_heads, num_kv_heads, norms, eps, length_factor, gated}, {});
        return std::make_tuple(y[0], y[1], y[2]);
      },
      nb::arg("qkv"), nb::arg("positions"), nb::arg("freqs"), nb::arg("norms") = nb::none(), nb::kw_only(),
      nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("eps"), nb::arg("length_factor"), nb::arg("gated"));
}

}  // namespace

void bind_elementwise(nb::module_& m) {
  m.def(
      "rms_norm", [](const array& x, const array& weight, float eps) { return rms_norm(x, weight, eps); }, nb::arg("x"),
      nb::arg("weight"), nb::arg("eps"));
  m.def(
      "silu_mul", [](const array& x, const std::optional<array>& up) { return silu_mul(x, up); }, nb::arg("x"),
      nb::arg("up") = nb::none());
  m.def(
      "gelu_mul", [](const array& x, const std::optional<array>& up) { return gelu_mul(x, up); }, nb::arg("x"),
      nb::arg("up") = nb::none());
  m.def(
      "silu_mul_fallback", [](const array& x, const std::optional<array>& up) { return silu_mul_fallback(x, up); },
      nb::arg("x"), nb::arg("up") = nb::none());
  m.def(
      "gelu_mul_fallback", [](const array& x, const std::optional<array>& up) { return gelu_mul_fallback(x, up); },
      nb::arg("x"), nb::arg("up") = nb::none());
  bind_qkv_rope<qkv_rope>(m, "qkv_rope");
  bind_qkv_rope<qkv_rope_fallback>(m, "qkv_rope_fallback");
}

}  // namespace mlx_server
