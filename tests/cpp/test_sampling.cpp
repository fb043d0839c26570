#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "sampling/philox.h"
#include "sampling/sample_row.h"

namespace {

using namespace mlx_server;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

RowParams make_params(float temperature, std::int32_t top_k = 0, float top_p = 1, float min_p = 0,
                      std::uint32_t seed = 1) {
  RowParams params;
  params.seed = {seed, seed * 7};
  params.position = 2;
  params.temperature = temperature;
  params.top_k = top_k;
  params.top_p = top_p;
  params.min_p = min_p;
  return params;
}
const RowParams kGreedy = make_params(0);

std::vector<float> normal(std::size_t size, float deviation, std::mt19937& rng) {
  std::normal_distribution<float> distribution(0, deviation);
  std::vector<float> values(size);
  for (float& value : values) {
    value = distribution(rng);
  }
  return values;
}

std::uint32_t sample(std::span<const float> logits, const RowParams& params, const RowKernels& kernels) {
  static RowScratch scratch;  // rows must leave nothing behind in it
  return sample_row(logits, params, {}, scratch, kernels).id;
}

// The definition: sorts the tokens and computes in float64. margin: how near the draw or a filter was to another
// result.
struct Definition {
  std::uint32_t token;
  double margin = 1;
};

Definition define(std::span<const float> logits, const RowParams& params) {
  const std::size_t n = logits.size();
  const float max = *std::max_element(logits.begin(), logits.end());
  std::vector<float> scaled(n);
  std::vector<double> weights(n);
  for (std::size_t i = 0; i < n; ++i) {
    scaled[i] = (logits[i] - max) / params.temperature;
    weights[i] = std::exp(static_cast<double>(scaled[i]));
  }
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return scaled[a] > scaled[b]; });
  Definition result{};
  result.margin = 1;
  if (params.top_k > 0 && static_cast<std::size_t>(params.top_k) < n) {
    order.resize(static_cast<std::size_t>(params.top_k));
  }
  auto sum_of = [&] {
    return std::accumulate(order.begin(), order.end(), 0.0,
                           [&](double sum, std::size_t i) { return sum + weights[i]; });
  };
  auto margin = [&](double distance) { result.margin = std::min(result.margin, std::abs(distance)); };
  if (params.top_p < 1) {
    const double whole = sum_of();
    double sum = 0;
    std::size_t kept = 0;
    do {
      sum += weights[order[kept++]];
      margin(sum / whole - params.top_p);
    } while (kept < order.size() && sum < params.top_p * whole);
    order.resize(kept);
  }
  if (params.min_p > 0) {
    std::erase_if(order, [&](std::size_t i) { return scaled[i] < std::log(params.min_p); });
  }
  std::sort(order.begin(), order.end());
  const double whole = sum_of(), u = philox_uniforms(params.seed, params.position).draw;
  double sum = 0;
  for (std::size_t i : order) {
    sum += weights[i];
    result.token = static_cast<std::uint32_t>(i);
    if (i != order.back()) {
      margin(sum / whole - u);
    }
    if (sum > u * whole) {
      break;
    }
  }
  return result;
}

// Random123's known answers (https://github.com/DEShawResearch/random123, tests/kat_vectors).
TEST(philox_known_answers) {
  using Counter = std::array<std::uint32_t, 4>;
  CHECK(philox4x32({0, 0, 0, 0}, {0, 0}) == Counter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  constexpr std::uint32_t kOnes = 0xffffffff;
  CHECK(philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}) ==
        Counter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        Counter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST(uniform_is_below_one) {
  for (std::uint32_t position = 0; position < 100000; ++position) {
    const Uniforms u = philox_uniforms({42, 0}, position);
    CHECK(u.draw >= 0 && u.draw < 1 && u.xtc >= 0 && u.xtc < 1);
  }
}

TEST(weights_are_exp) {
  for (const RowKernels* kernels : row_kernels()) {
    std::vector<float> logits;
    for (float x = 0; x > -90; x -= 0.013f) {
      logits.push_back(x);
    }
    logits.push_back(-kInfinity);
    std::vector<Key> keys(padded(logits.size()));
    std::vector<float> weights(keys.size());
    kernels->scale(logits.data(), logits.size(), 0, 1, keys.data(), weights.data());
    CHECK_EQ(weights[0], 1.0f);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      const double exact = logits[i] < -87 ? 0 : std::exp(static_cast<double>(logits[i]));
      CHECK_NEAR(weights[i], exact, 2e-7 * exact);
    }
    CHECK(keys.back() == kKeyEnd && weights.back() == 0);
  }
}

TEST(greedy_takes_the_first_of_the_largest) {
  std::mt19937 rng(1);
  for (const RowKernels* kernels : row_kernels()) {
    for (const std::size_t n : {1, 7, 8, 9, 63, 64, 65, 1000}) {
      std::vector<float> logits = normal(n, 1, rng);
      for (const std::size_t at : {n - 1, n / 2, std::size_t{0}}) {
        logits[at] = 10;
        CHECK_EQ(sample(logits, kGreedy, *kernels), at);
      }
    }
  }
}

TEST(agrees_with_the_definition) {
  std::mt19937 rng(2);
  auto pick = [&rng](auto... choices) {
    const std::array<std::common_type_t<decltype(choices)...>, sizeof...(choices)> all{choices...};
    return all[rng() % all.size()];
  };
  int num_compared = 0;
  for (int i = 0; i < 2000; ++i) {
    const std::size_t n = pick(1, 2, 7, 255, 256, 257, 5000);
    std::vector<float> logits = normal(n, pick(0.0f, 0.01f, 1.0f, 5.0f), rng);
    if (rng() % 3 == 0) {  // many ties
      std::ranges::transform(logits, logits.begin(), [](float x) { return std::round(2 * x) / 2; });
    }
    if (rng() % 3 == 0) {
      for (std::size_t j = 1; j < n; j += 2) {
        logits[j] = -kInfinity;
      }
    }
    const RowParams params =
        make_params(pick(0.01f, 0.7f, 1.0f, 50.0f),
                    static_cast<std::int32_t>(pick(std::size_t{0}, std::size_t{1}, std::size_t{20}, n / 2, n + 1)),
                    pick(1e-9f, 0.3f, 0.9f, 0.999f, 1.0f), pick(0.0f, 0.02f, 0.5f, 1.0f), rng());
    const Definition expected = define(logits, params);
    if (expected.margin < 1e-6) {
      continue;
    }
    ++num_compared;
    for (const RowKernels* kernels : row_kernels()) {
      CHECK_EQ(sample(logits, params, *kernels), expected.token);
    }
  }
  CHECK(num_compared > 1500);
}

TEST(row_without_token) {
  for (const RowKernels* kernels : row_kernels()) {
    for (const RowParams& params : {kGreedy, make_params(1, 5, 0.9f, 0.1f)}) {
      std::vector<float> logits(100, 1.0f);
      for (const std::size_t at : {0, 50, 99}) {
        for (const float bad : {NAN, kInfinity}) {
          logits[at] = bad;
          CHECK_EQ(sample(logits, params, *kernels), kInvalidToken);
          logits[at] = 1;
        }
      }
      CHECK_EQ(sample(std::vector<float>(9, -kInfinity), params, *kernels), kInvalidToken);
    }
  }
}

// Values that no caller should pass must not reach memory that is not theirs.
TEST(parameters_out_of_range_give_some_token) {
  std::mt19937 rng(5);
  const std::vector<float> logits = normal(1000, 2, rng);
  constexpr float RowParams::* kFloats[] = {
      &RowParams::top_n_sigma, &RowParams::temperature,   &RowParams::typical_p,      &RowParams::top_p,
      &RowParams::min_p,       &RowParams::xtc_threshold, &RowParams::xtc_probability};
  for (const RowKernels* kernels : row_kernels()) {
    for (const float x : {-1.0f, 0.0f, 1e-45f, 3.0f, 1e30f, kInfinity, -kInfinity, NAN}) {
      for (const auto field : kFloats) {
        for (const int processed : {0, 1}) {
          RowParams params;
          params.*field = x;
          params.num_logprobs = 1000;
          params.processed_logprobs = processed;
          CHECK(sample(logits, params, *kernels) < logits.size());
        }
      }
    }
    CHECK(sample(logits, make_params(1, -7), *kernels) < logits.size());
    RowParams params;
    params.given_token = 1'000'000;
    CHECK_EQ(sample(logits, params, *kernels), 999u);
  }
}

TEST(mask_forbids_and_bias_moves) {
  std::mt19937 rng(6);
  for (const RowKernels* kernels : row_kernels()) {
    for (const std::size_t n : {5, 31, 32, 33, 300}) {
      const std::vector<float> logits = normal(n, 1, rng);
      for (std::size_t allowed = 0; allowed < n; allowed += 3) {
        std::vector<std::uint32_t> masks(2 * ((n + 31) / 32));
        masks[masks.size() / 2 + allowed / 32] = 1u << allowed % 32;
        const auto id = static_cast<std::int32_t>(n - 1 - allowed);
        const float value = 1000;
        const SampleTables tables{masks.data(), masks.size() / 2, &id, &value, nullptr, nullptr};
        RowScratch scratch;
        RowParams params = kGreedy;
        params.mask_row = 1;
        CHECK_EQ(sample_row(logits, params, tables, scratch, *kernels).id, allowed);
        params.mask_row = 0;
        CHECK_EQ(sample_row(logits, params, tables, scratch, *kernels).id, kInvalidToken);
        params.mask_row = -1;
        params.bias_end = 1;
        CHECK_EQ(sample_row(logits, params, tables, scratch, *kernels).id, static_cast<std::uint32_t>(id));
      }
    }
  }
}

TEST(penalties_leave_no_counts_behind) {
  const std::vector<std::int32_t> history{3, 1, 3, 1, 900, -5, 3};
  const std::vector<float> logits(10, 1.0f);
  RowScratch scratch;
  RowParams params = kGreedy;
  params.history_end = static_cast<std::int32_t>(history.size());
  params.repetition_penalty = 2;
  params.frequency_penalty = 1;
  params.dry_multiplier = 3;
  for (const RowKernels* kernels : row_kernels()) {
    CHECK_EQ(sample_row(logits, params, {nullptr, 1, nullptr, nullptr, history.data(), nullptr}, scratch, *kernels).id,
             0u);
    CHECK(std::ranges::all_of(scratch.counts, [](std::int32_t count) { return count == 0; }));
  }
}

}  // namespace
