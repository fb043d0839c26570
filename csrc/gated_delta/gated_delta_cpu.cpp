#include "gated_delta/gated_delta_cpu.h"

#include <vector>

#include "common/cpu_info.h"

namespace mlx_server {

std::span<const GatedDeltaKernel* const> gated_delta_kernels() {
#if defined(__x86_64__)
  static const GatedDeltaKernel* const all[] = {&kGatedDeltaAvx2, &kGatedDeltaPortable};
  return std::span(all).subspan(cpu_has_avx2() ? 0 : 1);
#else
  static const GatedDeltaKernel* const all[] = {&kGatedDeltaPortable};
  return all;
#endif
}

void gated_delta(const GatedDelta& op, ThreadPool& pool, const GatedDeltaKernel& kernel) {
  std::vector<GatedDeltaRow> rows;
  int token = 0;
  for (std::size_t b = 0; b < op.query_lens.size(); ++b) {
    rows.push_back({op.slots[b], token, op.query_lens[b], op.fresh[b] != 0});
    token += op.query_lens[b];
  }
  const auto for_each_head = [&](int num_heads, auto body) {
    const int count = static_cast<int>(rows.size()) * num_heads;
    pool.parallel_for(count, [&](int i) { body(op, rows[static_cast<std::size_t>(i / num_heads)], i % num_heads); });
  };
  for_each_head(op.num_heads(), kernel.convolve);
  for_each_head(op.num_value_heads, kernel.scan);
}

}  // namespace mlx_server
