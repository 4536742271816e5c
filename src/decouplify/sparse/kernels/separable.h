// A convolution, the depthwise one after it, and the 1x1 convolution after that, a band of rows at a time.
//
// At the resolutions a network begins with, one map is larger than the second cache. Layer by layer, each is written to
// memory and read back; in bands, the two maps in between never leave the cache.
#pragma once

#include "expand.h"

namespace decouplify::DECOUPLIFY_ISA {

constexpr int64_t kSeparableBand = 160 << 10;  // floats of all maps in one band, which a second-level cache holds

// A window that must be gathered would need whole maps.
static bool can_separate(const Separable& layers) {
  return layers.expand.algorithm == Algorithm::kDirect && layers.inner.n_filters > 0 && layers.outer.n_filters > 0 &&
         (slides_by_rows(layers.window) || reads_in_place(layers.window));
}

class SeparableJob {
 public:
  SeparableJob(const Separable& layers, Scratch& scratch)
      : layers_(layers),
        scratch_(scratch),
        taps_(taps_of(layers.expand)),
        expand_(expand_job(layers.expand, layers.window, layers.inner, scratch)),
        sums_(layers.outer, n_shares(layers.outer.n_threads, n_bands()), scratch) {
    expand_.input = tile_input(layers.expand, layers.inner, taps_, scratch);
  }

  void run() const {
    const int n_inner = layers_.inner.n_filters;
    const int64_t plane = band_plane();
    Place* places = reserve_places(scratch_.inner_lists, n_inner);
    for (int i = 0; i < n_inner; ++i) places[i] = {i * plane, layers_.inner.filters[i]};
    add_places_ahead(places, n_inner);
    parallel(layers_.outer.n_threads, n_bands(), [&](const Share& share) {
      float* memory = scratch_.window[share.thread].reserve(n_inner * plane + kTileFloats);
      for (int band = share.begin; band < share.end; ++band) {
        const Rows rows = rows_of(band);
        if (rows.v0 < rows.v1) run_band(rows, memory, places, plane, share.is_first && band == share.begin, share);
      }
    });
    sums_.finish();
  }

 private:
  const Geometry& out() const { return layers_.window.out; }
  int blocks() const { return divide_up(out().height, kBlockRows); }

  // As many as threads can share.
  int n_bands() const {
    const int32_t* stride = layers_.expand.stride;
    const int n_threads = layers_.outer.n_threads;
    const int64_t n_planes = layers_.inner.n_channels * stride[0] * stride[1] + kTileFilters;
    const int64_t n_below = n_planes * layers_.window.in.row * layers_.window.stride[0];
    const int64_t per_row = n_below + int64_t{layers_.inner.n_filters} * out().row;
    const int at_once = static_cast<int>(kSeparableBand / (per_row * kBlockRows));
    const int n = divide_up(blocks(), at_once < 1 ? 1 : at_once);
    return smaller(divide_up(n, n_threads) * n_threads, blocks());
  }

  // Whole vectors, of which the last one may end in the row after the last block.
  Rows rows_of(int band) const {
    const auto vector = [&](int i) {
      const int64_t n = divide_up(part(blocks(), n_bands(), i) * kBlockRows * out().row, kLanes);
      return smaller(static_cast<int>(n), n_vectors(out()));
    };
    const int v0 = vector(band), v1 = vector(band + 1);
    return {v0 * kLanes / out().row, smaller(divide_up(v1 * kLanes, out().row), out().height), v0, v1};
  }

  // Floats from one filter to the next of what the depthwise convolution leaves of a band.
  int64_t band_plane() const {
    int most = 0;
    for (int i = 0; i < n_bands(); ++i) {
      const Rows rows = rows_of(i);
      most = rows.last - rows.first > most ? rows.last - rows.first : most;
    }
    const int64_t plane = (int64_t{most} * out().row + (kTileVectors + 2) * kLanes + 15) / 16 * 16;
    return plane % 1024 == 0 ? plane + 16 : plane;
  }

  void run_band(const Rows& rows, float* memory, const Place* places, int64_t plane, bool is_first,
                const Share& share) const {
    float* origin = memory - whole_lines(int64_t{rows.first} * out().row);  // as if all rows were there
    const int n_groups = expand_.n_groups(), n = layers_.inner.n_filters;
    const CopiedTiles tiles = expand_.tiles_under(rows, share.thread);
    for (int group = 0; group < n_groups; ++group) {
      const int n0 = part(n, n_groups, group), n1 = part(n, n_groups, group + 1);
      expand_.run(rows, tiles, group > 0, n0, n1, share.thread, [&](int i) {
        TileOutput to{};
        to.out = origin + i * plane;
        to.bias = layers_.window.bias[layers_.inner.filters[i]];
        return to;
      });
    }
    static constexpr int64_t kPoint[1] = {0};
    const TileInput in{origin, places, n, kPoint, 1};
    const int n_filters = layers_.outer.n_filters;
    const DirectJob job{layers_.project, layers_.outer, sums_, in, 0, n_filters, rows.v0, rows.v1, scratch_};
    job.run({0, job.n_tiles(), 0, job.n_filter_groups(), share.thread, share.index, is_first});
  }

  const Separable& layers_;
  Scratch& scratch_;
  Taps taps_;  // of the first convolution
  ExpandJob expand_;
  PixelSums sums_;
};

static bool separate(const Separable& layers, Scratch& scratch) {
  if (!can_separate(layers)) return false;
  SeparableJob(layers, scratch).run();
  return true;
}

}  // namespace decouplify::DECOUPLIFY_ISA
