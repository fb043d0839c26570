// Where the keys and values of the CPU's attention lie. Compiled for each instruction set, as paged_attention_impl.h.
#pragma once

#include "common/simd.h"
#include "paged_attention/paged_attention_cpu.h"

namespace mlx_server {

namespace {

// Vectors of sums that registers hold, beside what they are made of.
#if defined(__AVX512VL__)
constexpr int kMaxSums = 16;
#else
constexpr int kMaxSums = 8;
#endif

// Where the keys and values of one chunk lie: the only thing that knows of blocks.
struct Chunk {
  int begin = 0, end = 0;
  const float* keys[kMaxChunkSize + kMaxSums - 1];
  const float* values[kMaxChunkSize];

  int size() const { return end - begin; }
};

// A row of `rows`, made of integers in `scratch` if it is not there as floats.
inline const float* float_row(const CachedRows& rows, std::ptrdiff_t row, int head_dim, float* __restrict scratch) {
  if (rows.floats != nullptr) {
    return rows.floats + row * head_dim;
  }
  const std::int8_t* integers = rows.integers + row * head_dim;
  const float scale = rows.scales[row];
  // A plain loop: GCC converts vectors of 8 bytes element by element.
  for (int d = 0; d < head_dim; ++d) {
    scratch[d] = static_cast<float>(integers[d]) * scale;
  }
  return scratch;
}

// Where the rows of the keys from `begin` on lie in the pool.
class Slots {
 public:
  Slots(const PagedAttention& op, int row, int begin)
      : block_(op.block_tables + static_cast<std::ptrdiff_t>(row) * op.max_blocks + begin / op.block_size),
        block_size_(op.block_size),
        offset_(begin % op.block_size) {}

  std::ptrdiff_t next() {
    const std::ptrdiff_t slot = static_cast<std::ptrdiff_t>(*block_) * block_size_ + offset_;
    if (++offset_ == block_size_) {
      offset_ = 0;
      ++block_;
    }
    return slot;
  }

 private:
  const std::int32_t* block_;
  int block_size_, offset_;
};

// The keys and values [begin, end). scratch [2 * kMaxChunkSize, D]: of those made from integers.
inline void locate(const PagedAttention& op, const AttentionTile& tile, int kv_head, int begin, int end, float* scratch,
                   Chunk& chunk) {
  Slots slots(op, tile.row, begin);
  chunk.begin = begin;
  chunk.end = end;
  for (int i = 0; i < chunk.size(); ++i) {
    const std::ptrdiff_t row = slots.next() * op.num_kv_heads + kv_head;
    chunk.keys[i] = float_row(op.keys, row, op.head_dim, scratch + i * op.head_dim);
    chunk.values[i] = float_row(op.values, row, op.head_dim, scratch + (kMaxChunkSize + i) * op.head_dim);
  }
  // Scores are computed up to kMaxSums at a time; what is too much repeats the last key and is dropped.
  for (int i = chunk.size(); i < chunk.size() + kMaxSums - 1; ++i) {
    chunk.keys[i] = chunk.keys[chunk.size() - 1];
  }
}

// Asks memory for the keys and values that come next, of all of a tile's heads. A little at a time between products, as
// a processor waits when too many requests are under way.
class Prefetcher {
 public:
  Prefetcher(const PagedAttention& op, const AttentionTile& tile, int begin) : slots_(op, tile.row, begin) {
    const bool is_float = op.keys.floats != nullptr;
    keys_ = is_float ? reinterpret_cast<const char*>(op.keys.floats) : reinterpret_cast<const char*>(op.keys.integers);
    values_ =
        is_float ? reinterpret_cast<const char*>(op.values.floats) : reinterpret_cast<const char*>(op.values.integers);
    const std::ptrdiff_t row_size = op.head_dim * static_cast<std::ptrdiff_t>(is_float ? sizeof(float) : 1);
    stride_ = op.num_kv_heads * row_size;
    first_ = tile.first_kv_head * row_size;
    size_ = tile.num_kv_heads * row_size;
  }

  // To be asked for by the next steps.
  void add(int num_keys) {
    if (num_keys_ == 0 && num_keys > 0) {
      offset_ = slots_.next() * stride_ + first_;
      end_ = offset_ + size_;
    }
    num_keys_ += num_keys;
  }

  void step() {
    if (num_keys_ == 0) {
      return;
    }
    for (int line = 0; line < kLines; ++line) {
      __builtin_prefetch(keys_ + offset_ + line * kLineSize, /*write=*/0, kToL2);
      __builtin_prefetch(values_ + offset_ + line * kLineSize, /*write=*/0, kToL2);
    }
    offset_ += kLines * kLineSize;
    if (offset_ < end_) {
      return;
    }
    if (--num_keys_ > 0) {
      offset_ = slots_.next() * stride_ + first_;
      end_ = offset_ + size_;
    }
  }

  void finish() {
    while (num_keys_ > 0) {
      step();
    }
  }

 private:
  static constexpr int kLineSize = 64, kLines = 4, kToL2 = 2;

  Slots slots_;
  const char *keys_, *values_;
  std::ptrdiff_t stride_, first_, size_;  // of all heads, of the tile's in them, and theirs
  std::ptrdiff_t offset_ = 0, end_ = 0;   // of the next line of a key, and where its row ends
  int num_keys_ = 0;
};

}  // namespace

}  // namespace mlx_server
