#include "sampling/sampling.h"

#include <memory>
#include <vector>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "common/op_error.h"
#include "common/row_contiguous.h"
#include "common/thread_pool.h"
#include "sampling/sample_row.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr const char* kName = "sample";

// logits [B, V] float32, then the parameters [B] in the order of SampleParams  ->  [B] uint32
class SamplePrimitive : public mx::UnaryPrimitive {
 public:
  using UnaryPrimitive::UnaryPrimitive;

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    std::vector<mx::array> in;
    for (const mx::array& input : inputs) {
      in.push_back(row_contiguous(input, stream()));
    }
    out.set_data(mx::allocator::malloc(out.nbytes()));
    mx::cpu::get_command_encoder(stream()).dispatch(
        [batch_size = out.shape(0), vocab_size = static_cast<std::size_t>(inputs[0].shape(1)),
         logits = in[0].data<float>(), temperature = in[1].data<float>(), top_k = in[2].data<std::int32_t>(),
         top_p = in[3].data<float>(), min_p = in[4].data<float>(), seed = in[5].data<std::uint64_t>(),
         position = in[6].data<std::uint32_t>(), out = out.data<std::uint32_t>()] {
          ThreadPool::shared().parallel_for(batch_size, [&](int b) {
            thread_local RowScratch scratch;
            const RowParams params{temperature[b], top_k[b], top_p[b], min_p[b], seed[b], position[b]};
            out[b] = sample_row({logits + b * vocab_size, vocab_size}, params, scratch);
          });
        });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    op_error(kName, "the primitive must run on a CPU stream but got a GPU stream");
  }

  DEFINE_NAME(Sample)
  DEFINE_DEFAULT_IS_EQUIVALENT()
};

void check_param(const char* name, const mx::array& param, mx::Dtype dtype, int batch_size) {
  if (param.shape() != mx::Shape{batch_size} || param.dtype() != dtype) {
    op_error(kName, name, " must be ", dtype, " [", batch_size, "] but got ", param.dtype(), " ", param.shape());
  }
}

}  // namespace

void check_sample(const mx::array& logits, const SampleParams& params) {
  if (logits.ndim() != 2 || logits.shape(1) < 1 || !mx::issubdtype(logits.dtype(), mx::floating)) {
    op_error(kName, "logits must be floating point [B, V] with V >= 1 but got ", logits.dtype(), " ", logits.shape());
  }
  const int batch_size = logits.shape(0);
  check_param("temperature", params.temperature, mx::float32, batch_size);
  check_param("top_k", params.top_k, mx::int32, batch_size);
  check_param("top_p", params.top_p, mx::float32, batch_size);
  check_param("min_p", params.min_p, mx::float32, batch_size);
  check_param("seed", params.seed, mx::uint64, batch_size);
  check_param("position", params.position, mx::uint32, batch_size);
}

mx::array sample(const mx::array& logits, const SampleParams& params, mx::StreamOrDevice s) {
  check_sample(logits, params);
  const mx::Stream stream = mx::to_stream(s);
  if (stream.device != mx::Device::cpu) {
    return sample_fallback(logits, params, s);
  }
  return mx::array({logits.shape(0)}, mx::uint32, std::make_shared<SamplePrimitive>(stream),
                   {mx::astype(logits, mx::float32, s), params.temperature, params.top_k, params.top_p, params.min_p,
                    params.seed, params.position});
}

}  // namespace mlx_server
