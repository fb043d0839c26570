#include "sampling/sampling.h"

#include "bindings/bindings.h"

namespace nb = nanobind;

namespace mlx_server {

void bind_sampling(nb::module_& m) {
  using mlx::core::array;
  m.def(
      "sample",
      [](const array& logits, const array& temperature, const array& top_k, const array& top_p, const array& min_p,
         const array& seed,
         const array& position) { return sample(logits, {temperature, top_k, top_p, min_p, seed, position}); },
      nb::arg("logits"), nb::kw_only(), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"),
      nb::arg("seed"), nb::arg("position"));
  m.def(
      "sample_fallback",
      [](const array& logits, const array& temperature, const array& top_k, const array& top_p, const array& min_p,
         const array& seed,
         const array& position) { return sample_fallback(logits, {temperature, top_k, top_p, min_p, seed, position}); },
      nb::arg("logits"), nb::kw_only(), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"),
      nb::arg("seed"), nb::arg("position"), "The specification of `sample` in MLX's own ops, for tests.");
}

}  // namespace mlx_server
