// The portable kernels on the host, where every thread of a group is a thread.
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "kernels/host.h"

namespace {

using mlx_server::HostBfloat16;

template <int THREADS>
void names_kernel(const float* x, float* sums, float* maxima, float* neighbours, float* totals) {
  SHARED float parts[THREADS / 32];
  const float mine = x[GROUP_X * THREADS + THREAD];
  const float sum = SIMD_SUM(mine), maximum = SIMD_MAX(mine), neighbour = SIMD_SHUFFLE_XOR(mine, 1);
  const float last = SIMD_BROADCAST(mine, 31);
  if (LANE == 0) {
    parts[SIMDGROUP] = sum;
  }
  BARRIER();
  float total = 0;
  for (int i = 0; i < THREADS / 32; ++i) {
    total += parts[i];
  }
  const int i = GROUP_X * THREADS + THREAD;
  sums[i] = sum + last;
  maxima[i] = maximum;
  neighbours[i] = neighbour;
  totals[i] = total;
}

TEST(names_of_threads_and_simdgroups) {
  constexpr int kThreads = 64, kGroups = 3, kSize = kThreads * kGroups;
  std::vector<float> x(kSize), sums(kSize), maxima(kSize), neighbours(kSize), totals(kSize);
  for (int i = 0; i < kSize; ++i) {
    x[i] = static_cast<float>(i);
  }
  mlx_server::host_launch({kGroups, 1, 1}, kThreads, [&] {
    names_kernel<kThreads>(x.data(), sums.data(), maxima.data(), neighbours.data(), totals.data());
  });
  for (int i = 0; i < kSize; ++i) {
    const int first = i / 32 * 32, group = i / kThreads * kThreads;
    CHECK_EQ(sums[i], static_cast<float>(32 * first + 31 * 16 + first + 31));
    CHECK_EQ(maxima[i], static_cast<float>(first + 31));
    CHECK_EQ(neighbours[i], static_cast<float>(i ^ 1));
    CHECK_EQ(totals[i], static_cast<float>(kThreads * group + (kThreads - 1) * kThreads / 2));
  }
}

TEST(groups_run_in_all_three_directions) {
  std::vector<int> visits(2 * 3 * 4 * 32);
  mlx_server::host_launch({2, 3, 4}, 32, [&] { ++visits[((GROUP_Z * 3 + GROUP_Y) * 2 + GROUP_X) * 32 + THREAD]; });
  for (const int count : visits) {
    CHECK_EQ(count, 1);
  }
}

TEST(bfloat16_rounds_to_nearest) {
  CHECK_EQ(static_cast<float>(HostBfloat16(1.00390625f)), 1.0f);       // a tie goes to the even neighbour
  CHECK_EQ(static_cast<float>(HostBfloat16(1.01171875f)), 1.015625f);  // and this one up
  CHECK_EQ(static_cast<float>(HostBfloat16(-3.140625f)), -3.140625f);
}

}  // namespace
