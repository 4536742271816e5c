#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "layout.h"

namespace decouplify {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

float* allocate(size_t n_floats) {
  const size_t n_bytes = n_floats * sizeof(float);
  // Small blocks would waste most of a huge page.
  const size_t unit = n_bytes >= kHugePage / 2 ? kHugePage : 64;
  const size_t rounded = round_up(n_bytes > 0 ? n_bytes : 1, unit);
  void* data = std::aligned_alloc(unit, rounded);
  if (data == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  // Streams of weights from many filters at once would miss the TLB at every step with small pages.
  if (unit == kHugePage) madvise(data, rounded, MADV_HUGEPAGE);
#endif
  std::memset(data, 0, rounded);
  return static_cast<float*>(data);
}

void release(float* data) { std::free(data); }

Buffer::~Buffer() { release(data_); }

float* Buffer::reserve(size_t n) {
  if (n > size_) {
    release(data_);
    data_ = nullptr;
    size_ = 0;
    data_ = allocate(n);
    size_ = n;
  }
  return data_;
}

}  // namespace decouplify
