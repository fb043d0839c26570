// The kernels of gated_delta_cpu.h, for files that are compiled once for each instruction set.
//
// A prompt is computed in chunks (Yang, Kautz and Hatamizadeh 2024, section 3.3). With G_i the sum of the chunk's first
// i + 1 log decays and S the state before the chunk, the values w that the chunk adds to the state solve
//   w_i + sum over j < i of beta_i exp(G_i - G_j) (k_i k_j) w_j = beta_i (v_i - exp(G_i) S k_i)
// a unit triangular system, and then
//   y_i = exp(G_i) S q_i + sum over j <= i of exp(G_i - G_j) (q_i k_j) w_j
//   S   = exp(G_last) S + sum over j of exp(G_last - G_j) w_j k_j^T
// so that all but the triangle is products of matrices.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/simd.h"
#include "gated_delta/gated_delta_cpu.h"

namespace mlx_server {

namespace {

constexpr int kChunk = 64;     // tokens
constexpr int kBlock = 16;     // tokens of a chunk whose part of a triangle is one product
constexpr int kFewTokens = 8;  // up to here one by one is faster
constexpr float kNormEps = 1e-6f;

inline float sum_of(const Floats& x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// Scales x [d] to the given length.
inline void set_length(float* x, int d, float length) {
  Floats squares{}, v;
  for (int i = 0; i < d; i += kLanes) {
    load(v, x + i);
    squares += v * v;
  }
  const float scale = length / std::sqrt(sum_of(squares) + kNormEps);
  for (int i = 0; i < d; i += kLanes) {
    load(v, x + i);
    v *= scale;
    store(x + i, v);
  }
}

// x = x * sigmoid(x)
inline void silu_of(Floats& x) {
  Floats e = x < 0 ? x : -x;
  exp_of(e);  // exp(-|x|)
  x *= (x < 0 ? e : Floats{} + 1.0f) / (1.0f + e);
}

void convolve(const GatedDelta& op, const GatedDeltaRow& row, int head) {
  const bool is_value = head >= 2 * op.num_key_heads;
  const int d = is_value ? op.value_dim : op.key_dim, history = op.taps - 1, n = row.num_tokens;
  const std::ptrdiff_t channels = op.num_channels(), channel = op.first_channel(head);
  float* const state = op.conv_state + row.slot * history * channels + channel;
  const float* const qkv = op.qkv + row.first_token * channels + channel;
  float* const out = op.mixed + row.first_token * channels + channel * n;  // [n, d]
  thread_local std::vector<float> weight, old;                             // [K, d], [K - 1, d]
  weight.resize(static_cast<std::size_t>(op.taps * d));
  old.assign(static_cast<std::size_t>(history * d), 0.0f);
  for (int i = 0; i < op.taps * d; ++i) {
    weight[static_cast<std::size_t>(i)] = op.conv_weight[(channel + i % d) * op.taps + i / d];
  }
  for (int i = 0; i < history && !row.fresh; ++i) {
    std::copy_n(state + i * channels, d, old.data() + i * d);
  }
  const auto input = [&](int t) { return t < 0 ? old.data() + (t + history) * d : qkv + t * channels; };
  for (int t = 0; t < n; ++t) {
    for (int i = 0; i < d; i += kLanes) {
      Floats sum{}, x, w;
      for (int tap = 0; tap < op.taps; ++tap) {
        load(x, input(t + tap - history) + i);
        load(w, weight.data() + tap * d + i);
        sum += x * w;
      }
      silu_of(sum);
      store(out + t * d + i, sum);
    }
    if (!is_value) {
      set_length(out + t * d, d, head < op.num_key_heads ? 1 / std::sqrt(static_cast<float>(d)) : 1.0f);
    }
  }
  for (int i = 0; i < history; ++i) {
    std::copy_n(input(n + i - history), d, state + i * channels);
  }
}

// One head of one row.
struct Head {
  const float *q, *k, *v;  // [n, Dk], [n, Dk], [n, Dv]
  float* y;                // [n, Dv], tokens y_stride apart
  float* state;            // [Dv, Dk]
  std::ptrdiff_t y_stride;
  int key_dim, value_dim;
  std::vector<double>& log_decay;  // [n]
  std::vector<float>& beta;        // [n]
};

// One token: y and the new state. decay is not a log.
void step(const Head& head, int t, float decay) {
  const int dk = head.key_dim;
  const float *q = head.q + t * dk, *k = head.k + t * dk, *v = head.v + t * head.value_dim;
  Floats product{}, x, y;
  for (int i = 0; i < dk; i += kLanes) {
    load(x, q + i);
    load(y, k + i);
    product += x * y;
  }
  const float qk = sum_of(product);
  for (int r = 0; r < head.value_dim; ++r) {
    float* const s = head.state + r * dk;
    Floats sk{}, sq{}, sv;
    for (int i = 0; i < dk; i += kLanes) {
      load(sv, s + i);
      load(x, q + i);
      load(y, k + i);
      sq += sv * x;
      sk += sv * y;
    }
    const float delta = head.beta[static_cast<std::size_t>(t)] * (v[r] - decay * sum_of(sk));
    head.y[t * head.y_stride + r] = decay * sum_of(sq) + delta * qk;
    for (int i = 0; i < dk; i += kLanes) {
      load(sv, s + i);
      load(y, k + i);
      sv = sv * decay + y * delta;
      store(s + i, sv);
    }
  }
}

// A matrix in memory: element (i, j) at data[i * row + j * column].
struct Matrix {
  const float* data;
  std::ptrdiff_t row, column;
};

// c [kRows, 8 kVectors] += a [kRows, depth] b [depth, 8 kVectors]
template <int kRows, int kVectors>
inline void multiply_tile(int depth, Matrix a, const float* b, std::ptrdiff_t b_row, float* c, std::ptrdiff_t c_row) {
  Floats sums[kRows][kVectors], columns[kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kVectors; ++j) {
      load(sums[r][j], c + r * c_row + j * static_cast<int>(kLanes));
    }
  }
  for (int k = 0; k < depth; ++k) {
    for (int j = 0; j < kVectors; ++j) {
      load(columns[j], b + k * b_row + j * static_cast<int>(kLanes));
    }
    for (int r = 0; r < kRows; ++r) {
      const float x = a.data[r * a.row + k * a.column];
      for (int j = 0; j < kVectors; ++j) {
        sums[r][j] += columns[j] * x;
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kVectors; ++j) {
      store(c + r * c_row + j * static_cast<int>(kLanes), sums[r][j]);
    }
  }
}

template <int kVectors>
inline void multiply_columns(int rows, int depth, Matrix a, const float* b, std::ptrdiff_t b_row, float* c,
                             std::ptrdiff_t c_row) {
  int i = 0;
  for (; i + 4 <= rows; i += 4) {
    multiply_tile<4, kVectors>(depth, {a.data + i * a.row, a.row, a.column}, b, b_row, c + i * c_row, c_row);
  }
  for (; i < rows; ++i) {
    multiply_tile<1, kVectors>(depth, {a.data + i * a.row, a.row, a.column}, b, b_row, c + i * c_row, c_row);
  }
}

// c [rows, columns] += a [rows, depth] b [depth, columns]; columns is a multiple of 8.
void multiply_add(int rows, int columns, int depth, Matrix a, const float* b, std::ptrdiff_t b_row, float* c,
                  std::ptrdiff_t c_row) {
  constexpr int kWide = 2 * static_cast<int>(kLanes);
  int j = 0;
  for (; j + kWide <= columns; j += kWide) {
    multiply_columns<2>(rows, depth, a, b + j, b_row, c + j, c_row);
  }
  if (j < columns) {
    multiply_columns<1>(rows, depth, a, b + j, b_row, c + j, c_row);
  }
}

// y [size] = factor * x [size]
inline void scale(const float* x, int size, float factor, float* y) {
  Floats v;
  for (int i = 0; i < size; i += kLanes) {
    load(v, x + i);
    v *= factor;
    store(y + i, v);
  }
}

// to [columns, rows] = from [rows, columns]
inline void transpose(const float* from, int rows, int columns, float* to, int to_row) {
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      to[j * to_row + i] = from[i * columns + j];
    }
  }
}

// A thread's memory for chunks.
struct ChunkMemory {
  std::vector<float> state;                         // [Dk, Dv]: transposed
  std::vector<float> keys;                          // [Dk, kChunk]: transposed, then [kChunk, Dk] with decay
  std::vector<float> added;                         // [kChunk, Dv]: w
  std::vector<float> sk, sq;                        // [kChunk, Dv]
  std::vector<float> key_products, query_products;  // [kChunk, kChunk]

  void resize(int dk, int dv) {
    state.resize(static_cast<std::size_t>(dk * dv));
    keys.resize(static_cast<std::size_t>(dk * kChunk));
    for (auto* matrix : {&added, &sk, &sq}) {
      matrix->resize(static_cast<std::size_t>(dv * kChunk));
    }
    key_products.resize(kChunk * kChunk);
    query_products.resize(kChunk * kChunk);
  }
};

// Products of the chunk's queries and keys with its keys, times the decay between them: [n, n] lower triangles, of
// key_products strictly and times beta.
void decayed_products(const Head& head, int t0, int n, const double* sum, ChunkMemory& m) {
  const int dk = head.key_dim, columns = (n + 7) / 8 * 8;
  std::fill(m.keys.begin(), m.keys.end(), 0.0f);
  transpose(head.k + t0 * dk, n, dk, m.keys.data(), kChunk);
  for (auto [rows, products] : {std::pair(head.k, &m.key_products), std::pair(head.q, &m.query_products)}) {
    std::fill(products->begin(), products->end(), 0.0f);
    for (int begin = 0; begin < n; begin += kBlock) {  // the triangle's blocks below the diagonal, and those on it
      const int end = std::min(begin + kBlock, n), seen = std::min(end + 7, columns) / 8 * 8;
      multiply_add(end - begin, seen, dk, {rows + (t0 + begin) * dk, dk, 1}, m.keys.data(), kChunk,
                   products->data() + begin * kChunk, kChunk);
    }
  }
  for (int i = 0; i < n; ++i) {
    float decay[kChunk];
    for (int j = 0; j < kChunk; ++j) {
      decay[j] = j <= i ? static_cast<float>(sum[i] - sum[j]) : 0.0f;
    }
    const float beta = head.beta[static_cast<std::size_t>(t0 + i)];
    for (int j = 0; j < columns; j += kLanes) {
      Floats e, kk, qk;
      load(e, decay + j);
      exp_of(e);
      load(kk, m.key_products.data() + i * kChunk + j);
      load(qk, m.query_products.data() + i * kChunk + j);
      kk *= e * beta;
      qk *= e;
      store(m.key_products.data() + i * kChunk + j, kk);
      store(m.query_products.data() + i * kChunk + j, qk);
    }
    std::fill_n(m.key_products.data() + i * kChunk + i, kChunk - i, 0.0f);
    std::fill_n(m.query_products.data() + i * kChunk + i + 1, kChunk - i - 1, 0.0f);
  }
}

// Solves (1 + key_products) w = added, in place, for the chunk's n tokens.
void solve(int n, int dv, ChunkMemory& m) {
  constexpr int kTriangle = 8;
  for (auto& x : m.key_products) {
    x = -x;
  }
  for (int begin = 0; begin < n; begin += kTriangle) {
    const int end = std::min(begin + kTriangle, n);
    float* const rows = m.added.data() + begin * dv;
    multiply_add(end - begin, dv, begin, {m.key_products.data() + begin * kChunk, kChunk, 1}, m.added.data(), dv, rows,
                 dv);
    for (int i = begin + 1; i < end; ++i) {
      multiply_add(1, dv, i - begin, {m.key_products.data() + i * kChunk + begin, kChunk, 1}, rows, dv,
                   m.added.data() + i * dv, dv);
    }
  }
}

void scan_chunk(const Head& head, int t0, int n, ChunkMemory& m) {
  const int dk = head.key_dim, dv = head.value_dim;
  double sum[kChunk];  // of log decays
  for (int i = 0; i < n; ++i) {
    sum[i] = head.log_decay[static_cast<std::size_t>(t0 + i)] + (i > 0 ? sum[i - 1] : 0.0);
  }
  decayed_products(head, t0, n, sum, m);
  std::fill(m.sk.begin(), m.sk.end(), 0.0f);
  std::fill(m.sq.begin(), m.sq.end(), 0.0f);
  multiply_add(n, dv, dk, {head.k + t0 * dk, dk, 1}, m.state.data(), dv, m.sk.data(), dv);
  multiply_add(n, dv, dk, {head.q + t0 * dk, dk, 1}, m.state.data(), dv, m.sq.data(), dv);
  for (int i = 0; i < n; ++i) {
    const float decay = static_cast<float>(std::exp(sum[i])), beta = head.beta[static_cast<std::size_t>(t0 + i)];
    const float *const v = head.v + (t0 + i) * dv, *const sk = m.sk.data() + i * dv;
    float *const sq = m.sq.data() + i * dv, *const added = m.added.data() + i * dv;
    Floats x, y;
    for (int r = 0; r < dv; r += kLanes) {
      load(x, v + r);
      load(y, sk + r);
      x = beta * (x - decay * y);
      store(added + r, x);
      load(y, sq + r);
      y *= decay;
      store(sq + r, y);
    }
  }
  solve(n, dv, m);
  for (int begin = 0; begin < n; begin += kBlock) {
    const int end = std::min(begin + kBlock, n);
    multiply_add(end - begin, dv, end, {m.query_products.data() + begin * kChunk, kChunk, 1}, m.added.data(), dv,
                 m.sq.data() + begin * dv, dv);
  }
  for (int i = 0; i < n; ++i) {
    std::copy_n(m.sq.data() + i * dv, dv, head.y + (t0 + i) * head.y_stride);
    const float decay = static_cast<float>(std::exp(sum[n - 1] - sum[i]));
    scale(head.k + (t0 + i) * dk, dk, decay, m.keys.data() + i * dk);
  }
  const float decay = static_cast<float>(std::exp(sum[n - 1]));
  scale(m.state.data(), dk * dv, decay, m.state.data());
  multiply_add(dk, dv, n, {m.keys.data(), 1, dk}, m.added.data(), dv, m.state.data(), dv);
}

void scan(const GatedDelta& op, const GatedDeltaRow& row, int value_head) {
  const std::ptrdiff_t dk = op.key_dim, dv = op.value_dim, hv = op.num_value_heads, n = row.num_tokens;
  thread_local std::vector<double> log_decay;
  thread_local std::vector<float> beta;
  thread_local ChunkMemory memory;
  log_decay.resize(static_cast<std::size_t>(n));
  beta.resize(static_cast<std::size_t>(n));
  for (std::ptrdiff_t t = 0; t < n; ++t) {
    const std::ptrdiff_t gate = (row.first_token + t) * hv + value_head;
    const double x = double{op.a[gate]} + op.dt_bias[value_head];
    const double softplus = std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)));
    log_decay[static_cast<std::size_t>(t)] = -std::exp(double{op.a_log[value_head]}) * softplus;
    beta[static_cast<std::size_t>(t)] = 1 / (1 + std::exp(-op.b[gate]));
  }
  const int key_head = value_head / (op.num_value_heads / op.num_key_heads);
  const float* const mixed = op.mixed + row.first_token * std::ptrdiff_t{op.num_channels()};
  const Head head{.q = mixed + op.first_channel(key_head) * n,
                  .k = mixed + op.first_channel(op.num_key_heads + key_head) * n,
                  .v = mixed + op.first_channel(2 * op.num_key_heads + value_head) * n,
                  .y = op.y + (row.first_token * hv + value_head) * dv,
                  .state = op.state + (row.slot * hv + value_head) * dv * dk,
                  .y_stride = hv * dv,
                  .key_dim = op.key_dim,
                  .value_dim = op.value_dim,
                  .log_decay = log_decay,
                  .beta = beta};
  if (row.fresh) {
    std::fill_n(head.state, dv * dk, 0.0f);
  }
  if (n <= kFewTokens || op.one_by_one) {
    for (int t = 0; t < n; ++t) {
      step(head, t, static_cast<float>(std::exp(log_decay[static_cast<std::size_t>(t)])));
    }
    return;
  }
  memory.resize(op.key_dim, op.value_dim);
  transpose(head.state, op.value_dim, op.key_dim, memory.state.data(), op.value_dim);
  for (int t = 0; t < n; t += kChunk) {
    scan_chunk(head, t, std::min(kChunk, static_cast<int>(n) - t), memory);
  }
  transpose(memory.state.data(), op.key_dim, op.value_dim, head.state, op.key_dim);
}

}  // namespace

}  // namespace mlx_server
