// Input planes laid out for a convolution or a window, so that every tap is one offset in flat memory.
#pragma once

#include "tile.h"

namespace decouplify::DECOUPLIFY_ISA {

constexpr int kMaxTaps = 256;

// Taps along one axis: tap i reads input o * stride + i * dilation - padding for output o, which is element
// o + shift of one of `stride` phases.
struct Axis {
  int stride, kernel, dilation, padding;

  int reach(int i) const { return i * dilation - padding; }
  int phase(int i) const { return ((reach(i) % stride) + stride) % stride; }
  int shift(int i) const { return (reach(i) - phase(i)) / stride; }
  int first() const { return shift(0); }
  int last() const { return shift(kernel - 1); }
  int n_phases() const { return kernel == 1 && padding == 0 ? 1 : stride; }
};

struct Taps {
  Axis rows, columns;
  int n;
  int64_t offset[kMaxTaps];
  int64_t plane;  // floats of one phase of one channel

  int64_t channel() const { return plane * rows.n_phases() * columns.n_phases(); }
};

template <class Step>
static Taps taps_of(const Step& step) {
  const auto axis = [&](int i) { return Axis{step.stride[i], step.kernel[i], step.dilation[i], step.padding[i]}; };
  Taps taps{axis(0), axis(1), step.kernel[0] * step.kernel[1], {}, 0};
  return taps;
}

// Whether the input planes can be read where they are.
template <class Step>
static bool reads_in_place(const Step& step) {
  const Geometry &in = step.in, &out = step.out;
  const bool same = in.height == out.height && in.row == out.row && step.stride[0] == 1 && step.stride[1] == 1;
  const auto fits = [&](int i) {
    const int last = (step.kernel[i] - 1) * step.dilation[i] - step.padding[i];
    return step.padding[i] <= in.border && last <= in.border;
  };
  return same && fits(0) && fits(1);
}

// Offsets of the taps in the input's own planes, relative to the first pixel.
DECOUPLIFY_INLINE void place_in_plane(Taps& taps, const Geometry& in) {
  for (int t = 0; t < taps.n; ++t) {
    const int r = t / taps.columns.kernel, c = t % taps.columns.kernel;
    taps.offset[t] = int64_t{taps.rows.reach(r)} * in.row + taps.columns.reach(c);
  }
}

// Offsets in gathered phases, whose rows are as far apart as the output's.
DECOUPLIFY_INLINE void place_in_phases(Taps& taps, const Geometry& out) {
  const int n_rows = out.height + taps.rows.last() - taps.rows.first();
  // A tile's last vector may begin at the last pixel.
  taps.plane = (int64_t{n_rows} * out.row + kTileFloats + 15) / 16 * 16;
  if (taps.plane % 1024 == 0) taps.plane += 16;  // planes a page apart would fight for the same cache sets
  for (int t = 0; t < taps.n; ++t) {
    const int r = t / taps.columns.kernel, c = t % taps.columns.kernel;
    const int phase = taps.rows.phase(r) * taps.columns.n_phases() + taps.columns.phase(c);
    const int64_t shift_rows = taps.rows.shift(r) - taps.rows.first();
    taps.offset[t] = phase * taps.plane + shift_rows * out.row + taps.columns.shift(c) - taps.columns.first();
  }
}

// Elements first, first + stride, ... of an input row, `fill` where there is none. Writes up to a vector more than n.
DECOUPLIFY_INLINE void gather_row(const float* in, int width, int first, int stride, float* to, int n, float fill) {
  int i = 0;
  for (; i < n && first + i * stride < 0; ++i) to[i] = fill;
  const int end = first < width ? smaller(n, (width - 1 - first) / stride + 1) : i;
  if (stride == 1) {
    for (; i < end; i += kLanes) store(to + i, load(in + first + i));
  } else if (stride == 2) {
    for (; i < end; i += kLanes) {
      const float* x = in + first + 2 * i;
      store(to + i, evens(load(x), load(x + kLanes)));
    }
  } else {
    for (; i < end; ++i) to[i] = in[first + i * stride];
  }
  for (i = end; i < n; ++i) to[i] = fill;
}

// Both phases of a row at stride 2, as two calls of gather_row would leave them; what is loaded serves the two.
//   first: column of the first even element, itself even
DECOUPLIFY_INLINE void gather_both_phases(const float* in, int width, int first, float* even, float* odd, int n,
                                          float fill) {
  const int begin = first < 0 ? smaller(-first / 2, n) : 0;
  const auto end_at = [&](int i) { return smaller(i > begin ? i : begin, n); };
  const int end_even = end_at((width - first + 1) / 2), end_odd = end_at((width - first) / 2);
  for (int i = 0; i < begin; ++i) even[i] = odd[i] = fill;
  for (int i = begin; i < end_even; i += kLanes) {
    const Vec low = load(in + first + 2 * i), high = load(in + first + 2 * i + kLanes);
    store(even + i, evens(low, high));
    store(odd + i, odds(low, high));
  }
  for (int i = end_even; i < n; ++i) even[i] = fill;
  for (int i = end_odd; i < n; ++i) odd[i] = fill;
}

// The phases of one channel that begin in row `phase`. `plane` is the channel's first pixel, and `next` that of the
// channel to follow, which is asked for meanwhile, or the same.
static void gather_phase(const float* plane, const float* next, const Taps& taps, int phase, const Geometry& in,
                         const Geometry& out, float* to, float fill) {
  const Axis &rows = taps.rows, &columns = taps.columns;
  const int first_row = rows.first() * rows.stride, n_rows = out.height + rows.last() - rows.first();
  const int first_column = columns.first() * columns.stride, n_phases = columns.n_phases();
  to += phase * n_phases * taps.plane;
  for (int i = 0; i < n_rows; ++i) {
    const int y = first_row + i * rows.stride + phase;
    const bool exists = y >= 0 && y < in.height;
    const float* from = exists ? plane + int64_t{y} * in.row : plane;
    float* row = to + int64_t{i} * out.row;
    if (exists && next != plane) fetch_to_read(next + int64_t{y} * in.row, in.width);
    if (n_phases == 2) {
      gather_both_phases(from, exists ? in.width : 0, first_column, row, row + taps.plane, out.row, fill);
      continue;
    }
    for (int b = 0; b < n_phases; ++b) {
      gather_row(from, exists ? in.width : 0, first_column + b, columns.stride, row + b * taps.plane, out.row, fill);
    }
  }
}

static void gather_channel(const float* plane, const float* next, const Taps& taps, const Geometry& in,
                           const Geometry& out, float* to, float fill) {
  for (int a = 0; a < taps.rows.n_phases(); ++a) gather_phase(plane, next, taps, a, in, out, to, fill);
}

}  // namespace decouplify::DECOUPLIFY_ISA
