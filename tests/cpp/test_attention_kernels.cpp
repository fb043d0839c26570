// The portable kernels of paged_attention against its definition.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "kernels/host.h"

namespace {

using mlx_server::HostBfloat16;

constexpr int kBlockSize = 4, kKvHeads = 2, kThreads = 64;

template <typename T, typename KV, int HEAD_DIM, int SHARING, int HEADS, int SPLIT, int SCALE_BITS, int SOFTCAP_BITS>
void decode_kernel(const T* q, const KV* k_pool, const KV* v_pool, const float* k_scales, const float* v_scales,
                   const int* tables, const int* splits, float* split_out, float* split_softmax) {
  constexpr int HAS_SCALES = std::is_same_v<KV, std::int8_t>;
  constexpr int THREADS = kThreads, KV_HEADS = kKvHeads, BLOCK_SIZE = kBlockSize;
#include "paged_attention/attention_decode.kernel"
}

template <typename T, int HEAD_DIM, int NUM_HEADS, int HAS_SINKS>
void combine_kernel(const float* split_out, const float* split_softmax, const int* queries, const T* sinks, T* out) {
  constexpr int THREADS = kThreads;
#include "paged_attention/attention_combine.kernel"
}

template <typename T, typename KV, int HEAD_DIM, int SHARING, int HEADS, int SCALE_BITS, int SOFTCAP_BITS,
          int HAS_SINKS>
void prefill_kernel(const T* q, const KV* k_pool, const KV* v_pool, const float* k_scales, const float* v_scales,
                    const int* tables, const int* tiles, const T* sinks, T* out) {
  constexpr int HAS_SCALES = std::is_same_v<KV, std::int8_t>;
  constexpr int THREADS = kThreads, KV_HEADS = kKvHeads, BLOCK_SIZE = kBlockSize;
#include "paged_attention/attention_prefill.kernel"
}

template <typename T>
std::vector<T> normal(int size, std::mt19937& rng) {
  std::normal_distribution<float> distribution;
  std::vector<T> values;
  for (int i = 0; i < size; ++i) {
    values.push_back(T(distribution(rng)));
  }
  return values;
}

template <typename T, typename KV, int HEAD_DIM, int SHARING, int HEADS, int SCALE_BITS, int SOFTCAP_BITS,
          int HAS_SINKS>
void matrix_kernel(const T* q, const KV* k_pool, const KV* v_pool, const float* k_scales, const float* v_scales,
                   const int* tables, const int* tiles, const T* sinks, T* out) {
  constexpr int HAS_SCALES = std::is_same_v<KV, std::int8_t>;
  constexpr int THREADS = kThreads, KV_HEADS = kKvHeads, BLOCK_SIZE = kBlockSize;
#include "paged_attention/attention_matrix.kernel"
}

template <typename T, int HEAD_DIM>
void quantize_kernel(const T* x, std::int8_t* values, float* scales) {
#include "paged_attention/kv_quantize.kernel"
}

struct Options {
  float softcap = 0;
  bool has_sinks = false;
  int window = std::numeric_limits<int>::max();
};

// Two rows of tokens [0, 40) and [0, 23), in blocks of reverse order. What no query sees is NaN.
template <typename T, typename KV, int kHeadDim, int kSharing>
struct Case {
  static constexpr int kHeads = kKvHeads * kSharing, kNumBlocks = 16, kMaxBlocks = 10;
  static constexpr int kLens[2] = {40, 23};

  explicit Case(Options options_) : options(options_) {
    std::mt19937 rng(5);
    for (int row = 0, next = kNumBlocks; row < 2; ++row) {
      for (int block = 0; block < kMaxBlocks; ++block) {
        tables.push_back(block * kBlockSize < kLens[row] ? --next : -1);
      }
    }
    q = normal<T>((kLens[0] + kLens[1]) * kHeads * kHeadDim, rng);
    fill(k, k_scales, rng);
    fill(v, v_scales, rng);
    sinks = normal<T>(kHeads, rng);
    out.resize(q.size(), T(NAN));
    if constexpr (!std::is_same_v<KV, std::int8_t>) {
      std::fill_n(k.begin() + offset(1, kLens[1] - 1, kHeads - 1) + kHeadDim, kKvHeads * kHeadDim, KV(NAN));
    }
  }

  static void fill(std::vector<KV>& values, std::vector<float>& scales, std::mt19937& rng) {
    constexpr int kRows = kNumBlocks * kBlockSize * kKvHeads;
    if constexpr (std::is_same_v<KV, std::int8_t>) {
      for (int i = 0; i < kRows * kHeadDim; ++i) {
        values.push_back(static_cast<std::int8_t>(static_cast<int>(rng() % 255) - 127));
      }
      for (int i = 0; i < kRows; ++i) {
        scales.push_back(0.02f * static_cast<float>(i % 3));
      }
    } else {
      values = normal<KV>(kRows * kHeadDim, rng);
      scales.assign(kRows, NAN);  // not to be read
    }
  }

  static double value(const std::vector<KV>& values, const std::vector<float>& scales, int index) {
    const double scale = std::is_same_v<KV, std::int8_t> ? double(scales[index / kHeadDim]) : 1.0;
    return double(float(values[index])) * scale;
  }

  int offset(int row, int position, int head) const {
    const int slot = tables[row * kMaxBlocks + position / kBlockSize] * kBlockSize + position % kBlockSize;
    return (slot * kKvHeads + head / kSharing) * kHeadDim;
  }

  std::vector<double> expected(int row, int position, int head) const {
    const T* const query = q.data() + ((row == 0 ? 0 : kLens[0]) + position) * kHeads * kHeadDim + head * kHeadDim;
    std::vector<double> result(kHeadDim, 0);
    double sum = options.has_sinks ? std::exp(double(float(sinks[head]))) : 0;
    for (int seen = std::max(0, position - options.window + 1); seen <= position; ++seen) {
      double score = 0;
      for (int d = 0; d < kHeadDim; ++d) {
        score += double(float(query[d])) * value(k, k_scales, offset(row, seen, head) + d);
      }
      score *= 0.25;
      const double weight =
          std::exp(options.softcap > 0 ? options.softcap * std::tanh(score / options.softcap) : score);
      sum += weight;
      for (int d = 0; d < kHeadDim; ++d) {
        result[d] += weight * value(v, v_scales, offset(row, seen, head) + d);
      }
    }
    for (double& value : result) {
      value /= sum;
    }
    return result;
  }

  void check_token(const T* token_out, int row, int position, double tolerance) const {
    for (int head = 0; head < kHeads; ++head) {
      const std::vector<double> want = expected(row, position, head);
      for (int d = 0; d < kHeadDim; ++d) {
        CHECK_NEAR(float(token_out[head * kHeadDim + d]), want[d], tolerance);
      }
    }
  }

  Options options;
  std::vector<int> tables;
  std::vector<T> q, sinks, out;
  std::vector<KV> k, v;
  std::vector<float> k_scales, v_scales;
};

constexpr int kScaleBits = std::bit_cast<int>(0.25f);

// Queries 39 and 10 of row 0 and 22 of row 1, in splits of 8 keys.
template <typename T, int kHeadDim, int kSharing, int kHeads, int kSoftcap = 0, int kHasSinks = 0, typename KV = T>
void check_decode(double tolerance, int window = std::numeric_limits<int>::max()) {
  using C = Case<T, KV, kHeadDim, kSharing>;
  constexpr int kSplit = 8;
  C c({float(kSoftcap), kHasSinks != 0, window});
  const int positions[3][2] = {{0, 39}, {0, 10}, {1, 22}};
  std::vector<int> splits, queries;
  for (const auto& [row, position] : positions) {
    const int first = static_cast<int>(splits.size()) / 4;
    for (int begin = std::max(0, position + 1 - window); begin <= position;) {
      const int end = std::min((begin / kSplit + 1) * kSplit, position + 1);
      splits.insert(splits.end(), {row * C::kMaxBlocks, row * C::kLens[0] + position, begin, end});
      begin = end;
    }
    queries.insert(queries.end(), {first, static_cast<int>(splits.size()) / 4 - first});
  }
  const int num_splits = static_cast<int>(splits.size()) / 4;
  std::vector<float> split_out(num_splits * C::kHeads * kHeadDim, NAN), split_softmax(num_splits * C::kHeads * 2, NAN);
  std::vector<T> out(3 * C::kHeads * kHeadDim, T(NAN));
  mlx_server::host_launch({num_splits, kKvHeads * ((kSharing + kHeads - 1) / kHeads), 1}, kThreads, [&] {
    decode_kernel<T, KV, kHeadDim, kSharing, kHeads, kSplit, kScaleBits, std::bit_cast<int>(float(kSoftcap))>(
        c.q.data(), c.k.data(), c.v.data(), c.k_scales.data(), c.v_scales.data(), c.tables.data(), splits.data(),
        split_out.data(), split_softmax.data());
  });
  mlx_server::host_launch({C::kHeads, 3, 1}, kThreads, [&] {
    combine_kernel<T, kHeadDim, C::kHeads, kHasSinks>(split_out.data(), split_softmax.data(), queries.data(),
                                                      c.sinks.data(), out.data());
  });
  for (int i = 0; i < 3; ++i) {
    c.check_token(out.data() + i * C::kHeads * kHeadDim, positions[i][0], positions[i][1], tolerance);
  }
}

// All queries of row 1 and queries [5, 40) of row 0.
template <bool kMatrix, typename T, int kHeadDim, int kSharing, int kHeads, int kSoftcap = 0, int kHasSinks = 0,
          typename KV = T>
void check_prefill(double tolerance, int window = std::numeric_limits<int>::max()) {
  using C = Case<T, KV, kHeadDim, kSharing>;
  constexpr int kQueries = kThreads / (kMatrix ? 2 : 4) / kHeads, kSoftcapBits = std::bit_cast<int>(float(kSoftcap));
  C c({float(kSoftcap), kHasSinks != 0, window});
  std::vector<int> tiles;
  for (const auto& [row, begin, end] : {std::array{0, 5, 40}, std::array{1, 0, 23}}) {
    for (int i = begin; i < end; i += kQueries) {
      const int token = row * C::kLens[0] + i;
      tiles.insert(tiles.end(), {row * C::kMaxBlocks, token, token, std::min(kQueries, end - i), i, window});
    }
  }
  mlx_server::host_launch(
      {static_cast<int>(tiles.size()) / 6, kKvHeads * ((kSharing + kHeads - 1) / kHeads), 1}, kThreads, [&] {
        constexpr auto kernel =
            kMatrix ? matrix_kernel<T, KV, kHeadDim, kSharing, kHeads, kScaleBits, kSoftcapBits, kHasSinks>
                    : prefill_kernel<T, KV, kHeadDim, kSharing, kHeads, kScaleBits, kSoftcapBits, kHasSinks>;
        kernel(c.q.data(), c.k.data(), c.v.data(), c.k_scales.data(), c.v_scales.data(), c.tables.data(), tiles.data(),
               c.sinks.data(), c.out.data());
      });
  for (int position = 0; position < 40; ++position) {
    const T* const row_0 = c.out.data() + position * C::kHeads * kHeadDim;
    if (position < 5) {
      CHECK(std::isnan(float(row_0[0])));  // no query of a tile
    } else {
      c.check_token(row_0, 0, position, tolerance);
    }
    if (position < 23) {
      c.check_token(row_0 + 40 * C::kHeads * kHeadDim, 1, position, tolerance);
    }
  }
}

TEST(decode_agrees_with_the_definition) {
  check_decode<float, 16, 3, 4>(2e-6);
  check_decode<float, 64, 1, 1>(2e-6);
  check_decode<float, 72, 10, 8, 3, 1>(2e-6, 13);
  check_decode<float, 256, 2, 2, 0, 1>(2e-6);
  check_decode<float, 9, 16, 16>(2e-6, 1);
  check_decode<HostBfloat16, 80, 4, 4, 5>(1e-2);
  check_decode<float, 64, 3, 4, 0, 0, std::int8_t>(2e-5);
}

TEST(prefill_agrees_with_the_definition) {
  check_prefill<false, float, 16, 3, 3>(2e-6);
  check_prefill<false, float, 64, 1, 1>(2e-6);
  check_prefill<false, float, 24, 5, 4, 3, 1>(2e-6, 13);
  check_prefill<false, float, 144, 2, 2, 0, 1>(2e-6);
  check_prefill<false, float, 9, 16, 16>(2e-6, 1);
  check_prefill<false, HostBfloat16, 80, 4, 4, 5>(1e-2);
  check_prefill<false, float, 64, 3, 3, 0, 0, std::int8_t>(2e-5);
}

TEST(matrix_kernel_agrees_with_the_definition) {
  check_prefill<true, float, 16, 3, 3>(2e-6);
  check_prefill<true, float, 64, 1, 1>(2e-6);
  check_prefill<true, float, 32, 5, 4, 3, 1>(2e-6, 13);
  check_prefill<true, float, 48, 16, 16>(2e-6, 1);
  check_prefill<true, HostBfloat16, 80, 4, 4, 5, 1>(2e-2);
  check_prefill<true, float, 64, 3, 3, 0, 0, std::int8_t>(2e-5);
}

TEST(quantize_rounds_to_the_nearest) {
  constexpr int kHeadDim = 40;
  std::mt19937 rng(3);
  std::vector<float> x = normal<float>(3 * kHeadDim, rng), scales(3, NAN);
  std::fill_n(x.begin(), kHeadDim, 0.0f);
  std::vector<std::int8_t> values(x.size());
  mlx_server::host_launch({3, 1, 1}, 32,
                          [&] { quantize_kernel<float, kHeadDim>(x.data(), values.data(), scales.data()); });
  CHECK_EQ(scales[0], 0.0f);
  for (std::size_t i = 0; i < x.size(); ++i) {
    CHECK_NEAR(values[i] * scales[i / kHeadDim], x[i], 0.501 * scales[i / kHeadDim]);
  }
  x[0] = NAN;
  x[kHeadDim] = INFINITY;
  mlx_server::host_launch({3, 1, 1}, 32,
                          [&] { quantize_kernel<float, kHeadDim>(x.data(), values.data(), scales.data()); });
  CHECK(std::isnan(scales[0]) && std::isnan(scales[1]) && std::isfinite(scales[2]));
}

}  // namespace
