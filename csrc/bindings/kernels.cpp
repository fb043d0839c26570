#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "kernels/kernel_use.h"

namespace nb = nanobind;

namespace mlx_server {

void bind_kernels(nb::module_& m) {
  m.def("disable_kernel", &disable_kernel, nb::arg("name"));
  m.def("set_batch_invariant", &set_batch_invariant, nb::arg("wanted"));
  m.def("is_batch_invariant", &is_batch_invariant);
  m.def("take_launched_kernels", &take_launched_kernels);
}

}  // namespace mlx_server
