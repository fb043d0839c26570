// The portable kernels of sampling against what the CPU computes.
#include <cstddef>
#include <random>

#include "check.h"
#include "kernels/host.h"
#include "sampling/sample_row.h"

namespace {

using namespace mlx_server;
using Floats = std::vector<float>;
using Words = std::vector<std::uint32_t>;
using Ids = std::vector<std::int32_t>;

template <typename T, int THREADS>
void adjust_kernel(const T* logits, const std::uint32_t* rows, const std::uint32_t* masks, const int* bias_ids,
                   const float* biases, const int* history, const int* breakers, float* adjusted,
                   const int* logits_shape) {
#include "sampling/sampling_adjust.kernel"
}

template <typename T, typename X, int THREADS>
void choose_kernel(const T* raw, const X* logits, const std::uint32_t* rows, std::uint32_t* token_ids, float* logprobs,
                   std::uint32_t* top_ids, float* top_logprobs, const int* raw_shape) {
#include "sampling/sampling_choose.kernel"
}

TEST(row_words_are_those_of_row_params) {
#include "sampling/row_words.h"
#define CHECK_WORD(word, field) CHECK_EQ(static_cast<std::size_t>(word) * 4, offsetof(RowParams, field))
  CHECK_WORD(SEED, seed);
  CHECK_WORD(POSITION, position);
  CHECK_WORD(GIVEN_TOKEN, given_token);
  CHECK_WORD(NUM_LOGPROBS, num_logprobs);
  CHECK_WORD(PROCESSED_LOGPROBS, processed_logprobs);
  CHECK_WORD(MASK_ROW, mask_row);
  CHECK_WORD(BIAS_BEGIN, bias_begin);
  CHECK_WORD(BIAS_END, bias_end);
  CHECK_WORD(REPETITION_BEGIN, repetition_begin);
  CHECK_WORD(OUTPUT_BEGIN, output_begin);
  CHECK_WORD(DRY_BEGIN, dry_begin);
  CHECK_WORD(HISTORY_END, history_end);
  CHECK_WORD(BREAKERS_BEGIN, breakers_begin);
  CHECK_WORD(BREAKERS_END, breakers_end);
  CHECK_WORD(REPETITION_PENALTY, repetition_penalty);
  CHECK_WORD(FREQUENCY_PENALTY, frequency_penalty);
  CHECK_WORD(PRESENCE_PENALTY, presence_penalty);
  CHECK_WORD(DRY_MULTIPLIER, dry_multiplier);
  CHECK_WORD(DRY_BASE, dry_base);
  CHECK_WORD(DRY_ALLOWED_LENGTH, dry_allowed_length);
  CHECK_WORD(TOP_N_SIGMA, top_n_sigma);
  CHECK_WORD(TEMPERATURE, temperature);
  CHECK_WORD(TOP_K, top_k);
  CHECK_WORD(TYPICAL_P, typical_p);
  CHECK_WORD(TOP_P, top_p);
  CHECK_WORD(MIN_P, min_p);
  CHECK_WORD(XTC_PROBABILITY, xtc_probability);
  CHECK_WORD(XTC_THRESHOLD, xtc_threshold);
  CHECK_EQ(static_cast<int>(ROW_WORDS), kRowParamsWords);
}

// What the rows of a test share.
struct Tables {
  Words masks;
  Ids bias_ids, history, breakers;
  Floats biases;
};

template <typename T>
std::vector<SampledToken> run_kernels(const std::vector<T>& logits, const std::vector<RowParams>& rows,
                                      const Tables& tables) {
  constexpr int kThreads = 64;
  const int num_rows = static_cast<int>(rows.size()), vocab_size = static_cast<int>(logits.size()) / num_rows;
  const int shape[] = {num_rows, vocab_size};
  const auto* words = reinterpret_cast<const std::uint32_t*>(rows.data());
  Floats adjusted(logits.size()), logprobs(rows.size()), top_logprobs(rows.size() * kMaxTopLogprobs);
  Words token_ids(rows.size()), top_ids(top_logprobs.size());
  host_launch({(vocab_size + 2047) / 2048, num_rows, 1}, kThreads, [&] {
    adjust_kernel<T, kThreads>(logits.data(), words, tables.masks.data(), tables.bias_ids.data(), tables.biases.data(),
                               tables.history.data(), tables.breakers.data(), adjusted.data(), shape);
  });
  host_launch({num_rows, 1, 1}, kThreads, [&] {
    choose_kernel<T, float, kThreads>(logits.data(), adjusted.data(), words, token_ids.data(), logprobs.data(),
                                      top_ids.data(), top_logprobs.data(), shape);
  });
  std::vector<SampledToken> tokens(rows.size());
  for (std::size_t b = 0; b < rows.size(); ++b) {
    tokens[b].id = token_ids[b];
    tokens[b].logprob = logprobs[b];
    std::copy_n(top_ids.begin() + static_cast<std::ptrdiff_t>(b * kMaxTopLogprobs), kMaxTopLogprobs,
                tokens[b].top_ids.begin());
    std::copy_n(top_logprobs.begin() + static_cast<std::ptrdiff_t>(b * kMaxTopLogprobs), kMaxTopLogprobs,
                tokens[b].top_logprobs.begin());
  }
  return tokens;
}

template <typename T>
void check_rows(const Floats& logits, const std::vector<RowParams>& rows, const Tables& tables) {
  const std::size_t vocab_size = logits.size() / rows.size();
  std::vector<T> typed;
  Floats rounded;
  for (const float x : logits) {
    typed.push_back(T(x));
    rounded.push_back(static_cast<float>(typed.back()));
  }
  const auto tokens = run_kernels<T>(typed, rows, tables);
  RowScratch scratch;
  for (std::size_t b = 0; b < rows.size(); ++b) {
    const SampleTables pointers{tables.masks.data(),  (vocab_size + 31) / 32, tables.bias_ids.data(),
                                tables.biases.data(), tables.history.data(),  tables.breakers.data()};
    const SampledToken expected = sample_row({rounded.data() + b * vocab_size, vocab_size}, rows[b], pointers, scratch);
    CHECK_EQ(tokens[b].id, expected.id);
    CHECK_NEAR(tokens[b].logprob, expected.logprob, 1e-4);
    for (std::size_t i = 0; i < kMaxTopLogprobs; ++i) {
      CHECK_EQ(tokens[b].top_ids[i], expected.top_ids[i]);
      CHECK_NEAR(tokens[b].top_logprobs[i], expected.top_logprobs[i], 1e-4);
    }
  }
}

// Every filter in several rows, with log-probabilities of both kinds.
std::vector<RowParams> many_rows() {
  std::vector<RowParams> rows(16);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    RowParams& row = rows[i];
    row.seed = {static_cast<std::uint32_t>(i), 77};
    row.position = 5;
    row.num_logprobs = static_cast<std::int32_t>(i % 4 * 7) - 1;
    row.processed_logprobs = i % 3 == 0;
    row.temperature = i % 5 == 4 ? 0 : 0.6f + 0.1f * static_cast<float>(i % 4);
  }
  rows[1].top_k = 20;
  rows[2].top_p = 0.8f;
  rows[3].typical_p = 0.6f;
  rows[5].min_p = 0.1f;
  rows[6].top_n_sigma = 1.5f;
  rows[7].xtc_probability = 1;
  rows[7].xtc_threshold = 0.01f;
  rows[8].given_token = 9;
  rows[10].top_k = 30;
  rows[10].typical_p = 0.9f;
  rows[10].top_p = 0.9f;
  rows[10].min_p = 0.02f;
  rows[11].top_k = 1;
  rows[12].top_p = 1e-6f;
  rows[13].typical_p = 0.3f;
  rows[13].top_p = 0.7f;
  rows[15] = rows[10];
  rows[15].xtc_probability = 1;
  rows[15].processed_logprobs = 1;
  return rows;
}

Floats normal(std::size_t size, float deviation, float step) {
  std::mt19937 rng(static_cast<unsigned>(size));
  std::normal_distribution<float> distribution(0, deviation);
  Floats values(size);
  for (float& value : values) {
    value = step > 0 ? std::round(distribution(rng) / step) * step : distribution(rng);
  }
  return values;
}

TEST(choose_agrees_with_the_cpu) {
  const auto rows = many_rows();
  check_rows<float>(normal(rows.size() * 1000, 2, 0), rows, {});
  check_rows<HostBfloat16>(normal(rows.size() * 333, 1, 0.5f), rows, {});  // many ties
}

TEST(choose_agrees_with_the_cpu_in_a_large_vocabulary) {
  std::vector<RowParams> rows = many_rows();
  rows.erase(rows.begin(), rows.begin() + 13);
  check_rows<float>(normal(rows.size() * 70'001, 2, 0), rows, {});
}

TEST(adjust_agrees_with_the_cpu) {
  Tables tables;
  std::mt19937 rng(3);
  for (int i = 0; i < 60; ++i) {
    tables.history.push_back(static_cast<std::int32_t>(i % 7 == 0 ? rng() % 3000 : rng() % 4));
  }
  tables.history.insert(tables.history.end(), {-1, 1'000'000, 1, 2, 3, 1, 2});
  tables.bias_ids = {5, 2500, -3, 5000};
  tables.biases = {4, 9, 1, 1};
  tables.breakers = {3};
  tables.masks.assign(94 * 2, 0xAAAAAAAA);
  std::vector<RowParams> rows(6);
  for (RowParams& row : rows) {
    row.temperature = 0;
    row.history_end = static_cast<std::int32_t>(tables.history.size());
    row.num_logprobs = 20;
    row.processed_logprobs = 1;
  }
  rows[0].bias_end = 4;
  rows[1].mask_row = 1;
  rows[2].repetition_penalty = 1.7f;
  rows[3].frequency_penalty = 0.6f;
  rows[3].presence_penalty = 0.3f;
  rows[3].output_begin = 20;
  rows[4].dry_multiplier = 0.8f;
  rows[5] = rows[3];
  rows[5].bias_end = 4;
  rows[5].mask_row = 0;
  rows[5].repetition_penalty = 0.8f;
  rows[5].dry_multiplier = 1.5f;
  rows[5].dry_allowed_length = 1;
  rows[5].dry_begin = 3;
  rows[5].breakers_end = 1;
  check_rows<HostBfloat16>(normal(rows.size() * 3000, 2, 0), rows, tables);
}

TEST(invalid_rows_give_no_token) {
  std::vector<RowParams> rows(4);
  rows[1].num_logprobs = 3;
  rows[2].temperature = 0;
  Floats logits = normal(400, 1, 0);
  logits[50] = logits[299] = std::numeric_limits<float>::quiet_NaN();
  logits[150] = std::numeric_limits<float>::infinity();
  std::fill(logits.begin() + 300, logits.end(), -std::numeric_limits<float>::infinity());
  check_rows<float>(logits, rows, {});
}

}  // namespace
