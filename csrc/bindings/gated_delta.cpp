#include "gated_delta/gated_delta.h"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"

namespace nb = nanobind;

namespace mlx_server {

namespace {

using Outputs = std::tuple<mlx::core::array, mlx::core::array, mlx::core::array>;

template <Outputs (*op)(const GatedDeltaInputs&, mlx::core::StreamOrDevice)>
void bind(nb::module_& m, const char* name, const char* doc) {
  using mlx::core::array;
  m.def(
      name,
      [](const array& qkv, const array& conv_weight, const array& a, const array& b, const array& a_log,
         const array& dt_bias, const array& conv_state, const array& state, const array& slots,
         const std::vector<int>& query_lens, const std::vector<bool>& fresh, int num_key_heads, int key_head_dim) {
        return op({qkv, conv_weight, a, b, a_log, dt_bias, conv_state, state, slots, query_lens, fresh, num_key_heads,
                   key_head_dim},
                  {});
      },
      nb::arg("qkv"), nb::arg("conv_weight"), nb::arg("a"), nb::arg("b"), nb::arg("a_log"), nb::arg("dt_bias"),
      nb::arg("conv_state"), nb::arg("state"), nb::kw_only(), nb::arg("slots"), nb::arg("query_lens"), nb::arg("fresh"),
      nb::arg("num_key_heads"), nb::arg("key_head_dim"), doc);
}

}  // namespace

void bind_gated_delta(nb::module_& m) {
  bind<gated_delta>(m, "gated_delta", "ops.gated_delta documents it.");
  bind<gated_delta_fallback>(m, "gated_delta_fallback",
                             "The specification of `gated_delta` in MLX's own ops, for tests.");
}

}  // namespace mlx_server
