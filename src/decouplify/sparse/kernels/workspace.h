// The memory of one run: arenas for the planes, which channels of every value exist, and what single steps need.
#pragma once

#include "plan.h"

namespace decouplify {

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

}  // namespace decouplify

struct decouplify_workspace {
  std::vector<decouplify::Floats> arenas;
  std::vector<decouplify::Channels> channels;  // per value
  std::vector<decouplify::Channels> gates;     // per gate
  std::vector<std::vector<float>> sums;        // per value, empty where nobody asks
  std::vector<float> pooled, hidden, logits;   // of the controller that runs
  std::vector<float> absent, bias;            // of the convolution that runs, where absent channels hold constants
  decouplify::Scratch scratch;
  int64_t n_macs = 0;
};

namespace decouplify {

inline void add_values(decouplify_workspace& workspace, const decouplify_plan& plan) {
  for (const auto& value : plan.values) workspace.channels.emplace_back(value.channels);
  for (const auto& value : plan.values) {
    workspace.channels.emplace_back(value.channels).fill();
    workspace.sums.emplace_back(value.has_sums ? value.channels : 0);
  }
  for (const int32_t size : plan.gate_sizes) workspace.gates.emplace_back(size).fill();
}

inline void add_buffers(decouplify_workspace& workspace, const decouplify_plan& plan) {
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

}  // namespace decouplify
