// How feature maps lie in memory, and the small services kernels need. Nothing here depends on the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace decouplify {

// Planes of one height and width. A plane is one channel, row after row, with `border` columns of zeros between two
// rows (they are the right border of one and the left border of the next), `border` rows of zeros above and as many
// below. So a tap of a convolution is a constant offset into flat memory, whatever row a pixel is in. Every kernel
// writes zeros to the border, or nothing.
struct Geometry {
  int32_t height, width, border;
  int32_t row;     // floats from one row to the next
  int64_t plane;   // floats from one channel to the next
  int64_t origin;  // position of the first pixel in its plane
  const int32_t* mask;  // per flat position from the origin: -1 for a pixel, 0 for border; padded to whole vectors
};

// The floats before a position that fill whole cache lines, which also holds before the first pixel.
inline int64_t whole_lines(int64_t position) { return position & ~int64_t{15}; }

// Positions from the first pixel to the last one, border columns in between included.
inline int64_t flat_size(const Geometry& g) { return int64_t{g.height} * g.row; }

enum class ActivationKind : int32_t { kClamp, kSilu, kHardswish, kGelu, kSigmoid, kLeaky, kGeluTanh };

// clamp(x, low, high), which is ReLU, ReLU6 and the identity; or a named function. kLeaky has its slope in `low`.
struct Activation {
  ActivationKind kind;
  float low, high;
};

// Memory that only grows, so that a run allocates nothing once every size was seen.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();
  // At least n floats, aligned to 64 bytes; what was there is lost when it grows.
  float* reserve(size_t n);

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

// Zeroed memory in huge pages where the system has them; free with release().
float* allocate(size_t n_floats);
void release(float* data);
// Lets the C library return what it keeps of memory that was freed.
void trim();

// What one run may write to besides its values: private buffers per thread, and some that all threads share.
struct Scratch {
  static constexpr int kMaxThreads = 64;
  Buffer transformed[kMaxThreads], products[kMaxThreads], window[kMaxThreads], filter_groups[kMaxThreads];
  Buffer gathered, partial_sums, lists, inner_lists, band;
};

// A part of a loop that one thread does in one go: tasks [begin, end).
struct Share {
  int begin, end;
  int thread;     // who does it, which is whoever comes first
  int index;      // among the shares of the loop
  bool is_first;  // that this thread does
};

// Into how many shares n_threads threads divide n_tasks tasks. Several for each, so that none waits long for another.
constexpr int kSharesPerThread = 4;
int n_shares(int n_threads, int n_tasks);

// Calls body(context, share) for all shares of n_tasks tasks, on up to n_threads threads, and returns when all are
// done; if a body threw std::bad_alloc, throws it then. Which tasks are a share depends on the two numbers only, so sums
// over shares come out the same in every run.
using Body = void (*)(void* context, const Share& share);
void run_parallel(int n_threads, int n_tasks, Body body, void* context);

}  // namespace decouplify
