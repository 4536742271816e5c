// Linear layers on one vector of features.
#pragma once

#include "direct.h"

namespace decouplify::DECOUPLIFY_ISA {

// Rows of the weight that are added up in one pass over the outputs.
constexpr int kRowsAtOnce = 8;
// Outputs whose partial sums are kept at a time; see kLongestSum.
constexpr int kOutputsAtOnce = 1024;

// y += sum of x[i] * row[i] over a few rows, n a whole number of vectors plus a rest.
static void add_rows(const float* const* rows, const float* x, int n_rows, float* y, int begin, int end) {
  const float* row[kRowsAtOnce];
  Vec factor[kRowsAtOnce];
  for (int i = 0; i < kRowsAtOnce; ++i) {
    row[i] = rows[i < n_rows ? i : 0];
    factor[i] = splat(i < n_rows ? x[i] : 0.0f);
  }
  int k = begin;
  for (; k + kLanes <= end; k += kLanes) {
    Vec total = load(y + k);
#pragma GCC unroll 8
    for (int i = 0; i < kRowsAtOnce; ++i) total += factor[i] * load(row[i] + k);
    store(y + k, total);
  }
  for (; k < end; ++k) {
    for (int i = 0; i < n_rows; ++i) y[k] += x[i] * row[i][k];
  }
}

static void project(const float* weight, const float* bias, const float* x, int n_inputs, const int32_t* filters,
                    int n_filters, float* y) {
  for (int i = 0; i < n_filters; ++i) {
    const int f = filters[i];
    y[f] = bias[f] + dot(weight + int64_t{f} * n_inputs, x, n_inputs);
  }
}

// y += the products of inputs [first, last), of which those that are zero cost nothing.
static void add_inputs(const float* weight, const float* x, int first, int last, float* y, int n_outputs, int begin,
                       int end) {
  const float* rows[kRowsAtOnce];
  float values[kRowsAtOnce];
  int n = 0;
  for (int i = first; i < last; ++i) {
    if (x[i] == 0.0f) continue;
    rows[n] = weight + int64_t{i} * n_outputs;
    values[n++] = x[i];
    if (n == kRowsAtOnce) add_rows(rows, values, n, y, begin, end), n = 0;
  }
  if (n > 0) add_rows(rows, values, n, y, begin, end);
}

static void linear_range(const float* weight, const float* bias, const float* x, int n_inputs, float* y, int n_outputs,
                         const Activation& activation, int begin, int end) {
  memcpy(y + begin, bias + begin, (end - begin) * sizeof(float));
  if (n_inputs <= kLongestSum) {
    add_inputs(weight, x, 0, n_inputs, y, n_outputs, begin, end);
  } else {
    alignas(64) float part[kOutputsAtOnce];
    for (int from = begin; from < end; from += kOutputsAtOnce) {
      const int to = smaller(end, from + kOutputsAtOnce);
      for (int i = 0; i < n_inputs; i += kLongestSum) {
        memset(part, 0, (to - from) * sizeof(float));
        add_inputs(weight + from, x, i, smaller(n_inputs, i + kLongestSum), part, n_outputs, 0, to - from);
        for (int k = from; k < to; ++k) y[k] += part[k - from];
      }
    }
  }
  int k = begin;
  for (; k + kLanes <= end; k += kLanes) store(y + k, activate(load(y + k), activation));
  for (; k < end; ++k) y[k] = activate(splat(y[k]), activation)[0];
}

static void linear(const float* weight, const float* bias, const float* x, int n_inputs, float* y, int n_outputs,
                   Activation activation, int n_threads) {
  // Below this a loop is over before the other threads have heard of it.
  const int threads = int64_t{n_inputs} * n_outputs < (1 << 17) ? 1 : n_threads;
  const int n_parts = smaller(threads, divide_up(n_outputs, kLanes));
  parallel(threads, n_parts, [&](const Share& share) {
    const int n_vectors = divide_up(n_outputs, kLanes);
    const int from = part(n_vectors, n_parts, share.begin) * kLanes;
    linear_range(weight, bias, x, n_inputs, y, n_outputs, activation, from,
                 smaller(n_outputs, part(n_vectors, n_parts, share.end) * kLanes));
  });
}

}  // namespace decouplify::DECOUPLIFY_ISA
