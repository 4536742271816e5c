// Sums over channels from packed operands: the inner loop of Winograd and of packed convolutions.
#pragma once

#include "tile.h"

namespace decouplify::DECOUPLIFY_ISA {

// Fewer vectors leave registers for more filters than a full tile has.
constexpr int kMostFilters = kTileVectors == 4 ? 8 : 6;
DECOUPLIFY_INLINE int filters_at_once(int n_vectors) { return n_vectors < kTileVectors ? kMostFilters : kTileFilters; }

// The operands of one tile.
struct Factors {
  const float* x;                    // (channels, vectors)
  const int32_t* columns;            // of each channel, its place in a filter's weights
  const float* const* weights;       // per filter
  int64_t first;                     // where in all of them to begin
  int n_channels;
  uint32_t part_per_fetch;           // of so many channels
};

// What is fetched meanwhile.
struct Meanwhile {
  const float* const* next_weights;  // rows of the filters that come next, as many as there are filters
  int64_t next_first;                // where in all of them to begin
  Stream stream;
  const float* const* outputs = nullptr;  // packed convolutions: per filter, where its sums will go
  int64_t n_outputs = 0;                  // floats of each
};

// acc[filter][vector] += the products of channels up to `end`. IN_ORDER: whether their columns are consecutive.
template <int NB, int NV, bool FETCH, bool OUTPUTS, bool IN_ORDER>
DECOUPLIFY_INLINE void add_products(const Factors& factors, const Meanwhile& meanwhile, int end, TileProgress& progress,
                                    Vec (&acc)[NB][NV]) {
  const float* weight[NB];
#pragma GCC unroll 8
  for (int n = 0; n < NB; ++n) weight[n] = factors.weights[n] + factors.first;
  const float* x = factors.x + int64_t{progress.channel} * NV * kLanes;
  const int32_t* columns = factors.columns + progress.channel;
  const int length = end > 0 ? factors.columns[factors.n_channels - 1] + 1 : 0;
  RowsAhead<NB, false> next_rows(progress.channel, factors.part_per_fetch, length);
  RowsAhead<NB, true> outputs(progress.channel, factors.part_per_fetch, meanwhile.n_outputs);
  if (FETCH) {
#pragma GCC unroll 8
    for (int n = 0; n < NB; ++n) next_rows.row[n] = meanwhile.next_weights[n] + meanwhile.next_first;
    if (OUTPUTS) memcpy(outputs.row, meanwhile.outputs, NB * sizeof(float*));
  }
  Stream ahead = progress.ahead;
  const int32_t* const last = factors.columns + end;
  int64_t first_column = IN_ORDER && end > 0 ? columns[0] : 0;
  const auto add_one = [&](int channel) DECOUPLIFY_INLINE_LAMBDA {
    const int64_t column = IN_ORDER ? first_column + channel : columns[channel];
    const float* first = x + channel * NV * kLanes;
    Vec value[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) value[v] = load(first + v * kLanes);
#pragma GCC unroll 8
    for (int n = 0; n < NB; ++n) {
      const Vec w = splat(weight[n][column]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) add_product(acc[n][v], w, value[v]);
    }
  };
  const auto add_next = [&](auto n) DECOUPLIFY_INLINE_LAMBDA {
    for_each_below(n, add_one);
    columns += n, x += n * NV * kLanes, first_column += n;
  };
  while (FETCH && last - columns >= kChannelsAtOnce) {
    next_rows.fetch();
    if (OUTPUTS) outputs.fetch();
    ahead.fetch(kChannelsAtOnce);
#pragma GCC unroll 1
    for (int i = 0; i < kChannelsAtOnce / kUnrolled; ++i) add_next(Unrolled{});
  }
  while (last - columns >= kUnrolled) add_next(Unrolled{});
  while (columns < last) add_next(One{});
  progress = {end, ahead};
}

// The same for a part of a long sum, added to `products`; see add_part.
template <int NB, int NV, bool FETCH, bool IN_ORDER>
__attribute__((noinline)) static void add_part_of_products(const Factors& factors, const Meanwhile& meanwhile, int end,
                                                           TileProgress& progress, float* products, int64_t stride) {
  Vec acc[NB][NV] = {};
  add_products<NB, NV, FETCH, true, IN_ORDER>(factors, meanwhile, end, progress, acc);
#pragma GCC unroll 8
  for (int n = 0; n < NB; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      float* p = products + n * stride + v * kLanes;
      store(p, load(p) + acc[n][v]);
    }
  }
}

// products[filter][vector] = sum over channels of weight[filter][column[c]] * x[c][vector]. FETCH: whether anything is
// fetched meanwhile. SPLIT: whether long sums are sums of sums, as in packed convolutions.
template <int NB, int NV, bool FETCH, bool SPLIT, bool IN_ORDER>
static void multiply(const Factors& factors, const Meanwhile& meanwhile, float* products, int64_t stride) {
  const int n_channels = factors.n_channels;
  TileProgress progress{0, meanwhile.stream};
  const int n_at_once = SPLIT ? kLongestSum : n_channels;
  Vec acc[NB][NV] = {};
  add_products<NB, NV, FETCH, SPLIT, IN_ORDER>(factors, meanwhile, smaller(n_channels, n_at_once), progress, acc);
#pragma GCC unroll 8
  for (int n = 0; n < NB; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(products + n * stride + v * kLanes, acc[n][v]);
  }
  while (SPLIT && progress.channel < n_channels) {
    const int end = smaller(n_channels, progress.channel + n_at_once);
    add_part_of_products<NB, NV, FETCH, IN_ORDER>(factors, meanwhile, end, progress, products, stride);
  }
}

using MultiplyFunction = void (*)(const Factors&, const Meanwhile&, float*, int64_t);

// Whether a list of columns is without gaps.
DECOUPLIFY_INLINE bool are_in_order(const int32_t* columns, int n) {
  return n > 0 && columns[n - 1] - columns[0] == n - 1;
}

template <bool FETCH, bool SPLIT, bool IN_ORDER, int NB, int... V>
static MultiplyFunction multiply_for(int n_vectors, std::integer_sequence<int, V...>) {
  static constexpr MultiplyFunction functions[] = {multiply<NB, V + 1, FETCH, SPLIT, IN_ORDER>...};
  return functions[n_vectors - 1];
}

template <bool FETCH, bool SPLIT, bool IN_ORDER, int... B>
static MultiplyFunction multiply_for(int n_filters, int n_vectors, std::integer_sequence<int, B...>) {
  // More filters than a full tile has come with fewer vectors only.
  using Full = std::make_integer_sequence<int, kTileVectors>;
  using Fewer = std::make_integer_sequence<int, kTileVectors - 1>;
  using Choose = MultiplyFunction (*)(int);
  static constexpr Choose functions[] = {[](int v) {
    return multiply_for<FETCH, SPLIT, IN_ORDER && (B + 1 >= kTileFilters), B + 1>(
        v, std::conditional_t<(B < kTileFilters), Full, Fewer>{});
  }...};
  return functions[n_filters - 1](n_vectors);
}

// For 1 <= n_filters <= filters_at_once(n_vectors). SPLIT: for packed convolutions.
template <bool SPLIT>
static MultiplyFunction multiply_for(bool fetches, bool in_order, int n_filters, int n_vectors) {
  using Filters = std::make_integer_sequence<int, kMostFilters>;
  constexpr bool kFetches = kTilesFetch, kInOrder = kOrderMatters;
  if (fetches && in_order) return multiply_for<kFetches, SPLIT, kInOrder>(n_filters, n_vectors, Filters{});
  if (fetches) return multiply_for<kFetches, SPLIT, false>(n_filters, n_vectors, Filters{});
  if (in_order) return multiply_for<false, SPLIT, kInOrder>(n_filters, n_vectors, Filters{});
  return multiply_for<false, SPLIT, false>(n_filters, n_vectors, Filters{});
}

}  // namespace decouplify::DECOUPLIFY_ISA
