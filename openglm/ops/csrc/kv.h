// How keys and values lie in the pages of a pool, and how they get there. openglm/ops/kv.py is the reference of INT8.
#pragma once

#include "kernels.h"

namespace {

inline int64_t kv_row(const OgPool *pool, int64_t layer, int64_t n_kv_heads, int64_t page, int64_t kv_head) {
  return ((layer * pool->n_pages + page) * n_kv_heads + kv_head) * pool->page_size; // in tokens
}

// Elements of a cache from `n` floats, at most lanes.
template <class S> void cast(const float *x, int64_t n, bool, float *to) { memcpy(to, x, n * sizeof(float)); }
template <class S> void cast(const float *x, int64_t n, bool bf16, uint16_t *to) {
  if (n == S::lanes && !bf16) S::to_f16(to, S::load(x));
  else
    for (int64_t i = 0; i < n; i++) to[i] = bf16 ? float_to_bf16(x[i]) : float_to_half(x[i]);
}

template <class S, class T>
void store_floats(const OgPool *pool, int64_t k, int64_t v, int64_t head_dim, const float *key, const float *value) {
  T some[S::lanes], *keys = (T *)pool->keys + k, *values = (T *)pool->values + v;
  for (int64_t d = 0; d < head_dim; d += S::lanes) {
    int64_t n = head_dim - d < S::lanes ? head_dim - d : S::lanes;
    cast<S>(key + d, n, pool->kind == OG_BF16, some);
    for (int64_t i = 0; i < n; i++) keys[16 * (d + i)] = some[i];
    cast<S>(value + d, n, pool->kind == OG_BF16, values + d);
  }
}

// ---------------------------------------------------------------- INT8

// A head of a token is head_dim bytes: its numbers over a scale, turned by `spread`. The scale's code is in them too,
// bit i of it as the lowest bit of number i: these eight numbers are rounded to even or odd ones. Codes have five bits
// of exponent and three of mantissa, from 2^-22 on; the last one stands for NaN.
const int32_t SCALE_BASE = (127 - 22) << 23, SCALE_NAN = 255;

inline float scale_of(int32_t code) {
  int32_t bits = code == SCALE_NAN ? 0x7FC00000 : (code << 20) + SCALE_BASE;
  float scale;
  memcpy(&scale, &bits, 4);
  return scale;
}

inline int32_t scale_code(float scale) { // of the least one that is not below it
  int32_t bits;
  memcpy(&bits, &scale, 4);
  int32_t code = bits <= SCALE_BASE ? 0 : (bits - SCALE_BASE + (1 << 20) - 1) >> 20;
  return code < SCALE_NAN ? code : SCALE_NAN - 1;
}

// Scales of 16 keys side by side.
inline void key_scales(const int8_t *keys, float *scales) {
  const uint64_t ones = 0x0101010101010101u;
  uint8_t codes[16];
  for (int half = 0; half < 2; half++) {
    uint64_t eight = 0;
    for (int i = 0; i < 8; i++) {
      uint64_t row;
      memcpy(&row, keys + 16 * i + 8 * half, 8);
      eight |= (row & ones) << i;
    }
    memcpy(codes + 8 * half, &eight, 8);
  }
  for (int i = 0; i < 16; i++) scales[i] = scale_of(codes[i]);
}

inline float value_scale(const int8_t *value) {
  int32_t code = 0;
  for (int i = 0; i < 8; i++) code |= (value[i] & 1) << i;
  return scale_of(code);
}

// Walsh-Hadamard transform, by blocks of as many numbers as the largest power of two in head_dim: a turn that leaves
// products of two heads as they are, and shares what is large in one number among all of them.
inline void spread(float *x, int64_t head_dim) {
  const int64_t block = head_dim & -head_dim;
  const float factor = 1.0f / sqrtf((float)block);
  for (int64_t h = 1; h < block; h *= 2)
    for (int64_t i = 0; i < head_dim; i += 2 * h)
      for (int64_t j = i; j < i + h; j++) {
        float a = x[j], b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
  for (int64_t d = 0; d < head_dim; d++) x[d] *= factor;
}

// n numbers, `stride` bytes apart.
inline void store_bytes(const float *x, int64_t n, int64_t stride, int8_t *to) {
  float top = 0.0f, odd = 0.0f;
  for (int64_t d = 0; d < n; d++) {
    top = fabsf(x[d]) > top ? fabsf(x[d]) : top;
    odd += x[d] - x[d];
  }
  const int32_t code = odd == 0.0f ? scale_code(top / 127.0f) : SCALE_NAN; // NaN and infinities must not get lost
  const float scale = scale_of(code == SCALE_NAN ? 0 : code);
  for (int64_t d = 0; d < n; d++) {
    const float bit = d < 8 ? (float)(code >> d & 1) : 0.0f, step = d < 8 ? 2.0f : 1.0f;
    float y = odd == 0.0f ? nearbyintf((x[d] / scale - bit) / step) * step : 0.0f;
    y = y < -128.0f ? -128.0f : y > 128.0f - step ? 128.0f - step : y;
    to[d * stride] = (int8_t)(y + bit);
  }
}

// ---------------------------------------------------------------- all kinds

template <class S>
void store_kv(const OgPool *pool, int64_t layer, int64_t n_kv_heads, int64_t head_dim, int64_t kv_head, int64_t page,
              int64_t slot, float *key, const float *value) {
  int64_t row = kv_row(pool, layer, n_kv_heads, page, kv_head);
  int64_t k = row * head_dim + slot / 16 * 16 * head_dim + slot % 16, v = (row + slot) * head_dim;
  if (pool->kind == OG_F32) return store_floats<S, float>(pool, k, v, head_dim, key, value);
  if (pool->kind != OG_INT8) return store_floats<S, uint16_t>(pool, k, v, head_dim, key, value);
  spread(key, head_dim);
  store_bytes(key, head_dim, 16, (int8_t *)pool->keys + k);
  store_bytes(value, head_dim, 1, (int8_t *)pool->values + v);
}

} // namespace
