// Sums over channels from packed operands: the inner loop of Winograd and of packed convolutions.
#pragma once

#include "tile.h"

namespace decouplify::DECOUPLIFY_ISA {

// Three vectors leave registers for more filters than a full tile has.
constexpr int kMostFilters = kTileVectors == 4 ? 8 : kTileFilters;
DECOUPLIFY_INLINE int filters_at_once(int n_vectors) { return n_vectors < 4 ? kMostFilters : kTileFilters; }

// products[filter][vector] = sum over channels of weight[filter][column[c]] * x[c][vector].
template <int NB, int NV, bool AHEAD>
static void multiply(const float* x, const int32_t* columns, int n_channels, const float* const* weights,
                     const float* const* next_weights, Stream ahead, float* products, int64_t stride) {
  Vec acc[NB][NV];
  const float* weight[NB];
#pragma GCC unroll 8
  for (int n = 0; n < NB; ++n) {
    weight[n] = weights[n];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[n][v] = Vec{};
  }
  const float* const* turn = next_weights;
  Vec total[NB][NV];
  // Winograd rounds more than a sum of its channels does.
  const int n_at_once = AHEAD ? kLongestSum : n_channels;
  if (n_channels > n_at_once) memset(total, 0, sizeof(total));
  for (int c = 0; c < n_channels;) {
    if (c > 0) put_aside(acc, total);
    const int end = smaller(n_channels, c + n_at_once);
    for (; c < end; ++c, x += NV * kLanes) {
      const int64_t column = columns[c];
      // One row per channel: sixteen channels share a line, so each row has its turn.
      if (AHEAD) {
        __builtin_prefetch(*turn + column, 0, 2);
        turn = turn + 1 < next_weights + NB ? turn + 1 : next_weights;
        ahead.fetch();
      }
      Vec value[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) value[v] = load(x + v * kLanes);
#pragma GCC unroll 8
      for (int n = 0; n < NB; ++n) {
        const Vec w = splat(weight[n][column]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[n][v] += w * value[v];
      }
    }
  }
  if (n_channels > n_at_once) {
    put_aside(acc, total);
    memcpy(acc, total, sizeof(acc));
  }
#pragma GCC unroll 8
  for (int n = 0; n < NB; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(products + n * stride + v * kLanes, acc[n][v]);
  }
}

using MultiplyFunction = void (*)(const float*, const int32_t*, int, const float* const*, const float* const*, Stream,
                                  float*, int64_t);

template <bool AHEAD, int NB, int... V>
static MultiplyFunction multiply_for(int n_vectors, std::integer_sequence<int, V...>) {
  static constexpr MultiplyFunction functions[] = {multiply<NB, V + 1, AHEAD>...};
  return functions[n_vectors - 1];
}

template <bool AHEAD, int... B>
static MultiplyFunction multiply_for(int n_filters, int n_vectors, std::integer_sequence<int, B...>) {
  // More filters than a full tile has come with fewer vectors only.
  using Full = std::make_integer_sequence<int, kTileVectors>;
  using Fewer = std::make_integer_sequence<int, kTileVectors - 1>;
  using Choose = MultiplyFunction (*)(int);
  static constexpr Choose functions[] = {[](int v) {
    return multiply_for<AHEAD, B + 1>(v, std::conditional_t<(B < kTileFilters), Full, Fewer>{});
  }...};
  return functions[n_filters - 1](n_vectors);
}

// For 1 <= n_filters <= filters_at_once(n_vectors). AHEAD: whether to fetch the rows of next_weights, and what the stream
// brings, meanwhile.
template <bool AHEAD>
static MultiplyFunction multiply_for(int n_filters, int n_vectors) {
  return multiply_for<AHEAD>(n_filters, n_vectors, std::make_integer_sequence<int, kMostFilters>{});
}

}  // namespace decouplify::DECOUPLIFY_ISA
