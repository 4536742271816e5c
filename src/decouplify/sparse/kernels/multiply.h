// Sums over channels from packed operands: the inner loop of Winograd and of packed convolutions.
#pragma once

#include "tile.h"

namespace decouplify::DECOUPLIFY_ISA {

// Three vectors leave registers for more filters than a full tile has.
constexpr int kMostFilters = kTileVectors == 4 ? 8 : kTileFilters;
DECOUPLIFY_INLINE int filters_at_once(int n_vectors) { return n_vectors < 4 ? kMostFilters : kTileFilters; }

// The operands of one tile.
struct Factors {
  const float* x;                    // (channels, vectors)
  const int32_t* columns;            // of each channel, its place in a filter's weights
  const float* const* weights;       // per filter
  const float* const* next_weights;  // kTurns rows of the filters that come next, or null
  int n_channels;
};

// acc[filter][vector] += the products of channels up to `end`.
template <int NB, int NV, bool FETCH>
DECOUPLIFY_INLINE void add_products(const Factors& factors, int end, TileProgress& progress, Vec (&acc)[NB][NV]) {
  const float* weight[NB];
#pragma GCC unroll 8
  for (int n = 0; n < NB; ++n) weight[n] = factors.weights[n];
  const float* x = factors.x + int64_t{progress.channel} * NV * kLanes;
  const int32_t* columns = factors.columns + progress.channel;
  NextRows next_rows(NB, factors.n_channels, factors.columns[factors.n_channels - 1] + 1);
  if (FETCH) memcpy(next_rows.row, factors.next_weights, sizeof(next_rows.row));
  Stream ahead = progress.ahead;
  for (int c = progress.channel; c < end; ++c, ++columns, x += NV * kLanes) {
    const int64_t column = *columns;
    if (FETCH) {
      next_rows.fetch(c);
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
  progress = {end, ahead};
}

// The same for a part of a long sum, added to `products`; see add_part.
template <int NB, int NV, bool FETCH>
__attribute__((noinline)) static void add_part_of_products(const Factors& factors, int end, TileProgress& progress,
                                                           float* products, int64_t stride) {
  Vec acc[NB][NV] = {};
  add_products<NB, NV, FETCH>(factors, end, progress, acc);
#pragma GCC unroll 8
  for (int n = 0; n < NB; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      float* p = products + n * stride + v * kLanes;
      store(p, load(p) + acc[n][v]);
    }
  }
}

// products[filter][vector] = sum over channels of weight[filter][column[c]] * x[c][vector]. FETCH: whether the rows of
// next_weights, and what the stream brings, are fetched meanwhile. SPLIT: whether long sums are sums of sums.
template <int NB, int NV, bool FETCH, bool SPLIT>
static void multiply(const float* x, const int32_t* columns, int n_channels, const float* const* weights,
                     const float* const* next_weights, Stream ahead, float* products, int64_t stride) {
  const Factors factors{x, columns, weights, next_weights, n_channels};
  TileProgress progress{0, ahead};
  const int n_at_once = SPLIT ? kLongestSum : n_channels;
  Vec acc[NB][NV] = {};
  add_products<NB, NV, FETCH>(factors, smaller(n_channels, n_at_once), progress, acc);
#pragma GCC unroll 8
  for (int n = 0; n < NB; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(products + n * stride + v * kLanes, acc[n][v]);
  }
  while (SPLIT && progress.channel < n_channels) {
    const int end = smaller(n_channels, progress.channel + n_at_once);
    add_part_of_products<NB, NV, FETCH>(factors, end, progress, products, stride);
  }
}

using MultiplyFunction = void (*)(const float*, const int32_t*, int, const float* const*, const float* const*, Stream,
                                  float*, int64_t);

template <bool FETCH, bool SPLIT, int NB, int... V>
static MultiplyFunction multiply_for(int n_vectors, std::integer_sequence<int, V...>) {
  static constexpr MultiplyFunction functions[] = {multiply<NB, V + 1, FETCH, SPLIT>...};
  return functions[n_vectors - 1];
}

template <bool FETCH, bool SPLIT, int... B>
static MultiplyFunction multiply_for(int n_filters, int n_vectors, std::integer_sequence<int, B...>) {
  // More filters than a full tile has come with fewer vectors only.
  using Full = std::make_integer_sequence<int, kTileVectors>;
  using Fewer = std::make_integer_sequence<int, kTileVectors - 1>;
  using Choose = MultiplyFunction (*)(int);
  static constexpr Choose functions[] = {[](int v) {
    return multiply_for<FETCH, SPLIT, B + 1>(v, std::conditional_t<(B < kTileFilters), Full, Fewer>{});
  }...};
  return functions[n_filters - 1](n_vectors);
}

// For 1 <= n_filters <= filters_at_once(n_vectors).
template <bool FETCH, bool SPLIT>
static MultiplyFunction multiply_for(int n_filters, int n_vectors) {
  return multiply_for<FETCH, SPLIT>(n_filters, n_vectors, std::make_integer_sequence<int, kMostFilters>{});
}

}  // namespace decouplify::DECOUPLIFY_ISA
