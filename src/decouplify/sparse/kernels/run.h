// One run over the steps of a plan: one function per kind of step.
#pragma once

#include <cstring>

#include "products.h"

namespace decouplify {

class Run : public Products {
 public:
  Run(const decouplify_plan& plan, decouplify_workspace& workspace, float* const* slots, int32_t n_threads,
      const Kernels& kernels)
      : Products(plan, workspace, n_threads, kernels), slots_(slots) {}

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

 private:
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
      std::memcpy(to + out.origin, from + in.origin, flat_size(in) * sizeof(float));
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
    const Activation relu{ActivationKind::kClamp, 0.0f, kInfinity};
    const Activation none{ActivationKind::kClamp, -kInfinity, kInfinity};
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
    const Norm norm{all.n, s.weight, s.bias, s.epsilon, plan_.geometry(s.input)};
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
  float* const* slots_;
};

}  // namespace decouplify
