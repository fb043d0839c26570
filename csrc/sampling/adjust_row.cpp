#include "sampling/adjust_row.h"

#include <algorithm>
#include <limits>

namespace mlx_server {

namespace {

using Ids = std::span<const std::int32_t>;

Ids part(const std::int32_t* ids, std::int32_t begin, std::int32_t end) {
  return {ids + begin, static_cast<std::size_t>(std::max(end - begin, 0))};
}

// One row, with a count for each token of the vocabulary.
struct Row {
  std::span<float> logits;
  std::int32_t* counts;

  bool has(std::int32_t id) const { return static_cast<std::size_t>(id) < logits.size() && id >= 0; }
};

void add_bias(const Row& row, Ids ids, const float* values) {
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (row.has(ids[i])) {
      row.logits[static_cast<std::size_t>(ids[i])] += values[i];
    }
  }
}

// apply(logit, count) for each token of ids, once.
template <typename Apply>
void for_each_token(const Row& row, Ids ids, const Apply& apply) {
  for (const std::int32_t id : ids) {
    if (row.has(id)) {
      ++row.counts[id];
    }
  }
  for (const std::int32_t id : ids) {
    if (row.has(id) && row.counts[id] > 0) {
      apply(row.logits[static_cast<std::size_t>(id)], row.counts[id]);
      row.counts[id] = 0;
    }
  }
}

// Keskar et al., "CTRL: a conditional transformer language model for controllable generation", 2019, section 4.1.
void penalize_repetition(const Row& row, Ids ids, float penalty) {
  for_each_token(row, ids, [&](float& logit, int) { logit = logit > 0 ? logit / penalty : logit * penalty; });
}

// As OpenAI defines them.
void penalize_frequency(const Row& row, Ids ids, float frequency, float presence) {
  for_each_token(row, ids, [&](float& logit, int count) { logit -= frequency * static_cast<float>(count) + presence; });
}

// How many tokens before and at `end` equal those at the end of the history, up to a breaker.
int match_length(Ids history, Ids breakers, std::size_t end) {
  int length = 0;
  for (; length < kMaxDryLength && static_cast<std::size_t>(length) <= end; ++length) {
    const std::int32_t id = history[history.size() - 1 - static_cast<std::size_t>(length)];
    if (history[end - static_cast<std::size_t>(length)] != id || std::ranges::find(breakers, id) != breakers.end()) {
      break;
    }
  }
  return length;
}

// "Don't repeat yourself" of p-e-w (text-generation-webui, pull request 5677): a token that would make a repetition of
// `length` tokens longer loses multiplier * base^(length - allowed length).
void penalize_repeated_sequences(const Row& row, Ids history, Ids breakers, const RowParams& params) {
  for (std::size_t i = 0; i + 1 < history.size(); ++i) {
    const std::int32_t next = history[i + 1];
    if (row.has(next) && history[i] == history.back()) {
      row.counts[next] = std::max(row.counts[next], match_length(history, breakers, i));
    }
  }
  for (const std::int32_t id : history) {
    if (row.has(id) && row.counts[id] > 0) {
      const int length = row.counts[id];
      row.counts[id] = 0;
      if (length >= params.dry_allowed_length && std::ranges::find(breakers, id) == breakers.end()) {
        float penalty = params.dry_multiplier;
        for (int i = std::max(params.dry_allowed_length, 0); i < length; ++i) {
          penalty *= params.dry_base;
        }
        row.logits[static_cast<std::size_t>(id)] -= std::min(penalty, std::numeric_limits<float>::max());
      }
    }
  }
}

bool has_penalties(const RowParams& params) {
  return params.repetition_penalty != 1 || params.frequency_penalty != 0 || params.presence_penalty != 0 ||
         params.dry_multiplier != 0;
}

}  // namespace

bool is_adjusted(const RowParams& params) {
  return params.mask_row >= 0 || params.bias_end > params.bias_begin || has_penalties(params);
}

void adjust_row(std::span<const float> logits, const RowParams& params, const SampleTables& tables, RowScratch& scratch,
                const RowKernels& kernels) {
  const std::uint32_t* mask =
      params.mask_row < 0 ? nullptr : tables.masks + static_cast<std::size_t>(params.mask_row) * tables.mask_words;
  kernels.copy_allowed(logits.data(), mask, logits.size(), scratch.logits.data());
  const Row row{{scratch.logits.data(), logits.size()}, scratch.counts.data()};
  add_bias(row, part(tables.bias_ids, params.bias_begin, params.bias_end), tables.bias_values + params.bias_begin);
  const auto history = [&](std::int32_t begin) { return part(tables.history, begin, params.history_end); };
  if (params.repetition_penalty != 1) {
    penalize_repetition(row, history(params.repetition_begin), params.repetition_penalty);
  }
  if (params.frequency_penalty != 0 || params.presence_penalty != 0) {
    penalize_frequency(row, history(params.output_begin), params.frequency_penalty, params.presence_penalty);
  }
  if (params.dry_multiplier != 0) {
    penalize_repeated_sequences(row, history(params.dry_begin),
                                part(tables.breakers, params.breakers_begin, params.breakers_end), params);
  }
}

}  // namespace mlx_server
