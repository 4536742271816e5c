// What vector.h and compact.h ask of AVX-512, on processors that have AVX2 at most: included before anything else, it
// has them compile what is for AVX-512 all the same. Slow, and for tests alone.
#pragma once

#include <immintrin.h>

#include <cstdint>

#if defined(__AVX512F__)
#error "this is for compilers that are not asked for AVX-512"
#endif
#define __AVX512F__ 1
#undef __FMA__  // vector.h would use its instruction with the longer registers

namespace emulated {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
constexpr int kLanes = 16;
#define EMULATED static inline __attribute__((always_inline))

EMULATED bool has(__mmask16 mask, int lane) { return mask >> lane & 1; }

EMULATED Floats mask_mov(Floats src, __mmask16 mask, Floats a) {
  for (int i = 0; i < kLanes; ++i) src[i] = has(mask, i) ? a[i] : src[i];
  return src;
}
EMULATED void mask_storeu(float* p, __mmask16 mask, Floats a) {
  for (int i = 0; i < kLanes; ++i) {
    if (has(mask, i)) p[i] = a[i];
  }
}
EMULATED Floats maskz_expand(__mmask16 mask, Floats a) {
  Floats found = {};
  for (int i = 0, from = 0; i < kLanes; ++i) {
    if (has(mask, i)) found[i] = a[from++];
  }
  return found;
}
EMULATED Floats maskz_compress(__mmask16 mask, Floats a) {
  Floats found = {};
  for (int i = 0, to = 0; i < kLanes; ++i) {
    if (has(mask, i)) found[to++] = a[i];
  }
  return found;
}
EMULATED __mmask16 movepi32_mask(Ints a) {
  unsigned found = 0;
  for (int i = 0; i < kLanes; ++i) found |= (a[i] < 0) << i;
  return static_cast<__mmask16>(found);
}
EMULATED __mmask16 unordered(Floats a, Floats b) { return movepi32_mask((a != a) | (b != b)); }
// What the instruction leaves undefined in the upper half is not zero, so that nobody relies on it.
EMULATED Floats castps256(__m256 a) {
  Floats found = Floats{} - 1e30f;
  for (int i = 0; i < kLanes / 2; ++i) found[i] = a[i];
  return found;
}
EMULATED Floats insert_upper(Floats a, __m256 b) {
  for (int i = 0; i < kLanes / 2; ++i) a[kLanes / 2 + i] = b[i];
  return a;
}

}  // namespace emulated

#define __m512 emulated::Floats
#define __m512i emulated::Ints
#define _mm512_mask_mov_ps(src, mask, a) emulated::mask_mov(src, mask, a)
#define _mm512_maskz_mov_ps(mask, a) emulated::mask_mov(emulated::Floats{}, mask, a)
#define _mm512_mask_storeu_ps(p, mask, a) emulated::mask_storeu(p, mask, a)
#define _mm512_maskz_expand_ps(mask, a) emulated::maskz_expand(mask, a)
#define _mm512_maskz_compress_ps(mask, a) emulated::maskz_compress(mask, a)
#define _mm512_movepi32_mask(a) emulated::movepi32_mask(a)
#define _mm512_castps256_ps512(a) emulated::castps256(a)
// Of two values that do not compare, these take the second, as the instructions do.
#define _mm512_maskz_max_ps(mask, a, b) emulated::mask_mov(emulated::Floats{}, mask, (a) > (b) ? (a) : (b))
#define _mm512_maskz_min_ps(mask, a, b) emulated::mask_mov(emulated::Floats{}, mask, (a) < (b) ? (a) : (b))
#define _mm512_insertf32x8(a, b, half)                                  \
  ([&] {                                                                \
    static_assert((half) == 1, "only the upper half is emulated");      \
    return emulated::insert_upper(a, b);                                \
  }())
#define _mm512_cmp_ps_mask(a, b, how)                                   \
  ([&] {                                                                \
    static_assert((how) == _CMP_UNORD_Q, "only this one is emulated");  \
    return emulated::unordered(a, b);                                   \
  }())
