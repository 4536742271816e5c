#include "plan.h"

namespace decouplify {
namespace {

// Tiles read beyond the last pixel of the last plane: a few rows of the next tile of pixels, and whole vectors.
int64_t slack(const Geometry& g) { return int64_t{g.row} * (8 + g.border) + 256; }

Geometry geometry_of(const decouplify_geometry& given) {
  Geometry g{given.height, given.width, given.border, given.width + given.border, 0, 0, nullptr};
  // Winograd tiles are four rows high; what they read below the last row must be finite.
  const int64_t n_rows = (g.height + 3) / 4 * 4 + 2 * int64_t{g.border};
  // The first pixel begins a cache line: a vector that lies across two of them takes twice as long to load and store.
  const int64_t before = int64_t{g.border} * g.row + g.border;
  g.origin = whole_lines(before + 15);
  g.plane = whole_lines(g.origin - before + n_rows * g.row + g.border + 15);
  if (g.plane % 1024 == 0) g.plane += 16;  // planes a page apart would fight for the same cache sets
  return g;
}

// See Geometry::mask. It begins a cache line, as the vectors do that it is applied to.
Floats mask_of(const Geometry& g) {
  Floats memory(allocate(flat_size(g) + 64));
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
  std::vector<float> scale(flat_size(out) + 64);
  for (int32_t y = 0; y < out.height; ++y) {
    for (int32_t x = 0; x < out.width; ++x) {
      scale[int64_t{y} * out.row + x] = 1.0f / static_cast<float>(count(0, y, in.height) * count(1, x, in.width));
    }
  }
  return scale;
}

// Floats of the arena of vectors.
int64_t vector_floats(const decouplify_plan& plan) {
  int64_t n_floats = 64;
  for (const auto& value : plan.values) {
    const int64_t end = int64_t{value.first} + value.channels + 64;
    if (value.geometry < 0 && end > n_floats) n_floats = end;
  }
  return n_floats;
}

std::vector<float> scale_of(const decouplify_plan& plan, const decouplify_step& step) {
  const bool is_average = step.kind == kWindow && static_cast<WindowKind>(step.window) == WindowKind::kAverage;
  if (!is_average) return {};
  return average_scale(step, plan.geometry(step.input), plan.geometry(step.output));
}

// A linear layer without inputs is the activation of its bias.
std::vector<float> constants_of(const decouplify_step& scale, int32_t n_channels, const Kernels& kernels) {
  std::vector<float> constants(n_channels);
  kernels.linear(scale.weight, scale.bias, nullptr, 0, constants.data(), n_channels, scale.activation, 1);
  return constants;
}

bool computes(int32_t kind) { return kind == kConvolution || kind == kExpand || kind == kWindow; }

// What a step fetches: the weights of linear layers and controllers that follow before the next step that computes.
Ahead ahead_of(const decouplify_plan& plan, size_t step) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (size_t i = step + 1; i < plan.steps.size() && !computes(plan.steps[i].kind); ++i) {
    const decouplify_step& s = plan.steps[i];
    if (s.kind == kLinear) {
      const int64_t n_inputs = plan.values[s.input].channels;
      return {{s.weight, nullptr}, {n_inputs * plan.values[s.output].channels / kLine, 0}};
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

void complete(decouplify_plan& plan, const std::vector<decouplify_geometry>& geometries, const Kernels& kernels) {
  for (const decouplify_geometry& given : geometries) {
    Geometry g = geometry_of(given);
    plan.masks.push_back(mask_of(g));
    g.mask = reinterpret_cast<const int32_t*>(plan.masks.back().get());
    plan.geometries.push_back(g);
    plan.arena_sizes.push_back(given.n_planes * g.plane + slack(g));
  }
  plan.arena_sizes.push_back(vector_floats(plan));
  for (const auto& step : plan.steps) plan.scales.push_back(scale_of(plan, step));
  plan.constants.resize(plan.values.size());
  for (const auto& step : plan.steps) {
    if (step.kind != kScale || !step.leaves_constants) continue;
    plan.constants[step.output] = constants_of(step, plan.values[step.output].channels, kernels);
  }
  for (size_t i = 0; i < plan.steps.size(); ++i) plan.ahead.push_back(ahead_of(plan, i));
}

}  // namespace decouplify
