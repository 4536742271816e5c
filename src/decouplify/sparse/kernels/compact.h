// Pixels of a plane side by side, without the borders between rows, and back.
#pragma once

#include "gather.h"

namespace decouplify::DECOUPLIFY_ISA {

#if defined(__AVX512F__)

// Which lanes of a vector of flat positions are pixels.
using Lanes = __mmask16;

DECOUPLIFY_INLINE int count(Lanes lanes) { return __builtin_popcount(lanes); }
// The next values, one for each of these lanes; the others are zero.
DECOUPLIFY_INLINE Vec spread(const float* values, Lanes lanes) {
  return (Vec)_mm512_maskz_expand_ps(lanes, (__m512)load(values));
}
DECOUPLIFY_INLINE Vec keep_lanes(Vec v, Lanes lanes) { return (Vec)_mm512_maskz_mov_ps(lanes, (__m512)v); }
DECOUPLIFY_INLINE void store_lanes(float* p, Vec v, Lanes lanes) { _mm512_mask_storeu_ps(p, lanes, (__m512)v); }

// The pixels among the positions from `at` on, the first n of them.
DECOUPLIFY_INLINE Lanes lanes_at(const Geometry& g, int64_t at, int n) {
  const Vec mask = load(reinterpret_cast<const float*>(g.mask) + at);
  const auto pixels = static_cast<uint32_t>(_mm512_movepi32_mask((__m512i)mask));
  return static_cast<Lanes>(n >= kLanes ? pixels : _pdep_u32((1u << n) - 1, pixels));
}

// The pixels of a plane, whose first one is *plane; also of one shifted by a tap, where borders serve as padding.
// Writes up to a vector more.
DECOUPLIFY_INLINE void compact(const float* plane, const Geometry& g, float* to) {
  const int64_t n = int64_t{g.height - 1} * g.row + g.width;
  for (int64_t at = 0; at < n; at += kLanes) {
    const Lanes lanes = lanes_at(g, at, kLanes);
    store(to, (Vec)_mm512_maskz_compress_ps(lanes, (__m512)load(plane + at)));
    to += count(lanes);
  }
}

#else

// How many lanes from the first one on are pixels: here a vector stays within its row. More may be stored where the
// others are border columns, which stay zero.
struct Lanes {
  int n, n_stored;
};

DECOUPLIFY_INLINE int count(Lanes lanes) { return lanes.n; }
DECOUPLIFY_INLINE Vec spread(const float* values, Lanes) { return load(values); }
DECOUPLIFY_INLINE Vec keep_lanes(Vec v, Lanes lanes) { return keep(v, lanes_below(lanes.n)); }
DECOUPLIFY_INLINE void store_lanes(float* p, Vec v, Lanes lanes) { store_first(p, v, lanes.n_stored); }

DECOUPLIFY_INLINE Lanes lanes_at(const Geometry& g, int64_t at, int n) {
  const int column = static_cast<int>(at % g.row), n_left = g.width - column;
  if (n_left <= n && n_left <= kLanes && g.row - column >= kLanes) return {n_left, kLanes};
  const int n_pixels = smaller(smaller(n, kLanes), n_left);
  return {n_pixels, n_pixels};
}

DECOUPLIFY_INLINE void compact(const float* plane, const Geometry& g, float* to) {
  for (int y = 0; y < g.height; ++y, plane += g.row, to += g.width) {
    for (int x = 0; x < g.width; x += kLanes) store(to + x, load(plane + x));  // the next row overwrites what is too much
  }
}

#endif

// Some consecutive pixels among flat positions: the lanes say where they lie from `at` on, and `index` counts those
// before them.
struct Chunk {
  int64_t at;
  int index;
  Lanes lanes;
};

// How many chunks the pixels of a map make at most, cut into n_runs.
DECOUPLIFY_INLINE int most_chunks(const Geometry& g, int n_runs) {
  return g.height * divide_up(g.width, kLanes) + n_runs;
}

// The chunks of pixels [first, first + n); returns how many there are.
DECOUPLIFY_INLINE int find_chunks(const Geometry& g, int first, int n, Chunk* chunks) {
  int n_chunks = 0;
  for (int i = 0; i < n; ++n_chunks) {
    const int pixel = first + i;
    const int64_t at = int64_t{pixel / g.width} * g.row + pixel % g.width;
    const Lanes lanes = lanes_at(g, at, n - i);
    chunks[n_chunks] = {at, i, lanes};
    i += count(lanes);
  }
  return n_chunks;
}

}  // namespace decouplify::DECOUPLIFY_ISA
