#include "sampling/sampling.h"

#include <nanobind/stl/tuple.h>

#include "bindings/bindings.h"

namespace nb = nanobind;

namespace mlx_server {

namespace {

template <Sampled (*op)(const SampleInputs&, mlx::core::StreamOrDevice)>
void bind(nb::module_& m, const char* name, const char* doc) {
  using mlx::core::array;
  m.def(
      name,
      [](const array& logits, const array& rows, const array& masks, const array& bias_ids, const array& bias_values,
         const array& history, const array& breakers) {
        Sampled out = op({logits, rows, masks, bias_ids, bias_values, history, breakers}, {});
        return std::tuple{out.token_ids, out.logprobs, out.top_ids, out.top_logprobs};
      },
      nb::arg("logits"), nb::arg("rows"), nb::kw_only(), nb::arg("masks"), nb::arg("bias_ids"), nb::arg("bias_values"),
      nb::arg("history"), nb::arg("breakers"), doc);
}

}  // namespace

void bind_sampling(nb::module_& m) {
  bind<sample>(m, "sample", "ops.sampling documents it.");
  bind<sample_fallback>(m, "sample_fallback", "The specification of `sample` in MLX's own ops, for tests.");
}

}  // namespace mlx_server
