// Depthwise convolution of several output rows at a time.
//
// Tap by tap, such a convolution waits for loads: nine for nine products, most of them across two cache lines. What is
// loaded for one row serves the rows above and below it too, and a row of every second pixel comes out of the same
// loads by a shuffle.
#pragma once

#include "direct.h"

namespace decouplify::DECOUPLIFY_ISA {

constexpr int kBlockRows = 4;

// One channel's input: `x` lies under the first tap of some output.
struct RowsInput {
  const float* x;
  int64_t row;  // floats from one row to the next
};

template <int KERNEL>
struct TapWeights {
  Vec of[KERNEL * KERNEL];
  explicit DECOUPLIFY_INLINE_MEMBER TapWeights(const float* weight) {
#pragma GCC unroll 32
    for (int t = 0; t < KERNEL * KERNEL; ++t) of[t] = splat(weight[t]);
  }
};

// The input under tap t of a row of kLanes outputs.
template <int STRIDE>
DECOUPLIFY_INLINE Vec under_tap(const float* row, const float* upper_half, int t) {
  if (STRIDE == 1) return load(row + t);
  return t % 2 == 0 ? evens(load(row + t), load(upper_half + t)) : odds(load(row + t - 1), load(upper_half + t - 1));
}

// acc[r] = bias + output row r; `to_upper` leads from the input of an output vector's first half to that of its second.
template <int KERNEL, int STRIDE, int ROWS>
DECOUPLIFY_INLINE void slide_block(const RowsInput& in, const TapWeights<KERNEL>& weight, int64_t to_upper, float bias,
                                   Vec (&acc)[ROWS]) {
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) acc[r] = splat(bias);
  const float* row = in.x;
#pragma GCC unroll 16
  for (int i = 0; i < (ROWS - 1) * STRIDE + KERNEL; ++i, row += in.row) {
    hide(row);
#pragma GCC unroll 8
    for (int t = 0; t < KERNEL; ++t) {
      Vec value = under_tap<STRIDE>(row, row + to_upper, t);
      hide(value);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const int tap_row = i - r * STRIDE;
        if (tap_row >= 0 && tap_row < KERNEL) acc[r] += value * weight.of[tap_row * KERNEL + t];
      }
    }
  }
}

// Whether rows of the output are so short that a vector holds two.
DECOUPLIFY_INLINE bool pairs_rows(const Window& window) {
  return window.stride[1] == 2 && window.out.width <= kLanes / 2;
}

// Whether slide_rows can compute this window, and better than vectors that run across rows could.
static bool slides_by_rows(const Window& window) {
  const Geometry &in = window.in, &out = window.out;
  const int kernel = window.kernel[0], stride = window.stride[0];
  const auto fits = [&](int i, int in_size, int out_size) {
    const int last = (out_size - 1) * stride + kernel - 1 - window.padding[i];
    return window.kernel[i] == kernel && window.stride[i] == stride && window.dilation[i] == 1 &&
           window.padding[i] <= in.border && last < in_size + in.border;
  };
  const bool is_known = (kernel == 3 || kernel == 5) && (stride == 1 || stride == 2);
  if (window.kind != WindowKind::kDepthwise || !is_known) return false;
  // Lanes beyond the end of a row are lost; across rows, each vector takes about twice as long.
  const int n_lanes = divide_up(out.width, kLanes) * kLanes;
  const bool pays = stride == 2 || n_lanes * 5 < out.row * 8;
  return pays && fits(0, in.height, out.height) && fits(1, in.width, out.width);
}

// Rows [first, first + ROWS) of the output. Pixels only are written; borders stay as they are.
template <int KERNEL, int STRIDE, int ROWS, class Activate>
DECOUPLIFY_INLINE void slide_some_rows(const RowsInput& from, const TapWeights<KERNEL>& weight, const Geometry& out,
                                       int first, const TileOutput& to, const Activate& activate, Vec& total) {
  const int64_t out_row = out.row;
  const int width = out.width;
  const float bias = to.bias;
  float* row = to.out + first * out_row;
  RowsInput in = from;
  in.x += int64_t{first} * STRIDE * in.row;
  for (int x = 0; x < width; x += kLanes, in.x += STRIDE * kLanes) {
    Vec acc[ROWS];
    slide_block<KERNEL, STRIDE, ROWS>(in, weight, kLanes, bias, acc);
    const int n = smaller(kLanes, width - x);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      float* p = row + r * out_row + x;
      const Vec y = activate(acc[r]);
      if (n == kLanes) {
        total += y;
        store(p, y);
      } else {
        total += keep(y, lanes_below(n));
        store_first(p, y, n);
      }
    }
  }
}

// Output rows `first` and `first + 1`, the second one only if it `exists`, in one vector.
template <int KERNEL, class Activate>
DECOUPLIFY_INLINE void slide_two_rows(const RowsInput& from, const TapWeights<KERNEL>& weight, const Geometry& out, int first,
                                      bool exists, const TileOutput& to, const Activate& activate, Vec& total) {
  RowsInput in = from;
  in.x += int64_t{first} * 2 * in.row;
  Vec acc[1];
  slide_block<KERNEL, 2, 1>(in, weight, exists ? 2 * in.row : 0, to.bias, acc);
  alignas(64) float y[2 * kLanes];
  store(y, activate(acc[0]));
  float* p = to.out + int64_t{first} * out.row;
  for (int half = 0; half < (exists ? 2 : 1); ++half) {
    const Vec v = keep(load(y + half * kLanes / 2), lanes_below(out.width));
    total += v;
    store_first(p + half * out.row, v, out.width);
  }
}

template <int KERNEL, int STRIDE, class Activate>
DECOUPLIFY_INLINE Vec slide_rows(const RowsInput& in, const TapWeights<KERNEL>& weight, const Geometry& out, int first,
                                 int last, const TileOutput& to, const Activate& activate) {
  Vec total{};
  int y = first;
  for (; y + kBlockRows <= last; y += kBlockRows) {
    slide_some_rows<KERNEL, STRIDE, kBlockRows>(in, weight, out, y, to, activate, total);
  }
  for (; y < last; ++y) slide_some_rows<KERNEL, STRIDE, 1>(in, weight, out, y, to, activate, total);
  return total;
}

template <int KERNEL, class Activate>
DECOUPLIFY_INLINE Vec slide_pairs(const RowsInput& in, const TapWeights<KERNEL>& weight, const Geometry& out, int first,
                                  int last, const TileOutput& to, const Activate& activate) {
  Vec total{};
  for (int y = first; y < last; y += 2) slide_two_rows(in, weight, out, y, y + 1 < last, to, activate, total);
  return total;
}

template <int KERNEL>
static void slide_rows(const Window& window, const float* plane, const float* weights, int first, int last,
                       const TileOutput& to) {
  const int64_t row = window.in.row;
  const RowsInput in{plane - window.padding[0] * row - window.padding[1], row};
  const TapWeights<KERNEL> weight(weights);
  const Geometry& out = window.out;
  with_activation(window.activation, [&](const auto& activate) DECOUPLIFY_INLINE_LAMBDA {
    const Vec total = pairs_rows(window)         ? slide_pairs(in, weight, out, first, last, to, activate)
                      : window.stride[0] == 1 ? slide_rows<KERNEL, 1>(in, weight, out, first, last, to, activate)
                                              : slide_rows<KERNEL, 2>(in, weight, out, first, last, to, activate);
    if (to.partial_sum != nullptr) store(to.partial_sum, load(to.partial_sum) + total);
  });
}

// Rows [first, last) of one channel's output, of a window that slides_by_rows.
//   plane: the first pixel of the input, or where it would be
//   weights: of the channel
//   to: with the first pixel of the output
static void slide_rows(const Window& window, const float* plane, const float* weights, int first, int last,
                       const TileOutput& to) {
  (window.kernel[0] == 3 ? slide_rows<3> : slide_rows<5>)(window, plane, weights, first, last, to);
}

}  // namespace decouplify::DECOUPLIFY_ISA
