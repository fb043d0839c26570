#include "paged_attention/kv_pool.h"

#include <algorithm>
#include <memory>

#include <mlx/allocator.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "common/op_error.h"

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

}  // namespace

mx::array new_kv_pool(const mx::Shape& shape, mx::Dtype dtype, mx::StreamOrDevice s_) {
  if (shape.size() != 4 || std::ranges::any_of(shape, [](auto size) { return size < 1; })) {
    op_error("new_kv_pool", "shape must be [N, block_size, Hk, D] with sizes of 1 and more but got ", shape);
  }
  const auto s = mx::to_stream(s_);
  if (s.device != mx::Device::cpu) {
    return mx::zeros(shape, dtype, s);
  }
  return mx::array(shape, dtype, std::make_shared<UnwrittenPrimitive>(s), {});
}

}  // namespace mlx_server
