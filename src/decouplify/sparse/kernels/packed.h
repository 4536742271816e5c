// Convolution on a packed copy of its inputs: every tap of every existing channel becomes a row of pixels without gaps.
//
// Planes of 7 x 7 or 14 x 14 fill vectors badly, border columns and all. Packed, 49 pixels are three vectors and one
// pixel more, whose value is a dot product along the filter's own weights.
#pragma once

#include "direct.h"
#include "multiply.h"

namespace decouplify::DECOUPLIFY_ISA {

struct Packed {
  const Convolution& conv;
  const ConvolutionCall& call;
  const PixelSums& sums;
  Scratch& scratch;
  Taps taps;
  float* x;          // (tiles, rows, vectors of the tile)
  float* rest;       // (remaining pixels, weights of a filter), zero where a channel does not exist
  int32_t* columns;  // of each row, its place among the weights of a filter

  int n_rows() const { return call.n_channels * taps.n; }
  int64_t n_weights() const { return int64_t{conv.n_channels} * taps.n; }
  int n_pixels() const { return conv.out.height * conv.out.width; }
  // Pixels beyond the last full vector, if they are few enough for dot products.
  int n_rest() const { return n_pixels() % kLanes <= kLanes / 4 && n_pixels() > kLanes ? n_pixels() % kLanes : 0; }
  int n_vectors() const { return divide_up(n_pixels() - n_rest(), kLanes); }
  int n_tiles() const { return divide_up(n_vectors(), kTileVectors); }
  int tile_start(int tile) const { return part(n_vectors(), n_tiles(), tile); }

  void pack() const {
    if (n_rest() > 0) memset(rest, 0, n_rest() * n_weights() * sizeof(float));
    parallel(call.n_threads, call.n_channels, [&](int begin, int end, int thread) {
      float* pixels = scratch.window[thread].reserve(n_pixels() + 4 * kLanes);
      for (int i = begin; i < end; ++i) {
        for (int t = 0; t < taps.n; ++t) pack_row(call.channels[i], t, i * taps.n + t, pixels);
      }
    });
  }

  void pack_row(int channel, int tap, int row, float* pixels) const {
    const Geometry &in = conv.in, &out = conv.out;
    const float* plane = call.in + channel * in.plane + in.origin;
    const int first_row = taps.rows.reach(tap / taps.columns.kernel);
    const int first_column = taps.columns.reach(tap % taps.columns.kernel);
    for (int y = 0; y < out.height; ++y) {
      const int from = first_row + y * taps.rows.stride;
      const bool exists = from >= 0 && from < in.height;
      gather_row(exists ? plane + int64_t{from} * in.row : plane, exists ? in.width : 0, first_column,
                 taps.columns.stride, pixels + y * out.width, out.width, 0.0f);
    }
    const int column = channel * taps.n + tap;
    columns[row] = column;
    for (int i = 0; i < n_rest(); ++i) rest[i * n_weights() + column] = pixels[n_pixels() - n_rest() + i];
    for (int tile = 0; tile < n_tiles(); ++tile) {
      const int v0 = tile_start(tile), n = tile_start(tile + 1) - v0;
      float* to = x + (int64_t{v0} * n_rows() + int64_t{row} * n) * kLanes;
      for (int v = 0; v < n; ++v) store(to + v * kLanes, load(pixels + (v0 + v) * kLanes));
    }
  }

  void run() const {
    const int n_groups = divide_up(call.n_filters, filters_at_once(divide_up(n_vectors(), n_tiles())));
    const bool share_filters = n_tiles() < 2 * call.n_threads;
    parallel(call.n_threads, share_filters ? n_groups : n_tiles(), [&](int begin, int end, int thread) {
      // A tile of inputs stays in the cache while the weights pass by.
      const int tile0 = share_filters ? 0 : begin, tile1 = share_filters ? n_tiles() : end;
      const int group0 = share_filters ? begin : 0, group1 = share_filters ? end : n_groups;
      for (int tile = tile0; tile < tile1; ++tile) {
        for (int group = group0; group < group1; ++group) run_group(tile, group, n_groups, thread);
      }
    });
  }

  void run_group(int tile, int group, int n_groups, int thread) const {
    const int n0 = part(call.n_filters, n_groups, group), n1 = part(call.n_filters, n_groups, group + 1);
    const int v0 = tile_start(tile), n_vectors = tile_start(tile + 1) - v0;
    alignas(64) float products[kMostFilters * (kTileVectors + 1) * kLanes];
    const float *weights[kMostFilters], *next_weights[kMostFilters];
    for (int i = n0; i < n1; ++i) {
      weights[i - n0] = conv.weight + call.filters[i] * n_weights();
      next_weights[i - n0] = conv.weight + call.filters[(i + n1 - n0) % call.n_filters] * n_weights();
    }
    const int64_t stride = (kTileVectors + 1) * kLanes;
    const float* inputs = x + int64_t{v0} * n_rows() * kLanes;
    multiply_for<true>(n1 - n0, n_vectors)(inputs, columns, n_rows(), weights, next_weights, products, stride);
    const bool is_last = tile + 1 == n_tiles();
    const int n = is_last ? n_pixels() - v0 * kLanes : n_vectors * kLanes;
    for (int i = n0; i < n1; ++i) {
      float* found = products + (i - n0) * stride;
      if (is_last) add_rest(weights[i - n0], found + n_vectors * kLanes);
      finish(found, v0 * kLanes, n, i, thread);
    }
  }

  // The dot products of the remaining pixels.
  void add_rest(const float* weight, float* to) const {
    for (int i = 0; i < n_rest(); ++i) {
      const float* values = rest + i * n_weights();
      Vec total[4] = {};
      int64_t k = 0;
      for (; k + 4 * kLanes <= n_weights(); k += 4 * kLanes) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) total[j] += load(weight + k + j * kLanes) * load(values + k + j * kLanes);
      }
      float dot = sum((total[0] + total[1]) + (total[2] + total[3]));
      for (; k < n_weights(); ++k) dot += weight[k] * values[k];
      to[i] = dot;
    }
  }

  // Pixels [first, first + n) of one filter to their rows.
  void finish(const float* values, int first, int n, int i, int thread) const {
    const TileOutput to = output_of(conv, call, call.filters[i]);
    Vec total{};
    int y = first / conv.out.width, column = first % conv.out.width;
    while (n > 0) {
      const int length = smaller(n, conv.out.width - column);
      const int64_t at = int64_t{y} * conv.out.row + column;
      for (int k = 0; k < length; k += kLanes) {
        Vec v = load(values + k) + to.bias;
        if (to.residual != nullptr) v += load(to.residual + at + k);
        v = activate(v, conv.activation);
        total += keep(v, lanes_below(length - k));
        store_first(to.out + at + k, v, length - k);
      }
      values += length, n -= length, column = 0, ++y;
    }
    float* partial = sums.of(thread, i);
    if (partial != nullptr) store(partial, load(partial) + total);
  }
};

static void convolve_packed(const Convolution& conv, const ConvolutionCall& call, Scratch& scratch) {
  const PixelSums sums(call, scratch);
  Packed packed{conv, call, sums, scratch, taps_of(conv), nullptr, nullptr, nullptr};
  const int64_t n_rows = packed.n_rows();
  const int64_t n_packed = n_rows * packed.n_vectors() * kLanes, n_rest = packed.n_rest() * packed.n_weights();
  packed.x = scratch.gathered.reserve(n_packed + n_rest);
  packed.rest = packed.x + n_packed;
  packed.columns = reinterpret_cast<int32_t*>(scratch.lists.reserve(n_rows));
  packed.pack();
  packed.run();
  sums.finish();
}

}  // namespace decouplify::DECOUPLIFY_ISA
