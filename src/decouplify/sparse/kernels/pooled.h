// The convolution of stride 2 that a network begins with, and the maxima that alone read it, a band of rows at a time.
//
// Its map is the largest of the whole network: written by one step and read by the next, it goes to memory and back.
#pragma once

#include "window.h"
#include "winograd.h"

namespace decouplify::DECOUPLIFY_ISA {

constexpr int64_t kPooledBand = 128 << 10;  // floats of the map in one band, half of a second-level cache
constexpr int kKeptRows = 2;                // of a band, which windows of the next one may reach

class PooledJob {
 public:
  PooledJob(const Convolution& conv, const ConvolutionCall& call, const Window& window, const WindowCall& pooled,
            Scratch& scratch)
      : conv_(conv), call_(call), window_(window), pooled_(pooled), scratch_(scratch) {
    band_.row = conv.out.row;
    band_.plane = whole_lines(int64_t{n_rows() + kKeptRows} * band_.row + 2 * kLanes + 15);
    if (band_.plane % 1024 == 0) band_.plane += 16;  // planes a page apart would fight for the same cache sets
    band_.origin = int64_t{kKeptRows} * band_.row;
    memory_ = scratch.band.reserve(band_.plane * conv.n_filters + 4 * kLanes);  // vectors read beyond the last row
  }

  void run() const {
    const Sources sources = strided_sources(conv_, call_, scratch_);
    for (int i = 0; i < pooled_.n_channels && pooled_.sums != nullptr; ++i) pooled_.sums[pooled_.channels[i]] = 0.0f;
    int pooled = 0;
    for (int first = 0; first < conv_.out.height; first += n_rows()) {
      const int last = smaller(first + n_rows(), conv_.out.height);
      convolve(sources, first, last);
      const bool is_last = last == conv_.out.height;
      const int end = is_last ? window_.out.height : rows_above(last);
      pool(first, pooled, end);
      if (!is_last) keep_last_rows();
      pooled = end;
    }
  }

 private:
  // Whole tiles, and an even number.
  int n_rows() const {
    const int most = static_cast<int>(kPooledBand / (int64_t{conv_.out.row} * conv_.n_filters)) / 4 * 4;
    return most < 4 ? 4 : most;
  }

  // Rows of the output whose windows end before a row of the map.
  int rows_above(int row) const {
    const int last = row - window_.kernel[0] + window_.padding[0];
    return last < 0 ? 0 : smaller(last / 2 + 1, window_.out.height);
  }

  void convolve(Sources sources, int first, int last) const {
    const auto move = [&](int64_t by) {
      for (int i = 0; i < sources.n; ++i) sources.plane[i] += by * sources.row;
    };
    Convolution conv = conv_;
    conv.out.height = last - first;
    conv.out.plane = band_.plane, conv.out.origin = band_.origin;
    ConvolutionCall call = call_;
    call.out = memory_, call.sums = nullptr;
    if (first > 0) call.ahead.n_lines[0] = call.ahead.n_lines[1] = 0;
    move(first);
    Winograd<Transform44, 1>(conv, call, sources, scratch_).run();
    move(-first);
  }

  // Rows [begin, end) of the output, from a band whose first row is `first`.
  void pool(int first, int begin, int end) const {
    parallel(pooled_.n_threads, pooled_.n_channels, [&](const Share& share) {
      for (int i = share.begin; i < share.end; ++i) {
        const int channel = pooled_.channels[i];
        const float* plane = memory_ + channel * band_.plane + band_.origin - int64_t{first} * band_.row;
        alignas(64) float partial[kLanes] = {};
        const TileOutput output{nullptr, nullptr, pooled_.out + channel * window_.out.plane + window_.out.origin,
                                nullptr, pooled_.sums == nullptr ? nullptr : partial, 0.0f};
        pool_rows(window_, plane, begin, end, output);
        if (pooled_.sums != nullptr) pooled_.sums[channel] += sum(load(partial));
      }
    });
  }

  // Of a whole band, for the next one.
  void keep_last_rows() const {
    for (int i = 0; i < pooled_.n_channels; ++i) {
      float* plane = memory_ + pooled_.channels[i] * band_.plane;
      memcpy(plane, plane + int64_t{n_rows()} * band_.row, kKeptRows * band_.row * sizeof(float));
    }
  }

  const Convolution& conv_;
  const ConvolutionCall& call_;
  const Window& window_;
  const WindowCall& pooled_;
  Scratch& scratch_;
  Geometry band_{};  // its planes begin with the rows kept
  float* memory_;
};

static bool convolve_and_pool(const Convolution& conv, const ConvolutionCall& call, const Window& window,
                              const WindowCall& pooled, Scratch& scratch) {
  if (conv.algorithm != Algorithm::kWinogradStrided || call.n_filters == 0) return false;
  if (!pools_by_rows(window) || window.stride[0] != 2) return false;
  PooledJob(conv, call, window, pooled, scratch).run();
  return true;
}

}  // namespace decouplify::DECOUPLIFY_ISA
