// What a convolution step is, as the plan keeps it, and what one call of it gets.
#pragma once

#include "layout.h"

namespace decouplify {

enum class Algorithm : int32_t { kDirect = 0, kPacked = 1, kWinograd2 = 2, kWinograd4 = 4, kWinogradStrided = 5 };

struct Convolution {
  int32_t n_channels, n_filters, groups;
  int32_t kernel[2], stride[2], padding[2], dilation[2];  // rows, columns; padding above and to the left
  const float* weight;       // (filters, channels / groups, rows, columns)
  const float* transformed;  // Winograd weights, or null
  const float* bias;         // (filters)
  Activation activation;
  Algorithm algorithm;
  Geometry in, out;
};

// Weights that the steps after a convolution read and do little with, so that they would wait for memory.
struct Ahead {
  const float* region[2];
  int64_t n_lines[2];  // cache lines of each
};

// One image's share of a convolution: the channels that exist, the filters that are open.
struct ConvolutionCall {
  const float* in;  // first plane of the input value
  const int32_t* channels;
  int32_t n_channels;
  float* out;  // first plane of the output value
  const int32_t* filters;
  int32_t n_filters;
  const float* residual;         // first plane of a value of the output's geometry that is added, or null
  const uint8_t* residual_live;  // per channel of that value, whether it exists
  float* sums;                   // per filter, receives the sum over its output pixels, or null
  int32_t n_threads;
  Ahead ahead;  // to be fetched meanwhile
};

// Windows over each channel by itself: depthwise convolution and pooling.
enum class WindowKind : int32_t { kDepthwise, kMax, kAverage };

struct Window {
  WindowKind kind;
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  const float* weight;  // depthwise: (channels, rows, columns)
  const float* bias;    // depthwise: (channels)
  const float* scale;   // average: 1 / elements under the window, per flat output position
  Activation activation;
  Geometry in, out;
};

struct WindowCall {
  const float* in;
  float* out;
  const int32_t* channels;   // those to compute
  int32_t n_channels;
  const uint8_t* live;       // per channel whether its input exists; only the bias is left where it does not
  float* sums;
  int32_t n_threads;
};

// A convolution, the depthwise one that alone reads it, and a 1x1 convolution that alone reads that.
struct Separable {
  const Convolution& expand;
  const Window& window;
  const Convolution& project;
  ConvolutionCall inner;  // of `expand`; the same filters are open in `window`
  ConvolutionCall outer;  // of `project`
};

// Layer norm over channels, of maps of one geometry.
struct Norm {
  int32_t n_channels;
  const float *weight, *bias;  // (channels)
  float epsilon;
  Geometry geometry;
};

// Kernels of one instruction set. A plane is given by its first float, borders included.
struct Kernels {
  const char* name;
  void (*convolve)(const Convolution&, const ConvolutionCall&, Scratch&);
  void (*slide)(const Window&, const WindowCall&, Scratch&);
  // A 1x1 convolution and the depthwise one that alone reads it, with the same filters open in both.
  void (*expand_and_slide)(const Convolution& expand, const Window&, const ConvolutionCall&, Scratch&);
  // All three a band of rows at a time, if that is possible; otherwise nothing is done.
  bool (*separate)(const Separable&, Scratch&);
  // A convolution and the pooling that alone reads it, in bands as well. The channels pooled are the filters open.
  bool (*convolve_and_pool)(const Convolution&, const ConvolutionCall&, const Window&, const WindowCall&, Scratch&);
  // Weights (filters, channels, kernel, kernel) for an algorithm: (filters, points, channels), for kWinogradStrided
  // (filters, points, channels, 4). Does nothing for algorithms that need none.
  void (*transform)(Algorithm, const float* weight, int n_filters, int n_channels, int kernel, int padding, float* to);
  // out = activation(a + b), where either may be null for zero. Returns the sum over the pixels.
  float (*add)(const float* a, const float* b, float* out, const Geometry&, Activation);
  // out = activation(a * scale + shift), where a may be null for zero. Returns the sum over the pixels.
  float (*scale)(const float* a, float scale, float shift, float* out, const Geometry&, Activation);
  float (*sum)(const float* a, const Geometry&);
  // Of the call it reads the lists of channels and filters (all), the planes, the sums and the number of threads.
  void (*normalise)(const Norm&, const ConvolutionCall&, Scratch&);
  // y[f] = bias[f] + the products of row f of the weight, (outputs, inputs), and x, for each filter f of the list.
  void (*project)(const float* weight, const float* bias, const float* x, int n_inputs, const int32_t* filters,
                  int n_filters, float* y);
  // y = activation(bias + sum over i of x[i] * weight[i]), weight (inputs, outputs). Inputs that are zero cost nothing.
  void (*linear)(const float* weight, const float* bias, const float* x, int n_inputs, float* y, int n_outputs,
                 Activation, int n_threads);
};

}  // namespace decouplify
