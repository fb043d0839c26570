#include "paged_attention/paged_attention_cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/cpu_info.h"

namespace mlx_server {

namespace {

// Query heads of a tile for each key/value head: enough to use a chunk of keys many times while it is in the L1 cache.
constexpr int kTileHeads = 32;
// With fewer tasks for each thread, every split of a context is a task of its own, or even every head.
constexpr int kTasksPerThread = 4;
constexpr int kSplitsPerThread = 2;

struct Splits {
  int first, end;

  int size() const { return end - first; }
};

Splits splits_of(const PagedAttention& op, const AttentionTile& tile) {
  const int begin = std::max(0, tile.first_pos + 1 - op.window), end = tile.first_pos + tile.num_queries;
  return {begin / kSplitSize, (end - 1) / kSplitSize + 1};
}

int heads_of(const PagedAttention& op, const AttentionTile& tile) {
  return tile.num_kv_heads * tile.num_queries * (op.num_heads / op.num_kv_heads);
}

// Tiles of all queries, for kv_heads key/value heads each.
std::vector<AttentionTile> make_tiles(const PagedAttention& op, int kv_heads) {
  const int tile_queries = std::max(1, kTileHeads * op.num_kv_heads / op.num_heads);
  std::vector<AttentionTile> tiles;
  int token = 0;
  for (int row = 0; row < static_cast<int>(op.query_lens.size()); ++row) {
    const int query_len = op.query_lens[row], first_pos = op.context_lens[row] - query_len;
    // The last queries see most keys: longest tiles first.
    for (int end = query_len; end > 0; end -= tile_queries) {
      const int begin = std::max(0, end - tile_queries);
      for (int kv_head = 0; kv_head < op.num_kv_heads; kv_head += kv_heads) {
        tiles.push_back({row, kv_head, kv_heads, token + begin, first_pos + begin, end - begin});
      }
    }
    token += query_len;
  }
  return tiles;
}

// Reading all heads together is faster, unless that leaves threads without work.
std::vector<AttentionTile> make_tiles(const PagedAttention& op, const ThreadPool& pool) {
  std::vector<AttentionTile> tiles = make_tiles(op, op.num_kv_heads);
  int num_splits = 0;
  for (const AttentionTile& tile : tiles) {
    num_splits += splits_of(op, tile).size();
  }
  const bool is_enough = num_splits >= kSplitsPerThread * pool.num_threads();
  return is_enough ? tiles : make_tiles(op, 1);
}

// total += part, for `size` heads. The weights of each are relative to its own maximum.
void merge(const AttentionPart& total, const AttentionPart& part, int size, int head_dim) {
  for (int i = 0; i < size; ++i) {
    OnlineSoftmax &a = total.softmax[i], &b = part.softmax[i];
    if (b.sum == 0) {
      continue;
    }
    const float max = std::max(a.max, b.max), scale_a = std::exp(a.max - max), scale_b = std::exp(b.max - max);
    a = {max, a.sum * scale_a + b.sum * scale_b};
    for (int d = 0; d < head_dim; ++d) {
      total.acc[i * head_dim + d] = total.acc[i * head_dim + d] * scale_a + part.acc[i * head_dim + d] * scale_b;
    }
  }
}

// Writes a tile's heads, whose softmax is complete but for the sinks, to op.out.
void finish(const PagedAttention& op, const AttentionTile& tile, const AttentionPart& total) {
  const int group = op.num_heads / op.num_kv_heads;
  for (int i = 0; i < heads_of(op, tile); ++i) {
    const int head = (tile.first_kv_head + i / (tile.num_queries * group)) * group + i % group;
    const auto [max, sum] = total.softmax[i];
    float factor = 1 / sum;
    if (op.sinks != nullptr) {
      const float new_max = std::max(max, op.sinks[head]), scale = std::exp(max - new_max);
      factor = scale / (sum * scale + std::exp(op.sinks[head] - new_max));
    }
    const std::ptrdiff_t token = tile.first_token + i / group % tile.num_queries;
    for (int d = 0; d < op.head_dim; ++d) {
      op.out[(token * op.num_heads + head) * op.head_dim + d] = total.acc[i * op.head_dim + d] * factor;
    }
  }
}

// Memory of a thread for a tile.
struct Scratch {
  std::vector<float> kernel, total, part;
  std::vector<OnlineSoftmax> total_softmax, part_softmax;

  static Scratch& of_thread(std::size_t num_heads, std::size_t head_dim) {
    static thread_local Scratch scratch;
    const auto grow = [](auto& values, std::size_t size) { values.resize(std::max(values.size(), size)); };
    grow(scratch.kernel, attention_scratch_size(num_heads, head_dim));
    grow(scratch.total, num_heads * head_dim);
    grow(scratch.part, num_heads * head_dim);
    grow(scratch.total_softmax, num_heads);
    grow(scratch.part_softmax, num_heads);
    return scratch;
  }
};

void attend_tile(const PagedAttention& op, const AttentionKernel& kernel, const AttentionTile& tile) {
  const int num_heads = heads_of(op, tile);
  Scratch& scratch = Scratch::of_thread(num_heads, op.head_dim);
  const AttentionPart total{scratch.total_softmax.data(), scratch.total.data()};
  const AttentionPart part{scratch.part_softmax.data(), scratch.part.data()};
  const auto [first, end] = splits_of(op, tile);
  kernel.attend(op, tile, first, scratch.kernel.data(), total);
  for (int split = first + 1; split < end; ++split) {
    kernel.attend(op, tile, split, scratch.kernel.data(), part);
    merge(total, part, num_heads, op.head_dim);
  }
  finish(op, tile, total);
}

// Tiles whose splits are computed apart and then merged in their order, to the same bits as by attend_tile.
class SplitTiles {
 public:
  SplitTiles(const PagedAttention& op, std::vector<AttentionTile> tiles) : op_(op), tiles_(std::move(tiles)) {
    std::size_t num_heads = 0;
    for (const AttentionTile& tile : tiles_) {
      const auto [first, end] = splits_of(op, tile);
      first_tasks_.push_back(static_cast<int>(tasks_.size()));
      for (int split = first; split < end; ++split) {
        tasks_.push_back({&tile, split, num_heads});
        num_heads += heads_of(op, tile);
      }
    }
    softmax_.resize(num_heads);
    acc_.resize(num_heads * op.head_dim);
  }

  void run(ThreadPool& pool, const AttentionKernel& kernel) {
    pool.parallel_for(static_cast<int>(tasks_.size()), [&](int i) {
      const AttentionTile& tile = *tasks_[i].tile;
      Scratch& scratch = Scratch::of_thread(heads_of(op_, tile), op_.head_dim);
      kernel.attend(op_, tile, tasks_[i].split, scratch.kernel.data(), part(i));
    });
    for (std::size_t i = 0; i < tiles_.size(); ++i) {
      const int first = first_tasks_[i];
      for (int task = first + 1; task < first + splits_of(op_, tiles_[i]).size(); ++task) {
        merge(part(first), part(task), heads_of(op_, tiles_[i]), op_.head_dim);
      }
      finish(op_, tiles_[i], part(first));
    }
  }

 private:
  struct Task {
    const AttentionTile* tile;
    int split;
    std::size_t first_head;  // of softmax_ and acc_
  };

  AttentionPart part(int task) {
    const std::size_t head = tasks_[task].first_head;
    return {softmax_.data() + head, acc_.data() + head * op_.head_dim};
  }

  const PagedAttention& op_;
  std::vector<AttentionTile> tiles_;
  std::vector<int> first_tasks_;  // of each tile
  std::vector<Task> tasks_;
  std::vector<OnlineSoftmax> softmax_;
  std::vector<float> acc_;
};

// A multiple of 0, NaN if an element is not finite.
float poison(const float* x, std::size_t size) {
  float sum = 0;
  for (std::size_t i = 0; i < size; ++i) {
    sum += x[i] * 0;
  }
  return sum;
}

}  // namespace

void quantize_rows(const float* x, std::size_t num_rows, std::size_t head_dim, std::int8_t* integers, float* scales) {
  for (std::size_t row = 0; row < num_rows; ++row, x += head_dim, integers += head_dim) {
    float max = 0;
    for (std::size_t i = 0; i < head_dim; ++i) {
      max = std::max(max, std::abs(x[i]));
    }
    const float zero = poison(x, head_dim);
    scales[row] = max / 127 + zero;
    const float factor = max > 0 ? 127 / max : 0;
    for (std::size_t i = 0; i < head_dim; ++i) {
      const float scaled = zero == 0 ? x[i] * factor : 0;
      integers[i] = static_cast<std::int8_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
    }
  }
}

std::span<const AttentionKernel* const> attention_kernels() {
#if defined(__x86_64__)
  static const AttentionKernel* const all[] = {&kAttentionAvx512, &kAttentionAvx2, &kAttentionPortable};
  return std::span(all).subspan(cpu_has_avx512() ? 0 : cpu_has_avx2() ? 1 : 2);
#else
  static const AttentionKernel* const all[] = {&kAttentionPortable};
  return all;
#endif
}

void paged_attention(const PagedAttention& op, ThreadPool& pool, const AttentionKernel& kernel) {
  std::vector<AttentionTile> tiles = make_tiles(op, pool);
  std::vector<int> row_tiles(op.query_lens.size());
  for (const AttentionTile& tile : tiles) {
    ++row_tiles[tile.row];
  }
  const auto split = std::ranges::stable_partition(tiles, [&](const AttentionTile& tile) {
    return splits_of(op, tile).size() == 1 || row_tiles[tile.row] >= kTasksPerThread * pool.num_threads();
  });
  SplitTiles split_tiles(op, {split.begin(), split.end()});
  tiles.erase(split.begin(), split.end());
  pool.parallel_for(static_cast<int>(tiles.size()), [&](int i) { attend_tile(op, kernel, tiles[i]); });
  split_tiles.run(pool, kernel);
}

}  // namespace mlx_server
