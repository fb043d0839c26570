#include "paged_attention/paged_attention.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"

namespace nb = nanobind;

namespace mlx_server {

using mlx::core::array;

void bind_paged_attention(nb::module_& m) {
  using OptionalArray = std::optional<array>;
  nb::class_<KVPool>(m, "KVPool", R"(One layer's keys and values [N, block_size, Hk, D].

With scales, float32 [N, block_size, Hk] each, they are int8, to be multiplied by the scale of their token and head.)")
      .def(nb::init<array, array, OptionalArray, OptionalArray>(), nb::arg("keys"), nb::arg("values"),
           nb::arg("key_scales") = nb::none(), nb::arg("value_scales") = nb::none())
      .def_ro("keys", &KVPool::keys)
      .def_ro("values", &KVPool::values)
      .def_ro("key_scales", &KVPool::key_scales)
      .def_ro("value_scales", &KVPool::value_scales);
  m.def(
      "new_kv_pool",
      [](std::tuple<int, int, int, int> shape, mlx::core::Dtype dtype, std::optional<int> bits) {
        const auto [num_blocks, block_size, num_heads, head_dim] = shape;
        return new_kv_pool({num_blocks, block_size, num_heads, head_dim}, dtype, bits);
      },
      nb::arg("shape"), nb::arg("dtype"), nb::kw_only(), nb::arg("bits") = nb::none());
  const auto def_write_kv = [&m](const char* name, auto function, const char* doc) {
    m.def(
        name,
        [function](const KVPool& pool, const array& k, const array& v, const array& slot_mapping) {
          return function(pool, k, v, slot_mapping, {});
        },
        nb::arg("pool"), nb::arg("k"), nb::arg("v"), nb::arg("slot_mapping"), doc);
  };
  def_write_kv("write_kv", write_kv, "");
  def_write_kv("write_kv_fallback", write_kv_fallback,
               "The specification of `write_kv`, rounded by MLX's own ops, for tests.");
  m.def(
      "copy_kv",
      [](const KVPool& pool, const std::vector<std::int32_t>& from_slots, const std::vector<std::int32_t>& to_slots) {
        return copy_kv(pool, from_slots, to_slots);
      },
      nb::arg("pool"), nb::arg("from_slots"), nb::arg("to_slots"));

  nb::class_<AttentionBatch>(m, "AttentionBatch", R"(Where the rows of a ragged batch lie: what a step's layers share.

Row b's queries are the last `query_lens[b]` of its `context_lens[b]` tokens. block_tables: [B, M] int32, the blocks of
each row in order; entries behind the context are not read, the values of the others are not checked. query_lens,
context_lens: B integers, 1 <= query_len <= context_len. ValueError if shapes, dtypes or lengths don't fit.)")
      .def(nb::init<array, std::vector<int>, std::vector<int>>(), nb::arg("block_tables"), nb::arg("query_lens"),
           nb::arg("context_lens"));
  const auto def_attention = [&m](const char* name, auto function, const char* doc) {
    m.def(
        name,
        [function](const array& q, const KVPool& pool, const AttentionBatch& batch, float scale,
                   std::optional<int> window, std::optional<float> softcap, OptionalArray sinks) {
          return function(q, pool, batch, {scale, window, softcap, std::move(sinks)}, {});
        },
        nb::arg("q"), nb::arg("pool"), nb::arg("batch"), nb::kw_only(), nb::arg("scale"),
        nb::arg("window") = nb::none(), nb::arg("softcap") = nb::none(), nb::arg("sinks") = nb::none(), doc);
  };
  def_attention("paged_attention", paged_attention, "");
  def_attention("paged_attention_fallback", paged_attention_fallback,
                "The specification of `paged_attention` in MLX's own ops, for tests.");
}

}  // namespace mlx_server
