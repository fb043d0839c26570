#include "paged_attention/kv_pool.h"

#include <algorithm>
#include <memory>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "common/op_error.h"
#include "common/row_contiguous.h"
#include "common/write_rows.h"
#include "kernel_sources.h"
#include "kernels/kernel_use.h"
#include "kernels/launch.h"
#include "paged_attention/paged_attention_cpu.h"

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

// x float32 [T, Hk, D] -> integers int8 [T, Hk, D], scales float32 [T, Hk]
class QuantizePrimitive : public mx::Primitive {
 public:
  using Primitive::Primitive;

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const mx::array x = row_contiguous(inputs[0], stream());
    for (mx::array& out : outputs) {
      out.set_data(mx::allocator::malloc(out.nbytes()));
    }
    mx::cpu::get_command_encoder(stream()).dispatch(
        [from = x.data<float>(), num_rows = outputs[1].size(), head_dim = x.shape(2),
         integers = outputs[0].data<std::int8_t>(),
         scales = outputs[1].data<float>()] { quantize_rows(from, num_rows, head_dim, integers, scales); });
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    op_error("write_kv", "the primitive must run on a CPU stream but got a GPU stream");
  }
  bool is_equivalent(const mx::Primitive&) const override { return true; }

  DEFINE_NAME(QuantizeKV)
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

struct Quantized {
  mx::array values;  // int8 [T, Hk, D]
  mx::array scales;  // float32 [T, Hk]
};

// In MLX's own ops.
Quantized quantize_fallback(const mx::array& x, mx::Stream s) {
  const mx::array values = mx::astype(x, mx::float32, s);
  const mx::array zero(0.0f);
  const mx::array max = mx::max(mx::abs(values, s), -1, /*keepdims=*/true, s);                // [T, Hk, 1]
  const mx::array poison = mx::sum(mx::multiply(values, zero, s), -1, /*keepdims=*/true, s);  // NaN or 0
  const mx::array is_usable = mx::logical_and(mx::greater(max, zero, s), mx::equal(poison, zero, s), s);
  const mx::array factor = mx::where(is_usable, mx::divide(mx::array(127.0f), max, s), zero, s);
  const mx::array scaled = mx::where(is_usable, mx::multiply(values, factor, s), zero, s);
  const mx::array half = mx::where(mx::less(scaled, zero, s), mx::array(-0.5f), mx::array(0.5f), s);
  const mx::array scales = mx::add(mx::divide(max, mx::array(127.0f), s), poison, s);
  return {mx::astype(mx::add(scaled, half, s), mx::int8, s), mx::squeeze(scales, -1, s)};
}

// kv_quantize.kernel says what is computed.
Quantized quantize(const mx::array& x, mx::Stream s) {
  const std::vector<mx::Shape> shapes{x.shape(), {x.shape(0), x.shape(1)}};
  const std::vector<mx::Dtype> dtypes{mx::int8, mx::float32};
  if (!is_gpu(s)) {
    const auto outputs =
        mx::array::make_arrays(shapes, dtypes, std::make_shared<QuantizePrimitive>(s), {mx::astype(x, mx::float32, s)});
    return {outputs[0], outputs[1]};
  }
  if (!are_enabled({"kv_quantize"})) {
    return quantize_fallback(x, s);
  }
  const auto outputs = launch(kernel_sources::kv_quantize,
                              {.inputs = {x},
                               .output_shapes = shapes,
                               .output_dtypes = dtypes,
                               .constants = {{"T", x.dtype()}, {"HEAD_DIM", x.shape(2)}},
                               .groups = {x.shape(0) * x.shape(1), 1, 1},
                               .threads = 32},
                              s);
  return {outputs[0], outputs[1]};
}

void check_scales(const char* op, const KVPool& pool) {
  const mx::Shape shape{pool.keys.shape(0), pool.block_size(), pool.num_heads()};
  const auto is_right = [&](const std::optional<mx::array>& scales) {
    return scales && scales->shape() == shape && scales->dtype() == mx::float32;
  };
  if (pool.keys.dtype() != mx::int8 || !is_right(pool.key_scales) || !is_right(pool.value_scales)) {
    op_error(op, "a pool with scales must have keys and values of int8 and float32 scales ", shape);
  }
}

}  // namespace

void check_kv_pool(const char* op, const KVPool& pool) {
  const mx::array &k = pool.keys, &v = pool.values;
  if (k.ndim() != 4 || k.shape() != v.shape() || k.dtype() != v.dtype()) {
    op_error(op, "keys and values of the pool must have one shape [N, block_size, Hk, D] and one dtype but got ",
             k.shape(), " ", k.dtype(), " and ", v.shape(), " ", v.dtype());
  }
  if (pool.key_scales || pool.value_scales) {
    check_scales(op, pool);
  }
}

KVPool new_kv_pool(const mx::Shape& shape, mx::Dtype dtype, std::optional<int> bits, mx::StreamOrDevice s_) {
  if (shape.size() != 4 || std::ranges::any_of(shape, [](auto size) { return size < 1; })) {
    op_error("new_kv_pool", "shape must be [N, block_size, Hk, D] with sizes of 1 and more but got ", shape);
  }
  if (bits && *bits != 8) {
    op_error("new_kv_pool", "bits must be 8 or None but got ", *bits);
  }
  const auto s = mx::to_stream(s_);
  if (!bits) {
    return {new_array(shape, dtype, s), new_array(shape, dtype, s), {}, {}};
  }
  const mx::Shape scales{shape[0], shape[1], shape[2]};
  return {new_array(shape, mx::int8, s), new_array(shape, mx::int8, s), new_array(scales, mx::float32, s),
          new_array(scales, mx::float32, s)};
}

namespace {

KVPool write_kv_by(Quantized (*quantize)(const mx::array&, mx::Stream), const KVPool& pool, const mx::array& k,
                   const mx::array& v, const mx::array& slot_mapping, mx::StreamOrDevice s_) {
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
  const auto write = [&](const mx::array& array, const mx::array& rows) {
    return write_slots(array, slot_mapping, rows, s);
  };
  if (!pool.key_scales) {
    return {write(pool.keys, k), write(pool.values, v), {}, {}};
  }
  const auto [keys, key_scales] = quantize(k, s);
  const auto [values, value_scales] = quantize(v, s);
  return {write(pool.keys, keys), write(pool.values, values), write(*pool.key_scales, key_scales),
          write(*pool.value_scales, value_scales)};
}

}  // namespace

KVPool write_kv(const KVPool& pool, const mx::array& k, const mx::array& v, const mx::array& slot_mapping,
                mx::StreamOrDevice s) {
  return write_kv_by(quantize, pool, k, v, slot_mapping, s);
}

KVPool write_kv_fallback(const KVPool& pool, const mx::array& k, const mx::array& v, const mx::array& slot_mapping,
                         mx::StreamOrDevice s) {
  return write_kv_by(quantize_fallback, pool, k, v, slot_mapping, s);
}

KVPool copy_kv(const KVPool& pool, const std::vector<std::int32_t>& from, const std::vector<std::int32_t>& to,
               mx::StreamOrDevice s) {
  check_kv_pool("copy_kv", pool);
  const auto copy = [&](const mx::array& array) {
    return mx::reshape(copy_rows(mx::flatten(array, 0, 1, s), from, to, s), array.shape(), s);
  };
  if (!pool.key_scales) {
    return {copy(pool.keys), copy(pool.values), {}, {}};
  }
  return {copy(pool.keys), copy(pool.values), copy(*pool.key_scales), copy(*pool.value_scales)};
}

}  // namespace mlx_server
