// Depthwise convolution and pooling: windows over one channel at a time.
#pragma once

#include <limits>

#include "depthwise.h"
#include "pool.h"

namespace decouplify::DECOUPLIFY_ISA {

// One channel of a window, a few vectors of positions at a time.
struct WindowInput {
  const float* x;
  const int64_t* tap;
  int n_taps;
  const float* weight;  // per tap, depthwise only
};

template <WindowKind KIND, int NV>
DECOUPLIFY_INLINE void slide_tile(const WindowInput& in, const Window& window, int64_t at, float bias, Vec (&acc)[NV]) {
  const float start = KIND == WindowKind::kMax ? -std::numeric_limits<float>::infinity() : bias;
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) acc[v] = splat(start);
  for (int t = 0; t < in.n_taps; ++t) {
    const float* x = in.x + in.tap[t] + at;
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const Vec value = load(x + v * kLanes);
      if (KIND == WindowKind::kMax) acc[v] = maximum(acc[v], value);
      if (KIND == WindowKind::kAverage) acc[v] += value;
      if (KIND == WindowKind::kDepthwise) acc[v] += value * splat(in.weight[t]);
    }
  }
  if (KIND != WindowKind::kAverage) return;
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) acc[v] *= load(window.scale + at + v * kLanes);
}

template <WindowKind KIND, int NV>
DECOUPLIFY_INLINE void slide_and_finish(const WindowInput& in, const Window& window, int64_t at,
                                        const TileOutput& to) {
  Vec acc[NV];
  slide_tile<KIND, NV>(in, window, at, to.bias, acc);
  with_activation(window.activation, [&](const auto& activate) DECOUPLIFY_INLINE_LAMBDA {
    finish_row<NV>(acc, to, at, window.out.mask, activate);
  });
}

template <WindowKind KIND>
static void slide_channel(const WindowInput& in, const Window& window, const TileOutput& to) {
  const int n = n_vectors(window.out);
  int v = 0;
  for (; v + 4 <= n; v += 4) slide_and_finish<KIND, 4>(in, window, int64_t{v} * kLanes, to);
  for (; v < n; ++v) slide_and_finish<KIND, 1>(in, window, int64_t{v} * kLanes, to);
}

static void slide_any(const WindowInput& in, const Window& window, const TileOutput& to) {
  switch (window.kind) {
    case WindowKind::kDepthwise: return slide_channel<WindowKind::kDepthwise>(in, window, to);
    case WindowKind::kMax: return slide_channel<WindowKind::kMax>(in, window, to);
    case WindowKind::kAverage: return slide_channel<WindowKind::kAverage>(in, window, to);
  }
}

static void slide(const Window& window, const WindowCall& call, Scratch& scratch) {
  const bool is_depthwise = window.kind == WindowKind::kDepthwise;
  const bool slides = slides_by_rows(window), pools = pools_by_rows(window);
  // The border of the planes is zero, which is not what a maximum needs outside the image.
  const bool in_place = slides || pools || (reads_in_place(window) && window.kind != WindowKind::kMax);
  Taps taps = taps_of(window);
  in_place ? place_in_plane(taps, window.in) : place_in_phases(taps, window.out);
  const float outside = window.kind == WindowKind::kMax ? -std::numeric_limits<float>::infinity() : 0.0f;
  parallel(call.n_threads, call.n_channels, [&](const Share& share) {
    float* gathered = in_place ? nullptr : scratch.window[share.thread].reserve(taps.channel() + kTileFloats);
    for (int i = share.begin; i < share.end; ++i) {
      const int channel = call.channels[i];
      const float* plane = call.in + channel * window.in.plane + window.in.origin;
      const bool exists = call.live[channel];
      if (exists && !in_place) gather_channel(plane, plane, taps, window.in, window.out, gathered, outside);
      alignas(64) float partial[kLanes] = {};
      const WindowInput in{in_place ? plane : gathered, taps.offset, exists ? taps.n : 0,
                           is_depthwise ? window.weight + int64_t{channel} * taps.n : nullptr};
      const TileOutput to{nullptr, nullptr, call.out + channel * window.out.plane + window.out.origin, nullptr,
                          call.sums == nullptr ? nullptr : partial, is_depthwise ? window.bias[channel] : 0.0f};
      if (slides && exists) {
        slide_rows(window, plane, in.weight, 0, window.out.height, to);
      } else {
        pools && exists ? pool_rows(window, plane, 0, window.out.height, to) : slide_any(in, window, to);
      }
      if (call.sums != nullptr) call.sums[channel] = sum(load(partial));
    }
  });
}

}  // namespace decouplify::DECOUPLIFY_ISA
