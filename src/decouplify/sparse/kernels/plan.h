// A plan as the engine keeps it: steps and values as they were given, and what is derived from them once.
#pragma once

#include <memory>
#include <vector>

#include "engine.h"
#include "kernels.h"

namespace decouplify {

struct Free {
  void operator()(float* data) const { release(data); }
};
using Floats = std::unique_ptr<float, Free>;

}  // namespace decouplify

struct decouplify_plan {
  std::vector<decouplify::Geometry> geometries;
  std::vector<decouplify::Floats> masks;
  std::vector<int64_t> arena_sizes;  // per geometry, and last that of vectors
  std::vector<decouplify_value> values;
  std::vector<decouplify_step> steps;
  std::vector<std::vector<float>> scales;  // per step, of averages
  std::vector<decouplify::Ahead> ahead;    // per step
  std::vector<std::vector<float>> constants;  // per value, what a channel holds that does not exist; empty for zeros
  std::vector<int32_t> gate_sizes;

  const decouplify::Geometry& geometry(int32_t value) const { return geometries[values[value].geometry]; }
  bool is_vector(int32_t value) const { return values[value].geometry < 0; }
};

namespace decouplify {

// Fills in what follows from geometries, values, steps and sizes of gates, which are there already. Throws bad_alloc.
void complete(decouplify_plan& plan, const std::vector<decouplify_geometry>& geometries, const Kernels& kernels);

}  // namespace decouplify
