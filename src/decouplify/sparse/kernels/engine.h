// The C interface. native.py mirrors these structures; kAbiVersion changes whenever one of them does.
//
// A plan is the flat list of steps that one image of one size needs, with every buffer placed. A workspace is the
// memory one run writes to: runs on different workspaces may go on at the same time. All pointers in a plan belong to
// the caller and must outlive it. No function throws; those that can fail return a status or null.
#pragma once

#include <cstdint>

#include "convolution.h"

#define DECOUPLIFY_API __attribute__((visibility("default")))

extern "C" {

enum { kAbiVersion = 7 };

enum Status : int32_t { kDone = 0, kUndefinedGate = 1, kOutOfMemory = 2 };

// All planes of one size lie in one arena; see decouplify::Geometry.
struct decouplify_geometry {
  int32_t height, width, border, n_planes;
};

// A feature map (planes [first, first + channels) of its geometry's arena), or with geometry -1 a vector of features
// (floats [first, first + channels) of the arena of vectors).
struct decouplify_value {
  int32_t geometry, first, channels;
  int32_t has_sums;  // whether a step asks for sums over its pixels
};

enum StepKind : int32_t {
  kLoad,         // output <- slot, contiguous
  kStore,        // slot <- input, contiguous, with zeros where channels do not exist
  kConvolution,  // output <- activation(convolution(input) + other); other may share the memory of output
  kWindow,       // output <- depthwise convolution or pooling of input
  kAdd,          // output <- activation(input + other)
  kScale,        // output <- activation(input * weight + bias), per channel
  kCopy,         // output channels from `position` on <- input, subsampled by stride, shifted and padded by padding
  kMean,         // vector output <- mean over the pixels of input
  kFlatten,      // vector output <- input in the order channel, row, column
  kLinear,       // vector output <- activation(weight^T input + bias)
  kControl,      // gate <- controller of input: weight, bias, weight2, bias2
  kNorm,         // output <- layer norm of input over channels: weight, bias, epsilon
  kMask,         // output (in the same memory) <- input restricted to the open filters of gate
  kExpand,       // output <- depthwise convolution of a 1x1 convolution of input: weight, bias; weight2, bias2
};

struct decouplify_step {
  int32_t kind, input, other, output, gate, slot, position;
  int32_t algorithm, window, groups, hidden;
  int32_t activated;  // kConvolution: whether `activation` changes nothing in `other`
  int32_t clears;     // kCopy: whether the channels it does not write exist no longer
  int32_t counts_padding;  // kWindow: whether an average counts the padding
  // kScale: whether a channel that the input lacks does not exist in the output either, though it would hold a constant.
  // What reads the output then adds the constant: kControl and kMean, and convolutions of 1x1 by way of their bias.
  int32_t leaves_constants;
  // How many steps after this one may be computed with it, a band of rows at a time, because each of them alone reads
  // what the one before it writes: a depthwise kWindow and a 1x1 kConvolution after a kConvolution without `other` that
  // has the gate of the kWindow; a 1x1 kConvolution after a kExpand; or a kWindow that takes maxima after a kConvolution
  // without `other`. What lies in between is then not written.
  int32_t joined;
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  decouplify::Activation activation;
  float epsilon;
  const float *weight, *bias, *weight2, *bias2, *transformed;
};

struct decouplify_plan;
struct decouplify_workspace;

DECOUPLIFY_API int32_t decouplify_abi_version();
// Name of the instruction set chosen for this CPU.
DECOUPLIFY_API const char* decouplify_instruction_set();
// Another of the compiled ones, for tests. Returns whether this CPU has it. Not while anything runs.
DECOUPLIFY_API int32_t decouplify_select(const char* name);

DECOUPLIFY_API float* decouplify_allocate(int64_t n_floats);
DECOUPLIFY_API void decouplify_release(float* data);
DECOUPLIFY_API void decouplify_trim();
// See decouplify::Kernels::transform.
DECOUPLIFY_API void decouplify_transform(int32_t algorithm, const float* weight, int32_t n_filters, int32_t n_channels,
                                         int32_t kernel, int32_t padding, float* to);

DECOUPLIFY_API decouplify_plan* decouplify_plan_new(const decouplify_geometry* geometries, int32_t n_geometries,
                                                    const decouplify_value* values, int32_t n_values,
                                                    const decouplify_step* steps, int32_t n_steps,
                                                    const int32_t* gate_sizes, int32_t n_gates);
DECOUPLIFY_API void decouplify_plan_free(decouplify_plan* plan);
DECOUPLIFY_API void decouplify_plan_set_algorithm(decouplify_plan* plan, int32_t step, int32_t algorithm,
                                                  const float* transformed);

DECOUPLIFY_API decouplify_workspace* decouplify_workspace_new(const decouplify_plan* plan);
DECOUPLIFY_API void decouplify_workspace_free(decouplify_workspace* workspace);
DECOUPLIFY_API int64_t decouplify_workspace_bytes(const decouplify_plan* plan);
// Multiply-accumulates since the last call.
DECOUPLIFY_API int64_t decouplify_workspace_macs(decouplify_workspace* workspace);

// Runs steps [begin, end) on one image. slots: one pointer per slot number the steps mention.
DECOUPLIFY_API int32_t decouplify_run(const decouplify_plan* plan, decouplify_workspace* workspace, int32_t begin,
                                      int32_t end, float* const* slots, int32_t n_threads);
// Puts gate values (0 is closed, anything else open) in place of a kControl step.
DECOUPLIFY_API void decouplify_set_gate(const decouplify_plan* plan, decouplify_workspace* workspace, int32_t gate,
                                        const float* z);
DECOUPLIFY_API void decouplify_get_gate(const decouplify_plan* plan, decouplify_workspace* workspace, int32_t gate,
                                        float* z);
}
