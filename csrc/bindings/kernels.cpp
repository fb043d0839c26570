#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <utility>
#include <variant>

#include "bindings/bindings.h"
#include "kernels/kernel_use.h"
#include "kernels/launch.h"

namespace nb = nanobind;

namespace mlx_server {

namespace {

using mlx::core::array;

// What calls `function(name, text, inputs, output_shapes, output_dtypes, constants, groups, threads)`.
Simulator simulator_of(nb::object function) {
  return [function](const KernelSource& source, const KernelLaunch& launch) {
    nb::dict constants;
    for (const auto& [name, value] : launch.constants) {
      std::visit([&, &key = name](const auto& v) { constants[key.c_str()] = v; }, value);
    }
    nb::list shapes;
    for (const auto& shape : launch.output_shapes) {
      shapes.append(nb::cast(std::vector<int>(shape.begin(), shape.end())));
    }
    return nb::cast<std::vector<array>>(function(source.name, source.text, launch.inputs, shapes, launch.output_dtypes,
                                                 constants, launch.groups, launch.threads));
  };
}

}  // namespace

void bind_kernels(nb::module_& m) {
  m.def("disable_kernel", &disable_kernel, nb::arg("name"));
  m.def("set_batch_invariant", &set_batch_invariant, nb::arg("wanted"));
  m.def("is_batch_invariant", &is_batch_invariant);
  m.def("take_launched_kernels", &take_launched_kernels);
  m.def(
      "simulate_gpu",
      [](nb::object function) { simulate_gpu(function.is_none() ? Simulator() : simulator_of(std::move(function))); },
      nb::arg("function").none(),
      "Lets ops on the CPU take the way of an NVIDIA GPU's, and a function compute the outputs of kernels: "
      "`function(name, text, inputs, output_shapes, output_dtypes, constants, groups, threads)`. None ends that. For "
      "tests.");
}

}  // namespace mlx_server
