// AVX-512 with VNNI: sixteen lanes.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace {

struct Avx512 {
  static constexpr int lanes = 16, tokens = 6, at_once = 12, panel_rows = 2, registers = 32;
  typedef __m512 F;
  typedef __m512i I;
  typedef __m512i B;
  typedef __m512i Dot4;

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float *p) { return _mm512_loadu_ps(p); }
  static void store(float *p, F x) { _mm512_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F pow2(F a) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), a); }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static float top(F a) { return _mm512_reduce_max_ps(a); }
  static F f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
  static F bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static F s8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
  }
  static void to_f16(uint16_t *p, F x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void to_s8(int8_t *p, F x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x))); }

  static B bytes(const void *p) { return _mm512_loadu_si512(p); }
  template <int J> static B four(const int8_t *p) { // quad J of a block
    int32_t x;
    memcpy(&x, p + 4 * J, 4);
    return _mm512_set1_epi32(x);
  }
  static B low(B x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
  static B high(B x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
  template <int C> static B with_bits(B low, B h) {
    if (C == 0) h = _mm512_slli_epi16(h, 4);
    if (C == 1) h = _mm512_slli_epi16(h, 2);
    if (C == 3) h = _mm512_srli_epi16(h, 2);
    return _mm512_or_si512(low, _mm512_and_si512(h, _mm512_set1_epi8(0x30)));
  }
  static I izero() { return _mm512_setzero_si512(); }
  static I shifted(const int32_t *p, int n) { return _mm512_srai_epi32(_mm512_set1_epi32(*p), n); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static F as_float(I a) { return _mm512_castsi512_ps(a); }
  static I plus(I a, int32_t b) { return _mm512_add_epi32(a, _mm512_set1_epi32(b)); }
  static Dot4 dot4_start(I init) { return init; }
  static Dot4 dot4(Dot4 c, B w, B a) { return _mm512_dpbusd_epi32(c, w, a); }
  static I dot4_sum(Dot4 c, I) { return c; }
  static I dot6(I c, B w0, B a0, B w1, B a1) { return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(c, w0, a0), w1, a1); }
  static constexpr bool unsigned8 = true;
  struct W8 { B w; };
  static W8 w8(B w) { return {_mm512_xor_si512(w, _mm512_set1_epi8((char)0x80))}; }
  static B from_128(B w, int add) { return _mm512_add_epi8(w, _mm512_set1_epi8((char)add)); }
  static void store_bytes(uint8_t *p, B w) { _mm512_storeu_si512(p, w); }
  static I dot8(I c, W8 w, B a) { return _mm512_dpbusd_epi32(c, w.w, a); }
};

} // namespace
