#include "engine.h"

#include <memory>
#include <new>

#include "kernels.h"
#include "run.h"

namespace {

const decouplify::Kernels* chosen = decouplify::best_kernels();

}  // namespace

extern "C" {

int32_t decouplify_abi_version() { return kAbiVersion; }
const char* decouplify_instruction_set() { return chosen->name; }

int32_t decouplify_select(const char* name) {
  const decouplify::Kernels* found = decouplify::kernels_named(name);
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
  plan->values.assign(values, values + n_values);
  plan->steps.assign(steps, steps + n_steps);
  plan->gate_sizes.assign(gate_sizes, gate_sizes + n_gates);
  decouplify::complete(*plan, {geometries, geometries + n_geometries}, *chosen);
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
  decouplify::add_values(*workspace, *plan);
  decouplify::add_buffers(*workspace, *plan);
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
  decouplify::Run run(*plan, *workspace, slots, n_threads, *chosen);
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
  const decouplify::Channels& open = workspace->gates[gate];
  for (int32_t f = 0; f < open.size(); ++f) z[f] = open.flags[f];
}
}
