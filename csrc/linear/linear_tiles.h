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
// Simd has: Vec, kLanes, the rows that LinearKernels names (kDirectRows, kNearRows) and those that panel multiplies at
// once (kPanelRows), direct_columns(rows): as many columns as registers hold sums and groups of, zero(), load(p),
// store(p, v), fma(a, b, c) = a * b + c, sum4(v0, v1, v2, v3, out[4]), and Simd::Format<bits, is_float>:
//   Group, group(scale, bias)    what a group of weights shares; floats have no bias
//   dequantize(group, packed)    the next kLanes weights, perhaps in an order of its own
//   in_order(v)                  that order put right
//   packed_order(v)              elements of x put into that order
#pragma once

#include "linear/linear_isa.h"

namespace mlx_server {

constexpr int kColumns = LinearKernels::kColumns;
constexpr int kBlock = 32;  // every row is a multiple of this

// What the loops over a matrix must know when they are compiled.
struct Form {
  int bits;
  bool is_float = false;
  int block = kBlock;  // every group is a multiple of this
};

// The weight's rows under `columns` columns of y, 1 or kColumns. With 1, all strides are 0: it is computed kColumns
// times.
template <typename Simd, Form kForm>
struct WeightRows {
  using Format = typename Simd::template Format<kForm.bits, kForm.is_float>;

  const std::uint8_t* weight;
  const float *scales, *biases;
  const std::uint8_t* scale_codes;
  const CodeValues* code_values;
  std::int64_t stride, group_stride;  // from one row to the next

  WeightRows(const LinearWeights& w, std::int64_t n, std::int64_t columns) {
    const std::int64_t row_bytes = w.k * kForm.bits / 8, groups = w.k / w.group_size;
    weight = w.weight + n * row_bytes;
    if constexpr (kForm.is_float) {
      scale_codes = w.scale_codes + n * groups;
      code_values = w.group_size == 16 ? &kE4m3Scales : &kE8m0Scales;
    } else {
      scales = w.scales + n * groups;
      biases = w.biases + n * groups;
    }
    stride = columns == 1 ? 0 : row_bytes;
    group_stride = columns == 1 ? 0 : groups;
  }

  typename Format::Group group(std::int64_t column, std::int64_t g) const {
    const std::int64_t at = column * group_stride + g;
    if constexpr (kForm.is_float) {
      return Format::group(code_values->of[scale_codes[at]], 0);
    } else {
      return Format::group(scales[at], biases[at]);
    }
  }

  // Asks for what the groups of the kSide rows behind those from `column` on share, a piece with each group.
  template <int kSide>
  void prefetch_group(std::int64_t column, std::int64_t g) const {
    const std::int64_t at = (column + kSide) * group_stride + kSide * g;
    if constexpr (kForm.is_float) {
      __builtin_prefetch(scale_codes + at);
    } else {
      __builtin_prefetch(scales + at);
      __builtin_prefetch(biases + at);
    }
  }
};

// The next kBits bytes as one number, the first byte lowest; nothing behind them is read.
template <typename Simd, int kBits>
inline std::uint64_t load_bytes(const std::uint8_t* p) {
  std::uint32_t low = 0;
  std::uint16_t high = 0;
  __builtin_memcpy(&low, p, kBits < 4 ? 2 : 4);
  if constexpr (kBits == 3 || kBits == 5) {
    high = p[kBits - 1];
  } else if constexpr (kBits == 6) {
    __builtin_memcpy(&high, p + 4, 2);
  }
  return low | static_cast<std::uint64_t>(high) << (kBits < 4 ? 16 : 32);
}

// Value i of a stream of kBits-bit values lies in the two bytes from `byte` on, `shift` bits up.
template <typename Simd, int kBits>
struct BitPlace {
  static constexpr int byte(int i) { return i * kBits / 8; }
  static constexpr int shift(int i) { return i * kBits % 8; }
};

template <typename Simd>
inline const float* x_row(const QuantizedLinear& op, std::int64_t row) {
  return op.x + (op.x_rows == nullptr ? row : op.x_rows[row]) * op.w.k;
}

template <typename Simd>
inline void zero_sums(typename Simd::Vec* sums, int count) {
  for (int i = 0; i < count; ++i) {
    sums[i] = Simd::zero();
  }
}

template <typename Simd>
inline void store_columns(const typename Simd::Vec (&sums)[kColumns], float* y, std::int64_t columns) {
  if (columns == kColumns) {
    Simd::sum4(sums[0], sums[1], sums[2], sums[3], y);
    return;
  }
  float out[kColumns];
  Simd::sum4(sums[0], sums[1], sums[2], sums[3], out);
  *y = out[0];
}

// Columns [first, first + kSide) of the kColumns whose sums are given.
template <typename Simd, Form kForm, int kRows, int kSide>
inline void direct_sums(const LinearWeights& w, const float* packed, const WeightRows<Simd, kForm>& rows, int first,
                        typename Simd::Vec (&sums)[kRows][kColumns]) {
  using Vec = typename Simd::Vec;
  using Format = typename Simd::template Format<kForm.bits, kForm.is_float>;
  constexpr int kVecBytes = Simd::kLanes * kForm.bits / 8, kBlockBytes = kForm.block * kForm.bits / 8;
  const std::uint8_t* weight = rows.weight + first * rows.stride;
  // Rows lie one behind the other, each too short for the processor to see where the next one starts: the next ones are
  // asked for in the order of memory.
  const std::uint8_t* next = weight + kSide * rows.stride;
  const float* x = packed;
  Vec side[kRows][kSide];
  zero_sums<Simd>(&side[0][0], kRows * kSide);

  const std::int64_t groups = w.k / w.group_size;
  const int blocks = w.group_size / kForm.block;
  for (std::int64_t g = 0; g < groups; ++g) {
    typename Format::Group group[kSide];
    for (int c = 0; c < kSide; ++c) {
      group[c] = rows.group(first + c, g);
    }
    rows.template prefetch_group<kSide>(first, g);
    for (int block = 0; block < blocks; ++block) {
      for (int line = 0; line < kSide * kBlockBytes; line += 64) {
        __builtin_prefetch(next + line);
      }
      next += kSide * kBlockBytes;
      for (int i = 0; i < kForm.block / Simd::kLanes; ++i) {
        Vec x_r[kRows];
        for (int r = 0; r < kRows; ++r, x += Simd::kLanes) {
          x_r[r] = Simd::load(x);
        }
        for (int c = 0; c < kSide; ++c) {
          const Vec v = Format::dequantize(group[c], weight + c * rows.stride + i * kVecBytes);
          for (int r = 0; r < kRows; ++r) {
            side[r][c] = Simd::fma(v, x_r[r], side[r][c]);
          }
        }
      }
      weight += kBlockBytes;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kSide; ++c) {
      sums[r][first + c] = Format::in_order(side[r][c]);
    }
  }
}

template <typename Simd, Form kForm, int kRows>
void direct_tile(const QuantizedLinear& op, const float* packed, std::int64_t n, std::int64_t columns) {
  constexpr int kSide = Simd::direct_columns(kRows);
  const WeightRows<Simd, kForm> rows(op.w, n, columns);
  typename Simd::Vec sums[kRows][kColumns];
  for (int first = 0; first < kColumns; first += kSide) {
    direct_sums<Simd, kForm, kRows, kSide>(op.w, packed, rows, first, sums);
  }
  for (int r = 0; r < kRows; ++r) {
    store_columns<Simd>(sums[r], op.y + r * op.w.n + n, columns);
  }
}

template <typename Simd, Form kForm>
void dequantize_row(const LinearWeights& w, std::int64_t n, float* out) {
  using Format = typename Simd::template Format<kForm.bits, kForm.is_float>;
  const WeightRows<Simd, kForm> row(w, n, 1);
  const std::uint8_t* weight = row.weight;
  for (std::int64_t g = 0; g < w.k / w.group_size; ++g) {
    const typename Format::Group group = row.group(0, g);
    for (int i = 0; i < w.group_size; i += Simd::kLanes) {
      Simd::store(out, Format::in_order(Format::dequantize(group, weight)));
      weight += Simd::kLanes * kForm.bits / 8;
      out += Simd::kLanes;
    }
  }
}

template <typename Simd, int kRows>
void panel_tile(const QuantizedLinear& op, const float* panel, std::int64_t stride, std::int64_t row, std::int64_t n,
                std::int64_t columns) {
  using Vec = typename Simd::Vec;
  const float* x[kRows];
  for (int r = 0; r < kRows; ++r) {
    x[r] = x_row<Simd>(op, row + r);
  }
  Vec sums[kRows][kColumns];
  zero_sums<Simd>(&sums[0][0], kRows * kColumns);
  for (std::int64_t k = 0; k < op.w.k; k += Simd::kLanes) {
    Vec w[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      w[c] = Simd::load(panel + c * stride + k);
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec x_r = Simd::load(x[r] + k);
      for (int c = 0; c < kColumns; ++c) {
        sums[r][c] = Simd::fma(w[c], x_r, sums[r][c]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    store_columns<Simd>(sums[r], op.y + (row + r) * op.w.n + n, columns);
  }
}

// rows rows at once, at most kRows.
template <typename Simd, int kRows>
void panel_rows(const QuantizedLinear& op, const float* panel, std::int64_t row, std::int64_t rows,
                std::int64_t n_begin, std::int64_t n_end) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      panel_rows<Simd, kRows - 1>(op, panel, row, rows, n_begin, n_end);
      return;
    }
  }
  std::int64_t n = n_begin;
  for (; n + kColumns <= n_end; n += kColumns) {
    panel_tile<Simd, kRows>(op, panel + (n - n_begin) * op.w.k, op.w.k, row, n, kColumns);
  }
  for (; n < n_end; ++n) {
    panel_tile<Simd, kRows>(op, panel + (n - n_begin) * op.w.k, 0, row, n, 1);
  }
}

template <typename Simd>
void multiply(const QuantizedLinear& op, const float* panel, std::int64_t n_begin, std::int64_t n_end) {
  // As few tiles as possible, of equal height: a low one does little with the weights that it loads.
  std::int64_t row = 0;
  for (std::int64_t tiles = (op.rows + Simd::kPanelRows - 1) / Simd::kPanelRows; tiles > 0; --tiles) {
    const std::int64_t rows = (op.rows - row + tiles - 1) / tiles;
    panel_rows<Simd, Simd::kPanelRows>(op, panel, row, rows, n_begin, n_end);
    row += rows;
  }
}

template <typename Simd, Form kForm>
void dequantize_and_multiply(const QuantizedLinear& op, float* panel, std::int64_t n_begin, std::int64_t n_end) {
  for (std::int64_t n = n_begin; n < n_end; ++n) {
    dequantize_row<Simd, kForm>(op.w, n, panel + (n - n_begin) * op.w.k);
  }
  multiply<Simd>(op, panel, n_begin, n_end);
}

// [k / kLanes, rows, kLanes]
template <typename Simd, Form kForm>
void pack(const QuantizedLinear& op, float* packed) {
  using Format = typename Simd::template Format<kForm.bits, kForm.is_float>;
  for (std::int64_t row = 0; row < op.rows; ++row) {
    const float* x = x_row<Simd>(op, row);
    for (std::int64_t i = 0; i < op.w.k; i += Simd::kLanes) {
      Simd::store(packed + i * op.rows + row * Simd::kLanes, Format::packed_order(Simd::load(x + i)));
    }
  }
}

template <typename Simd, Form kForm, int kRows = 1>
void direct(const QuantizedLinear& op, const float* packed, std::int64_t n_begin, std::int64_t n_end) {
  if constexpr (kRows < Simd::kNearRows) {
    if (op.rows > kRows) {
      direct<Simd, kForm, kRows + 1>(op, packed, n_begin, n_end);
      return;
    }
  }
  std::int64_t n = n_begin;
  for (; n + kColumns <= n_end; n += kColumns) {
    direct_tile<Simd, kForm, kRows>(op, packed, n, kColumns);
  }
  for (; n < n_end; ++n) {
    direct_tile<Simd, kForm, kRows>(op, packed, n, 1);
  }
}

// kernel.operator()<form>()
template <typename Simd, typename Kernel>
inline void with_form(const LinearWeights& w, const Kernel& kernel) {
  if (w.scale_codes != nullptr) {
    if (w.bits == 8) {
      return kernel.template operator()<Form{8, true}>();
    }
    return w.group_size == 16 ? kernel.template operator()<Form{4, true, 16}>()
                              : kernel.template operator()<Form{4, true}>();
  }
  switch (w.bits) {
    case 2:
      return kernel.template operator()<Form{2}>();
    case 3:
      return kernel.template operator()<Form{3}>();
    case 4:
      return kernel.template operator()<Form{4}>();
    case 5:
      return kernel.template operator()<Form{5}>();
    case 6:
      return kernel.template operator()<Form{6}>();
    default:
      return kernel.template operator()<Form{8}>();
  }
}

template <typename Simd>
constexpr LinearKernels make_linear_kernels(const char* name) {
  return {
      .name = name,
      .max_direct_rows = Simd::kDirectRows,
      .max_near_rows = Simd::kNearRows,
      .pack = [](const QuantizedLinear& op,
                 float* packed) { with_form<Simd>(op.w, [&]<Form kForm>() { pack<Simd, kForm>(op, packed); }); },
      .direct =
          [](const QuantizedLinear& op, const float* packed, std::int64_t n_begin, std::int64_t n_end) {
            with_form<Simd>(op.w, [&]<Form kForm>() { direct<Simd, kForm>(op, packed, n_begin, n_end); });
          },
      .panel =
          [](const QuantizedLinear& op, float* scratch, std::int64_t n_begin, std::int64_t n_end) {
            with_form<Simd>(op.w,
                            [&]<Form kForm>() { dequantize_and_multiply<Simd, kForm>(op, scratch, n_begin, n_end); });
          },
      .plain =
          [](const QuantizedLinear& op, std::int64_t n_begin, std::int64_t n_end) {
            multiply<Simd>(op, reinterpret_cast<const float*>(op.w.weight) + n_begin * op.w.k, n_begin, n_end);
          },
  };
}

}  // namespace mlx_server
