// The kernels, written once over a Simd type; each linear_<isa>.cpp includes this and is compiled with its own flags.
//
// The order of additions is the same on every path, so that a row's result does not depend on the rows beside it: lane
// l of one accumulator adds, in the order of k, every product whose k is congruent to l modulo the lanes (fused
// multiply-add), and Simd::sum4 adds the lanes.
//
// Nothing here may be an inline function or template instance that another file could also emit (so no std::
// algorithms): the linker keeps one copy of those, and it could be the one with instructions that the processor lacks.
// Templates over Simd are safe because each Simd is in an anonymous namespace.
//
// Simd has: Vec, kLanes, kPanelRows, zero(), load(p), store(p, v), fma(a, b, c) = a * b + c, sum4(v0, v1, v2, v3,
// out[4]); and Simd::Format<bits>:
//   Group, group(scale, bias)    what a group of weights shares
//   dequantize(group, packed)    the next kLanes weights, perhaps in an order of its own
//   in_order(v)                  that order put right
//   pack(x, packed)              32 elements of x put into that order
#pragma once

#include "linear/linear_isa.h"

namespace mlx_server {

constexpr int kColumns = LinearKernels::kColumns;
constexpr int kBlock = 32;  // every group is a multiple of this

// Rows of the weight under kColumns columns of y. Columns past n repeat the last one and are not stored.
template <typename Simd>
struct Columns {
  const std::uint8_t* weight[kColumns];
  const float* scales[kColumns];
  const float* biases[kColumns];

  Columns(const QuantizedLinear& op, std::int64_t n) {
    const std::int64_t groups = op.k / op.group_size;
    for (int c = 0; c < kColumns; ++c) {
      const std::int64_t column = n + c < op.n ? n + c : op.n - 1;
      weight[c] = op.weight + column * (op.k * op.bits / 8);
      scales[c] = op.scales + column * groups;
      biases[c] = op.biases + column * groups;
    }
  }
};

template <typename Simd>
inline void store_columns(const typename Simd::Vec (&sums)[kColumns], float* y, std::int64_t columns) {
  if (columns >= kColumns) {
    Simd::sum4(sums[0], sums[1], sums[2], sums[3], y);
    return;
  }
  float out[kColumns];
  Simd::sum4(sums[0], sums[1], sums[2], sums[3], out);
  for (int c = 0; c < columns; ++c) {
    y[c] = out[c];
  }
}

template <typename Simd, int kBits, int kRows>
void direct_tile(const QuantizedLinear& op, const float* packed, std::int64_t n) {
  using Vec = typename Simd::Vec;
  using Format = typename Simd::template Format<kBits>;
  const Columns<Simd> columns(op, n);
  Vec sums[kRows][kColumns];
  for (auto& row : sums) {
    for (Vec& sum : row) {
      sum = Simd::zero();
    }
  }
  for (std::int64_t k = 0, g = 0; k < op.k; ++g) {
    typename Format::Group group[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      group[c] = Format::group(columns.scales[c][g], columns.biases[c][g]);
    }
    for (const std::int64_t end = k + op.group_size; k < end; k += kBlock) {
      for (int i = 0; i < kBlock; i += Simd::kLanes) {
        Vec x[kRows];
        for (int r = 0; r < kRows; ++r) {
          x[r] = Simd::load(packed + r * op.k + k + i);
        }
        for (int c = 0; c < kColumns; ++c) {
          const Vec w = Format::dequantize(group[c], columns.weight[c] + (k + i) * kBits / 8);
          for (int r = 0; r < kRows; ++r) {
            sums[r][c] = Simd::fma(w, x[r], sums[r][c]);
          }
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (Vec& sum : sums[r]) {
      sum = Format::in_order(sum);
    }
    store_columns<Simd>(sums[r], op.y + r * op.n + n, op.n - n);
  }
}

template <typename Simd, int kBits>
void dequantize_tile(const QuantizedLinear& op, std::int64_t n, float* panel) {
  using Format = typename Simd::template Format<kBits>;
  const Columns<Simd> columns(op, n);
  for (int c = 0; c < kColumns; ++c) {
    float* out = panel + c * op.k;
    for (std::int64_t k = 0, g = 0; k < op.k; ++g) {
      const typename Format::Group group = Format::group(columns.scales[c][g], columns.biases[c][g]);
      for (const std::int64_t end = k + op.group_size; k < end; k += kBlock) {
        for (int i = 0; i < kBlock; i += Simd::kLanes) {
          Simd::store(out + k + i,
                      Format::in_order(Format::dequantize(group, columns.weight[c] + (k + i) * kBits / 8)));
        }
      }
    }
  }
}

template <typename Simd, int kRows>
void panel_tile(const QuantizedLinear& op, const float* panel, std::int64_t row, std::int64_t n) {
  using Vec = typename Simd::Vec;
  const float* x = op.x + row * op.k;
  Vec sums[kRows][kColumns];
  for (auto& sums_of_row : sums) {
    for (Vec& sum : sums_of_row) {
      sum = Simd::zero();
    }
  }
  for (std::int64_t k = 0; k < op.k; k += Simd::kLanes) {
    Vec w[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      w[c] = Simd::load(panel + c * op.k + k);
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec x_r = Simd::load(x + r * op.k + k);
      for (int c = 0; c < kColumns; ++c) {
        sums[r][c] = Simd::fma(w[c], x_r, sums[r][c]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    store_columns<Simd>(sums[r], op.y + (row + r) * op.n + n, op.n - n);
  }
}

// Tiles of at most kRows rows, as few as possible.
template <typename Simd, int kRows>
void panel_rows(const QuantizedLinear& op, const float* panel, std::int64_t row, std::int64_t rows,
                std::int64_t n_begin, std::int64_t n_end) {
  if (rows < kRows) {
    if constexpr (kRows > 1) {
      panel_rows<Simd, kRows - 1>(op, panel, row, rows, n_begin, n_end);
    }
    return;
  }
  for (std::int64_t n = n_begin; n < n_end; n += kColumns) {
    panel_tile<Simd, kRows>(op, panel + (n - n_begin) * op.k, row, n);
  }
}

template <typename Simd, int kBits>
void dequantize_and_multiply(const QuantizedLinear& op, float* panel, std::int64_t n_begin, std::int64_t n_end) {
  for (std::int64_t n = n_begin; n < n_end; n += kColumns) {
    dequantize_tile<Simd, kBits>(op, n, panel + (n - n_begin) * op.k);
  }
  for (std::int64_t row = 0; row < op.rows; row += Simd::kPanelRows) {
    panel_rows<Simd, Simd::kPanelRows>(op, panel, row, op.rows - row, n_begin, n_end);
  }
}

template <typename Simd, int kBits, int kRows = 1>
void direct(const QuantizedLinear& op, const float* packed, std::int64_t n_begin, std::int64_t n_end) {
  if constexpr (kRows < Simd::kDirectRows) {
    if (op.rows > kRows) {
      direct<Simd, kBits, kRows + 1>(op, packed, n_begin, n_end);
      return;
    }
  }
  for (std::int64_t n = n_begin; n < n_end; n += kColumns) {
    direct_tile<Simd, kBits, kRows>(op, packed, n);
  }
}

template <typename Simd>
constexpr LinearKernels make_linear_kernels(const char* name) {
  return {
      .name = name,
      .max_direct_rows = Simd::kDirectRows,
      .pack =
          [](const QuantizedLinear& op, float* packed) {
            for (std::int64_t i = 0; i < op.rows * op.k; i += kBlock) {
              op.bits == 4 ? Simd::template Format<4>::pack(op.x + i, packed + i)
                           : Simd::template Format<8>::pack(op.x + i, packed + i);
            }
          },
      .direct =
          [](const QuantizedLinear& op, const float* packed, std::int64_t n_begin, std::int64_t n_end) {
            op.bits == 4 ? direct<Simd, 4>(op, packed, n_begin, n_end) : direct<Simd, 8>(op, packed, n_begin, n_end);
          },
      .panel =
          [](const QuantizedLinear& op, float* scratch, std::int64_t n_begin, std::int64_t n_end) {
            op.bits == 4 ? dequantize_and_multiply<Simd, 4>(op, scratch, n_begin, n_end)
                         : dequantize_and_multiply<Simd, 8>(op, scratch, n_begin, n_end);
          },
  };
}

}  // namespace mlx_server
