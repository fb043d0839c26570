// Text that ends the bodies of linear_decode.kernel and linear_dense.kernel: adds up what lanes and then SPLIT
// simdgroups have in `sums` [ROWS][COLUMNS], in one order, and writes it to y.
UNROLL for (int r = 0; r < ROWS; ++r) {
  UNROLL for (int c = 0; c < COLUMNS; ++c) {
    const float sum = SIMD_SUM(sums[r][c]);
    if (LANE == 0) {
      parts[(SIMDGROUP * ROWS + r) * COLUMNS + c] = sum;
    }
  }
}
BARRIER();
for (int i = THREAD; i < THREADS / 32 / SPLIT * ROWS * COLUMNS; i += THREADS) {
  const int c = i % COLUMNS, r = i / COLUMNS % ROWS, team = i / COLUMNS / ROWS;
  const int row = first_row + r, column = (GROUP_X * (THREADS / 32 / SPLIT) + team) * COLUMNS + c;
  float sum = 0;
  UNROLL for (int p = 0; p < SPLIT; ++p) { sum += parts[((team * SPLIT + p) * ROWS + r) * COLUMNS + c]; }
  if (row < rows && column < num_columns) {
    y[size_t(row) * num_columns + column] = T(sum);
  }
}
