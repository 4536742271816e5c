// Layer norm over the channels of each pixel.
#pragma once

#include "direct.h"

namespace decouplify::DECOUPLIFY_ISA {

// A few vectors of pixels at a time, so that the three passes over their channels stay in the cache.
struct LayerNorm {
  const Norm& norm;
  const ConvolutionCall& call;  // filters: all channels of the output
  const PixelSums& sums;

  const float* input(int i, int64_t at) const { return call.in + call.channels[i] * norm.geometry.plane + at; }

  template <int NV>
  void run_tile(int64_t position, int slot) const {
    const int64_t at = norm.geometry.origin + position;
    Vec mean[NV] = {}, variance[NV] = {};
    for (int i = 0; i < call.n_channels; ++i) {
      for (int v = 0; v < NV; ++v) mean[v] += load(input(i, at) + v * kLanes);
    }
    const float per_channel = 1.0f / static_cast<float>(norm.n_channels);
    // A channel that does not exist is zero, and counts.
    const float n_missing = static_cast<float>(norm.n_channels - call.n_channels);
    for (int v = 0; v < NV; ++v) mean[v] *= per_channel, variance[v] = mean[v] * mean[v] * n_missing;
    for (int i = 0; i < call.n_channels; ++i) {
      for (int v = 0; v < NV; ++v) {
        const Vec difference = load(input(i, at) + v * kLanes) - mean[v];
        variance[v] += difference * difference;
      }
    }
    Vec scale[NV];
    for (int v = 0; v < NV; ++v) {
      const Vec shifted = variance[v] * per_channel + norm.epsilon;
      for (int k = 0; k < kLanes; ++k) scale[v][k] = 1.0f / __builtin_sqrtf(shifted[k]);
    }
    for (int i = 0, c = 0; c < norm.n_channels; ++c) {
      const bool exists = i < call.n_channels && call.channels[i] == c;
      const float* x = exists ? input(i, at) : nullptr;
      i += exists;
      Vec centred[NV];
      for (int v = 0; v < NV; ++v) centred[v] = (exists ? load(x + v * kLanes) - mean[v] : -mean[v]) * scale[v];
      for (int v = 0; v < NV; ++v) centred[v] = centred[v] * norm.weight[c] + norm.bias[c];
      float* out = call.out + c * norm.geometry.plane + norm.geometry.origin;
      const TileOutput to{nullptr, nullptr, out, nullptr, sums.of(slot, c), 0};
      finish_row<NV>(centred, to, position, norm.geometry.mask, [](Vec x) { return x; });
    }
  }

  static int n_tiles(const Geometry& g) { return divide_up(n_vectors(g), 4); }

  void run() const {
    parallel(call.n_threads, n_tiles(norm.geometry), [&](const Share& share) {
      int v = share.begin * 4;
      const int last = smaller(share.end * 4, n_vectors(norm.geometry));
      for (; v + 4 <= last; v += 4) run_tile<4>(int64_t{v} * kLanes, share.index);
      for (; v < last; ++v) run_tile<1>(int64_t{v} * kLanes, share.index);
    });
  }
};

static void normalise(const Norm& norm, const ConvolutionCall& call, Scratch& scratch) {
  const PixelSums sums(call, n_shares(call.n_threads, LayerNorm::n_tiles(norm.geometry)), scratch);
  LayerNorm{norm, call, sums}.run();
  sums.finish();
}

}  // namespace decouplify::DECOUPLIFY_ISA
