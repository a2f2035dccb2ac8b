// NEON of 64-bit ARM; with the dot products of ARMv8.2 (DotProd), and with the matrix products of ARMv8.6 (I8MM). Eight
// lanes, two vectors each: a block of weights is the same bytes as for AVX2.
#pragma once

#include <arm_neon.h>

#include "simd.h"

namespace {

struct NeonFloats {
  static constexpr int lanes = 8, tokens = 4, at_once = 4, registers = 16; // pairs of them
  struct F { float32x4_t a, b; };
  struct B { uint8x16_t a, b; };

  static F zero() { return set(0.0f); }
  static F set(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static F load(const float *p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static void store(float *p, F x) { vst1q_f32(p, x.a), vst1q_f32(p + 4, x.b); }
  static F add(F x, F y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
  static F sub(F x, F y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
  static F mul(F x, F y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
  static F div(F x, F y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
  static F max(F x, F y) { return {vmaxnmq_f32(x.a, y.a), vmaxnmq_f32(x.b, y.b)}; } // a number goes before NaN
  static F min(F x, F y) { return {vminnmq_f32(x.a, y.a), vminnmq_f32(x.b, y.b)}; }
  static F abs(F x) { return {vabsq_f32(x.a), vabsq_f32(x.b)}; }
  static F round(F x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b)}; }
  static float32x4_t power(float32x4_t x) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(x), vdupq_n_s32(127)), 23));
  }
  static F pow2(F x) { return {power(x.a), power(x.b)}; } // of whole numbers from -126 to 127
  static float sum(F x) {
    float32x4_t four = vaddq_f32(x.a, x.b);
    return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
  }
  static float top(F x) { return vmaxnmvq_f32(vmaxnmq_f32(x.a, x.b)); }
  static float32x4_t wide(uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
  static F f16(const uint16_t *p) { return {wide(vld1_u16(p)), wide(vld1_u16(p + 4))}; }
  static F bf16(const uint16_t *p) {
    uint16x8_t x = vld1q_u16(p);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(x, 16))};
  }
  static F s8(const int8_t *p) {
    int16x8_t x = vmovl_s8(vld1_s8(p));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_high_s16(x))};
  }
  static void to_f16(uint16_t *p, F x) {
    vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b)));
  }
  static void to_s8(int8_t *p, F x) {
    int16x4_t a = vqmovn_s32(vcvtnq_s32_f32(x.a));
    vst1_s8(p, vqmovn_s16(vqmovn_high_s32(a, vcvtnq_s32_f32(x.b))));
  }

  static B bytes(const void *p) { return {vld1q_u8((const uint8_t *)p), vld1q_u8((const uint8_t *)p + 16)}; }
  static void store_bytes(uint8_t *p, B x) { vst1q_u8(p, x.a), vst1q_u8(p + 16, x.b); }
  static B low(B x) { return {vandq_u8(x.a, vdupq_n_u8(15)), vandq_u8(x.b, vdupq_n_u8(15))}; }
  static B high(B x) { return {vshrq_n_u8(x.a, 4), vshrq_n_u8(x.b, 4)}; }
  template <int C> static uint8x16_t with_bits(uint8x16_t low, uint8x16_t h) {
    if constexpr (C == 3) h = vshrq_n_u8(h, 2);
    else h = vshlq_n_u8(h, 4 - 2 * C);
    return vbslq_u8(vdupq_n_u8(0x30), h, low);
  }
  template <int C> static B with_bits(B low, B h) { return {with_bits<C>(low.a, h.a), with_bits<C>(low.b, h.b)}; }
  static int8x16_t of(uint8x16_t x) { return vreinterpretq_s8_u8(x); }
  static constexpr bool unsigned8 = false;
  typedef B W8;
  static W8 w8(B w) { return w; }
};

// Without dot products: bytes are multiplied to 16 bits. Two sums a row until they become floats.
struct Neon : NeonFloats {
  static constexpr int panel_rows = 0;
  struct I { int32x4_t v[4]; };
  struct Dot4 { int16x8_t v[4]; }; // eight products below 15 * 127 fit, and two of any size

  static I izero() {
    int32x4_t none = vdupq_n_s32(0);
    return {{none, none, none, none}};
  }
  static I shifted(const int32_t *p, int n) {
    int32x4_t x = vzip1q_s32(vdupq_n_s32(*p >> n), vdupq_n_s32(0));
    return {{x, x, x, x}};
  }
  static F to_float(I x) {
    return {vcvtq_f32_s32(vpaddq_s32(x.v[0], x.v[1])), vcvtq_f32_s32(vpaddq_s32(x.v[2], x.v[3]))};
  }
  template <int J> static int8x16_t four(const int8_t *x) {
    int32_t four;
    memcpy(&four, x + 4 * J, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  static Dot4 products(B w, int8x16_t x) {
    return {{vmull_s8(vget_low_s8(of(w.a)), vget_low_s8(x)), vmull_high_s8(of(w.a), x),
             vmull_s8(vget_low_s8(of(w.b)), vget_low_s8(x)), vmull_high_s8(of(w.b), x)}};
  }
  static Dot4 dot4_start(I) {
    int16x8_t none = vdupq_n_s16(0);
    return {{none, none, none, none}};
  }
  static Dot4 dot4(Dot4 c, B w, int8x16_t x) {
    return {{vmlal_s8(c.v[0], vget_low_s8(of(w.a)), vget_low_s8(x)), vmlal_high_s8(c.v[1], of(w.a), x),
             vmlal_s8(c.v[2], vget_low_s8(of(w.b)), vget_low_s8(x)), vmlal_high_s8(c.v[3], of(w.b), x)}};
  }
  static I dot4_sum(Dot4 c, I init) {
    for (int i = 0; i < 4; i++) init.v[i] = vpadalq_s16(init.v[i], c.v[i]);
    return init;
  }
  static I dot6(I c, B w0, int8x16_t x0, B w1, int8x16_t x1) { return dot4_sum(dot4(products(w0, x0), w1, x1), c); }
  static I dot8(I c, W8 w, int8x16_t x) { return dot4_sum(products(w, x), c); }
};

#ifdef __ARM_FEATURE_DOTPROD
struct NeonDot : NeonFloats {
  static constexpr int panel_rows = 1; // with their sums, what the registers hold
  struct I { int32x4_t a, b; };
  typedef I Dot4;
  template <int L> struct Lane { int8x16_t x; }; // four bytes of these are meant

  static I izero() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
  static I shifted(const int32_t *p, int n) { return {vdupq_n_s32(*p >> n), vdupq_n_s32(*p >> n)}; }
  static F to_float(I x) { return {vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b)}; }
  template <int J> static Lane<J % 4> four(const int8_t *x) { return {vld1q_s8(x + J / 4 * 16)}; }
  template <int L> static I dot(I c, B w, Lane<L> x) {
    return {vdotq_laneq_s32(c.a, of(w.a), x.x, L), vdotq_laneq_s32(c.b, of(w.b), x.x, L)};
  }
  static Dot4 dot4_start(I init) { return init; }
  template <int L> static Dot4 dot4(Dot4 c, B w, Lane<L> x) { return dot(c, w, x); }
  static I dot4_sum(Dot4 c, I) { return c; }
  template <int L, int M> static I dot6(I c, B w0, Lane<L> x0, B w1, Lane<M> x1) { return dot(dot(c, w0, x0), w1, x1); }
  template <int L> static I dot8(I c, W8 w, Lane<L> x) { return dot(c, w, x); }

  // Panels hold signed bytes.
  static B from_128(B w, int add) {
    uint8x16_t less = vdupq_n_u8((uint8_t)(128 - add));
    return {vsubq_u8(w.a, less), vsubq_u8(w.b, less)};
  }
  static void pair(B &, B &) {}
  template <int NR, int QUADS> static void panel_dots(const uint8_t *q, const int8_t *x, I (&c)[NR][tokens]) {
    for (int r = 0; r < NR; r++)
      for (int m = 0; m < tokens; m++) c[r][m] = izero();
    for (int j = 0; j < QUADS; j += 4, q += 4 * NR * 32, x += 16) {
      int8x16_t xs[tokens];
      for (int m = 0; m < tokens; m++) xs[m] = vld1q_s8(x + 32 * m);
      quad<NR, 0>(q, xs, c), quad<NR, 1>(q, xs, c), quad<NR, 2>(q, xs, c), quad<NR, 3>(q, xs, c);
    }
  }
  template <int NR, int L> static void quad(const uint8_t *q, const int8x16_t *xs, I (&c)[NR][tokens]) {
    for (int r = 0; r < NR; r++) {
      B w = bytes(q + (L * NR + r) * 32);
      for (int m = 0; m < tokens; m++) c[r][m] = dot(c[r][m], w, Lane<L>{xs[m]});
    }
  }
};
#endif

#ifdef __ARM_FEATURE_MATMUL_INT8
// An instruction multiplies two rows by two tokens over eight columns: in panels, pairs of quads become rows of eight
// bytes, rows 0-3 in place of the even quad and 4-7 in place of the odd one.
struct NeonI8mm : NeonDot {
  static uint8x16_t rows(uint8x16_t even, uint8x16_t odd, bool upper) {
    uint32x4_t a = vreinterpretq_u32_u8(even), b = vreinterpretq_u32_u8(odd);
    return vreinterpretq_u8_u32(upper ? vzip2q_u32(a, b) : vzip1q_u32(a, b));
  }
  static void pair(B &even, B &odd) {
    B first = {rows(even.a, odd.a, false), rows(even.a, odd.a, true)};
    odd = {rows(even.b, odd.b, false), rows(even.b, odd.b, true)};
    even = first;
  }
  static int8x16_t eights(int8x16_t a, int8x16_t b, bool upper) { // eight columns of two tokens
    int64x2_t x = vreinterpretq_s64_s8(a), y = vreinterpretq_s64_s8(b);
    return vreinterpretq_s8_s64(upper ? vzip2q_s64(x, y) : vzip1q_s64(x, y));
  }
  template <int NR, int QUADS> static void panel_dots(const uint8_t *q, const int8_t *x, I (&c)[NR][tokens]) {
    const int P = tokens / 2;
    int32x4_t sums[NR][P][4]; // of rows 2i and 2i + 1, each with both tokens of a pair
    for (int r = 0; r < NR; r++)
      for (int p = 0; p < P; p++)
        for (int i = 0; i < 4; i++) sums[r][p][i] = vdupq_n_s32(0);
    for (int j = 0; j < QUADS; j += 4, x += 16) {
      int8x16_t xs[2][P];
      for (int p = 0; p < P; p++) {
        int8x16_t a = vld1q_s8(x + 64 * p), b = vld1q_s8(x + 64 * p + 32);
        xs[0][p] = eights(a, b, false), xs[1][p] = eights(a, b, true);
      }
      for (int h = 0; h < 2; h++, q += 2 * NR * 32)
        for (int r = 0; r < NR; r++) {
          B w[2] = {bytes(q + r * 32), bytes(q + (NR + r) * 32)};
          for (int p = 0; p < P; p++)
            for (int i = 0; i < 4; i++)
              sums[r][p][i] = vmmlaq_s32(sums[r][p][i], of(i % 2 ? w[i / 2].b : w[i / 2].a), xs[h][p]);
        }
    }
    for (int r = 0; r < NR; r++)
      for (int p = 0; p < P; p++) {
        int32x4_t *s = sums[r][p];
        c[r][2 * p] = {vuzp1q_s32(s[0], s[1]), vuzp1q_s32(s[2], s[3])};
        c[r][2 * p + 1] = {vuzp2q_s32(s[0], s[1]), vuzp2q_s32(s[2], s[3])};
      }
  }
};
#endif

} // namespace
