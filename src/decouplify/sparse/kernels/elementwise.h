// Whole planes: sums of two values, norms that stand alone, means.
#pragma once

#include "tile.h"

namespace decouplify::DECOUPLIFY_ISA {

// out = activation(value(position)) on the pixels of one plane. Returns the sum over them.
template <class F>
DECOUPLIFY_INLINE float fill_plane(float* out, const Geometry& g, const Activation& activation, F&& value) {
  const int64_t n = int64_t{g.height - 1} * g.row + g.width;
  Vec total{};
  for (int64_t at = 0; at < n; at += kLanes) {
    const Mask mask = (Mask)load(reinterpret_cast<const float*>(g.mask) + at);
    const Vec y = keep(activate(value(g.origin + at), activation), mask);
    total += y;
    store(out + g.origin + at, y);
  }
  return sum(total);
}

static float add_planes(const float* a, const float* b, float* out, const Geometry& g, Activation activation) {
  if (a != nullptr && b != nullptr) {
    return fill_plane(out, g, activation, [=](int64_t at) { return load(a + at) + load(b + at); });
  }
  const float* only = a != nullptr ? a : b;
  if (only == nullptr) return fill_plane(out, g, activation, [](int64_t) { return Vec{}; });
  return fill_plane(out, g, activation, [=](int64_t at) { return load(only + at); });
}

static float scale_plane(const float* a, float scale, float shift, float* out, const Geometry& g,
                         Activation activation) {
  if (a == nullptr) return fill_plane(out, g, activation, [=](int64_t) { return splat(shift); });
  return fill_plane(out, g, activation, [=](int64_t at) { return load(a + at) * scale + shift; });
}

static float sum_plane(const float* a, const Geometry& g) {
  Vec total[4] = {};
  int64_t at = 0;
  // Borders are zero, so whole planes may be added up; the end of the last row is where the pixels end.
  const int64_t n = int64_t{g.height - 1} * g.row + g.width;
  for (; at + 4 * kLanes <= n; at += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) total[i] += load(a + g.origin + at + i * kLanes);
  }
  for (; at < n; at += kLanes) {
    total[0] += keep(load(a + g.origin + at), (Mask)load(reinterpret_cast<const float*>(g.mask) + at));
  }
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

}  // namespace decouplify::DECOUPLIFY_ISA
