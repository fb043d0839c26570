#include "moe/moe.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>

#include "bindings/bindings.h"

namespace nb = nanobind;

namespace mlx_server {

using mlx::core::array;

void bind_moe(nb::module_& m) {
  using OptionalArray = std::optional<array>;
  nb::class_<ExpertMatrix>(m, "ExpertMatrix", R"(One projection [N, K] of all E experts, stacked.

weight [E, N, K] is plain, floating point, if scales is None. Else it is uint32 [E, N, K * bits / 32] with scales
[E, N, K / group_size] as `mx.quantize` stores them in `mode`; in the mode affine there are biases like scales.)")
      .def(nb::init<array, OptionalArray, OptionalArray, int, int, std::string>(), nb::arg("weight"),
           nb::arg("scales") = nb::none(), nb::arg("biases") = nb::none(), nb::kw_only(), nb::arg("group_size") = 0,
           nb::arg("bits") = 0, nb::arg("mode") = "affine")
      .def_ro("weight", &ExpertMatrix::weight)
      .def_ro("scales", &ExpertMatrix::scales)
      .def_ro("biases", &ExpertMatrix::biases)
      .def_ro("group_size", &ExpertMatrix::group_size)
      .def_ro("bits", &ExpertMatrix::bits)
      .def_ro("mode", &ExpertMatrix::mode);
  nb::enum_<Scoring>(m, "Scoring").value("SOFTMAX", Scoring::kSoftmax).value("SIGMOID", Scoring::kSigmoid);

  const auto def_route = [&m](const char* name, auto function, const char* doc) {
    m.def(name, function, nb::arg("logits"), nb::kw_only(), nb::arg("top_k"), nb::arg("scoring"), nb::arg("normalize"),
          doc);
  };
  def_route(
      "route",
      [](const array& logits, int top_k, Scoring scoring, bool normalize) {
        return route(logits, top_k, scoring, normalize);
      },
      "");
  def_route(
      "route_fallback",
      [](const array& logits, int top_k, Scoring scoring, bool normalize) {
        return route_fallback(logits, top_k, scoring, normalize);
      },
      "The specification of `route` in MLX's own ops, for tests.");

  const auto def_moe_mlp = [&m](const char* name, auto function, const char* doc) {
    m.def(name, function, nb::arg("x"), nb::arg("experts"), nb::arg("weights"), nb::kw_only(), nb::arg("gate"),
          nb::arg("up"), nb::arg("down"), nb::arg("shared") = nb::none(), doc);
  };
  def_moe_mlp(
      "moe_mlp",
      [](const array& x, const array& experts, const array& weights, const ExpertMatrix& gate, const ExpertMatrix& up,
         const ExpertMatrix& down,
         const OptionalArray& shared) { return moe_mlp(x, experts, weights, gate, up, down, shared); },
      "");
  def_moe_mlp(
      "moe_mlp_fallback",
      [](const array& x, const array& experts, const array& weights, const ExpertMatrix& gate, const ExpertMatrix& up,
         const ExpertMatrix& down,
         const OptionalArray& shared) { return moe_mlp_fallback(x, experts, weights, gate, up, down, shared); },
      "The specification of `moe_mlp` in MLX's own ops, for tests.");
}

}  // namespace mlx_server
