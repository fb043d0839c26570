#include "sampling/sampling.h"

#include <algorithm>
#include <memory>
#include <vector>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "common/op_error.h"
#include "common/row_contiguous.h"
#include "common/thread_pool.h"
#include "kernels/launch.h"
#include "sampling/sample_row.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr const char* kName = "sample";

// What the task of a batch reads and writes.
struct SampleTask {
  int batch_size;
  std::size_t vocab_size;
  const float* logits;
  const RowParams* rows;
  SampleTables tables;
  std::uint32_t* token_ids;
  float* logprobs;
  std::uint32_t* top_ids;
  float* top_logprobs;

  void operator()() const {
    ThreadPool::shared().parallel_for(batch_size, [this](int b) {
      thread_local RowScratch scratch;
      const SampledToken token = sample_row({logits + b * vocab_size, vocab_size}, rows[b], tables, scratch);
      token_ids[b] = token.id;
      logprobs[b] = token.logprob;
      std::ranges::copy(token.top_ids, top_ids + b * kMaxTopLogprobs);
      std::ranges::copy(token.top_logprobs, top_logprobs + b * kMaxTopLogprobs);
    });
  }
};

// inputs: the arrays of SampleInputs in their order, logits as float32. outputs: those of Sampled
class SamplePrimitive : public mx::Primitive {
 public:
  using Primitive::Primitive;

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    std::vector<mx::array> in;
    for (const mx::array& input : inputs) {
      in.push_back(row_contiguous(input, stream()));
    }
    for (mx::array& out : outputs) {
      out.set_data(mx::allocator::malloc(out.nbytes()));
    }
    mx::cpu::get_command_encoder(stream()).dispatch(SampleTask{
        .batch_size = inputs[0].shape(0),
        .vocab_size = static_cast<std::size_t>(inputs[0].shape(1)),
        .logits = in[0].data<float>(),
        .rows = reinterpret_cast<const RowParams*>(in[1].data<std::uint32_t>()),
        .tables = {.masks = in[2].data<std::uint32_t>(),
                   .mask_words = static_cast<std::size_t>(in[2].shape(1)),
                   .bias_ids = in[3].data<std::int32_t>(),
                   .bias_values = in[4].data<float>(),
                   .history = in[5].data<std::int32_t>(),
                   .breakers = in[6].data<std::int32_t>()},
        .token_ids = outputs[0].data<std::uint32_t>(),
        .logprobs = outputs[1].data<float>(),
        .top_ids = outputs[2].data<std::uint32_t>(),
        .top_logprobs = outputs[3].data<float>(),
    });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    op_error(kName, "the primitive must run on a CPU stream but got a GPU stream");
  }

  DEFINE_NAME(Sample)
  DEFINE_DEFAULT_IS_EQUIVALENT()
};

// -1: any size
void check_array(const char* name, const mx::array& array, mx::Dtype dtype, const mx::Shape& shape) {
  bool fits = array.dtype() == dtype && array.ndim() == shape.size();
  for (std::size_t axis = 0; fits && axis < shape.size(); ++axis) {
    fits = shape[axis] < 0 || array.shape(static_cast<int>(axis)) == shape[axis];
  }
  if (!fits) {
    op_error(kName, name, " must be ", dtype, " ", shape, " (-1: any) but got ", array.dtype(), " ", array.shape());
  }
}

}  // namespace

void check_sample(const SampleInputs& in) {
  const mx::array& logits = in.logits;
  if (logits.ndim() != 2 || logits.shape(1) < 1 || !mx::issubdtype(logits.dtype(), mx::floating)) {
    op_error(kName, "logits must be floating point [B, V] with V >= 1 but got ", logits.dtype(), " ", logits.shape());
  }
  check_array("rows", in.rows, mx::uint32, {logits.shape(0), kRowParamsWords});
  check_array("masks", in.masks, mx::uint32, {-1, (logits.shape(1) + 31) / 32});
  check_array("bias_ids", in.bias_ids, mx::int32, {-1});
  check_array("bias_values", in.bias_values, mx::float32, in.bias_ids.shape());
  check_array("history", in.history, mx::int32, {-1});
  check_array("breakers", in.breakers, mx::int32, {-1});
}

Sampled sample(const SampleInputs& in, mx::StreamOrDevice s) {
  check_sample(in);
  const mx::Stream stream = mx::to_stream(s);
  const int batch_size = in.logits.shape(0);
  if (is_gpu(stream)) {
    const bool has_kernel = batch_size > 0 && in.logits.shape(1) < kMaxGpuVocab;
    return has_kernel ? sample_gpu(in, stream) : sample_fallback(in, s);
  }
  const auto outputs = mx::array::make_arrays(
      {{batch_size}, {batch_size}, {batch_size, kMaxTopLogprobs}, {batch_size, kMaxTopLogprobs}},
      {mx::uint32, mx::float32, mx::uint32, mx::float32}, std::make_shared<SamplePrimitive>(stream),
      {mx::astype(in.logits, mx::float32, s), in.rows, in.masks, in.bias_ids, in.bias_values, in.history, in.breakers});
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

}  // namespace mlx_server
