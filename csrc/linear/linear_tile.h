// Text that the bodies of linear_matrix.kernel and moe_matrix.kernel share: ROWS by COLUMNS of x @ weight.T, by matrix
// units.
//
// Needs the constants T, BITS, GROUP_SIZE, ROWS, THREADS; linear_unit.h; x, weight, scales and biases; and these names:
// - COLUMNS = THREADS / 2, STEP = 2 * UNIT: elements of K for a turn
// - dim: K; begin, end: the group's steps
// - my_column, a size_t: the row of weight that is column THREAD / 2 of the tile
// - X_ROW(i): the row of x that is row i of the tile, asked for after a barrier
// - END_STEP(step): what follows on a step; SUMS[ROWS / 16]: what is stored, `sums` or what END_STEP adds up from it
// - STORE_SUM(i, j, sum): stores row i, column j of the tile
//
// Rows in shared memory are longer than what they hold, so that they begin in different banks.
constexpr int STRIDE = STEP + 8, SUM_STRIDE = 16 + 4;
SHARED T x_tile[ROWS * STRIDE];
SHARED T weight_tile[COLUMNS * STRIDE];
SHARED float sum_tile[THREADS / 32 * 16 * SUM_STRIDE];

const int num_units = dim / UNIT, num_groups = dim / GROUP_SIZE;
// A thread unpacks one unit of a step, with this place in it, and copies 8 elements of a row of x for each of its
// turns.
const int my_place = THREAD % 2 * UNIT, to = THREAD / 2 * STRIDE + my_place;

MATRIX_SUM sums[ROWS / 16];
UNROLL for (int r = 0; r < ROWS / 16; ++r) { MATRIX_ZERO(sums[r]); }
uint32_t words[WORDS] = {0};
float scale = 0, bias = 0;
// The thread's unit of a step; the last unit stands for those beyond the end.
#define READ_UNIT(step)                                                     \
  if (BITS < 16) {                                                          \
    const int unit = MIN(((step) * STEP + my_place) / UNIT, num_units - 1); \
    READ_WORDS(words, weight + (my_column * num_units + unit) * WORDS)      \
    const size_t group = my_column * num_groups + unit * UNIT / GROUP_SIZE; \
    scale = float(scales[group]) * float(1 << BITS);                        \
    bias = float(biases[group]) - scale;                                    \
  }

READ_UNIT(begin)
for (int step = begin; step < end; ++step) {
  BARRIER();
  for (int i = THREAD; i < ROWS * STEP / 8; i += THREADS) {
    const int row = i / (STEP / 8), place = i % (STEP / 8) * 8, k = step * STEP + place;
    if (k < dim) {
      COPY(8, x_tile + row * STRIDE + place, x + size_t(X_ROW(row)) * dim + k);
    } else {
      UNROLL for (int j = 0; j < 8; ++j) { x_tile[row * STRIDE + place + j] = T(0.0f); }
    }
  }
  const bool is_inside = step * STEP + my_place < dim;
  UNROLL for (int i = 0; i < UNIT; i += 8) {
    if (BITS == 16 && is_inside) {
      COPY(8, weight_tile + to + i, weight + my_column * dim + step * STEP + my_place + i);
    } else {
      float w[8];
      UNROLL for (int j = 0; j < 8; ++j) {
        uint32_t bits;
        READ_DIGITS(bits, words, i + j)
        w[j] = is_inside ? AS_FLOAT(bits) * scale + bias : 0.0f;
      }
      STORE(8, weight_tile + to + i, w);
    }
  }
  READ_UNIT(step + 1)
  BARRIER();
  UNROLL for (int k = 0; k < STEP; k += 16) {
    MATRIX_RIGHT(T) right;
    MATRIX_LOAD_TRANSPOSED(right, weight_tile + SIMDGROUP * 16 * STRIDE + k, STRIDE);
    UNROLL for (int r = 0; r < ROWS / 16; ++r) {
      MATRIX_LEFT(T) left;
      MATRIX_LOAD_LEFT(left, x_tile + r * 16 * STRIDE + k, STRIDE);
      MATRIX_MULTIPLY_ADD(sums[r], left, right);
    }
  }
  END_STEP(step)
}
UNROLL for (int r = 0; r < ROWS / 16; ++r) {
  SIMD_BARRIER();
  MATRIX_STORE(SUMS[r], sum_tile + SIMDGROUP * 16 * SUM_STRIDE, SUM_STRIDE);
  SIMD_BARRIER();
  for (int i = LANE; i < 16 * 16; i += 32) {
    STORE_SUM(r * 16 + i / 16, SIMDGROUP * 16 + i % 16, sum_tile[(SIMDGROUP * 16 + i / 16) * SUM_STRIDE + i % 16])
  }
}
#undef READ_UNIT
#undef READ_WORDS
#undef READ_DIGITS
#undef X_ROW
#undef END_STEP
#undef SUMS
#undef STORE_SUM
