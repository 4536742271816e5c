// The kernels of one instruction set; CMakeLists.txt compiles this file once for each.
#include "direct.h"
#include "elementwise.h"
#include "expand.h"
#include "linear.h"
#include "norm.h"
#include "packed.h"
#include "pooled.h"
#include "separable.h"

#define DECOUPLIFY_STRING_OF(x) #x
#define DECOUPLIFY_STRING(x) DECOUPLIFY_STRING_OF(x)

namespace decouplify::DECOUPLIFY_ISA {

static void convolve(const Convolution& conv, const ConvolutionCall& call, Scratch& scratch) {
  if (call.n_filters == 0) return;
  switch (conv.algorithm) {
    case Algorithm::kPacked: return convolve_packed(conv, call, scratch);
    case Algorithm::kWinograd2: return convolve_winograd<Transform2>(conv, call, scratch);
    case Algorithm::kWinograd4: return convolve_winograd<Transform4>(conv, call, scratch);
    case Algorithm::kWinogradStrided: return convolve_winograd_strided(conv, call, scratch);
    case Algorithm::kDirect: return convolve_direct(conv, call, scratch);
  }
}

static void transform(Algorithm algorithm, const float* weight, int n_filters, int n_channels, int kernel, int padding,
                      float* to) {
  switch (algorithm) {
    case Algorithm::kWinograd2: return transform_weights<Transform2>(weight, n_filters, n_channels, to);
    case Algorithm::kWinograd4: return transform_weights<Transform4>(weight, n_filters, n_channels, to);
    case Algorithm::kWinogradStrided:
      return transform_strided_weights(weight, n_filters, n_channels, kernel, padding, to);
    case Algorithm::kDirect:
    case Algorithm::kPacked: break;
  }
}

const Kernels& kernels() {
  static constexpr Kernels table{
      DECOUPLIFY_STRING(DECOUPLIFY_ISA), convolve,    slide,     expand_and_slide, separate, convolve_and_pool, transform,
      add_planes,                        scale_plane, sum_plane, normalise,        project,  linear};
  return table;
}

}  // namespace decouplify::DECOUPLIFY_ISA
