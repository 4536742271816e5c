// What instructions that are not products cost on a core that another hardware thread uses as well.
//
// The inner loop of a convolution with AVX2, 4 filters times 24 pixels, with all operands in the first-level cache: one
// channel or four between two checks for the end, and with four instructions that do nothing after each channel. The
// loops run in turns; what is printed are quantiles over turns, in 10^9 multiply-accumulates per second. On a quiet core
// all loops are equally fast, for there is time between products; where slow quantiles differ, the core is shared.
//
// $ g++ -O3 -mavx2 -mfma benchmarks/shared_core.cpp -o shared_core && taskset -c 1 ./shared_core 20
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kFilters = 4, kVectors = 3, kLanes = 8, kChannels = 256, kCallsPerTurn = 400;

struct Operands {
  const float* x;               // (channels, pixels)
  const int32_t* columns;       // of each channel, its place among the weights of a filter
  const float* weight[kFilters];
  float* sum;                   // of everything, so that nothing is left out
};

template <bool NOPS>
inline __attribute__((always_inline)) void add_channel(const float* x, const float* const* weight, int64_t column,
                                                       __m256 (&acc)[kFilters][kVectors]) {
  __m256 value[kVectors];
#pragma GCC unroll 3
  for (int v = 0; v < kVectors; ++v) value[v] = _mm256_loadu_ps(x + v * kLanes);
#pragma GCC unroll 4
  for (int n = 0; n < kFilters; ++n) {
    const __m256 w = _mm256_broadcast_ss(weight[n] + column);
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) asm("vfmadd231ps %2, %1, %0" : "+x"(acc[n][v]) : "x"(w), "x"(value[v]));
  }
  if (NOPS) asm volatile("nop; nop; nop; nop");
}

template <int UNROLLED, bool NOPS>
__attribute__((noinline)) void multiply(const Operands& operands) {
  __m256 acc[kFilters][kVectors] = {}, total = _mm256_setzero_ps();
  const float *x = operands.x, *weight[kFilters];
#pragma GCC unroll 4
  for (int n = 0; n < kFilters; ++n) weight[n] = operands.weight[n];
  for (const int32_t *c = operands.columns, *end = c + kChannels; c < end; c += UNROLLED, x += UNROLLED * kVectors * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < UNROLLED; ++i) add_channel<NOPS>(x + i * kVectors * kLanes, weight, c[i], acc);
  }
#pragma GCC unroll 4
  for (int n = 0; n < kFilters; ++n) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) total += acc[n][v];
  }
  _mm256_storeu_ps(operands.sum, total);
}

struct Loop {
  const char* name;
  void (*run)(const Operands&);
  std::vector<double> speeds;
};

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

int main(int n_arguments, char** arguments) {
  const double end = seconds() + (n_arguments > 1 ? atof(arguments[1]) : 20);
  std::vector<float> weights(kFilters * kChannels), sum(kLanes);
  auto* x = static_cast<float*>(aligned_alloc(64, kChannels * kVectors * kLanes * sizeof(float)));
  std::fill(x, x + kChannels * kVectors * kLanes, 0.0f);
  std::vector<int32_t> columns(kChannels);
  for (int i = 0; i < kChannels; ++i) columns[i] = i;
  Operands operands{x, columns.data(), {}, sum.data()};
  for (int n = 0; n < kFilters; ++n) operands.weight[n] = weights.data() + n * kChannels;

  Loop loops[] = {{"1 channel between checks", multiply<1, false>, {}},
                  {"1 channel, 4 instructions that do nothing", multiply<1, true>, {}},
                  {"4 channels between checks", multiply<4, false>, {}},
                  {"4 channels, 4 instructions each that do nothing", multiply<4, true>, {}}};
  while (seconds() < end) {
    for (Loop& loop : loops) {
      const double start = seconds();
      for (int i = 0; i < kCallsPerTurn; ++i) loop.run(operands);
      loop.speeds.push_back(1e-9 * kCallsPerTurn * kChannels * kFilters * kVectors * kLanes / (seconds() - start));
    }
  }
  for (Loop& loop : loops) {
    std::sort(loop.speeds.begin(), loop.speeds.end());
    const auto at = [&](double q) { return loop.speeds[static_cast<size_t>(q * (loop.speeds.size() - 1))]; };
    printf("%-50s 10 %%: %.1f, median: %.1f, 90 %%: %.1f\n", loop.name, at(.1), at(.5), at(.9));
  }
  free(x);
}
