// Maxima over windows of stride 1 or 2, row by row.
//
// Laid out for vectors that run across rows, as other windows are, every pixel would be copied once, for a maximum sees
// no border of zeros; that takes several times as long as the maxima.
#pragma once

#include <limits>

#include "direct.h"

namespace decouplify::DECOUPLIFY_ISA {

// The columns that windows read, for output x: 2x and 2x + 1; 2x to 2x + 2; 2x - 1 to 2x + 1.
enum class Columns { kTwo, kThree, kThreeCentred };

// At stride 1, maxima over rows are kept for some rows of the output: read right after they were written, and between
// two vectors, they would be waited for.
constexpr int kMaximaFloats = 4096;
static int maxima_row(const Window& window) {
  return window.padding[1] + window.in.width + window.out.width + window.kernel[1] + 2 * kLanes;
}

static bool pools_by_rows(const Window& window) {
  const auto is = [&](int i, int kernel, int padding) {
    return window.kernel[i] == kernel && window.padding[i] == padding && window.stride[i] == 2;
  };
  const bool is_strided = is(0, window.kernel[1], window.padding[1]) && (is(1, 2, 0) || is(1, 3, 0) || is(1, 3, 1));
  const bool is_dense = window.stride[0] == 1 && window.stride[1] == 1 && maxima_row(window) <= kMaximaFloats;
  return window.kind == WindowKind::kMax && window.dilation[0] == 1 && window.dilation[1] == 1 &&
         (is_strided || is_dense);
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

// Maxima over rows, with the columns of the border before and after.
DECOUPLIFY_INLINE void pool_over_rows(const RowsToPool& rows, const Window& window, float* to) {
  const Vec nothing = splat(-std::numeric_limits<float>::infinity());
  const int before = window.padding[1], n_columns = rows.n > 0 ? window.in.width : 0;
  const int end = window.out.width + window.kernel[1] - 1;
  for (int x = 0; x < before; x += kLanes) store(to + x, nothing);
  for (int x = 0; x < n_columns; x += kLanes) store(to + before + x, rows.at(x));
  for (int x = before + n_columns; x < end; x += kLanes) store(to + x, nothing);
}

template <class Activate>
DECOUPLIFY_INLINE void pool_over_columns(const float* maxima, const Window& window, float* to, const Activate& activate,
                                         Vec& total) {
  const int width = window.out.width, n_columns = window.kernel[1];
  for (int x = 0; x < width; x += kLanes) {
    Vec y = load(maxima + x);
    for (int i = 1; i < n_columns; ++i) y = maximum(y, load(maxima + x + i));
    y = activate(y);
    const int n = smaller(kLanes, width - x);
    total += keep(y, lanes_below(n));
    store_first(to + x, y, n);
  }
}

// The rows that the windows of row y of the output reach. Where no row is, any will do, such as those of another y.
DECOUPLIFY_INLINE RowsToPool rows_to_pool(const Window& window, const float* plane, int y, int other) {
  const int stride = window.stride[0], top = stride * y - window.padding[0], first = top > 0 ? top : 0;
  const int n = smaller(top + window.kernel[0], window.in.height) - first;
  return {plane + (n > 0 ? first : stride * other) * int64_t{window.in.row}, n, window.in.row};
}

template <Columns COLUMNS>
static void pool_strided(const Window& window, const float* plane, int first, int last, const TileOutput& to,
                         Vec& total) {
  with_activation(window.activation, [&](const auto& activate) DECOUPLIFY_INLINE_LAMBDA {
    for (int y = first; y < last; ++y) {
      const RowsToPool rows = rows_to_pool(window, plane, y, first);
      float* out = to.out + y * int64_t{window.out.row};
      pool_row<COLUMNS>(rows, window.in.width, window.out.width, out, activate, total);
    }
  });
}

static void pool_dense(const Window& window, const float* plane, int first, int last, const TileOutput& to,
                       Vec& total) {
  alignas(64) float maxima[kMaximaFloats];
  const int n_floats = maxima_row(window), n_at_once = kMaximaFloats / n_floats;
  with_activation(window.activation, [&](const auto& activate) DECOUPLIFY_INLINE_LAMBDA {
    for (int begin = first; begin < last; begin += n_at_once) {
      const int end = smaller(begin + n_at_once, last);
      for (int y = begin; y < end; ++y) {
        pool_over_rows(rows_to_pool(window, plane, y, first), window, maxima + (y - begin) * n_floats);
      }
      for (int y = begin; y < end; ++y) {
        float* out = to.out + y * int64_t{window.out.row};
        pool_over_columns(maxima + (y - begin) * n_floats, window, out, activate, total);
      }
    }
  });
}

// Rows [first, last) of one channel of a window that pools_by_rows.
//   plane: the first pixel of the input, or where it would be
//   to: with the first pixel of the output
static void pool_rows(const Window& window, const float* plane, int first, int last, const TileOutput& to) {
  Vec total{};
  if (window.stride[0] == 1) {
    pool_dense(window, plane, first, last, to, total);
  } else if (window.kernel[1] == 2) {
    pool_strided<Columns::kTwo>(window, plane, first, last, to, total);
  } else if (window.padding[1] == 0) {
    pool_strided<Columns::kThree>(window, plane, first, last, to, total);
  } else {
    pool_strided<Columns::kThreeCentred>(window, plane, first, last, to, total);
  }
  if (to.partial_sum != nullptr) store(to.partial_sum, load(to.partial_sum) + total);
}

}  // namespace decouplify::DECOUPLIFY_ISA
