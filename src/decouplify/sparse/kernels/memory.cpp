#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "layout.h"

namespace decouplify {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kMapsLargeBlocks = false;  // the sanitizer watches only what the C library hands out
#else
constexpr bool kMapsLargeBlocks = true;
#endif

// Right before the data, which it leaves aligned.
struct alignas(64) Header {
  char* mapping;  // null if the block is the C library's
  size_t n_bytes;
};

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

char* take(size_t n_bytes) {
  const size_t rounded = round_up(sizeof(Header) + n_bytes, alignof(Header));
  void* block = std::aligned_alloc(alignof(Header), rounded);
  if (block == nullptr) throw std::bad_alloc();
  std::memset(block, 0, rounded);
  return static_cast<char*>(block) + sizeof(Header);
}

// Huge pages, with a small one ahead for the header. The C library would keep such a block when it is freed, if others
// of its size were freed before, and cut it up for other uses.
char* map(size_t n_bytes, Header& header) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), data_bytes = round_up(n_bytes, kHugePage);
  const size_t n_mapped = page + kHugePage + data_bytes;
  void* mapped = mmap(nullptr, n_mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  char* begin = static_cast<char*>(mapped);
  const size_t ahead = round_up(reinterpret_cast<uintptr_t>(begin) + page, kHugePage) -
                       reinterpret_cast<uintptr_t>(begin);
  char* data = begin + ahead;
  header = {data - page, page + data_bytes};
  if (header.mapping > begin) munmap(begin, header.mapping - begin);
  const size_t behind = n_mapped - ahead - data_bytes;
  if (behind > 0) munmap(data + data_bytes, behind);
#if defined(MADV_HUGEPAGE)
  // Streams of weights from many filters at once would miss the TLB at every step with small pages.
  madvise(data, data_bytes, MADV_HUGEPAGE);
#endif
  std::memset(data, 0, data_bytes);  // here rather than page by page while the first images run
  return data;
}

}  // namespace

float* allocate(size_t n_floats) {
  const size_t n_bytes = n_floats * sizeof(float);
  Header header{nullptr, 0};
  // Small blocks would waste most of a huge page.
  const bool is_large = kMapsLargeBlocks && n_bytes >= kHugePage / 2;
  char* data = is_large ? map(n_bytes, header) : take(n_bytes);
  std::memcpy(data - sizeof(Header), &header, sizeof(Header));
  return reinterpret_cast<float*>(data);
}

void release(float* data) {
  if (data == nullptr) return;
  char* begin = reinterpret_cast<char*>(data) - sizeof(Header);
  Header header{nullptr, 0};
  std::memcpy(&header, begin, sizeof(Header));
  if (header.mapping == nullptr) {
    std::free(begin);
  } else {
    munmap(header.mapping, header.n_bytes);
  }
}

void trim() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

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
