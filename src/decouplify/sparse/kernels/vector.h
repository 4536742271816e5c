// One vector of floats for the instruction set this file is compiled for, in GCC/Clang vector extensions.
//
// Everything that depends on the instruction set lives in the namespace DECOUPLIFY_ISA, because the same sources are
// compiled several times with different options and linked into one library. For the same reason nothing here may be
// a non-static function outside that namespace, nor use inline functions of the standard library on hot paths: the
// linker keeps one copy of each, and it may be the one this CPU cannot run.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#define DECOUPLIFY_INLINE static inline __attribute__((always_inline))
#define DECOUPLIFY_INLINE_MEMBER inline __attribute__((always_inline))
#define DECOUPLIFY_INLINE_LAMBDA __attribute__((always_inline))

namespace decouplify::DECOUPLIFY_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// A tile of a convolution: filters x vectors of accumulators that fit the registers beside their operands.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileFilters = 6, kTileVectors = 4;  // 32 registers
#else
constexpr int kTileFilters = 4, kTileVectors = 3;  // 16 registers
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Mask __attribute__((vector_size(kLanes * sizeof(float))));  // per lane 0 or -1
// Accumulators of the unaligned type would be spilled; it is for memory only.
typedef float VecInMemory __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

DECOUPLIFY_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecInMemory*>(p); }
DECOUPLIFY_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecInMemory*>(p) = v; }
// Not `Vec{} + x`: 0 + x differs from x for -0, so the compiler would keep the addition.
DECOUPLIFY_INLINE Vec splat(float x) { return x - Vec{}; }
DECOUPLIFY_INLINE Vec keep(Vec v, Mask mask) { return (Vec)((Mask)v & mask); }
// sum += a * b, in the register of the sum: the compiler would compute into that of an operand at times, copy it back
// with another instruction, and run out of registers in loops that are unrolled.
DECOUPLIFY_INLINE void add_product(Vec& sum, Vec a, Vec b) {
#if defined(__AVX__) && defined(__FMA__)
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
  sum += a * b;
#endif
}

template <int... I>
DECOUPLIFY_INLINE Mask lanes_below(int n, std::integer_sequence<int, I...>) {
  return Mask{I...} < (n - Mask{});
}
// The first n lanes.
DECOUPLIFY_INLINE Mask lanes_below(int n) { return lanes_below(n, std::make_integer_sequence<int, kLanes>{}); }

// The first n lanes, 0 <= n; the rest of the memory is not touched.
DECOUPLIFY_INLINE void store_first(float* p, Vec v, int n) {
  if (n >= kLanes) {
    store(p, v);
    return;
  }
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#elif defined(__AVX__)
  // In parts, for a masked store takes AMD's processors (Zen 3) four times as long as these.
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps((__m256)v, 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, part);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// Half a vector from each of two places.
DECOUPLIFY_INLINE Vec load_halves(const float* a, const float* b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a)), _mm256_loadu_ps(b), 1);
#elif defined(__AVX__)
  return (Vec)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a)), _mm_loadu_ps(b), 1);
#else
  return Vec{a[0], a[1], b[0], b[1]};
#endif
}

// A NaN in v stays: of two values that do not compare, the instructions take the second, as the expressions do. (The
// forms with a mask of all lanes are the same instructions; GCC 12 warns of the others.)
DECOUPLIFY_INLINE Vec at_least(Vec v, Vec low) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)low, (__m512)v);
#elif defined(__AVX__)
  return (Vec)_mm256_max_ps((__m256)low, (__m256)v);
#else
  return low > v ? low : v;
#endif
}
DECOUPLIFY_INLINE Vec at_most(Vec v, Vec high) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)high, (__m512)v);
#elif defined(__AVX__)
  return (Vec)_mm256_min_ps((__m256)high, (__m256)v);
#else
  return high < v ? high : v;
#endif
}
// A NaN in either wins, as in torch; see at_least.
DECOUPLIFY_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  const __m512 m = _mm512_maskz_max_ps(0xffff, (__m512)b, (__m512)a);
  return (Vec)_mm512_mask_mov_ps(m, _mm512_cmp_ps_mask((__m512)b, (__m512)b, _CMP_UNORD_Q), (__m512)b);
#elif defined(__AVX__)
  const __m256 is_nan = _mm256_cmp_ps((__m256)b, (__m256)b, _CMP_UNORD_Q);  // whose bits are a NaN themselves
  return (Vec)_mm256_or_ps(_mm256_max_ps((__m256)b, (__m256)a), is_nan);
#else
  return (b > a) | (b != b) ? b : a;
#endif
}

DECOUPLIFY_INLINE float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

DECOUPLIFY_INLINE float dot(const float* a, const float* b, int64_t n) {
  Vec total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) total[j] += load(a + i + j * kLanes) * load(b + i + j * kLanes);
  }
  float products = sum((total[0] + total[1]) + (total[2] + total[3]));
  for (; i < n; ++i) products += a[i] * b[i];
  return products;
}

// Hides from the compiler what it knows about a value. It would keep one offset for each row or vector in a register
// and, for want of registers, load what is in one again.
template <class T>
DECOUPLIFY_INLINE void hide(T*& pointer) {
  asm("" : "+r"(pointer));
}
DECOUPLIFY_INLINE void hide(uint32_t& number) { asm("" : "+r"(number)); }
DECOUPLIFY_INLINE void hide(Vec& v) {
#if defined(DECOUPLIFY_EMULATE)  // by vectors longer than registers
  asm("" : "+m"(v));
#elif defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// The even (odd) elements of two vectors side by side.
template <int... I>
DECOUPLIFY_INLINE Vec evens(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}
template <int... I>
DECOUPLIFY_INLINE Vec odds(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + 1)...);
}
DECOUPLIFY_INLINE Vec evens(Vec a, Vec b) { return evens(a, b, std::make_integer_sequence<int, kLanes>{}); }
DECOUPLIFY_INLINE Vec odds(Vec a, Vec b) { return odds(a, b, std::make_integer_sequence<int, kLanes>{}); }

// The sums over the lanes of four vectors, in this order, in the first four lanes.
DECOUPLIFY_INLINE Vec sums_of(Vec a, Vec b, Vec c, Vec d) {
  const auto pairs = [](Vec x, Vec y) DECOUPLIFY_INLINE_LAMBDA { return evens(x, y) + odds(x, y); };
  Vec v = pairs(pairs(a, b), pairs(c, d));
  for (int n = kLanes / 4; n > 1; n /= 2) v = pairs(v, v);
  return v;
}

// Shuffles within quarters: groups of four lanes, whatever the vector's length. Each is one instruction, where those
// across quarters take several. Of the quarters a0 a1 a2 a3 and b0 b1 b2 b3, P to S say which lanes to take, b's from 4.
template <int P, int Q, int R, int S, int... I>
DECOUPLIFY_INLINE Vec in_quarters(Vec a, Vec b, std::integer_sequence<int, I...>) {
  constexpr int kTaken[] = {P, Q, R, S};
  return __builtin_shufflevector(a, b, (I / 4 * 4 + kTaken[I % 4] % 4 + kTaken[I % 4] / 4 * kLanes)...);
}
template <int P, int Q, int R, int S>
DECOUPLIFY_INLINE Vec in_quarters(Vec a, Vec b) {
  return in_quarters<P, Q, R, S>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// e^x to about one unit in the last place; bounded below at -87.3 and above at 88.37.
DECOUPLIFY_INLINE Vec exponential(Vec x) {
  const Vec bounded = at_most(at_least(x, splat(-87.3f)), splat(88.37f));
  const Vec scaled = bounded * 1.44269504f;
  const Vec rounded = __builtin_convertvector(
      __builtin_convertvector(scaled + (scaled < Vec{} ? splat(-0.5f) : splat(0.5f)), Mask), Vec);
  const Vec r = (bounded - rounded * 0.693359375f) - rounded * -2.12194440e-4f;  // ln 2 in two parts
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Mask exponent = (__builtin_convertvector(rounded, Mask) + 127) << 23;
  const Vec y = p * (Vec)exponent;
  return x != x ? x : y;
}

}  // namespace decouplify::DECOUPLIFY_ISA
