// The kernels, written once over the vectors of simd.h. `table<S>()` (attention.h) gives them for one instruction set.
//
// Every output element is computed in an order that depends on its own row and token alone, never on how many tokens
// or rows are computed beside it: results do not depend on company.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "products.h"

namespace {

// ---------------------------------------------------------------- rows of activations

template <class S> typename S::F exponential(typename S::F x) { // relative error below 2e-7, no infinities
  x = S::min(S::max(x, S::set(-87.3f)), S::set(88.0f));
  const typename S::F whole = S::set(12582912.0f); // 1.5 * 2^23: a small number added to it is rounded to a whole one
  typename S::F n = S::sub(S::fma(x, S::set(1.44269504f), whole), whole);
  typename S::F r = S::fma(n, S::set(-0.693145752f), x);
  r = S::fma(n, S::set(-1.42860677e-6f), r);
  typename S::F y = S::set(1.0f / 720);
  const float taylor[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (float c : taylor) y = S::fma(y, r, S::set(c));
  return S::mul(y, S::pow2(n));
}

template <class S> double sum_exp(const float *x, int64_t n, float peak) {
  double total = 0.0;
  for (int64_t i = 0; i < n;) { // in runs, so that float32 sums stay short
    int64_t end = n - i < 1024 ? n : i + 1024;
    typename S::F sum = S::zero();
    for (; i + S::lanes <= end; i += S::lanes) sum = S::add(sum, exponential<S>(S::sub(S::load(x + i), S::set(peak))));
    total += S::sum(sum);
    for (; i < end; i++) total += expf(x[i] - peak);
  }
  return total;
}

inline int32_t sum_of_bytes(const int8_t *q) { // 16 of them
#if defined(__SSE2__)
  const __m128i bytes = _mm_xor_si128(_mm_loadu_si128((const __m128i *)q), _mm_set1_epi8((char)0x80));
  const __m128i sums = _mm_sad_epu8(bytes, _mm_setzero_si128());
  return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
#else
  int32_t sum = 0;
  for (int i = 0; i < 16; i++) sum += q[i];
  return sum;
#endif
}

template <class S>
void quantise(const float *x, int64_t n, int64_t token, const OgActivations *out, int64_t first_block) {
  const int V = 32 / S::lanes;
  const int64_t m = token % S::tokens, tile = token / S::tokens * out->blocks + first_block;
  typename S::F odd = S::zero(); // becomes NaN with NaN and infinities, which must not get lost
  float tail[32];
  auto block = [&](int64_t b) {
    if (n - b * 32 >= 32) return x + b * 32;
    memset(tail, 0, sizeof tail);
    memcpy(tail, x + b * 32, (n - b * 32) * sizeof(float));
    return (const float *)tail;
  };
  const int MOST = 16; // blocks in one go: their largest numbers take long to find, but not after each other
  float largest[MOST];
  for (int64_t first = 0; first * 32 < n; first += MOST) {
    const int64_t last = (first + MOST) * 32 < n ? first + MOST : (n + 31) / 32;
    for (int64_t b = first; b < last; b++) {
      const float *from = block(b);
      typename S::F top = S::zero();
      for (int i = 0; i < V; i++) {
        typename S::F v = S::load(from + i * S::lanes);
        top = S::max(top, S::abs(v));
        odd = S::fma(v, S::zero(), odd);
      }
      largest[b - first] = S::top(top);
    }
    for (int64_t b = first; b < last; b++) {
      const int64_t at = (tile + b) * S::tokens + m;
      const float *from = block(b), top = largest[b - first], inverse = top > 0 ? 127.0f / top : 0.0f;
      int8_t *q = out->q + at * 32;
      for (int i = 0; i < V; i++) S::to_s8(q + i * S::lanes, S::mul(S::load(from + i * S::lanes), S::set(inverse)));
      const int32_t sums[2] = {sum_of_bytes(q), sum_of_bytes(q + 16)};
      out->scale[at] = top * (1.0f / 127);
      out->sums[at] = (float)(sums[0] + sums[1]);
      int32_t *minus = out->minus + (tile + b) * 3 * S::tokens + m;
      minus[0] = -128 * sums[0];
      minus[S::tokens] = -128 * sums[1];
      minus[2 * S::tokens] = -128 * (sums[0] + sums[1]);
    }
  }
  if (S::sum(odd) == 0.0f) return;
  for (int64_t b = 0; b * 32 < n; b++) { // rare: which ones are they?
    const float *from = block(b);
    for (int i = 0; i < 32; i++)
      if (from[i] - from[i] != 0.0f) out->scale[(tile + b) * S::tokens + m] = NAN;
  }
}

template <class S> void norm(const float *x, const OgNorm *w, int32_t layer_norm, float eps, int64_t n, float *out) {
  int64_t whole = n / S::lanes * S::lanes;
  float mean = 0.0f;
  if (layer_norm) {
    typename S::F sum = S::zero();
    for (int64_t i = 0; i < whole; i += S::lanes) sum = S::add(sum, S::load(x + i));
    mean = S::sum(sum);
    for (int64_t i = whole; i < n; i++) mean += x[i];
    mean /= (float)n;
  }
  typename S::F squares = S::zero();
  for (int64_t i = 0; i < whole; i += S::lanes) {
    typename S::F d = S::sub(S::load(x + i), S::set(mean));
    squares = S::fma(d, d, squares);
  }
  float total = S::sum(squares);
  for (int64_t i = whole; i < n; i++) total += (x[i] - mean) * (x[i] - mean);
  float factor = 1.0f / sqrtf(total / (float)n + eps);
  for (int64_t i = 0; i < whole; i += S::lanes) {
    typename S::F y = S::mul(S::mul(S::sub(S::load(x + i), S::set(mean)), S::set(factor)), S::load(w->weight + i));
    S::store(out + i, w->bias ? S::add(y, S::load(w->bias + i)) : y);
  }
  for (int64_t i = whole; i < n; i++) out[i] = (x[i] - mean) * factor * w->weight[i] + (w->bias ? w->bias[i] : 0.0f);
}

template <class S> void activate(int32_t mlp, const float *gate, const float *up, int64_t n, float *out) {
  if (mlp == OG_GEGLU) { // the exact one, with erf
    for (int64_t i = 0; i < n; i++) out[i] = 0.5f * gate[i] * (1.0f + erff(gate[i] * 0.70710678f)) * up[i];
    return;
  }
  for (int64_t i = 0; i < n; i += S::lanes) {
    float edge[3][S::lanes];
    bool cut = n - i < S::lanes;
    if (cut) {
      memcpy(edge[0], gate + i, (n - i) * sizeof(float));
      if (up) memcpy(edge[1], up + i, (n - i) * sizeof(float));
      for (int64_t j = n - i; j < S::lanes; j++) edge[0][j] = edge[1][j] = 0.0f;
    }
    typename S::F g = S::load(cut ? edge[0] : gate + i), inner = g;
    if (mlp == OG_GELU_TANH) { // g / (1 + exp(-2 sqrt(2 / pi) (g + 0.044715 g^3))) is the tanh form
      inner = S::fma(S::mul(S::mul(g, g), g), S::set(0.044715f), g);
      inner = S::mul(inner, S::set(1.59576912f));
    }
    typename S::F y = S::div(g, S::add(S::set(1.0f), exponential<S>(S::sub(S::zero(), inner))));
    if (mlp == OG_SWIGLU) y = S::mul(y, S::load(cut ? edge[1] : up + i));
    S::store(cut ? edge[2] : out + i, y);
    if (cut) memcpy(out + i, edge[2], (n - i) * sizeof(float));
  }
}

template <class S> void rotate(float *x, const float *cosines, const float *sines, int64_t half) {
  int64_t i = 0;
  for (; i + S::lanes <= half; i += S::lanes) {
    typename S::F a = S::load(x + i), b = S::load(x + half + i), c = S::load(cosines + i), s = S::load(sines + i);
    S::store(x + i, S::sub(S::mul(a, c), S::mul(b, s)));
    S::store(x + half + i, S::add(S::mul(b, c), S::mul(a, s)));
  }
  for (; i < half; i++) {
    float a = x[i], b = x[half + i];
    x[i] = a * cosines[i] - b * sines[i];
    x[half + i] = b * cosines[i] + a * sines[i];
  }
}

// ---------------------------------------------------------------- products with plain weights, row-major

template <class S> struct LoadF32 {
  typedef float T;
  static typename S::F vector(const float *p) { return S::load(p); }
  static float one(float x) { return x; }
};
template <class S> struct LoadF16 {
  typedef uint16_t T;
  static typename S::F vector(const uint16_t *p) { return S::f16(p); }
  static float one(uint16_t x) { return half_to_float(x); }
};
template <class S> struct LoadBF16 {
  typedef uint16_t T;
  static typename S::F vector(const uint16_t *p) { return S::bf16(p); }
  static float one(uint16_t x) { return bf16_to_float(x); }
};
template <class S> struct LoadS8 {
  typedef int8_t T;
  static typename S::F vector(const int8_t *p) { return S::s8(p); }
  static float one(int8_t x) { return (float)x; }
};

template <class S, class L, int NR, int MT>
void plain_tile(const OgMatrix *w, const float *x, int64_t x_stride, int64_t token, int64_t row, int64_t shift,
                const Output &o) {
  const int64_t n = w->columns, whole = n / S::lanes * S::lanes;
  const typename L::T *rows[NR];
  typename S::F acc[NR][MT];
  for (int r = 0; r < NR; r++) {
    rows[r] = (const typename L::T *)w->data + (row + r) * n;
    for (int m = 0; m < MT; m++) acc[r][m] = S::zero();
  }
  for (int64_t k = 0; k < whole; k += S::lanes) {
    typename S::F v[MT];
    for (int m = 0; m < MT; m++) v[m] = S::load(x + (token + m) * x_stride + k);
    for (int r = 0; r < NR; r++) {
      typename S::F weight = L::vector(rows[r] + k);
      for (int m = 0; m < MT; m++) acc[r][m] = S::fma(weight, v[m], acc[r][m]);
    }
  }
  for (int r = 0; r < NR; r++)
    for (int m = 0; m < MT; m++) {
      float y = S::sum(acc[r][m]);
      for (int64_t k = whole; k < n; k++) y += L::one(rows[r][k]) * x[(token + m) * x_stride + k];
      o.put(token + m, row + r, row + r - shift, y);
    }
}

template <class S, class L, int MT>
void plain_tokens(const OgMatrix *w, const float *x, int64_t x_stride, int64_t token, int64_t row0, int64_t row1,
                  int64_t shift, const Output &o) {
  const int NR = MT == 1 ? 8 : 4;
  int64_t row = row0;
  for (; row + NR <= row1; row += NR) plain_tile<S, L, NR, MT>(w, x, x_stride, token, row, shift, o);
  for (; row < row1; row++) plain_tile<S, L, 1, MT>(w, x, x_stride, token, row, shift, o);
}

template <class S, class L>
void plain_product(const OgMatrix *w, const float *x, int64_t x_stride, int64_t n_tokens, int64_t row0, int64_t row1,
                   const Output &o) {
  int64_t strip = 131072 / (w->columns * (int64_t)sizeof(typename L::T));
  strip = strip < 1 ? 8 : round_up(strip, 8);
  for (int64_t row = row0; row < row1; row += strip) {
    int64_t end = row + strip < row1 ? row + strip : row1, token = 0;
    for (; token + 3 <= n_tokens; token += 3) plain_tokens<S, L, 3>(w, x, x_stride, token, row, end, row0, o);
    if (n_tokens - token == 2) plain_tokens<S, L, 2>(w, x, x_stride, token, row, end, row0, o);
    if (n_tokens - token == 1) plain_tokens<S, L, 1>(w, x, x_stride, token, row, end, row0, o);
  }
}

template <class S>
void product(const OgMatrix *w, const OgActivations *a, const float *x, int64_t x_stride, int64_t n_tokens,
             int64_t row0, int64_t row1, const float *bias, const float *residual, int64_t residual_stride,
             float alpha, float *out, int64_t out_stride) {
  Output o = {bias, residual, residual_stride, out_stride, alpha, out};
  bool g16 = w->group == 16, min = w->minimum != nullptr;
  if (w->kind == OG_INT4 && min) quantised_product<S, OG_INT4, false, true>(w, a, n_tokens, row0, row1, o);
  else if (w->kind == OG_INT4) quantised_product<S, OG_INT4, false, false>(w, a, n_tokens, row0, row1, o);
  else if (w->kind == OG_INT6 && min) quantised_product<S, OG_INT6, false, true>(w, a, n_tokens, row0, row1, o);
  else if (w->kind == OG_INT6 && g16) quantised_product<S, OG_INT6, true, false>(w, a, n_tokens, row0, row1, o);
  else if (w->kind == OG_INT6) quantised_product<S, OG_INT6, false, false>(w, a, n_tokens, row0, row1, o);
  else if (w->kind == OG_INT8 && g16) quantised_product<S, OG_INT8, true, false>(w, a, n_tokens, row0, row1, o);
  else if (w->kind == OG_INT8) quantised_product<S, OG_INT8, false, false>(w, a, n_tokens, row0, row1, o);
  else if (w->kind == OG_F32) plain_product<S, LoadF32<S>>(w, x, x_stride, n_tokens, row0, row1, o);
  else if (w->kind == OG_F16) plain_product<S, LoadF16<S>>(w, x, x_stride, n_tokens, row0, row1, o);
  else plain_product<S, LoadBF16<S>>(w, x, x_stride, n_tokens, row0, row1, o);
}

} // namespace
