// A 1x1 convolution and the depthwise convolution that alone reads it, a few filters and a band of rows at a time.
//
// Inverted residual blocks expand their channels up to sixfold between these two. The expanded map of a whole layer is
// megabytes; that of a few filters and rows stays in the first caches, and is never anywhere else.
#pragma once

#include "packed.h"
#include "window.h"

namespace decouplify::DECOUPLIFY_ISA {

constexpr int64_t kBandFloats = 256 << 10;  // input and expanded rows of one band: about a second-level cache

// Rows [first, last) of the expanded map of a few filters, in memory of their own.
class Band {
 public:
  Band(const Geometry& g, int first, int last, float* memory) : g_(g), first_(first), last_(last), memory_(memory) {}

  // Beside the rows: border columns before the first one, and what the last tile writes beyond the last one.
  static int64_t filter_floats(const Geometry& g, int n_rows) {
    return (int64_t{n_rows} * g.row + 2 * g.border + (kTileVectors + 1) * kLanes + 15) / 16 * 16;
  }

  float* memory() const { return memory_; }
  int first() const { return first_; }
  int last() const { return last_; }
  // Rows of the image among them.
  int first_pixel_row() const { return within(0); }
  int last_pixel_row() const { return within(g_.height); }
  // The first pixel of the image, as if all of its rows were there.
  float* origin(int i) const {
    return memory_ + i * filter_floats(g_, last_ - first_) + g_.border - int64_t{first_} * g_.row;
  }
  // Zeros above and below the image; to be called after the rows were written, for tiles write beyond their end.
  void clear_outside(int i) const {
    const int64_t above = first_pixel_row() - first_, below = last_ - last_pixel_row();
    float* top = origin(i) + int64_t{first_} * g_.row - g_.border;
    memset(top, 0, (above * g_.row + g_.border) * sizeof(float));
    if (below > 0) memset(origin(i) + int64_t{last_pixel_row()} * g_.row, 0, (below * g_.row + g_.border) * sizeof(float));
  }

 private:
  int within(int row) const { return row < first_ ? first_ : smaller(row, last_); }

  const Geometry& g_;
  int first_, last_;
  float* memory_;
};

struct ExpandJob {
  const Convolution& expand;  // its output is what `window` reads
  const Window& window;
  const ConvolutionCall& call;  // of the input of the one and the output of the other
  const PixelSums& sums;
  Taps taps;
  bool by_rows, in_place;
  const PackedInput* packed;  // the input without borders, or null
  const int64_t* offsets;     // its channels where they are, if it is not packed
  const int32_t* columns;
  Scratch& scratch;

  int n_vectors() const { return divide_up((window.out.height - 1) * window.out.row + window.out.width, kLanes); }
  int n_groups() const {
    return divide_up(call.n_filters, packed == nullptr ? kTileFilters : packed->filters_at_once());
  }
  int n_bands() const {
    const int64_t per_row = int64_t{call.n_channels + 2 * kTileFilters} * window.in.row;
    const int n_rows = static_cast<int>(kBandFloats / per_row);
    const int most = by_rows ? divide_up(window.out.height, kBlockRows) : divide_up(n_vectors(), kTileVectors);
    return smaller(divide_up(window.in.height, n_rows < 4 ? 4 : n_rows), most);
  }

  // Rows of the expanded map under output rows [first, last).
  Band band_under(int first, int last, float* memory) const {
    const Axis& rows = taps.rows;
    return {window.in, first * rows.stride - rows.padding, (last - 1) * rows.stride + rows.reach(rows.kernel - 1) + 1,
            memory};
  }

  // Of a band of whole blocks of rows.
  int first_row(int i_band) const {
    return part(divide_up(window.out.height, kBlockRows), n_bands(), i_band) * kBlockRows;
  }

  void run(int index, int thread) const {
    const int i_band = index / n_groups(), group = index % n_groups();
    const int n0 = part(call.n_filters, n_groups(), group), n1 = part(call.n_filters, n_groups(), group + 1);
    const int v0 = part(n_vectors(), n_bands(), i_band), v1 = part(n_vectors(), n_bands(), i_band + 1);
    // A vector may begin in one row and end in the next.
    const int first = by_rows ? first_row(i_band) : v0 * kLanes / window.out.row;
    const int end = by_rows ? first_row(i_band + 1) : divide_up(v1 * kLanes, window.out.row);
    const int last = smaller(end, window.out.height);
    const Band sized = band_under(first, last, nullptr);
    const int64_t n_floats = Band::filter_floats(window.in, sized.last() - sized.first()) * (n1 - n0);
    const Band band = band_under(first, last, scratch.products[thread].reserve(n_floats + kTileVectors * kLanes));
    packed == nullptr ? fill(band, n0, n1) : fill_packed(band, n0, n1);
    for (int i = n0; i < n1; ++i) {
      band.clear_outside(i - n0);
      slide_filter(band, band.origin(i - n0), i, first, last, v0, v1, thread);
    }
  }

  void fill(const Band& band, int n0, int n1) const {
    const int64_t start = int64_t{band.first_pixel_row()} * window.in.row;
    const int64_t n = int64_t{band.last_pixel_row() - band.first_pixel_row()} * window.in.row;
    const int n_tile = divide_up(static_cast<int>(n), kLanes);
    for (int v = 0; v < n_tile; v += kTileVectors) {
      const int64_t at = start + int64_t{v} * kLanes;
      TileOutput to[kTileFilters] = {};
      for (int i = n0; i < n1; ++i) {
        const int filter = call.filters[i];
        TileOutput& o = to[i - n0];
        o.weight = o.next_weight = expand.weight + int64_t{filter} * expand.n_channels;
        o.out = band.origin(i - n0) + at;
        o.bias = expand.bias[filter];
      }
      const TileInput in{call.in + window.in.origin + at, offsets, columns, call.n_channels, taps_of_point(), 1, nothing_ahead(call.in)};
      tile_for(1, n1 - n0, smaller(kTileVectors, n_tile - v))(in, to, window.in.mask + at, expand.activation);
    }
  }

  // The whole map, which has one band then.
  void fill_packed(const Band& band, int n0, int n1) const {
    alignas(64) float products[kMostFilters * kProductFloats];
    memset(band.memory(), 0, Band::filter_floats(window.in, band.last() - band.first()) * (n1 - n0) * sizeof(float));
    for (int tile = 0; tile < packed->n_tiles(); ++tile) {
      packed->multiply(tile, n0, n1, nothing_ahead(call.in), products);
      for (int i = n0; i < n1; ++i) {
        TileOutput to{};
        to.out = band.origin(i - n0);
        to.bias = expand.bias[call.filters[i]];
        finish_pixels(products + (i - n0) * kProductFloats, packed->first_pixel(tile), packed->n_pixels(tile),
                      window.in, to, expand.activation);
      }
    }
  }

  static const int64_t* taps_of_point() {
    static constexpr int64_t kPoint[1] = {0};
    return kPoint;
  }

  void slide_filter(const Band& band, const float* plane, int i, int first, int last, int v0, int v1, int thread) const {
    const int filter = call.filters[i];
    const float* weight = window.weight + int64_t{filter} * taps.n;
    TileOutput to{};
    to.out = call.out + filter * window.out.plane + window.out.origin;
    to.partial_sum = sums.of(thread, i);
    to.bias = window.bias[filter];
    if (by_rows) return slide_rows(window, plane, weight, first, last, to);
    float* gathered = in_place ? nullptr : scratch.window[thread].reserve(taps.channel() + kTileVectors * kLanes);
    if (!in_place) gather_band(band, plane, first, last, gathered);
    const WindowInput in{in_place ? plane : gathered, taps.offset, taps.n, weight};
    int v = v0;
    for (; v + 4 <= v1; v += 4) slide_and_finish<WindowKind::kDepthwise, 4>(in, window, int64_t{v} * kLanes, to);
    for (; v < v1; ++v) slide_and_finish<WindowKind::kDepthwise, 1>(in, window, int64_t{v} * kLanes, to);
  }

  // What gather_channel does, for the rows that output rows [first, last) need.
  void gather_band(const Band& band, const float* plane, int first, int last, float* to) const {
    const Axis &rows = taps.rows, &columns_axis = taps.columns;
    const int n_rows = last + rows.last() - rows.first();
    for (int a = 0; a < rows.n_phases(); ++a) {
      for (int b = 0; b < columns_axis.n_phases(); ++b, to += taps.plane) {
        for (int i = first; i < n_rows; ++i) {
          const int y = (i + rows.first()) * rows.stride + a;
          if (y < band.first() || y >= band.last()) continue;  // a row that no tap of this phase reads
          gather_row(plane + int64_t{y} * window.in.row, window.in.width, columns_axis.first() * columns_axis.stride + b,
                     columns_axis.stride, to + int64_t{i} * window.out.row, window.out.row, 0.0f);
        }
      }
    }
  }
};

// Whether copying the input and the products costs less than computing on the borders does, which about a dozen
// products per vector of pixels would do as well.
static bool pays_to_pack(const Geometry& g, int n_channels) {
  const int n_pixels = g.height * g.width, n_flat = divide_up(static_cast<int>(flat_size(g)), kLanes);
  const int n_packed = n_pixels / kLanes + (n_rest_pixels(n_pixels, n_channels, n_channels) < n_pixels % kLanes);
  return int64_t{n_flat - n_packed} * n_channels > 12 * int64_t{n_packed};
}

static void expand_and_slide(const Convolution& expand, const Window& window, const ConvolutionCall& call,
                             Scratch& scratch) {
  if (call.n_filters == 0) return;
  Taps taps = taps_of(window);
  const bool in_place = reads_in_place(window);
  in_place ? place_in_plane(taps, window.in) : place_in_phases(taps, window.out);
  const PixelSums sums(call, scratch);
  const auto run = [&](const ExpandJob& job) {
    parallel(call.n_threads, job.n_bands() * job.n_groups(), [&](int begin, int end, int thread) {
      for (int i = begin; i < end; ++i) job.run(i, thread);
    });
  };
  ExpandJob job{expand, window, call, sums, taps, slides_by_rows(window), in_place, nullptr, nullptr, nullptr, scratch};
  if (job.n_bands() == 1 && pays_to_pack(window.in, call.n_channels)) {
    const PackedInput packed(expand, call, scratch);
    job.packed = &packed;
    run(job);
  } else {
    auto* offsets = reinterpret_cast<int64_t*>(scratch.lists.reserve(size_t(call.n_channels) * 3 + 1));
    auto* columns = reinterpret_cast<int32_t*>(offsets + call.n_channels);
    for (int i = 0; i < call.n_channels; ++i) {
      offsets[i] = call.channels[i] * window.in.plane;
      columns[i] = call.channels[i];
    }
    job.offsets = offsets;
    job.columns = columns;
    run(job);
  }
  sums.finish();
}

}  // namespace decouplify::DECOUPLIFY_ISA
