// What the names of kernels mean in plain C++: every thread of a group is a thread of the machine, so that kernels run
// in the C++ tests, under sanitizers. Slow: for small shapes.
//
//   template <typename T>
//   void scale(const T* x, T* y) {
//   #include "op/scale.kernel"
//   }
//   host_launch({num_groups, 1, 1}, 64, [&] { scale(x, y); });
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

namespace mlx_server {

// The 16 bits of a bfloat16, with the conversions that kernels use.
struct HostBfloat16 {
  std::uint16_t bits = 0;

  HostBfloat16() = default;
  explicit HostBfloat16(float x) {
    const auto wide = std::bit_cast<std::uint32_t>(x);
    bits = static_cast<std::uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);  // to nearest, ties to even
  }
  operator float() const { return std::bit_cast<float>(std::uint32_t{bits} << 16); }
};

// The thread that runs: its place in the grid and what it shares with its neighbours.
struct HostThread {
  struct Simdgroup {
    std::barrier<> barrier{32};
    std::array<float, 32> values{};
  };

  int index = 0;
  std::array<int, 3> group{};
  std::barrier<>* group_barrier = nullptr;
  Simdgroup* simdgroup = nullptr;

  static HostThread& current() {
    static thread_local HostThread thread;
    return thread;
  }

  // Gives every lane the values of all 32, in an array that read(values) may use.
  template <typename Read>
  float exchange(float x, const Read& read) {
    simdgroup->values[index % 32] = x;
    simdgroup->barrier.arrive_and_wait();
    const float result = read(simdgroup->values);
    simdgroup->barrier.arrive_and_wait();
    return result;
  }
};

// Runs body for all threads (a multiple of 32) of all groups, one group after the other.
template <typename Body>
void host_launch(std::array<int, 3> groups, int threads, const Body& body) {
  std::barrier<> group_barrier(threads);
  std::deque<HostThread::Simdgroup> simdgroups(static_cast<std::size_t>(threads / 32));
  const auto work = [&](int index) {
    HostThread& thread = HostThread::current();
    thread = {index, {}, &group_barrier, &simdgroups[static_cast<std::size_t>(index / 32)]};
    auto& [x, y, z] = thread.group;
    for (z = 0; z < groups[2]; ++z) {
      for (y = 0; y < groups[1]; ++y) {
        for (x = 0; x < groups[0]; ++x) {
          body();
          group_barrier.arrive_and_wait();
        }
      }
    }
  };
  std::vector<std::thread> others;
  for (int i = 0; i < threads; ++i) {
    others.emplace_back(work, i);
  }
  for (std::thread& other : others) {
    other.join();
  }
}

inline float host_simd_sum(float x) {
  return HostThread::current().exchange(x, [](std::array<float, 32> v) {
    for (std::size_t width = 16; width > 0; width /= 2) {
      for (std::size_t i = 0; i < width; ++i) {
        v[i] += v[i + width];
      }
    }
    return v[0];
  });
}

inline float host_simd_max(float x) {
  return HostThread::current().exchange(x, [](const auto& v) { return *std::max_element(v.begin(), v.end()); });
}

inline float host_simd_read(float x, int lane) {
  return HostThread::current().exchange(x, [&](const auto& v) { return v[static_cast<std::size_t>(lane)]; });
}

// UBSan checks what the kernel promises: that the array's side is aligned.
inline void host_load4(float* to, const float* from) { std::copy_n(std::assume_aligned<16>(from), 4, to); }
inline void host_store4(float* to, const float* from) { std::copy_n(from, 4, std::assume_aligned<16>(to)); }
// GPUs need it.
template <int N, typename T>
void host_check_aligned(const T* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % std::min<std::size_t>(N * sizeof(T), 16) != 0) {
    std::abort();
  }
}

template <int N, typename To, typename From>
void host_copy(To* to, const From* from) {
  host_check_aligned<N>(from);
  host_check_aligned<N>(to);
  for (int i = 0; i < N; ++i) {
    to[i] = To(float(from[i]));
  }
}

// Two T in 32 bits.
template <typename T>
float host_half(std::uint32_t pair, int half) {
  return float(std::bit_cast<T>(static_cast<std::uint16_t>(pair >> (16 * half))));
}

template <typename T>
std::uint32_t host_pair(float low, float high) {
  return std::bit_cast<std::uint16_t>(T(low)) | std::uint32_t{std::bit_cast<std::uint16_t>(T(high))} << 16;
}

template <typename T>
std::uint32_t host_pair_fma(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  const auto fma = [&](int half) {
    return std::fma(host_half<T>(a, half), host_half<T>(b, half), host_half<T>(c, half));
  };
  return host_pair<T>(fma(0), fma(1));
}

// 16 by 16, whole in each lane.
struct HostMatrix {
  float x[16][16];

  // Each lane gives its pair of the 8 by 8 that begins at row and column.
  template <typename T>
  void set_pairs(int row, int column, std::uint32_t pair) {
    HostThread::current().exchange(std::bit_cast<float>(pair), [&](const auto& pairs) {
      for (int i = 0; i < 8; ++i) {
        for (int j = 0; j < 8; ++j) {
          x[row + i][column + j] =
              host_half<T>(std::bit_cast<std::uint32_t>(pairs[static_cast<std::size_t>(i * 4 + j / 2)]), j % 2);
        }
      }
      return 0.0f;
    });
  }

  template <typename T>
  void load(const T* from, int row_stride, int column_stride) {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) {
        x[i][j] = float(from[i * row_stride + j * column_stride]);
      }
    }
  }

  void multiply_add(const HostMatrix& a, const HostMatrix& b) {
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 16; ++k) {
        for (int j = 0; j < 16; ++j) {
          x[i][j] += a.x[i][k] * b.x[k][j];
        }
      }
    }
  }

  void add(const HostMatrix& other) {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) {
        x[i][j] += other.x[i][j];
      }
    }
  }

  void scale_rows(const float* factors) {
    for (int i = 0; i < 16; ++i) {
      for (float& value : x[i]) {
        value *= factors[i];
      }
    }
  }

  // Each lane stores a part.
  void store(float* to, int stride, int lane) const {
    for (int j = lane % 2; j < 16; j += 2) {
      to[lane / 2 * stride + j] = x[lane / 2][j];
    }
  }
};

template <int N, typename T>
void host_load(float* to, const T* from) {
  host_check_aligned<N>(from);
  for (int i = 0; i < N; ++i) {
    to[i] = float(from[i]);
  }
}

template <int N, typename T>
void host_store(T* to, const float* from) {
  host_check_aligned<N>(to);
  for (int i = 0; i < N; ++i) {
    to[i] = T(from[i]);
  }
}

inline void host_atomic_max(std::atomic<std::uint32_t>& counter, std::uint32_t x) {
  for (std::uint32_t seen = counter; seen < x && !counter.compare_exchange_weak(seen, x);) {
  }
}

}  // namespace mlx_server

#define THREAD (mlx_server::HostThread::current().index)
#define LANE (mlx_server::HostThread::current().index % 32)
#define SIMDGROUP (mlx_server::HostThread::current().index / 32)
#define GROUP_X (mlx_server::HostThread::current().group[0])
#define GROUP_Y (mlx_server::HostThread::current().group[1])
#define GROUP_Z (mlx_server::HostThread::current().group[2])
#define SHARED alignas(16) static
#define DEVICE
#define WRITABLE(type, input) const_cast<type*>(input)
#define BARRIER() mlx_server::HostThread::current().group_barrier->arrive_and_wait()
#define SIMD_BARRIER() mlx_server::HostThread::current().simdgroup->barrier.arrive_and_wait()
#define SIMD_SUM(x) mlx_server::host_simd_sum(x)
#define SIMD_MAX(x) mlx_server::host_simd_max(x)
#define SIMD_SHUFFLE_XOR(x, mask) mlx_server::host_simd_read(x, LANE ^ (mask))
#define SIMD_BROADCAST(x, lane) mlx_server::host_simd_read(x, lane)
#define EXP(x) std::exp(x)
#define LOG(x) std::log(x)
#define LOG1P(x) std::log1p(x)
#define RSQRT(x) (1 / std::sqrt(x))
#define TANH(x) std::tanh(x)
#define COS(x) std::cos(x)
#define SIN(x) std::sin(x)
#define AS_FLOAT(bits) std::bit_cast<float>(bits)
#define AS_INT(x) std::bit_cast<int>(x)
#define COUNTER std::atomic<std::uint32_t>
#define ATOMIC_ADD(counter, x) (counter).fetch_add(static_cast<std::uint32_t>(x), std::memory_order_relaxed)
#define ATOMIC_MAX(counter, x) mlx_server::host_atomic_max(counter, static_cast<std::uint32_t>(x))
#define ATOMIC_READ(counter) (counter).load(std::memory_order_relaxed)
#define ATOMIC_WRITE(counter, x) (counter).store(static_cast<std::uint32_t>(x), std::memory_order_relaxed)
#define ABS(x) std::abs(x)
#define MAX(a, b) std::max(a, b)
#define MIN(a, b) std::min(a, b)
#define LOAD4(to, from) mlx_server::host_load4(to, from)
#define STORE4(to, from) mlx_server::host_store4(to, from)
#define COPY(N, to, from) mlx_server::host_copy<N>(to, from)
#define STORE(N, to, from) mlx_server::host_store<N>(to, from)
#define MATRIX_LEFT(T) mlx_server::HostMatrix
#define MATRIX_RIGHT(T) mlx_server::HostMatrix
#define MATRIX_SUM mlx_server::HostMatrix
#define MATRIX_LOAD_LEFT(a, from, stride) a.load(from, stride, 1)
#define MATRIX_LOAD_RIGHT(b, from, stride) b.load(from, stride, 1)
#define MATRIX_LOAD_TRANSPOSED(b, from, stride) b.load(from, 1, stride)
#define MATRIX_ROW (LANE / 4)
#define MATRIX_COLUMN (LANE % 4 * 2)
#define MATRIX_SET_LEFT(T, a, i, j, pair) a.set_pairs<T>(8 * (i), 8 * (j), pair)
#define PAIR(T, low, high) mlx_server::host_pair<T>(low, high)
#define PAIR_LOW(T, pair) mlx_server::host_half<T>(pair, 0)
#define PAIR_FMA(T, a, b, c) mlx_server::host_pair_fma<T>(a, b, c)
#define AS_SHARED(T, p) reinterpret_cast<const T*>(p)
#define MATRIX_ZERO(c) c = {}
#define MATRIX_MULTIPLY_ADD(c, a, b) c.multiply_add(a, b)
#define MATRIX_ADD(c, d) c.add(d)
#define MATRIX_SCALE_ROWS(c, factors) c.scale_rows(factors)
#define MATRIX_STORE(c, to, stride) c.store(to, stride, LANE)
#define LOAD(N, to, from) mlx_server::host_load<N>(to, from)
#define UNROLL
