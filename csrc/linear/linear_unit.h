// Text that the bodies of linear_decode.kernel, linear_skinny.kernel, linear_matrix.kernel and moe_matrix.kernel share:
// a unit of quantized weights.
//
// Needs the constant BITS: of a weight.
constexpr int UNIT = 32;     // weights for a thread's turn
constexpr int WORDS = BITS;  // that hold them
constexpr uint32_t DIGITS = ((uint32_t(1) << BITS) - 1) << (23 - BITS);

// The i-th weight of `words` as the float in [1, 2) that is 1 + digits / 2^BITS, in the bits of a uint32_t `to`.
#define READ_DIGITS(to, words, i)                                                          \
  {                                                                                        \
    const int bit = (i) * BITS, at = bit / 32, shift = bit % 32;                           \
    uint32_t digits = words[at];                                                           \
    if (shift + BITS > 32) {                                                               \
      digits = digits >> shift | words[at + 1 < WORDS ? at + 1 : at] << (32 - shift) % 32; \
      digits <<= 23 - BITS;                                                                \
    } else if (shift > 23 - BITS) {                                                        \
      digits >>= shift - (23 - BITS);                                                      \
    } else {                                                                               \
      digits <<= 23 - BITS - shift;                                                        \
    }                                                                                      \
    to = (digits & DIGITS) | 0x3f800000;                                                   \
  }
// The words of a unit at the multiple of WORDS `from`.
#define READ_WORDS(words, from)                                                                  \
  if (WORDS % 4 == 0) {                                                                          \
    UNROLL for (int i = 0; i < WORDS; i += 4) {                                                  \
      float four[4];                                                                             \
      LOAD4(four, reinterpret_cast<const DEVICE float*>((from) + i));                            \
      UNROLL for (int j = 0; j < 4; ++j) { words[(i + j) % WORDS] = uint32_t(AS_INT(four[j])); } \
    }                                                                                            \
  } else {                                                                                       \
    UNROLL for (int i = 0; i < WORDS; ++i) { words[i] = (from)[i]; }                             \
  }
