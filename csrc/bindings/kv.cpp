#include "bindings/bindings.h"

namespace mlx_server {

void bind_kv(nanobind::module_&) {}

}  // namespace mlx_server
