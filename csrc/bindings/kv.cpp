#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "kv/block_pool.h"

namespace nb = nanobind;

namespace mlx_server {

void bind_kv(nb::module_& m) {
  using kv::BlockId;
  using kv::BlockPool;
  nb::class_<BlockPool>(m, "BlockPool",
                        R"(Which of the KV cache's fixed-size blocks are free, and how many owners the others have.

Blocks 0 ... num_blocks - 1. An owner is whoever called `allocate` or `retain`; a block is free again when its last
owner releases it. Calls that raise change nothing. Not thread safe.)")
      .def(nb::init<BlockId>(), nb::arg("num_blocks"))
      .def("allocate", &BlockPool::allocate, nb::arg("n"),
           "n blocks with one owner each, or None if fewer than n are free. ValueError if n is negative.")
      .def(
          "retain", [](BlockPool& pool, const std::vector<BlockId>& ids) { pool.retain(ids); }, nb::arg("ids"),
          "One more owner for each id. IndexError for an id outside the pool, ValueError for a free block.")
      .def(
          "release", [](BlockPool& pool, const std::vector<BlockId>& ids) { pool.release(ids); }, nb::arg("ids"),
          "One owner less for each id. IndexError for an id outside the pool, ValueError for a block without owner "
          "left.")
      .def("ref_count", &BlockPool::ref_count, nb::arg("id"), "Owners of a block, 0 if it is free. IndexError.")
      .def_prop_ro("num_blocks", &BlockPool::num_blocks)
      .def_prop_ro("num_free", &BlockPool::num_free)
      .def("check_integrity", &BlockPool::check_integrity,
           "RuntimeError unless each block is either owned or exactly once in the free list.");
}

}  // namespace mlx_server
