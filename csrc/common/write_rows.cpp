#include "common/write_rows.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "common/op_error.h"
#include "common/row_contiguous.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

// Moves the ownership of an array's memory to another array; the destructor moves it back.
class LentMemory {
 public:
  LentMemory(const mx::array& lender, mx::array& borrower) : owner_(lender.data_shared_ptr()) {
    borrower.set_data(std::move(*owner_), borrower.size(), lender.strides(), lender.flags(), lender.offset());
    borrowed_ = borrower.data_shared_ptr().get();
  }

  ~LentMemory() {
    std::destroy_at(owner_.get());
    std::construct_at(owner_.get(), std::move(*borrowed_));
  }

  LentMemory(const LentMemory&) = delete;
  LentMemory& operator=(const LentMemory&) = delete;

 private:
  std::shared_ptr<mx::allocator::Data> owner_;
  mx::allocator::Data* borrowed_;
};

// inputs: pool [N, ...], slots [T], rows [T, 1, ...]
class WriteRowsPrimitive : public mx::UnaryPrimitive {
 public:
  WriteRowsPrimitive(mx::Stream stream, std::shared_ptr<mx::Primitive> scatter)
      : UnaryPrimitive(stream), scatter_(std::move(scatter)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    const mx::array pool = row_contiguous(inputs[0], stream());
    const mx::array slots = row_contiguous(inputs[1], stream()), rows = row_contiguous(inputs[2], stream());
    out.copy_shared_buffer(pool);
    const std::size_t row_bytes = rows.nbytes() / std::max(rows.shape(0), 1);
    mx::cpu::get_command_encoder(stream()).dispatch([num_rows = rows.shape(0), row_bytes,
                                                     slots = slots.data<std::int32_t>(), rows = rows.data<char>(),
                                                     pool = out.data<char>()] {
      for (int t = 0; t < num_rows; ++t) {
        std::memcpy(pool + slots[t] * row_bytes, rows + t * row_bytes, row_bytes);
      }
    });
  }

  // MLX's scatter writes in place if the pool is its alone and fills its buffer, so it borrows the pool's memory, with
  // as many rows as fill the buffer. That MLX sees an output in that memory is what makes later reads wait for
  // it on the device.
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    const mx::array& pool = inputs[0];
    const void* const buffer = pool.buffer().ptr();
    mx::Shape shape = pool.shape();
    const std::size_t row_bytes = pool.nbytes() / std::max(shape[0], 1);
    if (row_bytes > 0) {
      shape[0] = std::max(shape[0], static_cast<int>((pool.buffer_size() + row_bytes - 1) / row_bytes));
    }
    std::vector<mx::array> scatter_inputs = inputs, scatter_outputs;
    scatter_inputs[0] = mx::array(shape, pool.dtype(), nullptr, {});
    // With its primitive: the scatter asks its output for the stream.
    scatter_outputs.emplace_back(shape, pool.dtype(), scatter_, std::vector<mx::array>{});
    {
      const LentMemory lent(pool, scatter_inputs[0]);
      scatter_->eval_gpu(scatter_inputs, scatter_outputs);
      if (pool.size() > 0 && scatter_outputs[0].buffer().ptr() != buffer) {
        throw std::runtime_error("[write_rows] MLX's scatter did not write in place.");
      }
    }
    out.copy_shared_buffer(pool);
  }

  DEFINE_NAME(WriteRows)
  bool is_equivalent(const mx::Primitive&) const override { return true; }

 private:
  std::shared_ptr<mx::Primitive> scatter_;  // MLX's, for GPUs
};

}  // namespace

mx::array write_rows(const mx::array& pool, const mx::array& slots, const mx::array& rows, mx::Stream s) {
  const mx::array scattered = mx::scatter(pool, slots, mx::expand_dims(rows, 1, s), 0, s);
  return mx::array(pool.shape(), pool.dtype(), std::make_shared<WriteRowsPrimitive>(s, scattered.primitive_ptr()),
                   scattered.inputs());
}

mx::array copy_rows(const mx::array& pool, const std::vector<std::int32_t>& from, const std::vector<std::int32_t>& to,
                    mx::StreamOrDevice s_) {
  const std::set<std::int32_t> distinct(to.begin(), to.end());
  if (pool.ndim() < 1 || from.size() != to.size() || distinct.size() != to.size()) {
    op_error("copy_rows", "pool must have rows, from and to as many numbers, those of to distinct, but got ",
             pool.shape(), ", ", from.size(), " and ", to.size(), " numbers, ", distinct.size(), " distinct");
  }
  for (const auto& rows : {from, to}) {
    for (std::int32_t row : rows) {
      if (row < 0 || row >= pool.shape(0)) {
        throw std::out_of_range("[copy_rows] rows must be in [0, " + std::to_string(pool.shape(0)) + ") but got " +
                                std::to_string(row) + ".");
      }
    }
  }
  if (from.empty()) {
    return pool;
  }
  const auto s = mx::to_stream(s_);
  const mx::Shape shape{static_cast<int>(from.size())};
  const mx::array sources(from.begin(), shape, mx::int32), targets(to.begin(), shape, mx::int32);
  return write_rows(pool, targets, mx::take(pool, sources, 0, s), s);
}

}  // namespace mlx_server
