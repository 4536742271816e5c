// The steps that take most of the time: convolutions, windows, and those of them that are computed together.
#pragma once

#include "values.h"

namespace decouplify {

class Products : protected Values {
 public:
  using Values::Values;

  // A step and those joined to it at once; false, and nothing is done, if they have to be taken one by one.
  bool join(int32_t index) const {
    const decouplify_step& first = plan_.steps[index];
    if (has_constants(first.input)) return false;
    return first.kind == kConvolution && first.joined == 1 ? pool(index) : separate(index);
  }

 protected:
  void convolve(const decouplify_step& s, const Ahead& ahead) const {
    const Convolution conv = convolution_of(s);
    kernels_.convolve(conv, call_of(s, ahead), workspace_.scratch);
    finish_convolution(s, conv);
  }

  Convolution convolution_of(const decouplify_step& s) const {
    const decouplify_value &x = plan_.values[s.input], &y = plan_.values[s.output];
    Convolution conv{x.channels, y.channels, s.groups, {}, {}, {}, {}, s.weight, s.transformed, s.bias,
                     s.activation, static_cast<Algorithm>(s.algorithm), plan_.geometry(s.input),
                     plan_.geometry(s.output)};
    copy_window(s, conv);
    const Channels& in = live(s.input);
    if (in.n < in.size() && has_constants(s.input)) conv.bias = bias_with_constants(s, open(s));
    return conv;
  }

  ConvolutionCall call_of(const decouplify_step& s, const Ahead& ahead) const {
    const Channels &in = live(s.input), &filters = open(s);
    const bool adds = s.other >= 0;
    return {data(s.input), in.list.data(), in.n, data(s.output), filters.list.data(), filters.n,
            adds ? data(s.other) : nullptr, adds ? live(s.other).flags.data() : nullptr, sums(s.output), n_threads_,
            ahead};
  }

  void finish_convolution(const decouplify_step& s, const Convolution& conv) const {
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

  template <class Layer>
  static void copy_window(const decouplify_step& s, Layer& layer) {
    for (int i = 0; i < 2; ++i) {
      layer.kernel[i] = s.kernel[i];
      layer.stride[i] = s.stride[i];
      layer.padding[i] = s.padding[i];
      layer.dilation[i] = s.dilation[i];
    }
  }

  void count(const Convolution& conv, const Channels& in, const Channels& filters) const {
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
    const Window window = window_of(s, scale);
    const Channels &in = live(s.input), &channels = channels_of(window, s);
    kernels_.slide(window,
                   {data(s.input), data(s.output), channels.list.data(), channels.n, in.flags.data(), sums(s.output),
                    n_threads_},
                   workspace_.scratch);
    finish_window(s, window);
  }

  Window window_of(const decouplify_step& s, const float* scale) const {
    Window window{static_cast<WindowKind>(s.window), {}, {}, {}, {}, s.weight, s.bias, scale,
                  s.activation, plan_.geometry(s.input), plan_.geometry(s.output)};
    copy_window(s, window);
    return window;
  }

  const Channels& channels_of(const Window& window, const decouplify_step& s) const {
    return window.kind == WindowKind::kDepthwise ? open(s) : live(s.input);
  }

  void finish_window(const decouplify_step& s, const Window& window) const {
    const Channels &in = live(s.input), &channels = channels_of(window, s);
    live(s.output).assign([&](int32_t c) { return channels.flags[c]; });
    if (window.kind != WindowKind::kDepthwise) return;
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
  Convolution expansion_of(const decouplify_step& s) const {
    const Geometry& in = plan_.geometry(s.input);
    return {live(s.input).size(), open(s).size(), 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}, s.weight2, nullptr, s.bias2,
            s.activation, Algorithm::kDirect, in, in};
  }

  void finish_expand(const decouplify_step& s) const {
    const Geometry &in = plan_.geometry(s.input), &out = plan_.geometry(s.output);
    const Channels& filters = open(s);
    live(s.output).assign([&](int32_t c) { return filters.flags[c]; });
    const int64_t n_expanded = int64_t{in.height} * in.width, n_pixels = int64_t{out.height} * out.width;
    workspace_.n_macs += filters.n * (live(s.input).n * n_expanded + n_pixels * s.kernel[0] * s.kernel[1]);
  }

 private:
  bool pool(int32_t index) const {
    const decouplify_step &first = plan_.steps[index], &last = plan_.steps[index + 1];
    const Convolution conv = convolution_of(first);
    const Window window = window_of(last, nullptr);
    const ConvolutionCall call = call_of(first, plan_.ahead[index + 1]);
    const WindowCall pooled{nullptr, data(last.output), call.filters, call.n_filters, nullptr, sums(last.output),
                            n_threads_};
    if (!kernels_.convolve_and_pool(conv, call, window, pooled, workspace_.scratch)) return false;
    finish_convolution(first, conv);
    finish_window(last, window);
    return true;
  }

  bool separate(int32_t index) const {
    const decouplify_step &first = plan_.steps[index], &last = plan_.steps[index + first.joined];
    const bool is_one = first.kind == kExpand;
    const decouplify_step& middle = is_one ? first : plan_.steps[index + 1];
    const Convolution expand = is_one ? expansion_of(first) : convolution_of(first);
    const Convolution project = convolution_of(last);
    const Window window = window_of(middle, nullptr);
    const ConvolutionCall outer = call_of(last, plan_.ahead[index + first.joined]);
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
};

}  // namespace decouplify
