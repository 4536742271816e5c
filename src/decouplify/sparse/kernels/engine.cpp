#include "engine.h"

#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"

using decouplify::Geometry;
using decouplify::Kernels;

namespace {

// Which channels of a value exist, as an ascending list and as flags.
struct Channels {
  std::vector<int32_t> list;
  std::vector<uint8_t> flags;
  int32_t n = 0;

  explicit Channels(int32_t n_channels) : list(n_channels), flags(n_channels) {}

  int32_t size() const { return static_cast<int32_t>(list.size()); }
  template <class F>
  void assign(F&& exists) {
    n = 0;
    for (int32_t c = 0; c < size(); ++c) {
      flags[c] = exists(c);
      list[n] = c;
      n += flags[c];
    }
  }
  void fill() {
    assign([](int32_t) { return true; });
  }
};

struct Free {
  void operator()(float* data) const { decouplify::release(data); }
};
using Floats = std::unique_ptr<float, Free>;

// Tiles read beyond the last pixel of the last plane: a few rows of the next tile of pixels, and whole vectors.
int64_t slack(const Geometry& g) { return int64_t{g.row} * (8 + g.border) + 256; }

Geometry geometry_of(const decouplify_geometry& given) {
  Geometry g{given.height, given.width, given.border, given.width + given.border, 0, 0, nullptr};
  // Winograd tiles are four rows high; what they read below the last row must be finite.
  const int64_t n_rows = (g.height + 3) / 4 * 4 + 2 * int64_t{g.border};
  // The first pixel begins a cache line: a vector that lies across two of them takes twice as long to load and store.
  const int64_t before = int64_t{g.border} * g.row + g.border;
  g.origin = decouplify::whole_lines(before + 15);
  g.plane = decouplify::whole_lines(g.origin - before + n_rows * g.row + g.border + 15);
  if (g.plane % 1024 == 0) g.plane += 16;  // planes a page apart would fight for the same cache sets
  return g;
}

// See Geometry::mask. It begins a cache line, as the vectors do that it is applied to.
Floats mask_of(const Geometry& g) {
  Floats memory(decouplify::allocate(decouplify::flat_size(g) + 64));
  auto* mask = reinterpret_cast<int32_t*>(memory.get());
  for (int32_t y = 0; y < g.height; ++y) {
    for (int32_t x = 0; x < g.width; ++x) mask[int64_t{y} * g.row + x] = -1;
  }
  return memory;
}

// 1 / elements of the image under each window of an average; padding counts if asked for.
std::vector<float> average_scale(const decouplify_step& step, const Geometry& in, const Geometry& out) {
  const auto count = [&](int axis, int32_t at, int32_t size) {
    const int32_t first = at * step.stride[axis] - step.padding[axis], last = first + step.kernel[axis];
    // As torch: padding counts, what lies beyond the padding (rounding up the size) does not.
    const int32_t low = step.counts_padding ? -step.padding[axis] : 0;
    const int32_t high = step.counts_padding ? size + step.padding[axis] : size;
    return (last < high ? last : high) - (first > low ? first : low);
  };
  std::vector<float> scale(decouplify::flat_size(out) + 64);
  for (int32_t y = 0; y < out.height; ++y) {
    for (int32_t x = 0; x < out.width; ++x) {
      scale[int64_t{y} * out.row + x] = 1.0f / static_cast<float>(count(0, y, in.height) * count(1, x, in.width));
    }
  }
  return scale;
}

const Kernels* chosen = decouplify::best_kernels();

}  // namespace

struct decouplify_plan {
  std::vector<Geometry> geometries;
  std::vector<Floats> masks;
  std::vector<int64_t> arena_sizes;  // per geometry, and last that of vectors
  std::vector<decouplify_value> values;
  std::vector<decouplify_step> steps;
  std::vector<std::vector<float>> scales;  // per step, of averages
  std::vector<decouplify::Ahead> ahead;    // per step
  std::vector<std::vector<float>> constants;  // per value, what a channel holds that does not exist; empty for zeros
  std::vector<int32_t> gate_sizes;

  const Geometry& geometry(int32_t value) const { return geometries[values[value].geometry]; }
  bool is_vector(int32_t value) const { return values[value].geometry < 0; }
};

namespace {

// A linear layer without inputs is the activation of its bias.
std::vector<float> constants_of(const decouplify_step& scale, int32_t n_channels) {
  std::vector<float> constants(n_channels);
  chosen->linear(scale.weight, scale.bias, nullptr, 0, constants.data(), n_channels, scale.activation, 1);
  return constants;
}

// Whether what is zero for want of its channels is zero after the activation as well, and need not exist either.
bool keeps_zero(const decouplify::Activation& activation) {
  if (activation.kind == decouplify::ActivationKind::kClamp) return activation.low <= 0 && activation.high >= 0;
  return activation.kind != decouplify::ActivationKind::kSigmoid;
}

bool computes(int32_t kind) { return kind == kConvolution || kind == kExpand || kind == kWindow; }

decouplify::Ahead ahead_of(const decouplify_plan& plan, size_t step) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (size_t i = step + 1; i < plan.steps.size() && !computes(plan.steps[i].kind); ++i) {
    const decouplify_step& s = plan.steps[i];
    if (s.kind == kLinear) {
      return {{s.weight, nullptr}, {int64_t{plan.values[s.input].channels} * plan.values[s.output].channels / kLine, 0}};
    }
    if (s.kind == kControl) {
      const int64_t hidden = s.hidden;
      return {{s.weight, s.weight2},
              {hidden * plan.values[s.input].channels / kLine, hidden * plan.gate_sizes[s.gate] / kLine}};
    }
  }
  return {{plan.steps[step].weight, nullptr}, {0, 0}};
}

}  // namespace

struct decouplify_workspace {
  std::vector<Floats> arenas;
  std::vector<Channels> channels;           // per value
  std::vector<Channels> gates;              // per gate
  std::vector<std::vector<float>> sums;     // per value, empty where nobody asks
  std::vector<float> pooled, hidden, logits;  // of the controller that runs
  std::vector<float> absent, bias;            // of the convolution that runs, where absent channels hold constants
  decouplify::Scratch scratch;
  int64_t n_macs = 0;
};

namespace {

// One run: what every step needs, and one function per kind of step.
class Run {
 public:
  Run(const decouplify_plan& plan, decouplify_workspace& workspace, float* const* slots, int32_t n_threads)
      : plan_(plan), workspace_(workspace), slots_(slots), n_threads_(n_threads), kernels_(*chosen) {}

  Status step(int32_t index) {
    const decouplify_step& s = plan_.steps[index];
    switch (s.kind) {
      case kLoad: load(s); break;
      case kStore: store(s); break;
      case kConvolution: convolve(s, plan_.ahead[index]); break;
      case kWindow: slide(s, plan_.scales[index].data()); break;
      case kAdd: add(s); break;
      case kScale: scale(s); break;
      case kCopy: copy(s); break;
      case kMean: mean(s); break;
      case kFlatten: flatten(s); break;
      case kLinear: linear(s); break;
      case kControl: return control(s);
      case kNorm: normalise(s); break;
      case kMask: mask(s); break;
      case kExpand: expand(s); break;
    }
    return kDone;
  }

  // A step and those joined to it at once; false, and nothing is done, if they have to be taken one by one.
  bool join(int32_t index) const {
    const decouplify_step& first = plan_.steps[index];
    if (has_constants(first.input)) return false;
    return first.kind == kConvolution && first.joined == 1 ? pool(index) : separate(index);
  }

 private:
  bool pool(int32_t index) const {
    const decouplify_step &first = plan_.steps[index], &last = plan_.steps[index + 1];
    const decouplify::Convolution conv = convolution_of(first);
    const decouplify::Window window = window_of(last, nullptr);
    const decouplify::ConvolutionCall call = call_of(first, plan_.ahead[index + 1]);
    const decouplify::WindowCall pooled{nullptr, data(last.output), call.filters, call.n_filters, nullptr,
                                        sums(last.output), n_threads_};
    if (!kernels_.convolve_and_pool(conv, call, window, pooled, workspace_.scratch)) return false;
    finish_convolution(first, conv);
    finish_window(last, window);
    return true;
  }

  bool separate(int32_t index) const {
    const decouplify_step &first = plan_.steps[index], &last = plan_.steps[index + first.joined];
    const bool is_one = first.kind == kExpand;
    const decouplify_step& middle = is_one ? first : plan_.steps[index + 1];
    const decouplify::Convolution expand = is_one ? expansion_of(first) : convolution_of(first);
    const decouplify::Convolution project = convolution_of(last);
    const decouplify::Window window = window_of(middle, nullptr);
    const decouplify::ConvolutionCall outer = call_of(last, plan_.ahead[index + first.joined]);
    if (!kernels_.separate({expand, window, project, call_of(first, {}), outer}, workspace_.scratch)) return false;
    if (is_one) {
      finish_expand(first);
    } else {
      finish_convolution(first, expand);
      finish_window(middle, window);
    }
    finish_convolution(last, project);
    return true;
  }

  float* data(int32_t value) const {
    const decouplify_value& v = plan_.values[value];
    if (plan_.is_vector(value)) return workspace_.arenas.back().get() + v.first;
    return workspace_.arenas[v.geometry].get() + v.first * plan_.geometry(value).plane;
  }
  float* plane(int32_t value, int32_t channel) const { return data(value) + channel * plan_.geometry(value).plane; }
  Channels& live(int32_t value) const { return workspace_.channels[value]; }
  float* sums(int32_t value) const {
    auto& found = workspace_.sums[value];
    return found.empty() ? nullptr : found.data();
  }
  void set_sum(int32_t value, int32_t channel, float total) const {
    if (float* all = sums(value)) all[channel] = total;
  }
  float sum_of(int32_t value, int32_t channel) const {
    const float* all = sums(value);
    return all != nullptr ? all[channel] : kernels_.sum(plane(value, channel), plan_.geometry(value));
  }
  bool has_constants(int32_t value) const { return !plan_.constants[value].empty(); }
  float constant(int32_t value, int32_t channel) const {
    return has_constants(value) ? plan_.constants[value][channel] : 0.0f;
  }
  float mean_of(int32_t value, int32_t channel) const {
    if (!live(value).flags[channel]) return constant(value, channel);
    const Geometry& g = plan_.geometry(value);
    return sum_of(value, channel) / static_cast<float>(int64_t{g.height} * g.width);
  }
  const Channels& open(const decouplify_step& s) const {
    if (s.gate >= 0) return workspace_.gates[s.gate];
    return workspace_.channels[plan_.values.size() + s.output];  // all channels
  }

  void load(const decouplify_step& s) const {
    live(s.output).fill();
    const decouplify_value& value = plan_.values[s.output];
    const float* from = slots_[s.slot];
    if (plan_.is_vector(s.output)) {
      std::memcpy(data(s.output), from, value.channels * sizeof(float));
      return;
    }
    const Geometry& g = plan_.geometry(s.output);
    for (int32_t c = 0; c < value.channels; ++c) {
      float* to = plane(s.output, c) + g.origin;
      for (int32_t y = 0; y < g.height; ++y, from += g.width) {
        std::memcpy(to + int64_t{y} * g.row, from, g.width * sizeof(float));
      }
      if (sums(s.output) != nullptr) set_sum(s.output, c, kernels_.sum(plane(s.output, c), g));
    }
  }

  void store(const decouplify_step& s) const {
    float* to = slots_[s.slot];
    const int32_t n_channels = plan_.values[s.input].channels;
    if (plan_.is_vector(s.input)) {
      std::memcpy(to, data(s.input), n_channels * sizeof(float));
    } else {
      unroll(s.input, to);
    }
  }

  // Channel after channel and row after row, without borders.
  void unroll(int32_t value, float* to) const {
    const Geometry& g = plan_.geometry(value);
    const int64_t n_pixels = int64_t{g.height} * g.width;
    for (int32_t c = 0; c < plan_.values[value].channels; ++c, to += n_pixels) {
      if (!live(value).flags[c]) {
        std::memset(to, 0, n_pixels * sizeof(float));
        continue;
      }
      const float* from = plane(value, c) + g.origin;
      for (int32_t y = 0; y < g.height; ++y) {
        std::memcpy(to + int64_t{y} * g.width, from + int64_t{y} * g.row, g.width * sizeof(float));
      }
    }
  }

  void convolve(const decouplify_step& s, const decouplify::Ahead& ahead) const {
    const decouplify::Convolution conv = convolution_of(s);
    kernels_.convolve(conv, call_of(s, ahead), workspace_.scratch);
    finish_convolution(s, conv);
  }

  decouplify::Convolution convolution_of(const decouplify_step& s) const {
    const decouplify_value &x = plan_.values[s.input], &y = plan_.values[s.output];
    decouplify::Convolution conv{x.channels, y.channels, s.groups, {}, {}, {}, {}, s.weight, s.transformed, s.bias,
                                 s.activation, static_cast<decouplify::Algorithm>(s.algorithm),
                                 plan_.geometry(s.input), plan_.geometry(s.output)};
    copy_window(s, conv);
    const Channels& in = live(s.input);
    if (in.n < in.size() && has_constants(s.input)) conv.bias = bias_with_constants(s, open(s));
    return conv;
  }

  decouplify::ConvolutionCall call_of(const decouplify_step& s, const decouplify::Ahead& ahead) const {
    const Channels &in = live(s.input), &filters = open(s);
    const bool adds = s.other >= 0;
    return {data(s.input), in.list.data(), in.n, data(s.output), filters.list.data(), filters.n,
            adds ? data(s.other) : nullptr, adds ? live(s.other).flags.data() : nullptr, sums(s.output), n_threads_,
            ahead};
  }

  void finish_convolution(const decouplify_step& s, const decouplify::Convolution& conv) const {
    const Channels& filters = open(s);
    count(conv, live(s.input), filters);
    const bool adds = s.other >= 0;
    if (adds) add_closed(s, filters);
    const bool all_exist = adds && !keeps_zero(s.activation);
    live(s.output).assign([&](int32_t c) { return filters.flags[c] || all_exist || (adds && live(s.other).flags[c]); });
  }

  // What is the same at every pixel of a channel changes only the bias of a 1x1 convolution.
  const float* bias_with_constants(const decouplify_step& s, const Channels& filters) const {
    const Channels& in = live(s.input);
    float* absent = workspace_.absent.data();
    for (int32_t c = 0; c < in.size(); ++c) absent[c] = in.flags[c] ? 0.0f : constant(s.input, c);
    kernels_.project(s.weight, s.bias, absent, in.size(), filters.list.data(), filters.n, workspace_.bias.data());
    workspace_.n_macs += int64_t{in.size() - in.n} * filters.n;
    return workspace_.bias.data();
  }

  // Where a filter is closed, the sum is the other operand; where that does not exist either, it is zero.
  void add_closed(const decouplify_step& s, const Channels& filters) const {
    const Channels& other = live(s.other);
    for (int32_t c = 0; c < other.size() && !keeps_zero(s.activation); ++c) {
      if (!filters.flags[c] && !other.flags[c]) set_sum(s.output, c, add_planes(s, nullptr, nullptr, c));
    }
    const bool in_place = data(s.other) == data(s.output);
    for (int32_t i = 0; i < other.n; ++i) {
      const int32_t c = other.list[i];
      if (filters.flags[c]) continue;
      if (in_place && s.activated) {
        if (sums(s.output) != nullptr) set_sum(s.output, c, sum_of(s.other, c));
      } else {
        set_sum(s.output, c, add_planes(s, plane(s.other, c), nullptr, c));
      }
    }
  }

  float add_planes(const decouplify_step& s, const float* a, const float* b, int32_t c) const {
    return kernels_.add(a, b, plane(s.output, c), plan_.geometry(s.output), s.activation);
  }

  template <class Layer>
  static void copy_window(const decouplify_step& s, Layer& layer) {
    for (int i = 0; i < 2; ++i) {
      layer.kernel[i] = s.kernel[i];
      layer.stride[i] = s.stride[i];
      layer.padding[i] = s.padding[i];
      layer.dilation[i] = s.dilation[i];
    }
  }

  void count(const decouplify::Convolution& conv, const Channels& in, const Channels& filters) const {
    const int32_t c = conv.n_channels / conv.groups, f = conv.n_filters / conv.groups;
    int64_t n_pairs = int64_t{in.n} * filters.n;
    if (conv.groups > 1) {
      n_pairs = 0;
      for (int32_t g = 0; g < conv.groups; ++g) n_pairs += n_in(in, g * c, c) * n_in(filters, g * f, f);
    }
    workspace_.n_macs += n_pairs * conv.kernel[0] * conv.kernel[1] * conv.out.height * conv.out.width;
  }

  static int64_t n_in(const Channels& channels, int32_t first, int32_t n) {
    int64_t found = 0;
    for (int32_t c = first; c < first + n; ++c) found += channels.flags[c];
    return found;
  }

  void slide(const decouplify_step& s, const float* scale) const {
    const decouplify::Window window = window_of(s, scale);
    const Channels &in = live(s.input), &channels = channels_of(window, s);
    kernels_.slide(window,
                   {data(s.input), data(s.output), channels.list.data(), channels.n, in.flags.data(), sums(s.output),
                    n_threads_},
                   workspace_.scratch);
    finish_window(s, window);
  }

  decouplify::Window window_of(const decouplify_step& s, const float* scale) const {
    decouplify::Window window{static_cast<decouplify::WindowKind>(s.window), {}, {}, {}, {}, s.weight, s.bias, scale,
                              s.activation, plan_.geometry(s.input), plan_.geometry(s.output)};
    copy_window(s, window);
    return window;
  }

  const Channels& channels_of(const decouplify::Window& window, const decouplify_step& s) const {
    return window.kind == decouplify::WindowKind::kDepthwise ? open(s) : live(s.input);
  }

  void finish_window(const decouplify_step& s, const decouplify::Window& window) const {
    const Channels &in = live(s.input), &channels = channels_of(window, s);
    live(s.output).assign([&](int32_t c) { return channels.flags[c]; });
    if (window.kind != decouplify::WindowKind::kDepthwise) return;
    const int64_t n_pixels = int64_t{window.out.height} * window.out.width;
    for (int32_t i = 0; i < channels.n; ++i) {
      if (in.flags[channels.list[i]]) workspace_.n_macs += n_pixels * s.kernel[0] * s.kernel[1];
    }
  }

  void expand(const decouplify_step& s) const {
    kernels_.expand_and_slide(expansion_of(s), window_of(s, nullptr), call_of(s, {}), workspace_.scratch);
    finish_expand(s);
  }

  // The first convolution of a kExpand.
  decouplify::Convolution expansion_of(const decouplify_step& s) const {
    const Geometry& in = plan_.geometry(s.input);
    return {live(s.input).size(), open(s).size(), 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}, s.weight2, nullptr, s.bias2,
            s.activation, decouplify::Algorithm::kDirect, in, in};
  }

  void finish_expand(const decouplify_step& s) const {
    const Geometry &in = plan_.geometry(s.input), &out = plan_.geometry(s.output);
    const Channels& filters = open(s);
    live(s.output).assign([&](int32_t c) { return filters.flags[c]; });
    const int64_t n_expanded = int64_t{in.height} * in.width, n_pixels = int64_t{out.height} * out.width;
    workspace_.n_macs += filters.n * (live(s.input).n * n_expanded + n_pixels * s.kernel[0] * s.kernel[1]);
  }

  void add(const decouplify_step& s) const {
    const Channels &a = live(s.input), &b = live(s.other);
    const auto exists = [&](int32_t c) { return a.flags[c] || b.flags[c] || !keeps_zero(s.activation); };
    for (int32_t c = 0; c < a.size(); ++c) {
      if (!exists(c)) continue;
      const float total = add_planes(s, a.flags[c] ? plane(s.input, c) : nullptr,
                                     b.flags[c] ? plane(s.other, c) : nullptr, c);
      set_sum(s.output, c, total);
    }
    live(s.output).assign(exists);
  }

  void scale(const decouplify_step& s) const {
    const Channels& in = live(s.input);
    const bool writes_all = !s.leaves_constants && !keeps_zero(s.activation);
    live(s.output).assign(
        [&](int32_t c) { return in.flags[c] || writes_all || (s.bias[c] != 0 && !s.leaves_constants); });
    for (int32_t i = 0; i < live(s.output).n; ++i) {
      const int32_t c = live(s.output).list[i];
      const float total = kernels_.scale(in.flags[c] ? plane(s.input, c) : nullptr, s.weight[c], s.bias[c],
                                         plane(s.output, c), plan_.geometry(s.output), s.activation);
      set_sum(s.output, c, total);
    }
  }

  // Several copies may fill one value, and what they copy may lie there already.
  void copy(const decouplify_step& s) const {
    const Channels& in = live(s.input);
    Channels& out = live(s.output);
    for (int32_t i = 0; i < in.n; ++i) {
      const int32_t c = in.list[i], to = c + s.position;
      const bool in_place = plane(s.input, c) == plane(s.output, to);
      if (!in_place) copy_plane(s, plane(s.input, c), plane(s.output, to));
      if (sums(s.output) == nullptr) continue;
      const float total = in_place ? sum_of(s.input, c) : kernels_.sum(plane(s.output, to), plan_.geometry(s.output));
      set_sum(s.output, to, total);
    }
    out.assign([&](int32_t c) {
      const bool is_ours = c >= s.position && c < s.position + in.size();
      return is_ours ? in.flags[c - s.position] : (!s.clears && out.flags[c]);
    });
  }

  void copy_plane(const decouplify_step& s, const float* from, float* to) const {
    const Geometry &in = plan_.geometry(s.input), &out = plan_.geometry(s.output);
    const bool is_plain = in.height == out.height && in.width == out.width && s.stride[0] == 1 && s.stride[1] == 1 &&
                          s.padding[0] == 0 && s.padding[1] == 0;
    if (is_plain) {  // borders and all
      std::memcpy(to + out.origin, from + in.origin, decouplify::flat_size(in) * sizeof(float));
      return;
    }
    for (int32_t y = 0; y < out.height; ++y) {
      const int32_t row = y * s.stride[0] - s.padding[0];
      float* pixels = to + out.origin + int64_t{y} * out.row;
      for (int32_t x = 0; x < out.width; ++x) {
        const int32_t column = x * s.stride[1] - s.padding[1];
        const bool inside = row >= 0 && row < in.height && column >= 0 && column < in.width;
        pixels[x] = inside ? from[in.origin + int64_t{row} * in.row + column] : 0.0f;
      }
    }
  }

  void mean(const decouplify_step& s) const {
    float* to = data(s.output);
    for (int32_t c = 0; c < live(s.input).size(); ++c) to[c] = mean_of(s.input, c);
    live(s.output).assign([&](int32_t c) { return live(s.input).flags[c] || has_constants(s.input); });
  }

  void flatten(const decouplify_step& s) const {
    if (plan_.is_vector(s.input)) {
      std::memcpy(data(s.output), data(s.input), plan_.values[s.input].channels * sizeof(float));
    } else {
      unroll(s.input, data(s.output));
    }
    const int32_t n_pixels = plan_.values[s.output].channels / plan_.values[s.input].channels;
    live(s.output).assign([&](int32_t i) { return live(s.input).flags[i / n_pixels]; });
  }

  void linear(const decouplify_step& s) const {
    const int32_t n_inputs = plan_.values[s.input].channels, n_outputs = plan_.values[s.output].channels;
    kernels_.linear(s.weight, s.bias, data(s.input), n_inputs, data(s.output), n_outputs, s.activation, n_threads_);
    workspace_.n_macs += int64_t{live(s.input).n} * n_outputs;
    live(s.output).fill();
  }

  Status control(const decouplify_step& s) const {
    const int32_t n_inputs = plan_.values[s.input].channels, n_filters = plan_.gate_sizes[s.gate];
    float* pooled = workspace_.pooled.data();
    if (plan_.is_vector(s.input)) {
      pooled = data(s.input);
    } else {
      for (int32_t c = 0; c < n_inputs; ++c) pooled[c] = mean_of(s.input, c);
    }
    const decouplify::Activation relu{decouplify::ActivationKind::kClamp, 0.0f, kInfinity};
    const decouplify::Activation none{decouplify::ActivationKind::kClamp, -kInfinity, kInfinity};
    float *hidden = workspace_.hidden.data(), *logits = workspace_.logits.data();
    kernels_.linear(s.weight, s.bias, pooled, n_inputs, hidden, s.hidden, relu, n_threads_);
    kernels_.linear(s.weight2, s.bias2, hidden, s.hidden, logits, n_filters, none, n_threads_);
    workspace_.n_macs += int64_t{s.hidden} * (n_inputs + n_filters);
    for (int32_t f = 0; f < n_filters; ++f) {
      if (logits[f] != logits[f]) return kUndefinedGate;
    }
    workspace_.gates[s.gate].assign([&](int32_t f) { return logits[f] > 0; });
    return kDone;
  }

  void normalise(const decouplify_step& s) const {
    const Channels &in = live(s.input), &all = open(s);
    const decouplify::Norm norm{all.n, s.weight, s.bias, s.epsilon, plan_.geometry(s.input)};
    kernels_.normalise(norm,
                       {data(s.input), in.list.data(), in.n, data(s.output), all.list.data(), all.n, nullptr, nullptr,
                        sums(s.output), n_threads_, {}},
                       workspace_.scratch);
    live(s.output).fill();
  }

  void mask(const decouplify_step& s) const {
    const Channels &in = live(s.input), &filters = open(s);
    live(s.output).assign([&](int32_t c) { return in.flags[c] && filters.flags[c]; });
    if (sums(s.output) == nullptr) return;
    for (int32_t i = 0; i < in.n; ++i) set_sum(s.output, in.list[i], sum_of(s.input, in.list[i]));
  }

  static constexpr float kInfinity = __builtin_inff();
  const decouplify_plan& plan_;
  decouplify_workspace& workspace_;
  float* const* slots_;
  int32_t n_threads_;
  const Kernels& kernels_;
};

void add_values(decouplify_workspace& workspace, const decouplify_plan& plan) {
  for (const auto& value : plan.values) workspace.channels.emplace_back(value.channels);
  for (const auto& value : plan.values) {
    workspace.channels.emplace_back(value.channels).fill();
    workspace.sums.emplace_back(value.has_sums ? value.channels : 0);
  }
  for (const int32_t size : plan.gate_sizes) workspace.gates.emplace_back(size).fill();
}

void add_buffers(decouplify_workspace& workspace, const decouplify_plan& plan) {
  size_t n_inputs = 1, n_hidden = 1, n_filters = 1;
  const auto raise = [](size_t& n, int32_t to) { n = n < size_t(to) ? to : n; };
  for (const auto& step : plan.steps) {
    if (step.kind != kControl) continue;
    raise(n_inputs, plan.values[step.input].channels);
    raise(n_hidden, step.hidden);
    raise(n_filters, plan.gate_sizes[step.gate]);
  }
  size_t n_absent = 1, n_biases = 1;
  for (const auto& step : plan.steps) {
    if (step.kind != kConvolution || plan.constants[step.input].empty()) continue;
    raise(n_absent, plan.values[step.input].channels);
    raise(n_biases, plan.values[step.output].channels);
  }
  workspace.absent.resize(n_absent);
  workspace.bias.resize(n_biases);
  workspace.pooled.resize(n_inputs);
  workspace.hidden.resize(n_hidden);
  workspace.logits.resize(n_filters);
}

}  // namespace

extern "C" {

int32_t decouplify_abi_version() { return kAbiVersion; }
const char* decouplify_instruction_set() { return chosen->name; }

int32_t decouplify_select(const char* name) {
  const Kernels* found = decouplify::kernels_named(name);
  if (found != nullptr) chosen = found;
  return found != nullptr;
}

float* decouplify_allocate(int64_t n_floats) try {
  return decouplify::allocate(n_floats);
} catch (const std::bad_alloc&) {
  return nullptr;
}

void decouplify_release(float* data) { decouplify::release(data); }

void decouplify_trim() { decouplify::trim(); }

void decouplify_transform(int32_t algorithm, const float* weight, int32_t n_filters, int32_t n_channels, int32_t kernel,
                          int32_t padding, float* to) {
  chosen->transform(static_cast<decouplify::Algorithm>(algorithm), weight, n_filters, n_channels, kernel, padding, to);
}

decouplify_plan* decouplify_plan_new(const decouplify_geometry* geometries, int32_t n_geometries,
                                     const decouplify_value* values, int32_t n_values, const decouplify_step* steps,
                                     int32_t n_steps, const int32_t* gate_sizes, int32_t n_gates) try {
  auto plan = std::make_unique<decouplify_plan>();
  for (int32_t i = 0; i < n_geometries; ++i) {
    Geometry g = geometry_of(geometries[i]);
    plan->masks.push_back(mask_of(g));
    g.mask = reinterpret_cast<const int32_t*>(plan->masks.back().get());
    plan->geometries.push_back(g);
    plan->arena_sizes.push_back(geometries[i].n_planes * g.plane + slack(g));
  }
  plan->values.assign(values, values + n_values);
  plan->steps.assign(steps, steps + n_steps);
  plan->gate_sizes.assign(gate_sizes, gate_sizes + n_gates);
  int64_t n_floats = 64;
  for (const auto& value : plan->values) {
    const int64_t end = int64_t{value.first} + value.channels + 64;
    if (value.geometry < 0 && end > n_floats) n_floats = end;
  }
  plan->arena_sizes.push_back(n_floats);
  for (const auto& step : plan->steps) {
    const auto window = static_cast<decouplify::WindowKind>(step.window);
    const bool is_average = step.kind == kWindow && window == decouplify::WindowKind::kAverage;
    plan->scales.push_back(is_average ? average_scale(step, plan->geometry(step.input), plan->geometry(step.output))
                                      : std::vector<float>());
  }
  plan->constants.resize(n_values);
  for (const auto& step : plan->steps) {
    if (step.kind != kScale || !step.leaves_constants) continue;
    plan->constants[step.output] = constants_of(step, plan->values[step.output].channels);
  }
  for (int32_t i = 0; i < n_steps; ++i) plan->ahead.push_back(ahead_of(*plan, i));
  return plan.release();
} catch (const std::bad_alloc&) {
  return nullptr;
}

void decouplify_plan_free(decouplify_plan* plan) { delete plan; }

void decouplify_plan_set_algorithm(decouplify_plan* plan, int32_t step, int32_t algorithm, const float* transformed) {
  plan->steps[step].algorithm = algorithm;
  plan->steps[step].transformed = transformed;
}

decouplify_workspace* decouplify_workspace_new(const decouplify_plan* plan) try {
  auto workspace = std::make_unique<decouplify_workspace>();
  for (const int64_t size : plan->arena_sizes) workspace->arenas.emplace_back(decouplify::allocate(size));
  add_values(*workspace, *plan);
  add_buffers(*workspace, *plan);
  return workspace.release();
} catch (const std::bad_alloc&) {
  return nullptr;
}

void decouplify_workspace_free(decouplify_workspace* workspace) { delete workspace; }

int64_t decouplify_workspace_bytes(const decouplify_plan* plan) {
  int64_t n_floats = 0;
  for (const int64_t size : plan->arena_sizes) n_floats += size;
  return n_floats * int64_t{sizeof(float)};
}

int64_t decouplify_workspace_macs(decouplify_workspace* workspace) {
  const int64_t n = workspace->n_macs;
  workspace->n_macs = 0;
  return n;
}

int32_t decouplify_run(const decouplify_plan* plan, decouplify_workspace* workspace, int32_t begin, int32_t end,
                       float* const* slots, int32_t n_threads) try {
  Run run(*plan, *workspace, slots, n_threads);
  for (int32_t i = begin; i < end; ++i) {
    const int32_t n_joined = plan->steps[i].joined;
    if (n_joined > 0 && i + n_joined < end && run.join(i)) {
      i += n_joined;
      continue;
    }
    const Status status = run.step(i);
    if (status != kDone) return status;
  }
  return kDone;
} catch (const std::bad_alloc&) {
  return kOutOfMemory;
}

void decouplify_set_gate(const decouplify_plan*, decouplify_workspace* workspace, int32_t gate, const float* z) {
  workspace->gates[gate].assign([&](int32_t f) { return z[f] != 0; });
}

void decouplify_get_gate(const decouplify_plan*, decouplify_workspace* workspace, int32_t gate, float* z) {
  const Channels& open = workspace->gates[gate];
  for (int32_t f = 0; f < open.size(); ++f) z[f] = open.flags[f];
}
}
