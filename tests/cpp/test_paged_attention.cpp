#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <tuple>
#include <vector>

#include "check.h"
#include "paged_attention/paged_attention_cpu.h"

namespace {

using namespace mlx_server;

std::vector<float> normal(std::size_t size, std::mt19937& rng) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(size);
  for (float& value : values) {
    value = distribution(rng);
  }
  return values;
}

// A batch whose rows use the pool's blocks in reverse order.
struct Batch {
  Batch(std::vector<int> query_lens_, std::vector<int> context_lens_, int block_size_, int num_heads_,
        int num_kv_heads_, int head_dim_, int window_ = std::numeric_limits<int>::max(), float softcap_ = 0,
        bool with_sinks = false)
      : query_lens(std::move(query_lens_)), context_lens(std::move(context_lens_)) {
    std::mt19937 rng(7);
    int num_tokens = 0, num_blocks = 0;
    for (std::size_t row = 0; row < query_lens.size(); ++row) {
      num_tokens += query_lens[row];
      const int row_blocks = (context_lens[row] + block_size_ - 1) / block_size_;
      num_blocks += row_blocks;
      max_blocks = std::max(max_blocks, row_blocks);
    }
    int next = num_blocks;
    for (int context_len : context_lens) {
      for (int i = 0; i < max_blocks; ++i) {
        tables.push_back(i * block_size_ < context_len ? --next : -1);
      }
    }
    q = normal(static_cast<std::size_t>(num_tokens) * num_heads_ * head_dim_, rng);
    k = normal(static_cast<std::size_t>(num_blocks) * block_size_ * num_kv_heads_ * head_dim_, rng);
    v = normal(k.size(), rng);
    sinks = normal(static_cast<std::size_t>(num_heads_), rng);
    out.resize(q.size(), NAN);
    op = {.q = q.data(),
          .keys = {.floats = k.data()},
          .values = {.floats = v.data()},
          .block_tables = tables.data(),
          .sinks = with_sinks ? sinks.data() : nullptr,
          .out = out.data(),
          .query_lens = query_lens,
          .context_lens = context_lens,
          .max_blocks = max_blocks,
          .block_size = block_size_,
          .num_heads = num_heads_,
          .num_kv_heads = num_kv_heads_,
          .head_dim = head_dim_,
          .window = window_,
          .scale = 1 / std::sqrt(static_cast<float>(head_dim_)),
          .softcap = softcap_};
  }
  Batch(const Batch&) = delete;

  // Offset of a token of a row in the pools, for a query head.
  std::size_t offset(std::size_t row, int position, int head) const {
    const int block = tables[row * max_blocks + position / op.block_size];
    const int slot = block * op.block_size + position % op.block_size;
    return static_cast<std::size_t>((slot * op.num_kv_heads + head / (op.num_heads / op.num_kv_heads)) * op.head_dim);
  }

  // Keys and values are integers from now on; k and v become what these stand for.
  void quantize() {
    for (auto [floats, integers, scales, rows] :
         {std::tuple(&k, &k_integers, &k_scales, &op.keys), std::tuple(&v, &v_integers, &v_scales, &op.values)}) {
      const std::size_t head_dim = op.head_dim;
      for (std::size_t i = 0; i < floats->size(); ++i) {
        if (i % head_dim == 0) {
          scales->push_back(0.01f * static_cast<float>(1 + i / head_dim % 3));
        }
        integers->push_back(static_cast<std::int8_t>(static_cast<int>(i * 37 % 255) - 127));
        (*floats)[i] = static_cast<float>(integers->back()) * scales->back();
      }
      *rows = {.integers = integers->data(), .scales = scales->data()};
    }
  }

  std::vector<int> query_lens, context_lens;
  std::vector<std::int8_t> k_integers, v_integers;
  std::vector<float> k_scales, v_scales;
  std::vector<std::int32_t> tables;
  std::vector<float> q, k, v, sinks, out;
  PagedAttention op;
  int max_blocks = 1;
};

// In float64, one query head at a time.
std::vector<double> attend(const Batch& batch, std::size_t row, int position, int head, const float* q) {
  const int head_dim = batch.op.head_dim;
  std::vector<double> out(static_cast<std::size_t>(head_dim), 0);
  double sum = batch.op.sinks == nullptr ? 0 : std::exp(double{batch.sinks[head]});
  for (int seen = std::max(0, position + 1 - batch.op.window); seen <= position; ++seen) {
    const std::size_t offset = batch.offset(row, seen, head);
    double score = 0;
    for (int d = 0; d < head_dim; ++d) {
      score += static_cast<double>(q[d]) * batch.k[offset + d];
    }
    score *= batch.op.scale;
    if (batch.op.softcap > 0) {
      score = batch.op.softcap * std::tanh(score / batch.op.softcap);
    }
    const double weight = std::exp(score);
    sum += weight;
    for (int d = 0; d < head_dim; ++d) {
      out[d] += weight * batch.v[offset + d];
    }
  }
  for (double& value : out) {
    value /= sum;
  }
  return out;
}

void check_batch(const Batch& batch, const AttentionKernel& kernel, ThreadPool& pool) {
  paged_attention(batch.op, pool, kernel);
  std::size_t offset = 0;
  for (std::size_t row = 0; row < batch.query_lens.size(); ++row) {
    for (int i = 0; i < batch.query_lens[row]; ++i) {
      const int position = batch.context_lens[row] - batch.query_lens[row] + i;
      for (int head = 0; head < batch.op.num_heads; ++head) {
        const std::vector<double> expected = attend(batch, row, position, head, batch.q.data() + offset);
        for (int d = 0; d < batch.op.head_dim; ++d) {
          CHECK_NEAR(batch.out[offset + d], expected[d], 2e-6);
        }
        offset += batch.op.head_dim;
      }
    }
  }
}

TEST(agrees_with_the_definition) {
  ThreadPool pool(2);
  for (const AttentionKernel* kernel : attention_kernels()) {
    std::cerr << "  " << kernel->name << "\n";
    for (const int head_dim : {8, 64, 80, 96, 128}) {
      check_batch(Batch({1, 5, 1, 40, 33}, {1, 5, 200, 40, 130}, 16, 6, 2, head_dim), *kernel, pool);
    }
    for (const int block_size : {1, 7, 64, 100}) {
      check_batch(Batch({1, 9, 70}, {65, 128, 70}, block_size, 4, 4, 64), *kernel, pool);
    }
    check_batch(Batch({2, 1}, {20, 64}, 16, 40, 1, 16), *kernel, pool);
    check_batch(Batch({1, 3, 9}, {512, 1600, 1030}, 16, 4, 2, 16), *kernel, pool);  // several splits
    check_batch(Batch({1, 7, 20}, {512, 1600, 1030}, 16, 4, 2, 16, 600, 0, true), *kernel, pool);
    for (const int window : {1, 30, 64, 129}) {
      check_batch(Batch({1, 5, 1, 40, 33}, {1, 5, 200, 40, 130}, 16, 6, 2, 64, window), *kernel, pool);
      check_batch(Batch({1, 5, 1, 40, 33}, {1, 5, 200, 40, 130}, 16, 6, 2, 64, window, 0.5f, true), *kernel, pool);
    }
  }
}

TEST(integers_with_scales) {
  ThreadPool pool(2);
  for (const AttentionKernel* kernel : attention_kernels()) {
    Batch batch({1, 5, 40}, {200, 5, 130}, 16, 6, 2, 24, 90);
    batch.quantize();
    check_batch(batch, *kernel, pool);
  }
}

TEST(integers_are_the_nearest) {
  std::mt19937 rng(3);
  constexpr std::size_t kHeadDim = 40;
  std::vector<float> x = normal(4 * kHeadDim, rng), scales(4);
  std::vector<std::int8_t> integers(x.size());
  std::fill_n(x.begin(), kHeadDim, 0.0f);
  x[kHeadDim] = NAN;
  x[2 * kHeadDim] = -INFINITY;
  quantize_rows(x.data(), 4, kHeadDim, integers.data(), scales.data());
  CHECK(scales[0] == 0 && std::isnan(scales[1]) && std::isnan(scales[2]));
  for (std::size_t i = 3 * kHeadDim; i < x.size(); ++i) {
    CHECK_NEAR(static_cast<float>(integers[i]) * scales[3], x[i], 0.501 * scales[3]);
  }
}

TEST(nan_is_not_hidden) {
  ThreadPool pool(1);
  for (const AttentionKernel* kernel : attention_kernels()) {
    Batch batch({1, 1}, {70, 70}, 16, 2, 2, 8);
    batch.k[batch.offset(1, 66, 0)] = NAN;
    paged_attention(batch.op, pool, *kernel);
    CHECK(std::isfinite(batch.out[0]));                                // row 0
    CHECK(std::isnan(batch.out[16]) && std::isfinite(batch.out[24]));  // row 1, heads 0 and 1
  }
}

}  // namespace
