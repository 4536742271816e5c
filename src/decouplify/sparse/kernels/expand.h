// A 1x1 convolution and the depthwise convolution that alone reads it, a few filters and a band of rows at a time.
//
// Inverted residual blocks expand their channels up to sixfold between these two. The expanded map of a whole layer is
// megabytes; that of a few filters and rows stays in the first caches, and is never anywhere else.
#pragma once

#include "packed.h"
#include "window.h"

namespace decouplify::DECOUPLIFY_ISA {

constexpr int64_t kBandFloats = 256 << 10;  // input and expanded rows of one band: about a second-level cache

constexpr int64_t kFetchedFloats = 4 << 10;   // of the output, half of a first-level cache at most

// Rows [first, last) of the expanded map of a few filters, in memory of their own.
class Band {
 public:
  Band(const Geometry& g, int first, int last, float* memory) : g_(g), first_(first), last_(last), memory_(memory) {}

  // Beside the rows: border columns before the first one and what aligns it, and what the last tile writes beyond the
  // last one.
  static int64_t filter_floats(const Geometry& g, int n_rows) {
    return (int64_t{n_rows} * g.row + 2 * g.border + (kTileVectors + 2) * kLanes + 15) / 16 * 16;
  }

  float* memory() const { return memory_; }
  int first() const { return first_; }
  int last() const { return last_; }
  // Rows of the image among them.
  int first_pixel_row() const { return within(0); }
  int last_pixel_row() const { return within(g_.height); }
  // The first pixel of the image, as if all of its rows were there. Vectors of positions from it on begin cache lines.
  float* origin(int i) const {
    return memory_ + i * filter_floats(g_, last_ - first_) - whole_lines(int64_t{first_} * g_.row - g_.border);
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

// Rows [first, last) of the output, and the vectors [v0, v1) among them where vectors run across rows.
struct Rows {
  int first, last, v0, v1;
};

struct ExpandJob {
  const Convolution& expand;  // its output is what `window` reads
  const Window& window;
  const ConvolutionCall& call;  // of the input of the one and the filters of both
  Taps taps;                    // of the window
  bool by_rows, in_place;
  const PackedInput* packed;  // the input without borders, or null
  TileInput input;            // the input where it is, if it is not packed
  Scratch& scratch;

  int n_vectors() const { return DECOUPLIFY_ISA::n_vectors(window.out); }
  int filters_at_once() const { return packed == nullptr ? kTileFilters : packed->filters_at_once(); }
  int n_groups() const { return divide_up(call.n_filters, filters_at_once()); }
  int n_bands() const {
    const int64_t per_row = int64_t{call.n_channels + 2 * kTileFilters} * window.in.row;
    const int n_rows = static_cast<int>(kBandFloats / per_row);
    const int most = by_rows ? divide_up(window.out.height, kBlockRows) : divide_up(n_vectors(), kTileVectors);
    return smaller(divide_up(window.in.height, n_rows < 4 ? 4 : n_rows), most);
  }

  // Rows of the expanded map under these rows of the output.
  Band band_under(const Rows& rows, float* memory) const {
    const Axis& axis = taps.rows;
    return {window.in, rows.first * axis.stride - axis.padding,
            (rows.last - 1) * axis.stride + axis.reach(axis.kernel - 1) + 1, memory};
  }

  // A band of whole blocks of rows, or of whole vectors, which may begin in one row and end in the next.
  Rows rows_of(int i_band) const {
    const auto first_row = [&](int band) {
      return part(divide_up(window.out.height, kBlockRows), n_bands(), band) * kBlockRows;
    };
    const int v0 = part(n_vectors(), n_bands(), i_band), v1 = part(n_vectors(), n_bands(), i_band + 1);
    const int first = by_rows ? first_row(i_band) : v0 * kLanes / window.out.row;
    const int end = by_rows ? first_row(i_band + 1) : divide_up(v1 * kLanes, window.out.row);
    return {first, smaller(end, window.out.height), v0, v1};
  }

  // What tiles compute of a band, from a position in the expanded map on.
  struct Span {
    int64_t start;
    int n_vectors;
  };
  Span span_of(const Band& band) const {
    const int64_t start = whole_lines(int64_t{band.first_pixel_row()} * window.in.row);
    return {start, divide_up(static_cast<int>(int64_t{band.last_pixel_row()} * window.in.row - start), kLanes)};
  }

  // The input under these rows of the output.
  CopiedTiles tiles_under(const Rows& rows, int thread) const {
    const bool copies = packed == nullptr && can_copy(input) && n_groups() >= 4;
    const int n_tiles = divide_up(span_of(band_under(rows, nullptr)).n_vectors, kTileVectors);
    return {input, n_tiles, copies ? &scratch.transformed[thread] : nullptr};
  }

  // Both convolutions for filters [n0, n1) of the list; output_of(i) says where those of filter i go. are_copied: whether
  // other filters met the tiles before.
  template <class OutputOf>
  void run(const Rows& rows, const CopiedTiles& tiles, bool are_copied, int n0, int n1, int thread,
           OutputOf&& output_of) const {
    const Band sized = band_under(rows, nullptr);
    const int64_t n_floats = Band::filter_floats(window.in, sized.last() - sized.first()) * (n1 - n0);
    const Band band = band_under(rows, scratch.products[thread].reserve(n_floats + kTileFloats));
    const int64_t n_output = int64_t{rows.last - rows.first} * window.out.row;
    if (n_output * (n1 - n0) <= kFetchedFloats) {
      for (int i = n0; i < n1; ++i) fetch_to_write(output_of(i).out + rows.first * window.out.row, n_output);
    }
    packed == nullptr ? fill(band, tiles, are_copied, n0, n1) : fill_packed(band, n0, n1);
    for (int i = n0; i < n1; ++i) {
      band.clear_outside(i - n0);
      slide_filter(band, band.origin(i - n0), i, rows, output_of(i), thread);
    }
  }

  void fill(const Band& band, const CopiedTiles& tiles, bool are_copied, int n0, int n1) const {
    TileOutput to[kTileFilters] = {};
    for (int i = n0; i < n1; ++i) {
      const int filter = call.filters[i];
      TileOutput& o = to[i - n0];
      const int64_t n_weights = int64_t{expand.n_channels} * expand.kernel[0] * expand.kernel[1];
      o.weight = o.next_weight = expand.weight + filter * n_weights;
      o.out = band.origin(i - n0);
      o.bias = expand.bias[filter];
    }
    const Span span = span_of(band);
    TileInput in = tiles.of(0, span.start, are_copied);
    const TileFunction whole = tile_for(in.n_taps, false, n1 - n0, kTileVectors);
    TileAt tile{span.start, false, true, nothing_ahead(in.x)};
    int v = 0;
    for (; v + kTileVectors <= span.n_vectors; v += kTileVectors, tile.first += kTileFloats, tiles.advance(in)) {
      whole(in, to, tile, window.in.mask, expand.activation);
    }
    if (v == span.n_vectors) return;
    tile_for(in.n_taps, false, n1 - n0, span.n_vectors - v)(in, to, tile, window.in.mask, expand.activation);
  }

  // The whole map, which has one band then.
  void fill_packed(const Band& band, int n0, int n1) const {
    alignas(64) float products[kMostFilters * kProductFloats];
    memset(band.memory(), 0, Band::filter_floats(window.in, band.last() - band.first()) * (n1 - n0) * sizeof(float));
    for (int tile = 0; tile < packed->n_tiles(); ++tile) {
      const float* outputs[kMostFilters];
      for (int i = 0; i < n1 - n0; ++i) outputs[i] = products;  // which are in the cache
      packed->multiply(tile, n0, n1, tile == 0, nothing_ahead(call.in), outputs, 0, products);
      for (int i = n0; i < n1; ++i) {
        TileOutput to{};
        to.out = band.origin(i - n0);
        to.bias = expand.bias[call.filters[i]];
        finish_pixels(products + (i - n0) * kProductFloats, *packed, tile, to, expand.activation);
      }
    }
  }

  void slide_filter(const Band& band, const float* plane, int i, const Rows& rows, const TileOutput& to,
                    int thread) const {
    const float* weight = window.weight + int64_t{call.filters[i]} * taps.n;
    if (by_rows) return slide_rows(window, plane, weight, rows.first, rows.last, to);
    float* gathered = in_place ? nullptr : scratch.window[thread].reserve(taps.channel() + kTileFloats);
    if (!in_place) gather_band(band, plane, rows.first, rows.last, gathered);
    const WindowInput in{in_place ? plane : gathered, taps.offset, taps.n, weight};
    int v = rows.v0;
    for (; v + 4 <= rows.v1; v += 4) slide_and_finish<WindowKind::kDepthwise, 4>(in, window, int64_t{v} * kLanes, to);
    for (; v < rows.v1; ++v) slide_and_finish<WindowKind::kDepthwise, 1>(in, window, int64_t{v} * kLanes, to);
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

// The second convolution's way through memory.
static ExpandJob expand_job(const Convolution& expand, const Window& window, const ConvolutionCall& call,
                            Scratch& scratch) {
  Taps taps = taps_of(window);
  const bool in_place = reads_in_place(window);
  in_place ? place_in_plane(taps, window.in) : place_in_phases(taps, window.out);
  return {expand, window, call, taps, slides_by_rows(window), in_place, nullptr, {}, scratch};
}

static void expand_and_slide(const Convolution& expand, const Window& window, const ConvolutionCall& call,
                             Scratch& scratch) {
  if (call.n_filters == 0) return;
  ExpandJob job = expand_job(expand, window, call, scratch);
  const int n_slots = job.n_bands() == 1 ? 1 : n_shares(call.n_threads, job.n_bands() * job.n_groups());
  const PixelSums sums(call, n_slots, scratch);
  const auto run_all = [&] {
    const int n_groups = job.n_groups();
    parallel(call.n_threads, job.n_bands() * n_groups, [&](const Share& share) {
      CopiedTiles tiles(job.input, 0, nullptr);
      for (int index = share.begin; index < share.end; ++index) {
        const int group = index % n_groups;
        const int n0 = part(call.n_filters, n_groups, group), n1 = part(call.n_filters, n_groups, group + 1);
        const Rows rows = job.rows_of(index / n_groups);
        const bool are_new = group == 0 || index == share.begin;
        if (are_new) tiles = job.tiles_under(rows, share.thread);
        job.run(rows, tiles, !are_new, n0, n1, share.thread, [&](int i) {
          const int filter = call.filters[i];
          TileOutput to{};
          to.out = call.out + filter * window.out.plane + window.out.origin;
          to.partial_sum = sums.of(n_slots == 1 ? 0 : share.index, i);
          to.bias = window.bias[filter];
          return to;
        });
      }
    });
  };
  if (job.n_bands() == 1 && pays_to_pack(window.in, call.n_channels)) {
    const PackedInput packed(expand, call, scratch);
    job.packed = &packed;
    run_all();
  } else {
    Taps point = taps_of(expand);
    job.input = tile_input(expand, call, point, scratch);
    run_all();
  }
  sums.finish();
}

}  // namespace decouplify::DECOUPLIFY_ISA
