// What the kernels need from an instruction set: vectors of `lanes` floats and of `lanes` groups of four bytes. Each
// isa_*.cpp is compiled with its own flags and picks one of these; everything is in an unnamed namespace, so that no
// function built for one instruction set is ever called by another's.
#pragma once

#include <math.h>
#include <string.h>

#include "openglm.h"

namespace {

inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
  if (exponent == 31) bits = sign | 0x7F800000u | (mantissa << 13);
  else if (exponent) bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  else { // zero or subnormal
    float f = (float)mantissa * 5.9604644775390625e-8f; // 2^-24
    memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

inline uint16_t float_to_half(float f) { // rounds to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &f, 4);
  uint32_t sign = (bits >> 16) & 0x8000, x = bits & 0x7FFFFFFFu;
  if (x > 0x7F800000u) return (uint16_t)(sign | 0x7E00);
  if (x >= 0x477FF000u) return (uint16_t)(sign | 0x7C00);
  if (x < 0x38800000u) { // subnormal: adding 0.5 shifts the mantissa into place and rounds it
    float shifted;
    memcpy(&shifted, &x, 4);
    shifted += 0.5f;
    memcpy(&x, &shifted, 4);
    return (uint16_t)(sign | (x - 0x3F000000u));
  }
  x += 0xC8000FFFu + ((x >> 13) & 1);
  return (uint16_t)(sign | (x >> 13));
}

inline float bf16_to_float(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

inline uint16_t float_to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)((bits >> 16) | 64);
  return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

// ---------------------------------------------------------------- plain C++, any number of lanes

template <int N> struct Plain {
  static constexpr int lanes = N, tokens = 4, at_once = 4, panel_rows = 0, registers = 16;
  struct F { float v[N]; };
  struct I { int32_t v[N]; };
  struct B { uint8_t v[4 * N]; };
  typedef I Dot4;

  static F zero() { return set(0.0f); }
  static F set(float x) { F r; for (int i = 0; i < N; i++) r.v[i] = x; return r; }
  static F load(const float *p) { F r; memcpy(r.v, p, sizeof r.v); return r; }
  static void store(float *p, F x) { memcpy(p, x.v, sizeof x.v); }
  static F add(F a, F b) { for (int i = 0; i < N; i++) a.v[i] += b.v[i]; return a; }
  static F sub(F a, F b) { for (int i = 0; i < N; i++) a.v[i] -= b.v[i]; return a; }
  static F mul(F a, F b) { for (int i = 0; i < N; i++) a.v[i] *= b.v[i]; return a; }
  static F div(F a, F b) { for (int i = 0; i < N; i++) a.v[i] /= b.v[i]; return a; }
  static F fma(F a, F b, F c) { for (int i = 0; i < N; i++) c.v[i] += a.v[i] * b.v[i]; return c; }
  static F max(F a, F b) { for (int i = 0; i < N; i++) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
  static F min(F a, F b) { for (int i = 0; i < N; i++) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
  static F abs(F a) { for (int i = 0; i < N; i++) a.v[i] = fabsf(a.v[i]); return a; }
  static F round(F a) { for (int i = 0; i < N; i++) a.v[i] = nearbyintf(a.v[i]); return a; }
  static F pow2(F a) { for (int i = 0; i < N; i++) a.v[i] = ldexpf(1.0f, (int)a.v[i]); return a; }
  static float sum(F a) { // as a tree, like the vector forms
    for (int n = N / 2; n; n /= 2)
      for (int i = 0; i < n; i++) a.v[i] += a.v[i + n];
    return a.v[0];
  }
  static float top(F a) { float m = a.v[0]; for (int i = 1; i < N; i++) m = a.v[i] > m ? a.v[i] : m; return m; }
  static F f16(const uint16_t *p) { F r; for (int i = 0; i < N; i++) r.v[i] = half_to_float(p[i]); return r; }
  static F bf16(const uint16_t *p) { F r; for (int i = 0; i < N; i++) r.v[i] = bf16_to_float(p[i]); return r; }
  static F s8(const int8_t *p) { F r; for (int i = 0; i < N; i++) r.v[i] = (float)p[i]; return r; }
  static void to_f16(uint16_t *p, F x) { for (int i = 0; i < N; i++) p[i] = float_to_half(x.v[i]); }
  static void to_s8(int8_t *p, F x) { for (int i = 0; i < N; i++) p[i] = (int8_t)nearbyintf(x.v[i]); }

  static B bytes(const void *p) { B r; memcpy(r.v, p, sizeof r.v); return r; }
  template <int J> static B four(const int8_t *p) { B r; for (int i = 0; i < N; i++) memcpy(r.v + 4 * i, p + 4 * J, 4); return r; }
  static B low(B x) { for (int i = 0; i < 4 * N; i++) x.v[i] &= 15; return x; }
  static B high(B x) { for (int i = 0; i < 4 * N; i++) x.v[i] >>= 4; return x; }
  template <int C> static B with_bits(B low, B h) { // adds bits 2C, 2C + 1 of h as the fifth and sixth
    for (int i = 0; i < 4 * N; i++) low.v[i] |= ((h.v[i] >> (2 * C)) & 3) << 4;
    return low;
  }
  static I izero() { I r; for (int i = 0; i < N; i++) r.v[i] = 0; return r; }
  static I shifted(const int32_t *p, int n) { I r; for (int i = 0; i < N; i++) r.v[i] = *p >> n; return r; }
  static F to_float(I a) { F r; for (int i = 0; i < N; i++) r.v[i] = (float)a.v[i]; return r; }
  static I dot(I c, B w, B a) {
    for (int i = 0; i < 4 * N; i++) c.v[i / 4] += (int)w.v[i] * (int8_t)a.v[i];
    return c;
  }
  static Dot4 dot4_start(I init) { return init; }
  static Dot4 dot4(Dot4 c, B w, B a) { return dot(c, w, a); }
  static I dot4_sum(Dot4 c, I) { return c; }
  static I dot6(I c, B w0, B a0, B w1, B a1) { return dot(dot(c, w0, a0), w1, a1); }
  static constexpr bool unsigned8 = false; // whether `w8` adds 128
  struct W8 { B w; };
  static W8 w8(B w) { return {w}; }
  static I dot8(I c, W8 w, B a) {
    for (int i = 0; i < 4 * N; i++) c.v[i / 4] += (int)(int8_t)w.w.v[i] * (int8_t)a.v[i];
    return c;
  }
};

} // namespace
