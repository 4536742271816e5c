// Maxima over windows of stride 2, row by row.
//
// Laid out for vectors that run across rows, as other windows of stride 2 are, every pixel would be copied once, which
// takes several times as long as the maxima.
#pragma once

#include <limits>

#include "direct.h"

namespace decouplify::DECOUPLIFY_ISA {

// The columns that windows read, for output x: 2x and 2x + 1; 2x to 2x + 2; 2x - 1 to 2x + 1.
enum class Columns { kTwo, kThree, kThreeCentred };

static bool pools_by_rows(const Window& window) {
  const auto is = [&](int i, int kernel, int padding) {
    return window.kernel[i] == kernel && window.padding[i] == padding && window.stride[i] == 2 && window.dilation[i] == 1;
  };
  const bool is_known = is(1, 2, 0) || is(1, 3, 0) || is(1, 3, 1);
  return window.kind == WindowKind::kMax && is_known && is(0, window.kernel[0], window.padding[0]);
}

template <int... I>
DECOUPLIFY_INLINE Vec shift_in(Vec before, Vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(before, v, (kLanes - 1 + I)...);
}
// The last lane of `before`, then all of v but its last lane.
DECOUPLIFY_INLINE Vec shift_in(Vec before, Vec v) {
  return shift_in(before, v, std::make_integer_sequence<int, kLanes>{});
}

// Maxima over some input rows.
struct RowsToPool {
  const float* first;
  int n;
  int64_t row;  // floats from one to the next

  Vec DECOUPLIFY_INLINE_MEMBER at(int column) const {
    const float* x = first + column;
    Vec m = load(x);
    for (int i = 1; i < n; ++i) m = maximum(m, load(x + i * row));
    return m;
  }
};

// One row of output from the input rows that its windows reach, which may be none.
template <Columns COLUMNS, class Activate>
DECOUPLIFY_INLINE void pool_row(const RowsToPool& rows, int in_width, int width, float* to, const Activate& activate,
                                Vec& total) {
  const Vec nothing = splat(-std::numeric_limits<float>::infinity());
  const auto first_lanes = [&](Vec v, int n) { return lanes_below(n) ? v : nothing; };
  Vec before = nothing;
  for (int x = 0; x < width; x += kLanes) {
    const int column = 2 * x, n_columns = rows.n > 0 ? in_width - column : 0;
    const Vec low = rows.at(column), high = rows.at(column + kLanes);
    const Vec even = first_lanes(evens(low, high), (n_columns + 1) / 2);
    const Vec odd = first_lanes(odds(low, high), n_columns / 2);
    Vec y = maximum(even, odd);
    if (COLUMNS == Columns::kThree) {
      const Vec next = evens(rows.at(column + 2), rows.at(column + 2 + kLanes));
      y = maximum(y, first_lanes(next, (n_columns - 1) / 2));
    }
    if (COLUMNS == Columns::kThreeCentred) y = maximum(shift_in(before, odd), y);
    before = odd;
    y = activate(y);
    const int n = smaller(kLanes, width - x);
    total += keep(y, lanes_below(n));
    store_first(to + x, y, n);
  }
}

template <Columns COLUMNS>
static void pool_rows(const Window& window, const float* plane, int first_row, int last_row, const TileOutput& to) {
  const Geometry &in = window.in, &out = window.out;
  Vec total{};
  with_activation(window.activation, [&](const auto& activate) DECOUPLIFY_INLINE_LAMBDA {
    for (int y = first_row; y < last_row; ++y) {
      const int top = 2 * y - window.padding[0], first = top > 0 ? top : 0;
      const int n = smaller(top + window.kernel[0], in.height) - first;
      // Where no row is, any will do.
      const RowsToPool rows{plane + (n > 0 ? first : 2 * first_row) * int64_t{in.row}, n, in.row};
      pool_row<COLUMNS>(rows, in.width, out.width, to.out + y * int64_t{out.row}, activate, total);
    }
  });
  if (to.partial_sum != nullptr) store(to.partial_sum, load(to.partial_sum) + total);
}

// Rows [first, last) of one channel of a window that pools_by_rows.
//   plane: the first pixel of the input, or where it would be
//   to: with the first pixel of the output
static void pool_rows(const Window& window, const float* plane, int first, int last, const TileOutput& to) {
  if (window.kernel[1] == 2) return pool_rows<Columns::kTwo>(window, plane, first, last, to);
  window.padding[1] == 0 ? pool_rows<Columns::kThree>(window, plane, first, last, to)
                         : pool_rows<Columns::kThreeCentred>(window, plane, first, last, to);
}

}  // namespace decouplify::DECOUPLIFY_ISA
