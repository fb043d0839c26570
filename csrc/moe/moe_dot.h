// Text that the bodies of moe_hidden.kernel and moe_output.kernel share: the product of a matrix's row and x, by the
// lanes of a simdgroup.
//
// Needs the constant BITS: of a weight, 32 if the matrix is plain.
constexpr int UNIT = BITS == 2 ? 16 : BITS == 4 || BITS == 8 || BITS == 32 ? 8 : 32;  // weights for a lane's turn
constexpr int WORDS = BITS == 32 ? UNIT : UNIT * BITS / 32;                           // that hold them

// Adds to `sum` the products of a lane's unit of weights and x_unit[UNIT], whose sum is x_sum. A row of the matrix has
// num_units units and num_groups groups; `unit` and `group` are the lane's, `row` counts the rows of all experts.
#define ADD_PRODUCTS(sum, weight, scales, biases, row)                                   \
  {                                                                                      \
    const auto words = weight + (size_t(row) * num_units + unit) * WORDS;                \
    float products = 0;                                                                  \
    if (BITS == 32) {                                                                    \
      UNROLL for (int i = 0; i < UNIT; ++i) { products += float(words[i]) * x_unit[i]; } \
      sum += products;                                                                   \
    } else {                                                                             \
      uint32_t w[WORDS];                                                                 \
      UNROLL for (int i = 0; i < WORDS; ++i) { w[i] = uint32_t(words[i]); }              \
      UNROLL for (int i = 0; i < UNIT; ++i) {                                            \
        const int at = i * BITS / 32, shift = i * BITS % 32;                             \
        uint32_t q = w[at] >> shift;                                                     \
        q |= shift + BITS > 32 ? w[at + 1 < WORDS ? at + 1 : at] << (32 - shift) : 0;    \
        products += float(q & ((uint32_t(1) << (BITS % 32)) - 1)) * x_unit[i];           \
      }                                                                                  \
      const size_t at = size_t(row) * num_groups + group;                                \
      sum += float(scales[at]) * products + float(biases[at]) * x_sum;                   \
    }                                                                                    \
  }
