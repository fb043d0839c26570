// The portable kernels of moe against what the CPU computes.
#include <limits>
#include <random>

#include "check.h"
#include "kernels/host.h"
#include "moe/moe_cpu.h"

namespace {

using mlx_server::HostBfloat16;
using Floats = std::vector<float>;

template <typename T, int EXPERTS, int TOP_K, int SOFTMAX, int NORMALIZE>
void route_kernel(const T* logits, int* experts, float* weights) {
#include "moe/moe_route.kernel"
}

template <typename T, int kExperts, int kTopK, int kSoftmax, int kNormalize>
void check_route(const Floats& logits) {
  const std::size_t tokens = logits.size() / kExperts, size = tokens * kTopK;
  std::vector<T> typed;
  Floats rounded;
  for (const float x : logits) {
    typed.push_back(T(x));
    rounded.push_back(static_cast<float>(typed.back()));
  }
  std::vector<std::int32_t> experts(size), expected_experts(size);
  Floats weights(size), expected_weights(size);
  mlx_server::host_launch({static_cast<int>(tokens), 1, 1}, 32, [&] {
    route_kernel<T, kExperts, kTopK, kSoftmax, kNormalize>(typed.data(), experts.data(), weights.data());
  });
  mlx_server::ThreadPool pool(1);
  mlx_server::route({rounded.data(), expected_experts.data(), expected_weights.data(),
                     static_cast<std::int64_t>(tokens), kExperts, kTopK, kSoftmax != 0, kNormalize != 0},
                    pool);
  CHECK(experts == expected_experts);
  for (std::size_t i = 0; i < size; ++i) {
    CHECK(std::isnan(weights[i]) == std::isnan(expected_weights[i]));
    if (!std::isnan(weights[i])) {
      CHECK_NEAR(weights[i], expected_weights[i], 1e-6 * std::abs(expected_weights[i]));
    }
  }
}

// Eighths, far apart and with ties: no two scores differ by a rounding.
Floats coarse_logits(std::size_t size) {
  std::mt19937 rng(static_cast<unsigned>(size));
  Floats logits(size);
  for (float& x : logits) {
    x = static_cast<float>(static_cast<int>(rng() % 64) - 32) / 8;
  }
  return logits;
}

TEST(route_agrees_with_the_cpu) {
  check_route<float, 64, 8, 1, 1>(coarse_logits(5 * 64));
  check_route<float, 512, 10, 1, 1>(coarse_logits(2 * 512));
  check_route<float, 7, 7, 1, 0>(coarse_logits(3 * 7));
  check_route<float, 40, 32, 0, 1>(coarse_logits(3 * 40));
  check_route<float, 33, 1, 0, 0>(coarse_logits(3 * 33));
  check_route<float, 1, 1, 1, 1>(coarse_logits(2));
  check_route<HostBfloat16, 128, 8, 1, 1>(coarse_logits(4 * 128));
}

TEST(route_gives_experts_in_range_whatever_the_logits) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
  for (const float bad : {kNan, kInfinity}) {
    check_route<float, 4, 2, 1, 1>({0, 1, bad, 2, bad, 1, 5, 2, 0, 1, 2, 3});
  }
  check_route<float, 4, 2, 1, 0>({-kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, 0, 1, -kInfinity});
  check_route<float, 4, 3, 0, 0>({0, kNan, kInfinity, -kInfinity});
}

}  // namespace
