// The inner loop of every direct convolution: some filters times some vectors of consecutive positions.
#pragma once

#include "convolution.h"
#include "vector.h"

namespace decouplify::DECOUPLIFY_ISA {

DECOUPLIFY_INLINE constexpr int smaller(int a, int b) { return a < b ? a : b; }
// Where part i of n tasks in `parts` parts starts: 32 filters in 6 parts are 5 or 6 each, never five times 6 and a 2.
DECOUPLIFY_INLINE int part(int n, int parts, int i) { return static_cast<int>(int64_t{n} * i / parts); }
DECOUPLIFY_INLINE constexpr int divide_up(int n, int by) { return (n + by - 1) / by; }

DECOUPLIFY_INLINE Vec sigmoid(Vec x) { return splat(1.0f) / (exponential(-x) + 1.0f); }

// erf after Numerical Recipes (3rd ed., section 6.2.2, the Chebyshev fit with 1.2e-7 relative error in erfc).
DECOUPLIFY_INLINE Vec erf_of(Vec x) {
  const Vec z = x < Vec{} ? -x : x;
  const Vec t = splat(1.0f) / (z * 0.5f + 1.0f);
  constexpr float kFit[] = {0.17087277f,  -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                            -0.18628806f, 0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
  Vec p = splat(kFit[0]);
  for (int i = 1; i < 10; ++i) p = p * t + kFit[i];
  const Vec erfc = t * exponential(p - z * z);
  const Vec y = splat(1.0f) - erfc;
  return x < Vec{} ? -y : y;
}

// Never inlined: next to these functions a call is cheap, and every tile would hold a copy of all of them.
__attribute__((noinline)) static Vec activate_other(Vec x, const Activation& activation) {
  switch (activation.kind) {
    case ActivationKind::kSilu: return x * sigmoid(x);
    case ActivationKind::kHardswish: return x * at_most(at_least(x + 3.0f, Vec{}), splat(6.0f)) * (1.0f / 6.0f);
    case ActivationKind::kGelu: return x * 0.5f * (erf_of(x * 0.70710678f) + 1.0f);
    // 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), where (1 + tanh(u)) / 2 is the sigmoid of 2 u.
    case ActivationKind::kGeluTanh: return x * sigmoid((x + x * x * x * 0.044715f) * 1.59576912f);
    case ActivationKind::kSigmoid: return sigmoid(x);
    case ActivationKind::kLeaky: return x < Vec{} ? x * activation.low : x;
    case ActivationKind::kClamp: break;
  }
  return x;
}

// Calls f(activate) with a function of one vector. A clamp's bounds stay in registers, which loads between stores that
// the compiler must take for changes of the bounds would not.
template <class F>
DECOUPLIFY_INLINE void with_activation(const Activation& activation, F&& f) {
  if (activation.kind == ActivationKind::kClamp) {
    const Vec low = splat(activation.low), high = splat(activation.high);
    f([=](Vec x) DECOUPLIFY_INLINE_LAMBDA { return at_most(at_least(x, low), high); });
  } else {
    f([&](Vec x) DECOUPLIFY_INLINE_LAMBDA { return activate_other(x, activation); });
  }
}

DECOUPLIFY_INLINE Vec activate(Vec x, const Activation& activation) {
  if (activation.kind != ActivationKind::kClamp) return activate_other(x, activation);
  return at_most(at_least(x, splat(activation.low)), splat(activation.high));
}

// Memory that is fetched by and by, a little with every channel of a tile: a core can wait for few lines at a time.
struct Stream {
  const char* at;
  int64_t step;  // bytes per channel

  void DECOUPLIFY_INLINE_MEMBER fetch(int n_channels) {
    const char* const end = at + n_channels * step;
#pragma GCC unroll 1
    for (const char* line = at; line < end; line += 64) __builtin_prefetch(line, 0, 2);
    at = end;
  }
};

DECOUPLIFY_INLINE Stream nothing_ahead(const float* anything) { return {reinterpret_cast<const char*>(anything), 0}; }

// Part i of n of what comes next, for a tile of some channels.
DECOUPLIFY_INLINE Stream stream_of(const Ahead& ahead, int i, int n, int n_channels) {
  constexpr int64_t kLine = 64;
  const int64_t total = ahead.n_lines[0] + ahead.n_lines[1];
  int64_t first = total * i / n, end = total * (i + 1) / n;
  const int region = first >= ahead.n_lines[0];
  if (region == 0 && end > ahead.n_lines[0]) end = ahead.n_lines[0];
  if (region == 1) first -= ahead.n_lines[0], end -= ahead.n_lines[0];
  const auto* start = reinterpret_cast<const char*>(ahead.region[region]);
  return {start + first * kLine, ((end - first) * kLine + n_channels) / (n_channels + 1)};
}

// The same at once, where a loop has no time for it.
DECOUPLIFY_INLINE void fetch_part(const Ahead& ahead, int i, int n) {
  constexpr int64_t kFloats = 64 / sizeof(float);
  for (int r = 0; r < 2; ++r) {
    const int64_t end = ahead.n_lines[r] * (i + 1) / n;
    for (int64_t line = ahead.n_lines[r] * i / n; line < end; ++line) {
      __builtin_prefetch(ahead.region[r] + line * kFloats, 0, 2);
    }
  }
}

// Outputs are rarely in the cache; a store waits for its line, unless that was asked for long before.
constexpr int kFloatsPerLine = 16, kVectorsPerLine = divide_up(kFloatsPerLine, kLanes);
DECOUPLIFY_INLINE void fetch_to_write(const float* first, int64_t n_floats) {
  for (int64_t i = 0; i < n_floats; i += kFloatsPerLine) __builtin_prefetch(first + i, 1);
}

// Nothing foresees the way from plane to plane. How many channels before its own turn a plane of n floats is asked for,
// which is some kilobytes ahead.
DECOUPLIFY_INLINE int planes_ahead(int64_t n_floats) { return 1 + static_cast<int>(512 / (n_floats + 1)); }
DECOUPLIFY_INLINE void fetch_to_read(const float* first, int64_t n_floats) {
  for (int64_t i = 0; i < n_floats; i += kFloatsPerLine) __builtin_prefetch(first + i);
}

// Where the inputs of a channel are, and where its weights start in a filter's row. Behind the last channel of a list
// come kChannelsAhead more places, whose inputs will be wanted after its own.
struct Place {
  int64_t offset, column;
};
constexpr int kChannelsAhead = 32;

// With short vectors, every tap of a channel counts as a channel of a 1x1 convolution: what tiles copy is then side by
// side, which is worth more than what the offsets of taps have in common.
constexpr bool kTapsAreChannels = kLanes <= 8;

// Variants of tiles that make the library longer, where they were measured to pay: those that fetch by and by what comes
// next, and those that know weights to be in order.
constexpr bool kTilesFetch = kLanes >= 8, kOrderMatters = kLanes == 8;

// What all tiles read, at position 0: x + place[c].offset + tap[t] is the first input of channel c. Inputs of one tap may
// lie side by side instead, those of channel c at x + c * kTileFloats; then n_taps is kSideBySide, or kInOrder if weights
// of consecutive channels are side by side as well. Where it is kCopies, a tile puts what it reads side by side for
// others, at `copy`.
constexpr int kSideBySide = -1, kCopies = -2, kInOrder = -3, kTileFloats = kTileVectors * kLanes;
struct TileInput {
  const float* x;
  const Place* place;
  int n_channels;
  const int64_t* tap;
  int n_taps;
  float* copy = nullptr;
};

// The positions of one tile.
struct TileAt {
  int64_t first;
  bool fetches;  // whether weights of the next filters, and what comes after them, are fetched meanwhile (1x1 only)
  bool is_near;  // whether the output is in the cache
  Stream ahead;
};

// Where what one filter computes goes, at position 0.
struct TileOutput {
  const float* weight;
  const float* next_weight;  // of a filter that will be wanted soon
  float* out;
  const float* residual;  // or null
  float* partial_sum;     // one vector, or null
  float bias;
};

// out = activation(acc + residual) on pixels and zero on border positions. Sums start from the bias.
template <int NV, class Activate>
DECOUPLIFY_INLINE void finish_row(const Vec (&acc)[NV], const TileOutput& to, int64_t at, const int32_t* mask,
                                  const Activate& activate) {
  Vec total{};
  // Copies, for the compiler must take a store for a change of what `to` holds.
  const float* const residual = to.residual;
  float* const out = to.out;
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v, at += kLanes) {
    Vec y = acc[v];
    if (residual != nullptr) y += load(residual + at);
    y = keep(activate(y), (Mask)load(reinterpret_cast<const float*>(mask) + at));
    total += y;
    store(out + at, y);
  }
  if (to.partial_sum != nullptr) store(to.partial_sum, load(to.partial_sum) + total);
}

// Rows with another activation than a clamp. Not part of every tile, which are many, and these functions long.
template <int NV>
__attribute__((noinline)) static void finish_rows_otherwise(const Vec (*acc)[NV], int n_rows, const TileOutput* to,
                                                            int64_t at, const int32_t* mask,
                                                            const Activation& activation) {
  const auto activate = [&](Vec x) DECOUPLIFY_INLINE_LAMBDA { return activate_other(x, activation); };
  for (int n = 0; n < n_rows; ++n) finish_row<NV>(acc[n], to[n], at, mask, activate);
}

// Products that are added up one after another. Longer sums are sums of such sums, which lose fewer digits.
constexpr int kLongestSum = 256;

// Where a tile is among its channels.
struct TileProgress {
  int channel;
  Stream ahead;
};

// How many channels a tile computes between two looks at what to fetch meanwhile; looking takes instructions, too.
constexpr int kChannelsAtOnce = 8;

// How many channels are computed between two checks for the end. Where another thread shares the core, it takes every
// second chance to issue instructions, and every instruction that is not a product makes the sums wait.
constexpr int kUnrolled = kLanes == 8 ? 4 : 1;
using Unrolled = std::integral_constant<int, kUnrolled>;
using One = std::integral_constant<int, 1>;

// f(0), f(1) and so on, written out.
template <class F, int... I>
DECOUPLIFY_INLINE void for_each(const F& f, std::integer_sequence<int, I...>) {
  (f(I), ...);
}
template <int N, class F>
DECOUPLIFY_INLINE void for_each_below(std::integral_constant<int, N>, const F& f) {
  for_each(f, std::make_integer_sequence<int, N>{});
}

// The part of all rows that a tile of so many channels fetches at once, times 2^16; a division, which takes time.
DECOUPLIFY_INLINE uint32_t part_per_fetch(int n_channels) { return (1u << 16) / (n_channels / kChannelsAtOnce + 1); }

// N rows of memory that are fetched while a tile is computed, a little with every few channels: line after line and row
// after row, for the hardware runs ahead of whoever reads in order.
template <int N, bool TO_WRITE>
struct RowsAhead {
  // Weights of half of the channels, side by side, are so many lines in as many channels; outputs are fewer.
  static constexpr int kLines = TO_WRITE ? 1 : divide_up(N * 2 * kChannelsAtOnce, kFloatsPerLine);
  const float* row[N];
  uint32_t step;    // rows per fetch, times 2^16
  uint32_t at;      // rows so far, times 2^16
  uint32_t length;  // floats of a row

  RowsAhead(int channel, uint32_t part_per_fetch, int64_t length)
      : step(N * part_per_fetch),
        at(channel / kChannelsAtOnce * step),
        length(length) {
    hide(at);  // GCC 12 (its -ftree-pre) would fetch from the first row alone
  }

  // What is due with the next kChannelsAtOnce.
  void DECOUPLIFY_INLINE_MEMBER fetch() {
    const float* next = row[at >> 16] + ((at & 0xffff) * length >> 16);
#pragma GCC unroll 8
    for (int i = 0; i < kLines; ++i) {
      const float* line = next + i * kFloatsPerLine;
      TO_WRITE ? __builtin_prefetch(line, 1) : __builtin_prefetch(line, 0, 2);
    }
    at += step;
  }
};

template <int TAPS>
constexpr bool kIsSideBySide = TAPS == kSideBySide || TAPS == kInOrder;
template <int TAPS>
constexpr bool kIsPointwise = TAPS == 1 || kIsSideBySide<TAPS> || TAPS == kCopies;

// acc[filter][vector] += the products of channels up to `end`. FETCH: see TileAt::fetches; it takes time, which only
// weights that are not in the cache are worth.
template <int TAPS, bool FETCH, int NB, int NV>
DECOUPLIFY_INLINE void add_channels(const TileInput& in, const TileOutput* to, int64_t at, int end,
                                    TileProgress& progress, Vec (&acc)[NB][NV]) {
  const float* weight[NB];
#pragma GCC unroll 8
  for (int n = 0; n < NB; ++n) weight[n] = to[n].weight;
  const int64_t length = FETCH && end > 0 ? in.place[in.n_channels - 1].column + 1 : 0;
  RowsAhead<NB, false> next_rows(progress.channel, FETCH ? part_per_fetch(in.n_channels) : 0, length);
  if (FETCH) {
#pragma GCC unroll 8
    for (int n = 0; n < NB; ++n) next_rows.row[n] = to[n].next_weight;
  }
  const int n_taps = kIsPointwise<TAPS> ? 1 : TAPS > 0 ? TAPS : in.n_taps;
  const float* first = in.x + at + (TAPS == 1 || TAPS == kCopies ? in.tap[0] : 0);
  const float* next = first + int64_t{progress.channel} * kTileFloats;
  float* copy = TAPS == kCopies ? in.copy + at + int64_t{progress.channel} * kTileFloats : nullptr;
  Stream ahead = progress.ahead;
  const Place* place = in.place + progress.channel;
  const Place* const last = in.place + end;
  int64_t first_column = TAPS == kInOrder && end > 0 ? place->column : 0;
  const auto add_one = [&](int i) DECOUPLIFY_INLINE_LAMBDA {
    const Place* const here = place + i;
    const float* x0 = kIsSideBySide<TAPS> ? next + i * kTileFloats : first + here->offset;
    const int64_t column = TAPS == kInOrder ? first_column + i : here->column;
    if (TAPS == 9) {
      // The hardware does not foresee the jumps from filter to filter; one channel ahead hides them.
      const int64_t following = here[here + 1 < in.place + in.n_channels].column;
#pragma GCC unroll 8
      for (int n = 0; n < NB; ++n) __builtin_prefetch(weight[n] + following);
    }
    if (TAPS == kCopies) {
      // Nor the way from plane to plane. The vectors of a tile lie in as many lines as are asked for.
      const float* soon = first + here[kChannelsAhead].offset;
#pragma GCC unroll 8
      for (int v = 0; v < NV; v += kVectorsPerLine) __builtin_prefetch(soon + v * kLanes);
    }
#pragma GCC unroll 9
    for (int t = 0; t < n_taps; ++t) {
      const float* x = kIsPointwise<TAPS> ? x0 : x0 + in.tap[t];
      if (TAPS == 1 || TAPS == kCopies) hide(x);
      Vec value[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) value[v] = load(x + v * kLanes);
      if (TAPS == kCopies) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) store(copy + i * kTileFloats + v * kLanes, value[v]);
      }
#pragma GCC unroll 8
      for (int n = 0; n < NB; ++n) {
        const Vec w = splat(weight[n][column + t]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) add_product(acc[n][v], w, value[v]);
      }
    }
  };
  const auto add_next = [&](auto n) DECOUPLIFY_INLINE_LAMBDA {
    for_each_below(n, add_one);
    place += n, next += n * kTileFloats, first_column += n;
    if (TAPS == kCopies) copy += n * kTileFloats;
  };
  while (FETCH && last - place >= kChannelsAtOnce) {
    next_rows.fetch();
    ahead.fetch(kChannelsAtOnce);
#pragma GCC unroll 1
    for (int i = 0; i < kChannelsAtOnce / kUnrolled; ++i) add_next(Unrolled{});
  }
  while (kIsPointwise<TAPS> && last - place >= kUnrolled) add_next(Unrolled{});
  while (place < last) add_next(One{});
  progress = {end, ahead};
}

// The same for a part of a long sum. Never inlined: two sets of sums do not fit the registers, and moving them about
// would take short sums as long as a dozen channels.
template <int TAPS, bool FETCH, int NB, int NV>
__attribute__((noinline)) static void add_part(const TileInput& in, const TileOutput* to, int64_t at, int end,
                                               TileProgress& progress, Vec (&total)[NB][NV]) {
  Vec acc[NB][NV] = {};
  add_channels<TAPS, FETCH>(in, to, at, end, progress, acc);
#pragma GCC unroll 8
  for (int n = 0; n < NB; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) total[n][v] += acc[n][v];
  }
}

// TAPS is the number of taps per channel, 0 for a number known at run time only, or kSideBySide, kInOrder or kCopies.
template <int TAPS, bool FETCH, int NB, int NV>
static void run_tile(const TileInput& in, const TileOutput* to, const TileAt& tile, const int32_t* mask,
                     const Activation& activation) {
  Vec acc[NB][NV];
#pragma GCC unroll 8
  for (int n = 0; n < NB; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[n][v] = splat(to[n].bias);
  }
  // With few channels the sums are done before a line has come.
  if (!tile.is_near && (kIsPointwise<TAPS> || in.n_channels < 4)) {
#pragma GCC unroll 8
    for (int n = 0; n < NB; ++n) {
      const float* out = (to[n].residual ? to[n].residual : to[n].out) + tile.first;
#pragma GCC unroll 8
      for (int v = 0; v < NV; v += kVectorsPerLine) __builtin_prefetch(out + v * kLanes, 1);
      if ((NV - 1) % kVectorsPerLine != 0) __builtin_prefetch(out + (NV - 1) * kLanes, 1);
    }
  }
  const int n_at_once = kIsPointwise<TAPS> ? kLongestSum : TAPS > 0 ? kLongestSum / TAPS : 1 + kLongestSum / in.n_taps;
  TileProgress progress{0, tile.ahead};
  add_channels<TAPS, FETCH>(in, to, tile.first, smaller(in.n_channels, n_at_once), progress, acc);
  if (in.n_channels > n_at_once) {
    Vec total[NB][NV];
    memcpy(total, acc, sizeof(acc));
    while (progress.channel < in.n_channels) {
      const int end = smaller(in.n_channels, progress.channel + n_at_once);
      add_part<TAPS, FETCH>(in, to, tile.first, end, progress, total);
    }
    memcpy(acc, total, sizeof(acc));
  }
  if (activation.kind != ActivationKind::kClamp) {
    Vec total[NB][NV];
    memcpy(total, acc, sizeof(acc));
    return finish_rows_otherwise<NV>(total, NB, to, tile.first, mask, activation);
  }
  const Vec low = splat(activation.low), high = splat(activation.high);
#pragma GCC unroll 8
  for (int n = 0; n < NB; ++n) {
    finish_row<NV>(acc[n], to[n], tile.first, mask,
                   [=](Vec x) DECOUPLIFY_INLINE_LAMBDA { return at_most(at_least(x, low), high); });
  }
}

using TileFunction = void (*)(const TileInput&, const TileOutput*, const TileAt&, const int32_t* mask,
                              const Activation&);

template <int TAPS, bool FETCH, int NB, int... V>
constexpr TileFunction tile_for(int n_vectors, std::integer_sequence<int, V...>) {
  const TileFunction functions[] = {run_tile<TAPS, FETCH, NB, V + 1>...};
  return functions[n_vectors - 1];
}

template <int TAPS, bool FETCH, int... B>
static TileFunction tile_for(int n_filters, int n_vectors, std::integer_sequence<int, B...>) {
  using Vectors = std::make_integer_sequence<int, kTileVectors>;
  using Choose = TileFunction (*)(int);
  // Full tiles are most of all; for the others what is known of the order of weights is left unused.
  static constexpr Choose functions[] = {[](int v) {
    return tile_for<TAPS == kInOrder && B + 1 < kTileFilters ? kSideBySide : TAPS, FETCH, B + 1>(v, Vectors{});
  }...};
  return functions[n_filters - 1](n_vectors);
}

// Whether such tiles fetch by and by; copies are made by the first filters only.
DECOUPLIFY_INLINE constexpr bool can_fetch(int n_taps) {
  return kTilesFetch && (n_taps == 1 || n_taps == kSideBySide || n_taps == kInOrder);
}

template <int TAPS>
static TileFunction tile_for(bool fetches, int n_filters, int n_vectors) {
  using Filters = std::make_integer_sequence<int, kTileFilters>;
  constexpr bool kFetches = can_fetch(TAPS);
  if (kFetches && fetches) return tile_for<TAPS, kFetches>(n_filters, n_vectors, Filters{});
  return tile_for<TAPS, false>(n_filters, n_vectors, Filters{});
}

// The tile for 1 <= n_filters <= kTileFilters and 1 <= n_vectors <= kTileVectors.
static TileFunction tile_for(int n_taps, bool fetches, int n_filters, int n_vectors) {
  if constexpr (kTapsAreChannels) {
    constexpr int kOrder = kOrderMatters ? kInOrder : kSideBySide;
    if (n_taps == kOrder) return tile_for<kOrder>(fetches, n_filters, n_vectors);
    if (n_taps == kSideBySide) return tile_for<kSideBySide>(fetches, n_filters, n_vectors);
    if (n_taps == kCopies) return tile_for<kCopies>(fetches, n_filters, n_vectors);
  } else {
    if (n_taps == 9) return tile_for<9>(fetches, n_filters, n_vectors);
    if (n_taps > 1) return tile_for<0>(fetches, n_filters, n_vectors);
  }
  return tile_for<1>(fetches, n_filters, n_vectors);
}

}  // namespace decouplify::DECOUPLIFY_ISA
