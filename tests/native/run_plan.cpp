// Runs a plan from a file without Python, so that a memory checker sees nothing but the engine.
//
//   run_plan PLAN IMAGES OUTPUTS N_THREADS
//
// PLAN is what tests/test_memory.py writes: seven counts, the structures of the C interface, and one block of floats;
// where a structure has a pointer, the file has 1 + a position in the block, or 0. IMAGES are read one by one, and the
// output of each is written to OUTPUTS.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "engine.h"

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "run_plan: %s\n", what);
  std::exit(2);
}

std::FILE* open_file(const char* path, const char* mode) {
  std::FILE* file = std::fopen(path, mode);
  if (file == nullptr) fail(path);
  return file;
}

template <class T>
std::vector<T> read(std::FILE* file, int64_t n) {
  std::vector<T> items(n);
  if (std::fread(items.data(), sizeof(T), n, file) != static_cast<size_t>(n)) fail("the file is too short");
  return items;
}

void point_into(const float*& pointer, const std::vector<float>& block) {
  const auto position = reinterpret_cast<intptr_t>(pointer);
  pointer = position == 0 ? nullptr : block.data() + position - 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) fail("PLAN IMAGES OUTPUTS N_THREADS wanted");
  std::FILE* file = open_file(argv[1], "rb");
  enum { kGeometries, kValues, kSteps, kGates, kFloats, kInputs, kOutputs, kCounts };
  const auto n = read<int64_t>(file, kCounts);
  const auto geometries = read<decouplify_geometry>(file, n[kGeometries]);
  const auto values = read<decouplify_value>(file, n[kValues]);
  auto steps = read<decouplify_step>(file, n[kSteps]);
  const auto gates = read<int32_t>(file, n[kGates]);
  const auto block = read<float>(file, n[kFloats]);
  std::fclose(file);
  for (auto& step : steps) {
    for (const float** p : {&step.weight, &step.bias, &step.weight2, &step.bias2, &step.transformed}) {
      point_into(*p, block);
    }
  }

  decouplify_plan* plan = decouplify_plan_new(geometries.data(), n[kGeometries], values.data(), n[kValues],
                                              steps.data(), n[kSteps], gates.data(), n[kGates]);
  if (plan == nullptr) fail("no plan");
  decouplify_workspace* workspace = decouplify_workspace_new(plan);
  if (workspace == nullptr) fail("no workspace");
  // Of exactly their sizes, so that a read or write beyond them is seen.
  std::vector<float> image(n[kInputs]), output(n[kOutputs]);
  float* const slots[] = {image.data(), output.data()};
  std::FILE *images = open_file(argv[2], "rb"), *outputs = open_file(argv[3], "wb");
  while (std::fread(image.data(), sizeof(float), image.size(), images) == image.size()) {
    if (decouplify_run(plan, workspace, 0, n[kSteps], slots, std::atoi(argv[4])) != kDone) fail("a run failed");
    std::fwrite(output.data(), sizeof(float), output.size(), outputs);
  }
  std::fclose(images);
  std::fclose(outputs);
  decouplify_workspace_free(workspace);
  decouplify_plan_free(plan);
  std::printf("%s\n", decouplify_instruction_set());
  return 0;
}
