#include "paged_attention/paged_attention.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "paged_attention/kv_pool.h"

namespace nb = nanobind;

namespace mlx_server {

void bind_paged_attention(nb::module_& m) {
  using mlx::core::array;
  m.def(
      "new_kv_pool",
      [](std::tuple<int, int, int, int> shape, mlx::core::Dtype dtype) {
        const auto [num_blocks, block_size, num_heads, head_dim] = shape;
        return new_kv_pool({num_blocks, block_size, num_heads, head_dim}, dtype);
      },
      nb::arg("shape"), nb::arg("dtype"));
  m.def(
      "write_kv",
      [](const array& k_pool, const array& v_pool, const array& k, const array& v, const array& slot_mapping) {
        return write_kv(k_pool, v_pool, k, v, slot_mapping);
      },
      nb::arg("k_pool"), nb::arg("v_pool"), nb::arg("k"), nb::arg("v"), nb::arg("slot_mapping"));
  m.def(
      "paged_attention",
      [](const array& q, const array& k_pool, const array& v_pool, const array& block_tables,
         const std::vector<int>& query_lens, const std::vector<int>& context_lens, float scale,
         std::optional<int> window) {
        return paged_attention(q, k_pool, v_pool, block_tables, query_lens, context_lens, scale, window);
      },
      nb::arg("q"), nb::arg("k_pool"), nb::arg("v_pool"), nb::kw_only(), nb::arg("block_tables"), nb::arg("query_lens"),
      nb::arg("context_lens"), nb::arg("scale"), nb::arg("window") = nb::none());
  m.def(
      "paged_attention_fallback",
      [](const array& q, const array& k_pool, const array& v_pool, const array& block_tables,
         const std::vector<int>& query_lens, const std::vector<int>& context_lens, float scale,
         std::optional<int> window) {
        return paged_attention_fallback(q, k_pool, v_pool, block_tables, query_lens, context_lens, scale, window);
      },
      nb::arg("q"), nb::arg("k_pool"), nb::arg("v_pool"), nb::kw_only(), nb::arg("block_tables"), nb::arg("query_lens"),
      nb::arg("context_lens"), nb::arg("scale"), nb::arg("window") = nb::none(),
      "The specification of `paged_attention` in MLX's own ops, for tests.");
}

}  // namespace mlx_server
