// Attention over keys and values in pages, and rows of an embedding; over the vectors of simd.h.
#pragma once

#include "kv.h"

namespace {

const int64_t KEYS = OG_KEY_BLOCK;

// f(row, N) for N rows at a time, then once for those left.
template <int N, class Work> void the_rest(int64_t rows, int64_t first, const Work &f) {
  if (rows - first == N) f(first, std::integral_constant<int, N>());
  else if constexpr (N > 1) the_rest<N - 1>(rows, first, f);
}
template <int N, class Work> void in_groups(int64_t rows, const Work &f) {
  int64_t first = 0;
  for (; first + N <= rows; first += N) f(first, std::integral_constant<int, N>());
  if constexpr (N > 1) the_rest<N - 1>(rows, first, f);
}

// Scores of NQ query rows with G times 16 keys, each 16 side by side in memory: sums enough to keep the CPU busy.
template <class S, class L, int NQ, int G>
void score(const float *q, int64_t head_dim, const typename L::T *const *keys, const float *scales, float *scores) {
  const int V = 16 / S::lanes;
  typename S::F acc[NQ][G * V];
  for (int i = 0; i < NQ; i++)
    for (int v = 0; v < G * V; v++) acc[i][v] = S::zero();
  for (int64_t d = 0; d < head_dim; d++) {
    typename S::F k[G * V];
    for (int v = 0; v < G * V; v++) k[v] = L::vector(keys[v / V] + d * 16 + v % V * S::lanes);
    for (int i = 0; i < NQ; i++) {
      typename S::F x = S::set(q[i * head_dim + d]);
      for (int v = 0; v < G * V; v++) acc[i][v] = S::fma(x, k[v], acc[i][v]);
    }
  }
  for (int i = 0; i < NQ; i++)
    for (int v = 0; v < G * V; v++) {
      if (scales) acc[i][v] = S::mul(acc[i][v], S::load(scales + v * S::lanes));
      S::store(scores + i * KEYS + v * S::lanes, acc[i][v]);
    }
}

// The same for `n` times 16 keys, 1 to 4.
template <class S, class L, int NQ>
void scores_of(const float *q, int64_t head_dim, const typename L::T *const *keys, const float *scales, int64_t n,
               float *scores) {
  const int most = S::registers / 2 / (NQ * (16 / S::lanes)), G = most >= 4 ? 4 : most >= 2 ? 2 : 1;
  int64_t at = 0;
  auto of = [&] { return scales ? scales + 16 * at : nullptr; };
  for (; at + G <= n; at += G) score<S, L, NQ, G>(q, head_dim, keys + at, of(), scores + 16 * at);
  for (; at < n; at++) score<S, L, NQ, 1>(q, head_dim, keys + at, of(), scores + 16 * at);
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

// Softmax sums of rows so far: weighted values (rows, head_dim), the largest score and the sum of weights of each row.
struct Sums {
  float *out, *top, *total;
  Sums(float *at, int64_t rows, int64_t head_dim) : out(at), top(at + rows * head_dim), total(top + rows) {}
  void clear(int64_t rows, int64_t head_dim) {
    memset(out, 0, rows * head_dim * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
      top[r] = -INFINITY;
      total[r] = 0.0f;
    }
  }
};

// `to` goes on with the sums of a later segment of keys. Segments are cut at fixed places and joined in their order,
// whoever computes them: the result does not depend on it.
template <class S> void join(const Sums &to, const Sums &from, int64_t rows, int64_t head_dim) {
  for (int64_t r = 0; r < rows; r++) {
    if (from.total[r] == 0.0f) continue; // its keys are all in this row's future
    float next = from.top[r] > to.top[r] ? from.top[r] : to.top[r], factors[2][S::lanes];
    S::store(factors[0], exponential<S>(S::set(to.top[r] - next)));
    S::store(factors[1], exponential<S>(S::set(from.top[r] - next)));
    float old = to.top[r] == next ? 1.0f : to.total[r] == 0.0f ? 0.0f : factors[0][0];
    float added = from.top[r] == next ? 1.0f : factors[1][0];
    to.total[r] = to.total[r] * old + from.total[r] * added;
    to.top[r] = next;
    float *x = to.out + r * head_dim;
    const float *y = from.out + r * head_dim;
    for (int64_t d = 0; d < head_dim; d++) x[d] = x[d] * old + y[d] * added;
  }
}

// Sums over keys first .. last of rows q (rows, head_dim), of which row r sees those before limits[r].
template <class S, class L>
void segment(const OgTile *t, const float *q, const int64_t *limits, int64_t rows, int64_t first, int64_t last,
             float *scores, Sums sums) {
  const OgPool *pool = t->pool;
  const int64_t hd = t->head_dim;
  constexpr bool bytes = sizeof(typename L::T) == 1;
  const typename L::T *keys = (const typename L::T *)pool->keys, *values = (const typename L::T *)pool->values;
  auto row_of = [&](int64_t key) {
    int64_t page = t->chunk->pages[key / pool->page_size];
    return kv_row(pool, t->layer, t->n_kv_heads, page, t->kv_head) + key % pool->page_size;
  };
  sums.clear(rows, hd);
  for (int64_t b = first; b < last; b += KEYS) {
    int64_t n = last - b < KEYS ? last - b : KEYS;
    const typename L::T *keys_at[KEYS / 16];
    float scales[KEYS];
    for (int64_t s = 0; s < n; s += 16) {
      keys_at[s / 16] = keys + row_of(b + s) * hd;
      if constexpr (bytes) key_scales(keys_at[s / 16], scales + s);
    }
    in_groups<S::at_once>(rows, [&](int64_t r, auto n_rows) {
      const float *by = bytes ? scales : nullptr;
      scores_of<S, L, n_rows>(q + r * hd, hd, keys_at, by, round_up(n, 16) / 16, scores + r * KEYS);
    });
    for (int64_t r = 0; r < rows; r++) {
      int64_t count = limits[r] - b < n ? limits[r] - b : n;
      float *mine = scores + r * KEYS;
      if (count <= 0) memset(mine, 0, KEYS * sizeof(float));
      else soften<S>(mine, count, round_up(n, 16), sums.top + r, sums.total + r, sums.out + r * hd, hd);
    }
    for (int64_t s = 0; s < n; s += 16) {
      int64_t row = row_of(b + s), m = n - s < 16 ? n - s : 16;
      if constexpr (bytes) {
        for (int64_t i = 0; i < m; i++) scales[i] = value_scale(values + (row + i) * hd);
        for (int64_t r = 0; r < rows; r++)
          for (int64_t i = 0; i < m; i++) scores[r * KEYS + s + i] *= scales[i];
      }
      in_groups<S::at_once>(rows, [&](int64_t r, auto n_rows) {
        weigh<S, L, n_rows>(scores + r * KEYS + s, values + row * hd, m, hd, sums.out + r * hd);
      });
    }
  }
}

inline void finish(const OgTile *t, const Sums &sums, int64_t rows) {
  for (int64_t r = 0; r < rows; r++) {
    float *to = t->out + r / t->group * t->out_stride + r % t->group * t->head_dim, factor = 1.0f / sums.total[r];
    for (int64_t d = 0; d < t->head_dim; d++) to[d] = sums.out[r * t->head_dim + d] * factor;
  }
}

template <class S, class L> void attend_kind(const OgTile *t, float *scratch) {
  const OgChunk *c = t->chunk;
  const int64_t hd = t->head_dim, rows = t->n_tokens * t->group;
  float *q = scratch, *scores = q + rows * hd, *next = scores + rows * KEYS;
  Sums sums(next, rows, hd), part(next + rows * (hd + 2), rows, hd);
  int64_t longest = 0, limits[OG_TILE_ROWS];
  for (int64_t i = 0; i < t->n_tokens; i++) {
    int64_t at = c->start + t->first + i, limit = at < c->n_context ? c->n_context : at + 1;
    for (int64_t j = 0; j < t->group; j++) limits[i * t->group + j] = limit;
    longest = limit > longest ? limit : longest;
  }
  const float scale = 1.0f / sqrtf((float)hd);
  for (int64_t r = 0; r < rows; r++) {
    const float *from = t->q + r / t->group * t->q_stride + r % t->group * hd;
    for (int64_t d = 0; d < hd; d++) q[r * hd + d] = from[d] * scale;
    if (t->pool->kind == OG_INT8) spread(q + r * hd, hd);
  }
  if (t->partial) { // one segment of it
    int64_t first = t->segment * OG_SEGMENT, last = first + OG_SEGMENT < longest ? first + OG_SEGMENT : longest;
    return segment<S, L>(t, q, limits, rows, first, last, scores, Sums(t->partial, rows, hd));
  }
  sums.clear(rows, hd);
  for (int64_t first = 0; first < longest; first += OG_SEGMENT) {
    int64_t last = first + OG_SEGMENT < longest ? first + OG_SEGMENT : longest;
    segment<S, L>(t, q, limits, rows, first, last, scores, part);
    join<S>(sums, part, rows, hd);
  }
  finish(t, sums, rows);
}

template <class S> void attend(const OgTile *tile, float *scratch) {
  switch (tile->pool->kind) {
  case OG_F32: return attend_kind<S, LoadF32<S>>(tile, scratch);
  case OG_F16: return attend_kind<S, LoadF16<S>>(tile, scratch);
  case OG_BF16: return attend_kind<S, LoadBF16<S>>(tile, scratch);
  default: return attend_kind<S, LoadS8<S>>(tile, scratch);
  }
}

// The segments that `attend` left in `partial`, one after the other, become its output.
template <class S> void join_segments(const OgTile *tile, int64_t n, float *scratch) {
  const int64_t rows = tile->n_tokens * tile->group, size = rows * (tile->head_dim + 2);
  Sums sums(scratch, rows, tile->head_dim);
  sums.clear(rows, tile->head_dim);
  for (int64_t i = 0; i < n; i++)
    join<S>(sums, Sums(tile->partial + i * size, rows, tile->head_dim), rows, tile->head_dim);
  finish(tile, sums, rows);
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
          activate<S>, rotate<S>, store_kv<S>, attend<S>,   join_segments<S>, sum_exp<S>, gather<S>};
}

} // namespace
