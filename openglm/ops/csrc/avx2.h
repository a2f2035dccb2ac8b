// AVX2, with FMA and F16C; and its successor with VNNI, which multiplies bytes in one instruction.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace {

struct Avx2Floats {
  static constexpr int lanes = 8;
  typedef __m256 F;
  typedef __m256i I;
  typedef __m256i B;

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float *p) { return _mm256_loadu_ps(p); }
  static void store(float *p, F x) { _mm256_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F pow2(F a) { // of whole numbers from -126 to 127
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127)), 23));
  }
  static float sum(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  static float top(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  static F f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
  static F bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
  }
  static F s8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
  }
  static void to_f16(uint16_t *p, F x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void to_s8(int8_t *p, F x) {
    __m256i n = _mm256_cvtps_epi32(x);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(words, words));
  }

  static B bytes(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
  template <int J> static B four(const int8_t *p) { // quad J of a block
    int32_t x;
    memcpy(&x, p + 4 * J, 4);
    return _mm256_set1_epi32(x);
  }
  static B low(B x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  static B high(B x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
  template <int C> static B with_bits(B low, B h) {
    if (C == 0) h = _mm256_slli_epi16(h, 4);
    if (C == 1) h = _mm256_slli_epi16(h, 2);
    if (C == 3) h = _mm256_srli_epi16(h, 2);
    return _mm256_or_si256(low, _mm256_and_si256(h, _mm256_set1_epi8(0x30)));
  }
  static I izero() { return _mm256_setzero_si256(); }
  static I shifted(const int32_t *p, int n) { return _mm256_srai_epi32(_mm256_set1_epi32(*p), n); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
};

struct Avx2 : Avx2Floats {
  static constexpr int tokens = 4, at_once = 4, panel_rows = 0, registers = 16;
  // Products of two neighbours are added in 16 bits: eight times 2 * 15 * 127 fit, and twice 2 * 63 * 127.
  typedef __m256i Dot4;
  static Dot4 dot4_start(I) { return izero(); }
  static Dot4 dot4(Dot4 c, B w, B a) { return _mm256_add_epi16(c, _mm256_maddubs_epi16(w, a)); }
  static I dot4_sum(Dot4 c, I init) { return _mm256_add_epi32(init, _mm256_madd_epi16(c, _mm256_set1_epi16(1))); }
  static I dot6(I c, B w0, B a0, B w1, B a1) {
    __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(w0, a0), _mm256_maddubs_epi16(w1, a1));
    return _mm256_add_epi32(c, _mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
  }
  static constexpr bool unsigned8 = false;
  struct W8 { B w, absolute; };
  static W8 w8(B w) { return {w, _mm256_abs_epi8(w)}; }
  static I dot8(I c, W8 w, B a) { // one factor must be unsigned: the sign of the weight goes to the activation
    __m256i sums = _mm256_maddubs_epi16(w.absolute, _mm256_sign_epi8(a, w.w));
    return _mm256_add_epi32(c, _mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
  }
};

#ifdef __AVXVNNI__
struct Avx2Vnni : Avx2Floats {
  static constexpr int tokens = 4, at_once = 4, panel_rows = 1, registers = 16;
  typedef __m256i Dot4;
  static Dot4 dot4_start(I init) { return init; }
  static Dot4 dot4(Dot4 c, B w, B a) { return _mm256_dpbusd_avx_epi32(c, w, a); }
  static I dot4_sum(Dot4 c, I) { return c; }
  static I dot6(I c, B w0, B a0, B w1, B a1) {
    return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(c, w0, a0), w1, a1);
  }
  static constexpr bool unsigned8 = true;
  struct W8 { B w; };
  static W8 w8(B w) { return {_mm256_xor_si256(w, _mm256_set1_epi8((char)0x80))}; }
  static F as_float(I a) { return _mm256_castsi256_ps(a); }
  static I plus(I a, int32_t b) { return _mm256_add_epi32(a, _mm256_set1_epi32(b)); }
  static B from_128(B w, int add) { return _mm256_add_epi8(w, _mm256_set1_epi8((char)add)); }
  static void store_bytes(uint8_t *p, B w) { _mm256_storeu_si256((__m256i *)p, w); }
  static I dot8(I c, W8 w, B a) { return _mm256_dpbusd_avx_epi32(c, w.w, a); }
};
#endif

} // namespace
