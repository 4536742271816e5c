// Convolution as it is written down: for every open filter a sum over existing channels and taps, straight from the
// original weights.
#pragma once

#include <type_traits>

#include "gather.h"

namespace decouplify::DECOUPLIFY_ISA {

template <class F>
DECOUPLIFY_INLINE void parallel(int n_threads, int n_tasks, F&& f) {
  const auto call = [](void* context, const Share& share) {
    (*static_cast<std::remove_reference_t<F>*>(context))(share);
  };
  run_parallel(n_threads, n_tasks, call, &f);
}

// Tiles [tile0, tile1) with groups [group0, group1) of filters. `slot`: where sums over these tiles go.
struct Part {
  int tile0, tile1, group0, group1, thread, slot;
  bool fetches;  // whether weights are not known to be in the cache
};

// Threads share the tiles, or the groups where there are few tiles.
DECOUPLIFY_INLINE bool shares_groups(int n_threads, int n_tiles) { return n_tiles < 2 * n_threads; }
// Slots of sums over tiles that are shared so.
DECOUPLIFY_INLINE int n_slots(int n_threads, int n_tiles) {
  return shares_groups(n_threads, n_tiles) ? 1 : n_shares(n_threads, n_tiles);
}

// Calls f(part) so that every tile meets every group.
template <class F>
DECOUPLIFY_INLINE void share(int n_threads, int n_tiles, int n_groups, F&& f) {
  const bool by_groups = shares_groups(n_threads, n_tiles);
  parallel(n_threads, by_groups ? n_groups : n_tiles, [&](const Share& s) {
    by_groups ? f(Part{0, n_tiles, s.begin, s.end, s.thread, 0, true})
              : f(Part{s.begin, s.end, 0, n_groups, s.thread, s.index, s.is_first});
  });
}

// Groups of filters that all tiles meet before the next ones, so that their weights stay in the second-level cache.
DECOUPLIFY_INLINE int groups_at_once(int64_t weights_per_group) {
  constexpr int64_t kWeightsAtOnce = 64 << 10;
  return static_cast<int>(1 + kWeightsAtOnce / (weights_per_group + 1));
}

// Consecutive tiles that each group of filters meets one after another: the second of two tiles writes to the lines that
// the first one wrote to, and finds them in the cache. Their inputs, of so many rows, are about n_floats.
constexpr int kMostTilesAtOnce = 16;
DECOUPLIFY_INLINE int tiles_at_once(int n_rows, int n_floats) {
  return smaller(kMostTilesAtOnce, 1 + n_floats / (n_rows * kTileFloats + 1));
}

// Sums over the pixels of each filter, one vector per slot and filter until every tile is done. Tiles that share a slot
// come one after the other, whichever threads do them, so that sums are the same in every run.
class PixelSums {
 public:
  PixelSums(const ConvolutionCall& call, int n_slots, Scratch& scratch)
      : call_(call), n_slots_(n_slots), partial_(nullptr) {
    if (call.sums == nullptr) return;
    const size_t n = size_t(n_slots) * call.n_filters * kLanes;
    partial_ = scratch.partial_sums.reserve(n);
    memset(partial_, 0, n * sizeof(float));
  }
  float* of(int slot, int i) const { return partial_ == nullptr ? nullptr : at(slot, i); }
  void finish() const {
    if (partial_ == nullptr) return;
    for (int i = 0; i < call_.n_filters; ++i) {
      Vec total{};
      for (int slot = 0; slot < n_slots_; ++slot) total += load(at(slot, i));
      call_.sums[call_.filters[i]] = sum(total);
    }
  }

 private:
  float* at(int slot, int i) const { return partial_ + (size_t(slot) * call_.n_filters + i) * kLanes; }
  const ConvolutionCall& call_;
  int n_slots_;
  float* partial_;
};

// Output plane of one filter, and the plane to add to it.
DECOUPLIFY_INLINE TileOutput output_of(const Convolution& conv, const ConvolutionCall& call, int filter) {
  const int64_t plane = filter * conv.out.plane + conv.out.origin;
  const bool adds = call.residual != nullptr && call.residual_live[filter];
  return {nullptr, nullptr, call.out + plane, adds ? call.residual + plane : nullptr, nullptr, conv.bias[filter]};
}

// Filters that a tile computes together.
struct FilterGroup {
  int n;
  TileOutput to[kTileFilters];
};

// Whether tiles may copy what they read, where their vectors are short enough for that to be a small part of them.
DECOUPLIFY_INLINE bool can_copy(const TileInput& in) { return kTapsAreChannels && in.n_taps == 1; }

// What the tiles at hand read, side by side: in their planes, inputs of many channels fight for the sets of the
// first-level cache, nothing foresees the way from one to the next, and to find each takes instructions. The first
// filters that meet a tile read it from the planes and copy it as they go, so that products hide what loads wait for.
class CopiedTiles {
 public:
  // Without a buffer nothing is copied.
  CopiedTiles(const TileInput& in, int n_tiles, Buffer* buffer) : in_(&in) {
    if (buffer != nullptr) x_ = buffer->reserve(1 + n_tiles * tile());  // there may be no channel
    const int last = in.n_channels - 1;
    are_in_order_ = kOrderMatters && last >= 0 && in.place[last].column - in.place[0].column == last;
  }

  // What is read by tile `index`, which begins at position `first`: copies, or planes to be copied.
  TileInput of(int index, int64_t first, bool are_copied) const {
    TileInput found = *in_;
    if (x_ == nullptr) return found;
    float* copy = x_ + index * tile() - first;
    are_copied ? void(found.x = copy) : void(found.copy = copy);
    found.n_taps = !are_copied ? kCopies : are_in_order_ ? kInOrder : kSideBySide;
    return found;
  }
  // From a tile to the one that begins kTileFloats after it.
  void advance(TileInput& in) const {
    if (in.n_taps == kSideBySide || in.n_taps == kInOrder) in.x += tile() - kTileFloats;
    if (in.n_taps == kCopies) in.copy += tile() - kTileFloats;
  }

 private:
  int64_t tile() const { return int64_t{in_->n_channels} * kTileFloats; }

  const TileInput* in_;
  float* x_ = nullptr;
  bool are_in_order_;  // the channels, in a filter's weights
};

// The filters [first, first + n) of the call's list, which read the same channels.
struct DirectJob {
  const Convolution& conv;
  const ConvolutionCall& call;
  const PixelSums& sums;
  TileInput input;
  int first, n;
  int v_first, v_end;  // the vectors of the output to compute
  Scratch& scratch;

  int64_t weights_per_filter() const {
    return int64_t{conv.n_channels} / conv.groups * conv.kernel[0] * conv.kernel[1];
  }
  static int n_tiles(int n_vectors) { return divide_up(n_vectors, kTileVectors); }
  int n_tiles() const { return n_tiles(v_end - v_first); }
  int tile_start(int tile) const { return v_first + part(v_end - v_first, n_tiles(), tile); }
  int n_filter_groups() const { return divide_up(n, kTileFilters); }

  // Groups that all tiles meet before the next ones: weights that do not stay in the cache are better read once than
  // once per tile.
  int groups_at_once() const {
    if (can_copy(input)) return DECOUPLIFY_ISA::groups_at_once(weights_per_filter() * kTileFilters);
    const int64_t n_input = int64_t{input.n_channels} * conv.in.plane, n_weights = n * input.n_channels * input.n_taps;
    return n_input * sizeof(float) < (600 << 10) && n_weights * sizeof(float) > (256 << 10) ? 1 : n_filter_groups();
  }

  FilterGroup group_at(int group, int slot) const {
    const int n0 = part(n, n_filter_groups(), group), n1 = part(n, n_filter_groups(), group + 1);
    const auto weight_of = [&](int i) { return conv.weight + call.filters[first + i] * weights_per_filter(); };
    FilterGroup found;
    found.n = n1 - n0;
    for (int i = n0; i < n1; ++i) {
      TileOutput& to = found.to[i - n0] = output_of(conv, call, call.filters[first + i]);
      const int next = i + n1 - n0;
      to.weight = weight_of(i);
      to.next_weight = weight_of(next < n ? next : i);
      to.partial_sum = sums.of(slot, first + i);
    }
    return found;
  }

  // Group `index` on vectors [v0, v1). fetches: whether weights are met for the first time.
  void run(const TileInput& in, const FilterGroup& group, int index, int v0, int v1, bool fetches) const {
    TileAt tile{int64_t{v0} * kLanes, fetches, false, nothing_ahead(in.x)};
    if (fetches && can_fetch(in.n_taps)) tile.ahead = stream_of(call.ahead, index, n_filter_groups(), in.n_channels);
    if (fetches && !can_fetch(in.n_taps)) fetch_part(call.ahead, index, n_filter_groups());
    tile_for(in.n_taps, fetches, group.n, v1 - v0)(in, group.to, tile, conv.out.mask, conv.activation);
  }

  // Groups [g0, g1), the first of which is `groups`, on some tiles.
  struct Tiles {
    int n;
    TileInput in[kMostTilesAtOnce], first_in[kMostTilesAtOnce];  // the latter of the first group
    int v[kMostTilesAtOnce + 1];  // where each begins
    bool are_first;               // that meet the weights
  };
  void run(const Tiles& tiles, const FilterGroup* groups, int g0, int g1) const {
    for (int g = g0; g < g1; ++g) {
      for (int i = 0; i < tiles.n; ++i) {
        const TileInput& in = g == g0 ? tiles.first_in[i] : tiles.in[i];
        run(in, groups[g - g0], g, tiles.v[i], tiles.v[i + 1], tiles.are_first && i == 0);
      }
    }
  }

  void run(const Part& part) const {
    const int most = smaller(groups_at_once(), part.group1 - part.group0);
    auto* groups = reserve_groups(most, part.thread);
    const bool copies = can_copy(input) && most >= 4;
    const int n_at_once = tiles_at_once(input.n_channels * input.n_taps, 16 << 10);  // read from planes in longer runs
    const CopiedTiles copy(input, n_at_once, copies ? &scratch.transformed[part.thread] : nullptr);
    Tiles tiles;
    for (int begin = part.group0; begin < part.group1; begin += most) {
      const int end = smaller(begin + most, part.group1);
      for (int g = begin; g < end; ++g) groups[g - begin] = group_at(g, part.slot);
      for (int tile = part.tile0; tile < part.tile1; tile += n_at_once) {
        tiles.n = smaller(n_at_once, part.tile1 - tile);
        tiles.are_first = part.fetches && tile == part.tile0;
        for (int i = 0; i <= tiles.n; ++i) tiles.v[i] = tile_start(tile + i);
        for (int i = 0; i < tiles.n; ++i) {
          const int64_t first = int64_t{tiles.v[i]} * kLanes;
          tiles.first_in[i] = copy.of(i, first, false);
          tiles.in[i] = copy.of(i, first, true);
        }
        run(tiles, groups, begin, end);
      }
    }
  }

  FilterGroup* reserve_groups(int n, int thread) const {
    const size_t n_floats = n * sizeof(FilterGroup) / sizeof(float);
    return reinterpret_cast<FilterGroup*>(scratch.filter_groups[thread].reserve(n_floats));
  }

  void run_all() const {
    if (n == 0) return;
    share(call.n_threads, n_tiles(), n_filter_groups(), [&](const Part& part) { run(part); });
  }
};

// All phases of every channel of the call, for planes like `out`.
static void gather_channels(const Convolution& conv, const ConvolutionCall& call, const Taps& taps, const Geometry& out,
                            float* to) {
  const auto plane_of = [&](int i) { return call.in + call.channels[i] * conv.in.plane + conv.in.origin; };
  // Images have three channels, which two threads could not share well.
  const int n_phases = taps.rows.n_phases();
  parallel(call.n_threads, call.n_channels * n_phases, [&](const Share& share) {
    for (int index = share.begin; index < share.end; ++index) {
      const int i = index / n_phases;
      const float* next = plane_of(index + n_phases < share.end ? i + 1 : i);
      gather_phase(plane_of(i), next, taps, index % n_phases, conv.in, out, to + i * taps.channel(), 0.0f);
    }
  });
}

// Where each channel of the call is found: in its own plane, or gathered.
static const float* place_channels(const Convolution& conv, const ConvolutionCall& call, Taps& taps, Place* places,
                                   Scratch& scratch) {
  if (reads_in_place(conv)) {
    place_in_plane(taps, conv.in);
    for (int i = 0; i < call.n_channels; ++i) places[i].offset = call.channels[i] * conv.in.plane;
    return call.in + conv.in.origin;
  }
  place_in_phases(taps, conv.out);
  float* gathered = scratch.gathered.reserve(taps.channel() * call.n_channels + kTileFloats);
  gather_channels(conv, call, taps, conv.out, gathered);
  for (int i = 0; i < call.n_channels; ++i) places[i].offset = i * taps.channel();
  return gathered;
}

// The first position in an ascending list whose value is not below `bound`.
DECOUPLIFY_INLINE int position_of(const int32_t* list, int n, int from, int bound) {
  while (from < n && list[from] < bound) ++from;
  return from;
}

static Place* reserve_places(Buffer& buffer, int n) {
  return reinterpret_cast<Place*>(buffer.reserve(size_t(n + kChannelsAhead) * (sizeof(Place) / sizeof(float))));
}

// After the last of n channels come the first ones again, a tile further on.
static void add_places_ahead(Place* places, int n) {
  for (int i = n; n > 0 && i < n + kChannelsAhead; ++i) places[i] = {places[i - n].offset + kTileFloats, 0};
}

static int rows_per_channel(const Taps& taps) { return kTapsAreChannels ? taps.n : 1; }

// What every tile of a convolution reads; `taps` holds the offsets of the taps.
static TileInput tile_input(const Convolution& conv, const ConvolutionCall& call, Taps& taps, Scratch& scratch) {
  const int n_rows = rows_per_channel(taps), n = call.n_channels * n_rows;
  Place* places = reserve_places(scratch.lists, n);
  const float* x = place_channels(conv, call, taps, places, scratch);
  const int channels_per_group = conv.n_channels / conv.groups;
  for (int i = call.n_channels - 1; i >= 0; --i) {  // from behind, for a channel's rows take the places of others
    const int64_t offset = places[i].offset, column = call.channels[i] % channels_per_group * taps.n;
    for (int t = n_rows - 1; t >= 0; --t) {
      places[i * n_rows + t] = {offset + (n_rows > 1 ? taps.offset[t] : 0), column + t};
    }
  }
  add_places_ahead(places, n);
  static constexpr int64_t kNoOffset[1] = {0};
  if (n_rows > 1) return {x, places, n, kNoOffset, 1};
  return {x, places, n, taps.offset, taps.n};
}

static int n_vectors(const Geometry& g) { return divide_up((g.height - 1) * g.row + g.width, kLanes); }

static void convolve_direct(const Convolution& conv, const ConvolutionCall& call, Scratch& scratch) {
  Taps taps = taps_of(conv);
  const TileInput input = tile_input(conv, call, taps, scratch);
  const int channels_per_group = conv.n_channels / conv.groups, filters_per_group = conv.n_filters / conv.groups;
  const PixelSums sums(call, n_slots(call.n_threads, DirectJob::n_tiles(n_vectors(conv.out))), scratch);
  int c = 0, f = 0;
  for (int group = 0; group < conv.groups; ++group) {
    const int c1 = position_of(call.channels, call.n_channels, c, (group + 1) * channels_per_group);
    const int f1 = position_of(call.filters, call.n_filters, f, (group + 1) * filters_per_group);
    TileInput of_group = input;
    of_group.place += c * rows_per_channel(taps);
    of_group.n_channels = (c1 - c) * rows_per_channel(taps);
    DirectJob{conv, call, sums, of_group, f, f1 - f, 0, n_vectors(conv.out), scratch}.run_all();
    c = c1;
    f = f1;
  }
  sums.finish();
}

}  // namespace decouplify::DECOUPLIFY_ISA
