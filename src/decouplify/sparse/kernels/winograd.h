// Winograd convolution with run-time lists of filters and channels (Lavin & Gray, 2016): F(m x m, 3 x 3) for stride 1,
// and F(4 x 4, 4 x 4) on the four phases of a convolution with stride 2.
//
// An open filter is a run of rows of the transformed weights (filters, points, channels); an existing channel is one
// index in the innermost loop. So selection happens after the transform, and nothing is packed.
//
// F(4 x 4, 3 x 3) uses the points 0, +-5/8, +-3/2, infinity. The textbook's 0, +-1, +-2 lose four times more accuracy
// at the same cost; ours are exact in binary as well.
#pragma once

#include "direct.h"
#include "multiply.h"

namespace decouplify::DECOUPLIFY_ISA {

// Consecutive pixels of one row, or of two rows half a vector each, where rows are that short.
template <int ROWS>
DECOUPLIFY_INLINE Vec load_run(const float* const* x, int run, int64_t offset) {
  if (ROWS == 1) return load(x[run] + offset);
  return load_halves(x[2 * run] + offset, x[2 * run + 1] + offset);
}

struct Transform2 {
  static constexpr int kTile = 2, kTaps = 3, kPoints = 4;
  static constexpr double kFilter[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};

  // Inputs 0..3 of each tile of a row: tiles are two pixels apart.
  template <int ROWS>
  DECOUPLIFY_INLINE void load_row(const float* const* x, int64_t offset, Vec (&d)[4]) {
    const Vec a = load_run<ROWS>(x, 0, offset), b = load_run<ROWS>(x, 1, offset);
    const Vec next_a = load_run<ROWS>(x, 0, offset + 2), next_b = load_run<ROWS>(x, 1, offset + 2);
    d[0] = in_quarters<0, 2, 4, 6>(a, b), d[1] = in_quarters<1, 3, 5, 7>(a, b);
    d[2] = in_quarters<0, 2, 4, 6>(next_a, next_b), d[3] = in_quarters<1, 3, 5, 7>(next_a, next_b);
  }
  DECOUPLIFY_INLINE void input(const Vec (&d)[4], Vec (&t)[4]) {
    t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[1] - d[3];
  }
  DECOUPLIFY_INLINE void output(const Vec (&m)[4], Vec (&y)[2]) {
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
  }
  // Pixels of tiles back to runs of consecutive pixels.
  DECOUPLIFY_INLINE void to_runs(const Vec (&y)[2], Vec (&run)[2]) {
    run[0] = in_quarters<0, 4, 1, 5>(y[0], y[1]), run[1] = in_quarters<2, 6, 3, 7>(y[0], y[1]);
  }
};

// Element i of each quarter of four vectors side by side in vector i of the result: the four pixels of a tile's row to
// the vectors of its columns, and back. N: how many of the four are wanted.
template <int N>
DECOUPLIFY_INLINE void transpose_quarters(const Vec (&x)[4], Vec* to) {
  const Vec low0 = in_quarters<0, 4, 1, 5>(x[0], x[1]), low1 = in_quarters<0, 4, 1, 5>(x[2], x[3]);
  to[0] = in_quarters<0, 1, 4, 5>(low0, low1), to[1] = in_quarters<2, 3, 6, 7>(low0, low1);
  if (N == 2) return;
  const Vec high0 = in_quarters<2, 6, 3, 7>(x[0], x[1]), high1 = in_quarters<2, 6, 3, 7>(x[2], x[3]);
  to[2] = in_quarters<0, 1, 4, 5>(high0, high1);
  if (N == 4) to[3] = in_quarters<2, 3, 6, 7>(high0, high1);
}

struct Transform4 {
  static constexpr int kTile = 4, kTaps = 3, kPoints = 6;
  static constexpr double kA = 0.625, kB = 1.5, kA2 = kA * kA, kB2 = kB * kB;
  static constexpr double kNa = 2 * kA2 * (kA2 - kB2), kNb = 2 * kB2 * (kB2 - kA2);
  static constexpr double kFilter[6][3] = {{1 / (kA2 * kB2), 0, 0},      {1 / kNa, kA / kNa, kA2 / kNa},
                                           {1 / kNa, -kA / kNa, kA2 / kNa}, {1 / kNb, kB / kNb, kB2 / kNb},
                                           {1 / kNb, -kB / kNb, kB2 / kNb}, {0, 0, 1}};
  static constexpr float a = kA, b = kB, a2 = kA2, b2 = kB2, a3 = kA * kA2, b3 = kB * kB2;

  template <int ROWS>
  DECOUPLIFY_INLINE void load_row(const float* const* x, int64_t offset, Vec (&d)[6]) {
    Vec p[4], q[4];
    for (int i = 0; i < 4; ++i) p[i] = load_run<ROWS>(x, i, offset), q[i] = load_run<ROWS>(x, i, offset + 4);
    transpose_quarters<4>(p, d);
    transpose_quarters<2>(q, d + 4);
  }
  DECOUPLIFY_INLINE void input(const Vec (&d)[6], Vec (&t)[6]) {
    const Vec even_a = d[4] - d[2] * b2, odd_a = d[3] - d[1] * b2, even_b = d[4] - d[2] * a2, odd_b = d[3] - d[1] * a2;
    t[0] = d[0] * (a2 * b2) - d[2] * (a2 + b2) + d[4];
    t[1] = even_a + odd_a * a, t[2] = even_a - odd_a * a;
    t[3] = even_b + odd_b * b, t[4] = even_b - odd_b * b;
    t[5] = d[1] * (a2 * b2) - d[3] * (a2 + b2) + d[5];
  }
  DECOUPLIFY_INLINE void output(const Vec (&m)[6], Vec (&y)[4]) {
    const Vec sum_a = m[1] + m[2], sum_b = m[3] + m[4], difference_a = m[1] - m[2], difference_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = difference_a * a + difference_b * b;
    y[2] = sum_a * a2 + sum_b * b2;
    y[3] = difference_a * a3 + difference_b * b3 + m[5];
  }
  DECOUPLIFY_INLINE void to_runs(const Vec (&y)[4], Vec (&run)[4]) { transpose_quarters<4>(y, run); }
};

// F(4 x 4, 4 x 4) with the points +-3/8, +-7/8, +-3/2, infinity: pairs of opposite sign share their even and odd parts.
struct Transform44 {
  static constexpr int kTile = 4, kTaps = 4, kPoints = 7;
  static constexpr double kPoint[3] = {0.375, 0.875, 1.5};

  static constexpr double square(int i) { return kPoint[i % 3] * kPoint[i % 3]; }
  // Of the two other pairs: sum and product of squares.
  static constexpr double other_sum(int i) { return square(i + 1) + square(i + 2); }
  static constexpr double other_product(int i) { return square(i + 1) * square(i + 2); }
  static constexpr double filter(int row, int tap) {
    if (row == 6) return tap == 3;
    const int i = row / 2;
    const double p = row % 2 == 0 ? kPoint[i] : -kPoint[i];
    const double scale = 2 * p * (square(i) - square(i + 1)) * (square(i) - square(i + 2));
    return (tap == 0 ? 1 : tap == 1 ? p : tap == 2 ? p * p : p * p * p) / scale;
  }

  template <int ROWS>
  DECOUPLIFY_INLINE void load_row(const float* const* x, int64_t offset, Vec (&d)[7]) {
    Vec p[4], q[4];
    for (int i = 0; i < 4; ++i) p[i] = load_run<ROWS>(x, i, offset), q[i] = load_run<ROWS>(x, i, offset + 4);
    transpose_quarters<4>(p, d);
    transpose_quarters<3>(q, d + 4);
  }
  DECOUPLIFY_INLINE void input(const Vec (&d)[7], Vec (&t)[7]) {
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const float s = other_sum(i), q = other_product(i), p = kPoint[i];
      const Vec odd = d[5] - d[3] * s + d[1] * q, even = (d[4] - d[2] * s + d[0] * q) * p;
      t[2 * i] = odd + even, t[2 * i + 1] = odd - even;
    }
    constexpr double kSum = square(0) + square(1) + square(2);
    constexpr double kPairs = square(0) * square(1) + square(0) * square(2) + square(1) * square(2);
    constexpr double kProduct = square(0) * square(1) * square(2);
    t[6] = d[6] - d[4] * float(kSum) + d[2] * float(kPairs) - d[0] * float(kProduct);
  }
  DECOUPLIFY_INLINE void output(const Vec (&m)[7], Vec (&y)[4]) {
    // The first pair begins the sums, for adding to zero is an addition.
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const float p = kPoint[i], p2 = square(i), p3 = kPoint[i] * square(i);
      const Vec sum = m[2 * i] + m[2 * i + 1], difference = m[2 * i] - m[2 * i + 1];
      y[0] = i == 0 ? sum : y[0] + sum;
      y[1] = i == 0 ? difference * p : y[1] + difference * p;
      y[2] = i == 0 ? sum * p2 : y[2] + sum * p2;
      y[3] = (i == 0 ? m[6] : y[3]) + difference * p3;
    }
  }
  DECOUPLIFY_INLINE void to_runs(const Vec (&y)[4], Vec (&run)[4]) { transpose_quarters<4>(y, run); }
};

// The planes that are transformed, and the column of each among the transformed weights of a filter.
struct Sources {
  const float** plane;  // first input of the first tile
  int32_t* column;
  int n;
  int64_t row;    // floats from one row to the next
  int n_columns;  // transformed weights per filter and point
};

// One layer call. Tiles are taken in runs: kLanes consecutive pixels of M rows, which is kLanes / M tiles; M runs fill
// the lanes of a vector with tiles, in whatever order: results leave it in the order in which inputs came. A block is a
// few such vectors, so that a weight serves more than one.
//
// ROWS: rows of tiles in a run, 2 for maps half as wide as a vector at most.
template <class T, int ROWS>
struct Winograd {
  static constexpr int M = T::kTile, kRunWidth = kLanes / ROWS;
  static constexpr int kPoints = T::kPoints * T::kPoints;
  static constexpr int kFiltersAtOnce = 4 * kTileFilters;  // their products stay in the second-level cache

  const Convolution& conv;
  const ConvolutionCall& call;
  const Sources& sources;
  Scratch& scratch;
  const PixelSums sums;

  Winograd(const Convolution& conv, const ConvolutionCall& call, const Sources& sources, Scratch& scratch)
      : conv(conv), call(call), sources(sources), scratch(scratch), sums(call, n_slots(), scratch) {}

  int runs_per_row() const { return divide_up(conv.out.width, kRunWidth); }
  int n_runs() const { return divide_up(conv.out.height, M * ROWS) * runs_per_row(); }
  int n_vectors() const { return divide_up(n_runs(), M); }
  int n_blocks() const { return divide_up(n_vectors(), kTileVectors); }
  // As many for each thread.
  int n_filter_blocks() const {
    return divide_up(call.n_filters, kFiltersAtOnce * call.n_threads) * call.n_threads;
  }

  struct Run {
    int x, y;               // its first pixel
    int n_rows, n_columns;  // of the map from that pixel on; none if there is no such run
    int64_t at;             // position of the first pixel in an output plane
  };
  struct Block {
    int n;                      // vectors
    int64_t point;              // floats between points in the transformed input
    float* transformed;         // (points, channels, vectors)
    Run runs[kTileVectors][M];  // of each vector, found once: divisions take time
  };

  Run run_at(int index) const {
    if (index >= n_runs()) return {};
    const int x = index % runs_per_row() * kRunWidth, y = index / runs_per_row() * M * ROWS;
    return {x, y, conv.out.height - y, conv.out.width - x, int64_t{y} * conv.out.row + x};
  }

  Block block_at(int i, Buffer& buffer) const {
    const int first = part(n_vectors(), n_blocks(), i), n = part(n_vectors(), n_blocks(), i + 1) - first;
    // Points a power of two apart would share cache sets.
    const int64_t point = int64_t{sources.n} * n * kLanes + 16;
    Block block{n, point, buffer.reserve(point * kPoints), {}};
    for (int v = 0; v < n; ++v) {
      for (int k = 0; k < M; ++k) block.runs[v][k] = run_at((first + v) * M + k);
    }
    return block;
  }

  void transform_input(const Block& block, int c) const {
    const float* plane = sources.plane[c];
    for (int v = 0; v < block.n; ++v) {
      const float* x[M * ROWS];
      for (int i = 0; i < M * ROWS; ++i) {
        const Run& run = block.runs[v][i / ROWS];
        const int row = i % ROWS * M;  // where there is nothing any more, the first row of all will do
        x[i] = plane + int64_t{row < run.n_rows ? run.y + row : 0} * sources.row + run.x;
      }
      transform_tiles(x, block.transformed + (int64_t{c} * block.n + v) * kLanes, block.point);
    }
  }

  void transform_tiles(const float* const* x, float* to, int64_t stride) const {
    Vec rows[T::kPoints][T::kPoints];
#pragma GCC unroll 8
    for (int i = 0; i < T::kPoints; ++i) {
      Vec d[T::kPoints];
      T::template load_row<ROWS>(x, int64_t{i} * sources.row, d);
      T::input(d, rows[i]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < T::kPoints; ++j) {
      Vec d[T::kPoints], t[T::kPoints];
#pragma GCC unroll 8
      for (int i = 0; i < T::kPoints; ++i) d[i] = rows[i][j];
      T::input(d, t);
#pragma GCC unroll 8
      for (int i = 0; i < T::kPoints; ++i) store(to + (i * T::kPoints + j) * stride, t[i]);
    }
  }

  // Filters [n0, n1) of the list on one block. fetches: whether their weights are met for the first time.
  void run_filters(const Block& block, int n0, int n1, bool fetches, int thread, int slot) const {
    const int n = n1 - n0, n_groups = divide_up(n, filters_at_once(block.n));
    if (n == 0) return;
    const int64_t point = int64_t{block.n} * kLanes, filter = kPoints * point + 16;
    float* products = scratch.products[thread].reserve(filter * n);
    const float* rows[kFiltersAtOnce];  // of weights, at point 0
    const int64_t n_weights = int64_t{kPoints} * sources.n_columns;
    for (int i = 0; i < n; ++i) rows[i] = conv.transformed + call.filters[n0 + i] * n_weights;
    int first[kFiltersAtOnce + 1];  // filter of each group
    MultiplyFunction multiply[kFiltersAtOnce];
    for (int g = 0; g <= n_groups; ++g) first[g] = part(n, n_groups, g);
    const bool in_order = are_in_order(sources.column, sources.n);
    for (int g = 0; g < n_groups; ++g) {
      const int n_group = first[g + 1] - first[g];
      multiply[g] = multiply_for<false>(fetches, in_order, n_group, block.n);
    }
    const uint32_t per_fetch = part_per_fetch(sources.n);
    const auto run_group = [&](int e, int g) {
      const int64_t column = int64_t{e} * sources.n_columns;
      const float* inputs = block.transformed + e * block.point;
      multiply[g]({inputs, sources.column, rows + first[g], column, sources.n, per_fetch},
                  {rows + first[g], column + sources.n_columns, nothing_ahead(inputs)},
                  products + first[g] * filter + e * point, filter);
    };
    // Where a weight serves one vector only, what counts is to read those of a filter in order; otherwise, that the
    // inputs at a point stay in the first-level cache.
    for (int i = 0; i < kPoints * n_groups; ++i) {
      block.n == 1 ? run_group(i % kPoints, i / kPoints) : run_group(i / n_groups, i % n_groups);
    }
    for (int i = 0; i < n; ++i) finish_filter(block, n0 + i, products + i * filter, slot);
  }

  void finish_filter(const Block& block, int i, const float* products, int slot) const {
    const TileOutput to = output_of(conv, call, call.filters[i]);
    Vec total{};
    with_activation(conv.activation, [&](const auto& activate) DECOUPLIFY_INLINE_LAMBDA {
      for (int v = 0; v < block.n; ++v) {
        finish_tiles(products + v * kLanes, int64_t{block.n} * kLanes, block.runs[v], to, activate, total);
      }
    });
    float* partial = sums.of(slot, i);
    if (partial != nullptr) store(partial, load(partial) + total);
  }

  template <class Activate>
  DECOUPLIFY_INLINE_MEMBER void finish_tiles(const float* products, int64_t stride, const Run* runs, const TileOutput& to,
                                             const Activate& activate, Vec& total) const {
    Vec columns[M][T::kPoints];
#pragma GCC unroll 8
    for (int j = 0; j < T::kPoints; ++j) {
      Vec m[T::kPoints], y[M];
#pragma GCC unroll 8
      for (int i = 0; i < T::kPoints; ++i) m[i] = load(products + (i * T::kPoints + j) * stride);
      T::output(m, y);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) columns[i][j] = y[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      Vec y[M], pixels[M];
      T::output(columns[i], y);
      T::to_runs(y, pixels);
#pragma GCC unroll 8
      for (int k = 0; k < M; ++k) finish_run(pixels[k], runs[k], i, to, activate, total);
    }
  }

  template <class Activate>
  DECOUPLIFY_INLINE_MEMBER void finish_run(Vec pixels, const Run& run, int row, const TileOutput& to,
                                           const Activate& activate, Vec& total) const {
    if (ROWS == 1) return finish_row_of_run(pixels, run, row, to, activate, total);
    alignas(64) float both[2 * kLanes];
    store(both, pixels);
    for (int i = 0; i < ROWS; ++i) {
      finish_row_of_run(load(both + i * kRunWidth), run, i * M + row, to, activate, total);
    }
  }

  template <class Activate>
  DECOUPLIFY_INLINE_MEMBER void finish_row_of_run(Vec pixels, const Run& run, int row, const TileOutput& to,
                                                  const Activate& activate, Vec& total) const {
    if (row >= run.n_rows) return;
    const int64_t at = run.at + row * conv.out.row;
    Vec y = pixels + to.bias;
    if (to.residual != nullptr) y += load(to.residual + at);
    y = activate(y);
    total += run.n_columns >= kLanes ? y : keep(y, lanes_below(run.n_columns));
    store_first(to.out + at, y, run.n_columns);
  }

  // Blocks that a thread has to itself, from the first one on; what is left over would keep one waiting for another.
  int n_apart() const {
    const int n_threads = call.n_threads;
    return n_blocks() < 2 * n_threads && n_threads > 1 ? 0 : n_blocks() / n_threads * n_threads;
  }
  int n_slots() const { return n_apart() == 0 ? 1 : n_shares(call.n_threads, n_apart()); }

  // Each thread transforms and finishes its own.
  void run_by_block() const {
    parallel(call.n_threads, n_apart(), [&](const Share& share) {
      for (int i = share.begin; i < share.end; ++i) {
        const Block block = block_at(i, scratch.transformed[share.thread]);
        for (int c = 0; c < sources.n; ++c) transform_input(block, c);
        for (int f = 0; f < n_filter_blocks(); ++f) {
          run_filter_block(block, i, f, share.is_first && i == share.begin, share.thread, share.index);
        }
      }
    });
  }

  // Threads share the transformed input and read disjoint parts of the weights.
  void run_by_filter() const {
    for (int i = n_apart(); i < n_blocks(); ++i) {
      const Block block = block_at(i, scratch.transformed[0]);
      parallel(call.n_threads, sources.n, [&](const Share& share) {
        for (int c = share.begin; c < share.end; ++c) transform_input(block, c);
      });
      parallel(call.n_threads, n_filter_blocks(), [&](const Share& share) {
        for (int f = share.begin; f < share.end; ++f) run_filter_block(block, i, f, i == n_apart(), share.thread, 0);
      });
    }
  }

  void run_filter_block(const Block& block, int i_block, int f, bool fetches, int thread, int slot) const {
    const int parts = n_filter_blocks(), n0 = part(call.n_filters, parts, f), n1 = part(call.n_filters, parts, f + 1);
    fetch_part(call.ahead, i_block * parts + f, n_blocks() * parts);
    run_filters(block, n0, n1, fetches, thread, slot);
  }

  void run() const {
    run_by_block();
    run_by_filter();
    sums.finish();
  }
};

DECOUPLIFY_INLINE Sources new_sources(int n, Scratch& scratch) {
  auto* planes = reinterpret_cast<const float**>(scratch.lists.reserve(size_t(n) * 3));  // 8 + 4 bytes each
  return {planes, reinterpret_cast<int32_t*>(planes + n), n, 0, 0};
}

template <class T>
static void convolve_winograd(const Convolution& conv, const ConvolutionCall& call, Scratch& scratch) {
  Sources sources = new_sources(call.n_channels, scratch);
  sources.row = conv.in.row, sources.n_columns = conv.n_channels;
  for (int i = 0; i < call.n_channels; ++i) {
    sources.plane[i] = call.in + call.channels[i] * conv.in.plane + conv.in.origin - conv.in.row - 1;
    sources.column[i] = call.channels[i];
  }
  // Half a vector must hold a tile.
  if constexpr (kLanes / 2 >= T::kTile) {
    if (conv.out.width <= kLanes / 2 && conv.out.height > T::kTile) {
      return Winograd<T, 2>(conv, call, sources, scratch).run();
    }
  }
  Winograd<T, 1>(conv, call, sources, scratch).run();
}

// Stride 2: every phase of a channel is a source, and the sum over taps a sum over phases and up to 4 x 4 taps of each.
static Sources strided_sources(const Convolution& conv, const ConvolutionCall& call, Scratch& scratch) {
  Taps taps = taps_of(conv);
  Geometry out = conv.out;
  out.height = divide_up(out.height, 4) * 4;  // tiles read as far, and what they read must be finite
  place_in_phases(taps, out);
  float* gathered = scratch.gathered.reserve(taps.channel() * call.n_channels + 8 * out.row + 4 * kLanes);
  gather_channels(conv, call, taps, out, gathered);
  Sources sources = new_sources(call.n_channels * 4, scratch);
  sources.row = out.row, sources.n_columns = conv.n_channels * 4;
  for (int i = 0; i < sources.n; ++i) {
    sources.plane[i] = gathered + i * taps.plane;
    sources.column[i] = call.channels[i / 4] * 4 + i % 4;
  }
  return sources;
}

static void convolve_winograd_strided(const Convolution& conv, const ConvolutionCall& call, Scratch& scratch) {
  const Sources sources = strided_sources(conv, call, scratch);
  Winograd<Transform44, 1>(conv, call, sources, scratch).run();
}

// to[point * stride] = the transform of one filter plane, in double precision.
template <class T, class Filter>
DECOUPLIFY_INLINE void transform_filter(const double (&w)[T::kTaps][T::kTaps], Filter&& filter, float* to,
                                        int64_t stride) {
  constexpr int n = T::kPoints, m = T::kTaps;
  double rows[n][m] = {};
  for (int i = 0; i < n; ++i) {
    for (int x = 0; x < m; ++x) {
      for (int y = 0; y < m; ++y) rows[i][x] += filter(i, y) * w[y][x];
    }
  }
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      double u = 0;
      for (int x = 0; x < m; ++x) u += rows[i][x] * filter(j, x);
      to[(i * n + j) * stride] = static_cast<float>(u);
    }
  }
}

// Weights (filters, channels, 3, 3) to (filters, points, channels).
template <class T>
static void transform_weights(const float* weight, int n_filters, int n_channels, float* to) {
  constexpr int kPoints = T::kPoints * T::kPoints;
  const auto filter = [](int row, int tap) { return T::kFilter[row][tap]; };
  for (int64_t f = 0; f < n_filters; ++f) {
    for (int64_t c = 0; c < n_channels; ++c, weight += 9) {
      double w[3][3];
      for (int i = 0; i < 9; ++i) w[i / 3][i % 3] = weight[i];
      transform_filter<T>(w, filter, to + f * kPoints * n_channels + c, n_channels);
    }
  }
}

// Weights (filters, channels, kernel, kernel) of stride 2 to (filters, points, channels, phases).
static void transform_strided_weights(const float* weight, int n_filters, int n_channels, int kernel, int padding,
                                      float* to) {
  constexpr int kPoints = Transform44::kPoints * Transform44::kPoints;
  const Axis axis{2, kernel, 1, padding};
  const auto filter = [](int row, int tap) { return Transform44::filter(row, tap); };
  for (int64_t f = 0; f < n_filters; ++f) {
    for (int64_t c = 0; c < n_channels; ++c, weight += kernel * kernel) {
      double w[4][4][4] = {};
      for (int y = 0; y < kernel; ++y) {
        for (int x = 0; x < kernel; ++x) {
          double(&phase)[4][4] = w[axis.phase(y) * 2 + axis.phase(x)];
          phase[axis.shift(y) - axis.first()][axis.shift(x) - axis.first()] = weight[y * kernel + x];
        }
      }
      for (int p = 0; p < 4; ++p) {
        transform_filter<Transform44>(w[p], filter, to + f * kPoints * n_channels * 4 + c * 4 + p, n_channels * 4);
      }
    }
  }
}

}  // namespace decouplify::DECOUPLIFY_ISA
