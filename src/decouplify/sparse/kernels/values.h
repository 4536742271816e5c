// What the steps of one run read and write.
#pragma once

#include "workspace.h"

namespace decouplify {

// Whether what is zero for want of its channels is zero after the activation as well, and need not exist either.
inline bool keeps_zero(const Activation& activation) {
  if (activation.kind == ActivationKind::kClamp) return activation.low <= 0 && activation.high >= 0;
  return activation.kind != ActivationKind::kSigmoid;
}

// Planes, sums and flags of values by their number, for the steps of one run.
class Values {
 public:
  Values(const decouplify_plan& plan, decouplify_workspace& workspace, int32_t n_threads, const Kernels& kernels)
      : plan_(plan), workspace_(workspace), n_threads_(n_threads), kernels_(kernels) {}

 protected:
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

  float add_planes(const decouplify_step& s, const float* a, const float* b, int32_t c) const {
    return kernels_.add(a, b, plane(s.output, c), plan_.geometry(s.output), s.activation);
  }

  const decouplify_plan& plan_;
  decouplify_workspace& workspace_;
  int32_t n_threads_;
  const Kernels& kernels_;
};

}  // namespace decouplify
