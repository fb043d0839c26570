// One function per op adds its bindings to the module. Bindings hold no logic.
#pragma once

#include <nanobind/nanobind.h>

namespace mlx_server {

void bind_copy_rows(nanobind::module_& m);
void bind_kernels(nanobind::module_& m);
void bind_kv(nanobind::module_& m);
void bind_elementwise(nanobind::module_& m);
void bind_gated_delta(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_moe(nanobind::module_& m);
void bind_paged_attention(nanobind::module_& m);
void bind_sampling(nanobind::module_& m);

}  // namespace mlx_server
