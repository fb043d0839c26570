#include "paged_attention/kv_pool.h"

#include <algorithm>
#include <memory>

#include <mlx/allocator.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "common/op_error.h"
#include "common/write_rows.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

class UnwrittenPrimitive : public mx::UnaryPrimitive {
 public:
  using UnaryPrimitive::UnaryPrimitive;

  void eval_cpu(const std::vector<mx::array>&, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
  }
  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    op_error("new_kv_pool", "the primitive must run on a CPU stream but got a GPU stream");
  }

  DEFINE_NAME(Unwritten)
};

mx::array new_array(const mx::Shape& shape, mx::Dtype dtype, mx::Stream s) {
  if (s.device != mx::Device::cpu) {
    return mx::zeros(shape, dtype, s);
  }
  return mx::array(shape, dtype, std::make_shared<UnwrittenPrimitive>(s), {});
}

// array [N, block_size, ...], slots [T], rows [T, ...]
mx::array write_slots(const mx::array& array, const mx::array& slots, const mx::array& rows, mx::Stream s) {
  const mx::array flat = mx::flatten(array, 0, 1, s);
  return mx::reshape(write_rows(flat, slots, mx::astype(rows, array.dtype(), s), s), array.shape(), s);
}

}  // namespace

void check_kv_pool(const char* op, const KVPool& pool) {
  const mx::array &k = pool.keys, &v = pool.values;
  if (k.ndim() != 4 || k.shape() != v.shape() || k.dtype() != v.dtype()) {
    op_error(op, "keys and values of the pool must have one shape [N, block_size, Hk, D] and one dtype but got ",
             k.shape(), " ", k.dtype(), " and ", v.shape(), " ", v.dtype());
  }
}

KVPool new_kv_pool(const mx::Shape& shape, mx::Dtype dtype, mx::StreamOrDevice s_) {
  if (shape.size() != 4 || std::ranges::any_of(shape, [](auto size) { return size < 1; })) {
    op_error("new_kv_pool", "shape must be [N, block_size, Hk, D] with sizes of 1 and more but got ", shape);
  }
  const auto s = mx::to_stream(s_);
  return {new_array(shape, dtype, s), new_array(shape, dtype, s)};
}

KVPool write_kv(const KVPool& pool, const mx::array& k, const mx::array& v, const mx::array& slot_mapping,
                mx::StreamOrDevice s_) {
  constexpr char op[] = "write_kv";
  check_kv_pool(op, pool);
  if (k.ndim() != 3 || k.shape(1) != pool.num_heads() || k.shape(2) != pool.head_dim() || k.shape() != v.shape()) {
    op_error(op, "k and v must have the shape [T, ", pool.num_heads(), ", ", pool.head_dim(), "] but got ", k.shape(),
             " and ", v.shape());
  }
  if (slot_mapping.shape() != mx::Shape{k.shape(0)} || slot_mapping.dtype() != mx::int32) {
    op_error(op, "slot_mapping must be int32 [", k.shape(0), "] but got ", slot_mapping.dtype(), " ",
             slot_mapping.shape());
  }
  const auto s = mx::to_stream(s_);
  return {write_slots(pool.keys, slot_mapping, k, s), write_slots(pool.values, slot_mapping, v, s)};
}

}  // namespace mlx_server
