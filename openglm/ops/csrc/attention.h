// Keys and values in pages, attention over them, and rows of an embedding; over the vectors of simd.h.
#pragma once

#include "kernels.h"

namespace {

const int64_t KEYS = OG_KEY_BLOCK;

inline int64_t kv_row(const OgPool *pool, int64_t layer, int64_t n_kv_heads, int64_t page, int64_t kv_head) {
  return ((layer * pool->n_pages + page) * n_kv_heads + kv_head) * pool->page_size; // in tokens
}

inline int8_t to_byte(float x) { return x == x ? (int8_t)nearbyintf(x) : 0; }

template <class S>
void store_kv(const OgPool *pool, int64_t layer, int64_t n_kv_heads, int64_t head_dim, int64_t kv_head, int64_t page,
              int64_t slot, const float *key, const float *value) {
  int64_t row = kv_row(pool, layer, n_kv_heads, page, kv_head);
  int64_t k = row * head_dim + slot / 16 * 16 * head_dim + slot % 16, v = (row + slot) * head_dim;
  float key_factor = 0.0f, value_factor = 0.0f;
  if (pool->kind == OG_INT8) { // a scale for each token and head
    float key_top = 0.0f, value_top = 0.0f, odd = 0.0f;
    for (int64_t d = 0; d < head_dim; d++) {
      key_top = fabsf(key[d]) > key_top ? fabsf(key[d]) : key_top;
      value_top = fabsf(value[d]) > value_top ? fabsf(value[d]) : value_top;
      odd += value[d] - value[d]; // NaN must not get lost
    }
    pool->key_scales[row + slot] = key_top / 127.0f;
    pool->value_scales[row + slot] = value_top / 127.0f + odd;
    key_factor = key_top > 0 ? 127.0f / key_top : 0.0f;
    value_factor = value_top > 0 ? 127.0f / value_top : 0.0f;
  }
  for (int64_t d = 0; d < head_dim; d++) {
    switch (pool->kind) {
    case OG_F32:
      ((float *)pool->keys)[k + 16 * d] = key[d];
      ((float *)pool->values)[v + d] = value[d];
      break;
    case OG_F16:
      ((uint16_t *)pool->keys)[k + 16 * d] = float_to_half(key[d]);
      ((uint16_t *)pool->values)[v + d] = float_to_half(value[d]);
      break;
    case OG_BF16:
      ((uint16_t *)pool->keys)[k + 16 * d] = float_to_bf16(key[d]);
      ((uint16_t *)pool->values)[v + d] = float_to_bf16(value[d]);
      break;
    default:
      ((int8_t *)pool->keys)[k + 16 * d] = to_byte(key[d] * key_factor);
      ((int8_t *)pool->values)[v + d] = to_byte(value[d] * value_factor);
    }
  }
}

// f(row, N) for N rows at a time, then for what is left of them in halves.
template <int N, class Work> void in_groups(int64_t rows, const Work &f, int64_t first = 0) {
  for (; first + N <= rows; first += N) f(first, std::integral_constant<int, N>());
  if constexpr (N > 1) in_groups<N / 2>(rows, f, first);
}

// Scores of NQ query rows with 16 keys, side by side in memory.
template <class S, class L, int NQ>
void score_16(const float *q, int64_t head_dim, const typename L::T *keys, const float *key_scales, float *scores) {
  const int V = 16 / S::lanes;
  typename S::F acc[NQ][V];
  for (int i = 0; i < NQ; i++)
    for (int v = 0; v < V; v++) acc[i][v] = S::zero();
  for (int64_t d = 0; d < head_dim; d++) {
    typename S::F k[V];
    for (int v = 0; v < V; v++) k[v] = L::vector(keys + d * 16 + v * S::lanes);
    for (int i = 0; i < NQ; i++) {
      typename S::F x = S::set(q[i * head_dim + d]);
      for (int v = 0; v < V; v++) acc[i][v] = S::fma(x, k[v], acc[i][v]);
    }
  }
  for (int i = 0; i < NQ; i++)
    for (int v = 0; v < V; v++) {
      if (key_scales) acc[i][v] = S::mul(acc[i][v], S::load(key_scales + v * S::lanes));
      S::store(scores + i * KEYS + v * S::lanes, acc[i][v]);
    }
}

// out += weights * values for NQ rows and `n` tokens of one page.
template <class S, class L, int NQ>
void weigh(const float *weights, const typename L::T *values, int64_t n, int64_t head_dim, float *out) {
  const int V = 16 / S::lanes;
  int64_t d = 0;
  for (; d + 16 <= head_dim; d += 16) {
    typename S::F acc[NQ][V];
    for (int i = 0; i < NQ; i++)
      for (int v = 0; v < V; v++) acc[i][v] = S::load(out + i * head_dim + d + v * S::lanes);
    for (int64_t t = 0; t < n; t++) {
      typename S::F x[V];
      for (int v = 0; v < V; v++) x[v] = L::vector(values + t * head_dim + d + v * S::lanes);
      for (int i = 0; i < NQ; i++) {
        typename S::F p = S::set(weights[i * KEYS + t]);
        for (int v = 0; v < V; v++) acc[i][v] = S::fma(p, x[v], acc[i][v]);
      }
    }
    for (int i = 0; i < NQ; i++)
      for (int v = 0; v < V; v++) S::store(out + i * head_dim + d + v * S::lanes, acc[i][v]);
  }
  for (; d < head_dim; d++)
    for (int i = 0; i < NQ; i++)
      for (int64_t t = 0; t < n; t++)
        out[i * head_dim + d] += weights[i * KEYS + t] * L::one(values[t * head_dim + d]);
}

// The softmax of one row goes on: weights of `count` more keys in place of their scores, the output so far rescaled.
template <class S>
void soften(float *scores, int64_t count, int64_t padded, float *top, float *total, float *out, int64_t head_dim) {
  for (int64_t i = count; i < padded; i++) scores[i] = -INFINITY;
  typename S::F largest = S::load(scores);
  for (int64_t i = 0; i < padded; i += S::lanes) largest = S::max(largest, S::load(scores + i));
  float next = S::top(largest) > *top ? S::top(largest) : *top;
  typename S::F sum = S::zero();
  for (int64_t i = 0; i < padded; i += S::lanes)
    S::store(scores + i, exponential<S>(S::sub(S::load(scores + i), S::set(next))));
  for (int64_t i = count; i < padded; i++) scores[i] = 0.0f;
  for (int64_t i = 0; i < padded; i += S::lanes) sum = S::add(sum, S::load(scores + i));
  float carry[S::lanes];
  S::store(carry, exponential<S>(S::set(*top - next)));
  float factor = *top == -INFINITY ? 0.0f : carry[0];
  *total = *total * factor + S::sum(sum);
  *top = next;
  if (factor != 1.0f)
    for (int64_t d = 0; d < head_dim; d++) out[d] *= factor;
}

template <class S, class L> void attend_kind(const OgTile *t, float *scratch) {
  const OgPool *pool = t->pool;
  const OgChunk *c = t->chunk;
  const int64_t hd = t->head_dim, rows = t->n_tokens * t->group;
  float *q = scratch, *out = q + rows * hd, *scores = out + rows * hd, *top = scores + rows * KEYS;
  float *total = top + rows, scale = 1.0f / sqrtf((float)hd);
  int64_t longest = 0, *limits = (int64_t *)(total + rows + (rows & 1));
  for (int64_t r = 0; r < rows; r++) {
    int64_t token = t->first + r / t->group, head = t->kv_head * t->group + r % t->group;
    const float *from = t->q + token * t->q_stride + head * hd;
    for (int64_t d = 0; d < hd; d++) {
      q[r * hd + d] = from[d] * scale;
      out[r * hd + d] = 0.0f;
    }
    limits[r] = c->start + token < c->n_context ? c->n_context : c->start + token + 1;
    if (limits[r] > longest) longest = limits[r];
    top[r] = -INFINITY;
    total[r] = 0.0f;
  }
  const typename L::T *keys = (const typename L::T *)pool->keys, *values = (const typename L::T *)pool->values;
  for (int64_t b = 0; b < longest; b += KEYS) {
    int64_t n = longest - b < KEYS ? longest - b : KEYS;
    for (int64_t s = 0; s < n; s += 16) {
      int64_t slot = (b + s) % pool->page_size;
      int64_t row = kv_row(pool, t->layer, t->n_kv_heads, c->pages[(b + s) / pool->page_size], t->kv_head) + slot;
      const float *scales = pool->kind == OG_INT8 ? pool->key_scales + row : nullptr;
      in_groups<S::at_once>(rows, [&](int64_t r, auto n_rows) {
        score_16<S, L, n_rows>(q + r * hd, hd, keys + row * hd, scales, scores + r * KEYS + s);
      });
    }
    for (int64_t r = 0; r < rows; r++) {
      int64_t count = limits[r] - b < n ? limits[r] - b : n;
      float *mine = scores + r * KEYS;
      if (count <= 0) memset(mine, 0, KEYS * sizeof(float));
      else soften<S>(mine, count, round_up(n, 16), top + r, total + r, out + r * hd, hd);
    }
    for (int64_t s = 0; s < n; s += 16) {
      int64_t slot = (b + s) % pool->page_size, m = n - s < 16 ? n - s : 16;
      int64_t row = kv_row(pool, t->layer, t->n_kv_heads, c->pages[(b + s) / pool->page_size], t->kv_head) + slot;
      if (pool->kind == OG_INT8)
        for (int64_t r = 0; r < rows; r++)
          for (int64_t i = 0; i < m; i++) scores[r * KEYS + s + i] *= pool->value_scales[row + i];
      in_groups<S::at_once>(rows, [&](int64_t r, auto n_rows) {
        weigh<S, L, n_rows>(scores + r * KEYS + s, values + row * hd, m, hd, out + r * hd);
      });
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    int64_t token = t->first + r / t->group, head = t->kv_head * t->group + r % t->group;
    float *to = t->out + token * t->out_stride + head * hd, factor = 1.0f / total[r];
    for (int64_t d = 0; d < hd; d++) to[d] = out[r * hd + d] * factor;
  }
}

template <class S> void attend(const OgTile *tile, float *scratch) {
  switch (tile->pool->kind) {
  case OG_F32: return attend_kind<S, LoadF32<S>>(tile, scratch);
  case OG_F16: return attend_kind<S, LoadF16<S>>(tile, scratch);
  case OG_BF16: return attend_kind<S, LoadBF16<S>>(tile, scratch);
  default: return attend_kind<S, LoadS8<S>>(tile, scratch);
  }
}

template <class S> void gather(const OgMatrix *w, int64_t row, float *out) {
  const int R = S::lanes;
  if (w->kind >= OG_F32) {
    for (int64_t k = 0; k < w->columns; k++) {
      int64_t at = row * w->columns + k;
      if (w->kind == OG_F32) out[k] = ((const float *)w->data)[at];
      else if (w->kind == OG_F16) out[k] = half_to_float(((const uint16_t *)w->data)[at]);
      else out[k] = bf16_to_float(((const uint16_t *)w->data)[at]);
    }
    return;
  }
  const int64_t blocks = round_up(w->columns, 32) / 32, groups = round_up(w->columns, w->group) / w->group;
  const int64_t lane = row % R, bytes = (w->kind == OG_INT4 ? 16 : w->kind == OG_INT6 ? 24 : 32) * R;
  const uint8_t *base = (const uint8_t *)w->data + row / R * blocks * bytes;
  for (int64_t k = 0; k < w->columns; k++) {
    const uint8_t *q = base + k / 32 * bytes;
    int64_t quad = k % 32 / 4, byte = lane * 4 + k % 4, at = (row / R * groups + k / w->group) * R + lane;
    int value;
    if (w->kind == OG_INT8) value = (int8_t)q[quad * 4 * R + byte];
    else {
      value = q[quad / 2 * 4 * R + byte] >> (4 * (quad % 2)) & 15;
      if (w->kind == OG_INT6) value |= (q[(4 + quad / 4) * 4 * R + byte] >> (2 * (quad % 4)) & 3) << 4;
      if (!w->minimum) value -= w->kind == OG_INT4 ? 8 : 32;
    }
    float scale = half_to_float(w->scale[at]);
    out[k] = w->minimum ? (float)value * scale + half_to_float(w->minimum[at]) : (float)value * scale;
  }
}

// Constant, so that nothing of an instruction set runs when the library is loaded.
template <class S> constexpr OgKernels table(const char *name) {
  return {name,        S::lanes,  S::tokens,   quantise<S>, norm<S>,  product<S>,
          activate<S>, rotate<S>, store_kv<S>, attend<S>,   gather<S>};
}

} // namespace
