// Convolution on a packed copy of its inputs: every tap of every existing channel becomes a row of pixels without gaps.
//
// Planes of 7 x 7 or 14 x 14 fill vectors badly, border columns and all. Packed, 49 pixels are three vectors and one
// pixel more, whose value is a dot product along the filter's own weights.
#pragma once

#include "compact.h"
#include "direct.h"
#include "multiply.h"

namespace decouplify::DECOUPLIFY_ISA {

// Where the products of one filter and tile lie: whole vectors, the remaining pixels, and a vector that reads may touch.
constexpr int kProductFloats = (kTileVectors + 2) * kLanes;

// Dot products that are computed together: filters times pixels.
constexpr int kRestFilters = 4, kRestPixels = kTileVectors == 4 ? 4 : 2;

// Pixels beyond the last full vector, if dot products are the better way to them.
static int n_rest_pixels(int n_pixels, int n_rows, int64_t n_weights) {
  constexpr int kAcross = 24;  // a sum across lanes takes as long as this many products
  const int n = n_pixels % kLanes;
  return n_pixels > kLanes && n * (n_weights / kLanes + kAcross) < n_rows ? n : 0;
}

// Copies what a tile of n vectors reads of one channel.
DECOUPLIFY_INLINE void copy_vectors(const float* from, float* to, int n) {
  if (n == kTileVectors) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) store(to + v * kLanes, load(from + v * kLanes));
  } else {
    for (int v = 0; v < n; ++v) store(to + v * kLanes, load(from + v * kLanes));
  }
}

// What a convolution reads of its inputs, as a matrix of rows (channel and tap) times pixels.
class PackedInput {
 public:
  PackedInput(const Convolution& conv, const ConvolutionCall& call, Scratch& scratch)
      : conv_(conv), call_(call), scratch_(scratch), taps_(taps_of(conv)), in_place_(reads_in_place(conv)) {
    in_place_ ? place_in_plane(taps_, conv.in) : place_in_phases(taps_, conv.out);
    n_rest_ = n_rest_pixels(n_pixels(), n_rows(), n_weights());
    const int64_t n_packed = int64_t{n_rows()} * n_vectors() * kLanes;
    x_ = scratch.gathered.reserve(n_packed + n_rest_ * n_weights());
    rest_ = x_ + n_packed;
    list_chunks();
    pack();
  }

  int n_rows() const { return call_.n_channels * taps_.n; }
  int64_t n_weights() const { return int64_t{conv_.n_channels} * taps_.n; }
  int n_pixels() const { return conv_.out.height * conv_.out.width; }
  int n_tiles() const { return divide_up(n_vectors(), kTileVectors); }
  int filters_at_once() const { return DECOUPLIFY_ISA::filters_at_once(divide_up(n_vectors(), n_tiles())); }
  int first_pixel(int tile) const { return tile_start(tile) * kLanes; }
  int n_pixels(int tile) const {
    return (tile + 1 == n_tiles() ? n_pixels() : first_pixel(tile + 1)) - first_pixel(tile);
  }
  // Where the pixels of a tile belong in an output plane.
  const Chunk* first_chunk(int tile) const { return chunks_ + first_chunk_[tile]; }
  const Chunk* last_chunk(int tile) const { return chunks_ + first_chunk_[tile + 1]; }
  const float* weights_of(int filter) const { return conv_.weight + filter * n_weights(); }

  // The products of filters [n0, n1) of the call's list with one tile, kProductFloats apart. fetches: whether their
  // weights are met for the first time; then those of the next filters, the outputs and the stream are fetched
  // meanwhile.
  void multiply(int tile, int n0, int n1, bool fetches, Stream ahead, const float* const* outputs, int64_t n_outputs,
                float* products) const {
    const float *weights[kMostFilters], *next_weights[kMostFilters];
    for (int i = n0; i < n1; ++i) {
      weights[i - n0] = weights_of(call_.filters[i]);
      if (!fetches) continue;
      const int next = i + n1 - n0;
      next_weights[i - n0] = weights_of(call_.filters[next < call_.n_filters ? next : i]);
    }
    const int v0 = tile_start(tile), n = tile_start(tile + 1) - v0;
    const float* inputs = x_ + int64_t{v0} * n_rows() * kLanes;
    const MultiplyFunction run = multiply_for<true>(fetches, are_in_order(columns_, n_rows()), n1 - n0, n);
    const Factors factors{inputs, columns_, weights, 0, n_rows(), part_per_fetch(n_rows())};
    run(factors, {next_weights, 0, ahead, outputs, n_outputs}, products, kProductFloats);
    if (n_rest_ == 0 || tile + 1 < n_tiles()) return;
    multiply_rest(weights, n1 - n0, products + n * kLanes);
  }

 private:
  int n_vectors() const { return divide_up(n_pixels() - n_rest_, kLanes); }
  int tile_start(int tile) const { return part(n_vectors(), n_tiles(), tile); }

  // Found once, because dividing by the width of a row takes as long as finishing a few pixels.
  void list_chunks() {
    const int n_chunks = most_chunks(conv_.out, n_tiles());
    const size_t n_bytes = n_chunks * sizeof(Chunk) + (n_tiles() + 1 + n_rows()) * sizeof(int32_t);
    chunks_ = reinterpret_cast<Chunk*>(scratch_.lists.reserve(divide_up(static_cast<int>(n_bytes), sizeof(float))));
    first_chunk_ = reinterpret_cast<int32_t*>(chunks_ + n_chunks);
    columns_ = first_chunk_ + n_tiles() + 1;
    first_chunk_[0] = 0;
    for (int tile = 0; tile < n_tiles(); ++tile) {
      Chunk* to = chunks_ + first_chunk_[tile];
      first_chunk_[tile + 1] = first_chunk_[tile] + find_chunks(conv_.out, first_pixel(tile), n_pixels(tile), to);
    }
  }

  void pack() const {
    if (n_rest_ > 0) memset(rest_, 0, n_rest_ * n_weights() * sizeof(float));
    parallel(call_.n_threads, call_.n_channels, [&](const Share& share) {
      const int64_t n_phases = in_place_ ? 0 : taps_.channel() + kTileFloats;
      float* pixels = scratch_.window[share.thread].reserve(n_pixels() + 4 * kLanes + n_phases);
      float* phases = pixels + n_pixels() + 4 * kLanes;
      const int64_t n_floats = flat_size(conv_.in);
      const int n_ahead = planes_ahead(n_floats);
      for (int i = share.begin; i < share.end; ++i) {
        const float* plane = plane_of(call_.channels[i]);
        if (in_place_ && i + n_ahead < share.end) fetch_to_read(plane_of(call_.channels[i + n_ahead]), n_floats);
        if (!in_place_) {
          const float* next = plane_of(call_.channels[i + 1 < share.end ? i + 1 : i]);
          gather_channel(plane, next, taps_, conv_.in, conv_.out, phases, 0.0f);
          plane = phases;
        }
        for (int t = 0; t < taps_.n; ++t) {
          compact(plane + taps_.offset[t], conv_.out, pixels);
          pack_row(pixels, i * taps_.n + t, call_.channels[i] * taps_.n + t);
        }
      }
    });
  }

  const float* plane_of(int channel) const { return call_.in + channel * conv_.in.plane + conv_.in.origin; }

  // The pixels of one channel and tap, whose weights are at `column` in each filter.
  void pack_row(const float* pixels, int row, int column) const {
    columns_[row] = column;
    for (int i = 0; i < n_rest_; ++i) rest_[i * n_weights() + column] = pixels[n_pixels() - n_rest_ + i];
    for (int tile = 0; tile < n_tiles(); ++tile) {
      const int v0 = tile_start(tile), n = tile_start(tile + 1) - v0;
      float* to = x_ + (int64_t{v0} * n_rows() + int64_t{row} * n) * kLanes;
      copy_vectors(pixels + v0 * kLanes, to, n);
    }
  }

  // The dot products of the remaining pixels with the weights of n filters.
  void multiply_rest(const float* const* weights, int n, float* products) const {
    for (int f = 0; f < n; f += kRestFilters) {
      const float* rows[kRestFilters];
      for (int i = 0; i < kRestFilters; ++i) rows[i] = weights[smaller(f + i, n - 1)];
      const int n_filters = smaller(n - f, kRestFilters);
      float* to = products + f * kProductFloats;
      for (int p = 0; p < n_rest_;) {
        const bool several = p + kRestPixels <= n_rest_;
        several ? add_dots<kRestPixels>(rows, n_filters, p, to) : add_dots<1>(rows, n_filters, p, to);
        p += several ? kRestPixels : 1;
      }
    }
  }

  // Those of N pixels from `pixel` on; there are always kRestFilters rows. Even and odd vectors of a single pixel are
  // added up apart, for a product waits for the sum before it.
  template <int N>
  void add_dots(const float* const* rows, int n_filters, int pixel, float* to) const {
    constexpr int kApart = N == 1 ? 2 : 1;
    const int64_t n = n_weights();
    const float* x = rest_ + pixel * n;
    Vec acc[kApart][N][kRestFilters] = {};
    int64_t i = 0;
    const auto add = [&](Vec (&sums)[N][kRestFilters]) DECOUPLIFY_INLINE_LAMBDA {
      Vec w[kRestFilters];
#pragma GCC unroll 4
      for (int f = 0; f < kRestFilters; ++f) w[f] = load(rows[f] + i);
#pragma GCC unroll 4
      for (int p = 0; p < N; ++p) {
        const Vec value = load(x + p * n + i);
#pragma GCC unroll 4
        for (int f = 0; f < kRestFilters; ++f) sums[p][f] += w[f] * value;
      }
      i += kLanes;
    };
    while (i + kApart * kLanes <= n) {
#pragma GCC unroll 2
      for (int k = 0; k < kApart; ++k) add(acc[k]);
    }
    while (i + kLanes <= n) add(acc[0]);
#pragma GCC unroll 4
    for (int p = 0; p < N; ++p) {
#pragma GCC unroll 4
      for (int f = 0; f < kRestFilters && kApart == 2; ++f) acc[0][p][f] += acc[1 % kApart][p][f];
      const auto& sums = acc[0][p];
      const Vec totals = sums_of(sums[0], sums[1], sums[2], sums[3]);
      for (int f = 0; f < n_filters; ++f) {
        float total = totals[f];
        for (int64_t k = i; k < n; ++k) total += rows[f][k] * x[p * n + k];
        to[f * kProductFloats + pixel + p] = total;
      }
    }
  }

  const Convolution& conv_;
  const ConvolutionCall& call_;
  Scratch& scratch_;
  Taps taps_;
  bool in_place_;
  int n_rest_ = 0;
  float* x_;          // (tiles, rows, vectors of the tile)
  float* rest_;       // (remaining pixels, weights of a filter), zero where a channel does not exist
  Chunk* chunks_;
  int32_t* first_chunk_;  // of each tile
  int32_t* columns_;      // of each row, its place among the weights of a filter
};

// Products of one tile to the plane of one filter.
DECOUPLIFY_INLINE void finish_pixels(const float* products, const PackedInput& input, int tile, const TileOutput& to,
                                     const Activation& activation) {
  Vec total{};
  const Chunk* end = input.last_chunk(tile);
  with_activation(activation, [&](const auto& activate) DECOUPLIFY_INLINE_LAMBDA {
    for (const Chunk* c = input.first_chunk(tile); c != end; ++c) {
      Vec v = spread(products + c->index, c->lanes) + to.bias;
      if (to.residual != nullptr) v += load(to.residual + c->at);
      v = keep_lanes(activate(v), c->lanes);
      total += v;
      store_lanes(to.out + c->at, v, c->lanes);
    }
  });
  if (to.partial_sum != nullptr) store(to.partial_sum, load(to.partial_sum) + total);
}

struct PackedJob {
  const Convolution& conv;
  const ConvolutionCall& call;
  const PixelSums& sums;
  const PackedInput& input;

  int n_groups() const { return divide_up(call.n_filters, input.filters_at_once()); }

  void run_all() const {
    share(call.n_threads, input.n_tiles(), n_groups(), [&](const Part& part) { run(part); });
  }

  void run(const Part& part) const {
    // All at once where vectors are long: nothing else was tried there, and such processors have larger caches.
    const int most = kLanes > 8 ? n_groups() : groups_at_once(input.n_weights() * input.filters_at_once());
    const int n_at_once = tiles_at_once(input.n_rows(), 4 << 10);  // half of a first-level cache
    for (int begin = part.group0; begin < part.group1; begin += most) {
      const int end = smaller(begin + most, part.group1);
      for (int tile = part.tile0; tile < part.tile1; tile += n_at_once) {
        const int last = smaller(tile + n_at_once, part.tile1);
        for (int group = begin; group < end; ++group) {
          for (int t = tile; t < last; ++t) run_group(t, group, part.fetches && t == part.tile0, part.slot);
        }
      }
    }
  }

  void run_group(int tile, int group, bool fetches, int slot) const {
    const int64_t first = input.first_pixel(tile) / conv.out.width * conv.out.row;  // position in an output plane
    alignas(64) float products[kMostFilters * kProductFloats];
    const int n0 = part(call.n_filters, n_groups(), group), n1 = part(call.n_filters, n_groups(), group + 1);
    const bool tile_fetches = kTilesFetch && fetches;
    if (fetches && !tile_fetches) fetch_part(call.ahead, group, n_groups());
    const Stream ahead =
        tile_fetches ? stream_of(call.ahead, group, n_groups(), input.n_rows()) : nothing_ahead(conv.weight);
    const int64_t n_outputs = input.last_chunk(tile)[-1].at + kLanes - first;
    const float* outputs[kMostFilters] = {};  // for GCC 12, which warns of what no call reads
    for (int i = n0; i < n1; ++i) outputs[i - n0] = output_of(conv, call, call.filters[i]).out + first;
    // Where there are more lines than channels, or nothing is fetched by and by, all at once.
    const bool by_and_by = tile_fetches && n_outputs * (n1 - n0) <= input.n_rows() / kChannelsAtOnce * kFloatsPerLine;
    for (int i = 0; i < n1 - n0 && !by_and_by; ++i) fetch_to_write(outputs[i], n_outputs);
    input.multiply(tile, n0, n1, tile_fetches, ahead, outputs, by_and_by ? n_outputs : 0, products);
    for (int i = n0; i < n1; ++i) {
      TileOutput to = output_of(conv, call, call.filters[i]);
      to.partial_sum = sums.of(slot, i);
      finish_pixels(products + (i - n0) * kProductFloats, input, tile, to, conv.activation);
    }
  }
};

static void convolve_packed(const Convolution& conv, const ConvolutionCall& call, Scratch& scratch) {
  const PackedInput input(conv, call, scratch);
  const PixelSums sums(call, n_slots(call.n_threads, input.n_tiles()), scratch);
  PackedJob{conv, call, sums, input}.run_all();
  sums.finish();
}

}  // namespace decouplify::DECOUPLIFY_ISA
