// Attention over keys and values in pages, and rows of an embedding; over the vectors of simd.h.
#pragma once

#include "kv.h"
#include "logits.h"

namespace {

const int64_t KEYS = OG_SEGMENT;

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

// Query rows that share a vector of keys or values: half of the registers hold their sums.
template <class S> constexpr int at_once() {
  const int n = S::registers / 2 / (16 / S::lanes);
  return n < 8 ? n : 8;
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

// The same for `n` times 16 keys.
template <class S, class L, int NQ>
void scores_of(const float *q, int64_t head_dim, const typename L::T *const *keys, const float *scales, int64_t n,
               float *scores) {
  const int most = S::registers / 2 / (NQ * (16 / S::lanes)), G = most >= 4 ? 4 : most >= 2 ? 2 : 1;
  int64_t at = 0;
  auto of = [&] { return scales ? scales + 16 * at : nullptr; };
  for (; at + G <= n; at += G) score<S, L, NQ, G>(q, head_dim, keys + at, of(), scores + 16 * at);
  for (; at < n; at++) score<S, L, NQ, 1>(q, head_dim, keys + at, of(), scores + 16 * at);
}

// out += weights * values for NQ rows and `n` tokens, each 16 of them one after the other in memory; W vectors of the
// head's numbers from `d` on.
template <class S, class L, int NQ, int W>
void weigh_some(const float *weights, const typename L::T *const *values, int64_t n, int64_t head_dim, int64_t d,
                float *out) {
  typename S::F acc[NQ][W];
  for (int i = 0; i < NQ; i++)
    for (int v = 0; v < W; v++) acc[i][v] = S::load(out + i * head_dim + d + v * S::lanes);
  for (int64_t first = 0; first < n; first += 16) {
    const typename L::T *from = values[first / 16] + d;
    const int64_t last = n - first < 16 ? n : first + 16;
    for (int64_t t = first; t < last; t++, from += head_dim) {
      typename S::F x[W];
      for (int v = 0; v < W; v++) x[v] = L::vector(from + v * S::lanes);
      for (int i = 0; i < NQ; i++) {
        typename S::F p = S::set(weights[i * KEYS + t]);
        for (int v = 0; v < W; v++) acc[i][v] = S::fma(p, x[v], acc[i][v]);
      }
    }
  }
  for (int i = 0; i < NQ; i++)
    for (int v = 0; v < W; v++) S::store(out + i * head_dim + d + v * S::lanes, acc[i][v]);
}

template <class S, class L, int NQ>
void weigh(const float *weights, const typename L::T *const *values, int64_t n, int64_t head_dim, float *out) {
  const int most = S::registers / 2 / NQ, W = most >= 4 ? 4 : most >= 2 ? 2 : 1;
  int64_t d = 0;
  for (; d + W * S::lanes <= head_dim; d += W * S::lanes) weigh_some<S, L, NQ, W>(weights, values, n, head_dim, d, out);
  for (; d + S::lanes <= head_dim; d += S::lanes) weigh_some<S, L, NQ, 1>(weights, values, n, head_dim, d, out);
  for (; d < head_dim; d++)
    for (int i = 0; i < NQ; i++)
      for (int64_t t = 0; t < n; t++)
        out[i * head_dim + d] += weights[i * KEYS + t] * L::one(values[t / 16][t % 16 * head_dim + d]);
}

// 16 numbers each for keys that count and for those that do not: their scores are cut down to these, and weights
// multiplied. `min` gives the second number where the first is NaN.
alignas(64) const float CUT[2][16] = {
    {INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY,
     INFINITY, INFINITY, INFINITY, INFINITY, INFINITY},
    {-INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY,
     -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY}};
alignas(64) const float KEPT[2][16] = {{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, {}};

// The softmax of one row: weights of `count` keys in place of their scores, then zeros up to `padded`.
template <class S> void soften(float *scores, int64_t count, int64_t padded, float *top, float *total) {
  const int64_t whole = count / S::lanes * S::lanes, left = count - whole;
  typename S::F largest = S::set(-INFINITY), sum = S::zero(), end = S::set(-INFINITY);
  for (int64_t i = 0; i < whole; i += S::lanes) largest = S::max(largest, S::load(scores + i));
  if (left) end = S::min(S::load(scores + whole), S::load(CUT[1] - left));
  const float highest = S::top(S::max(largest, end)), peak = highest > -INFINITY ? highest : -INFINITY;
  for (int64_t i = 0; i < whole; i += S::lanes) {
    typename S::F weight = exponential<S>(S::sub(S::load(scores + i), S::set(peak)));
    S::store(scores + i, weight);
    sum = S::add(sum, weight);
  }
  if (left) {
    typename S::F weight = S::mul(exponential<S>(S::sub(end, S::set(peak))), S::load(KEPT[1] - left));
    S::store(scores + whole, weight);
    sum = S::add(sum, weight);
  }
  for (int64_t i = round_up(count, S::lanes); i < padded; i++) scores[i] = 0.0f;
  *top = peak;
  *total = S::sum(sum);
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

// Sums over `n` keys of rows q (rows, head_dim), of which row r sees those before limits[r]; keys and values each 16
// tokens at a time, and the scales of those in bytes. Later rows see no less than earlier ones.
template <class S, class L>
void segment_of(const typename L::T *const *keys, const typename L::T *const *values, const float *key_scales,
                const float *value_scales, const float *q, int64_t head_dim, const int64_t *limits, int64_t first,
                int64_t rows, int64_t n, float *scores, Sums sums) {
  const int64_t block = 64; // keys that stay in the first-level cache while the rows pass
  auto seen = [&](int64_t row) { return limits[row] - first < n ? limits[row] - first : n; };
  for (int64_t b = 0; b < n; b += block)
    in_groups<at_once<S>()>(rows, [&](int64_t r, auto n_rows) {
      const int64_t end = seen(r + n_rows - 1) < b + block ? seen(r + n_rows - 1) : b + block;
      if (end > b)
        scores_of<S, L, n_rows>(q + r * head_dim, head_dim, keys + b / 16, key_scales ? key_scales + b : nullptr,
                                round_up(end - b, 16) / 16, scores + r * KEYS + b);
    });
  in_groups<at_once<S>()>(rows, [&](int64_t r, auto n_rows) {
    const int64_t padded = round_up(seen(r + n_rows - 1), 16);
    for (int i = 0; i < n_rows; i++) {
      float *mine = scores + (r + i) * KEYS;
      if (seen(r + i) > 0) soften<S>(mine, seen(r + i), padded, sums.top + r + i, sums.total + r + i);
      else
        for (int64_t k = 0; k < padded; k++) mine[k] = 0.0f;
      for (int64_t k = 0; value_scales && k < seen(r + i); k++) mine[k] *= value_scales[k];
    }
  });
  for (int64_t b = 0; b < n; b += block)
    in_groups<at_once<S>()>(rows, [&](int64_t r, auto n_rows) {
      const int64_t end = seen(r + n_rows - 1) < b + block ? seen(r + n_rows - 1) : b + block;
      float *out = sums.out + r * head_dim;
      if (end > b) weigh<S, L, n_rows>(scores + r * KEYS + b, values + b / 16, end - b, head_dim, out);
    });
}

// The same for keys first .. last of a tile's sequence. Many rows have them as floats, made once.
template <class S, class L>
void segment(const OgTile *t, const float *q, const int64_t *limits, int64_t rows, int64_t first, int64_t last,
             float *scores, float *floats, Sums sums) {
  const OgPool *pool = t->pool;
  const int64_t hd = t->head_dim, n = last - first;
  constexpr int size = sizeof(typename L::T);
  const typename L::T *keys[KEYS / 16], *values[KEYS / 16];
  float scales[2][size == 1 ? KEYS : 1], *by[2] = {size == 1 ? scales[0] : nullptr, size == 1 ? scales[1] : nullptr};
  for (int64_t s = 0; s < n; s += 16) {
    const int64_t page = t->chunk->pages[(first + s) / pool->page_size];
    const int64_t row = kv_row(pool, t->layer, t->n_kv_heads, page, t->kv_head) + (first + s) % pool->page_size;
    keys[s / 16] = (const typename L::T *)pool->keys + row * hd;
    values[s / 16] = (const typename L::T *)pool->values + row * hd;
    if constexpr (size == 1) {
      key_scales(keys[s / 16], scales[0] + s);
      for (int64_t i = 0; i < 16 && s + i < n; i++) scales[1][s + i] = value_scale(values[s / 16] + i * hd);
    }
  }
  sums.clear(rows, hd);
  if (size == sizeof(float) || rows <= 2 * at_once<S>())
    return segment_of<S, L>(keys, values, by[0], by[1], q, hd, limits, first, rows, n, scores, sums);
  const float *wide[2][KEYS / 16];
  for (int64_t s = 0; s < n; s += 16)
    for (int i = 0; i < 2; i++, floats += 16 * hd) {
      const typename L::T *from = i ? values[s / 16] : keys[s / 16];
      for (int64_t d = 0; d < 16 * hd; d += S::lanes) S::store(floats + d, L::vector(from + d));
      wide[i][s / 16] = floats;
    }
  segment_of<S, LoadF32<S>>(wide[0], wide[1], by[0], by[1], q, hd, limits, first, rows, n, scores, sums);
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
  float *q = scratch, *scores = q + rows * hd, *next = scores + rows * KEYS, *floats = next + 2 * rows * (hd + 2);
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
    return segment<S, L>(t, q, limits, rows, first, last, scores, floats, Sums(t->partial, rows, hd));
  }
  for (int64_t first = 0; first < longest; first += OG_SEGMENT) {
    int64_t last = first + OG_SEGMENT < longest ? first + OG_SEGMENT : longest;
    segment<S, L>(t, q, limits, rows, first, last, scores, floats, first ? part : sums);
    if (first) join<S>(sums, part, rows, hd);
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
  for (int64_t quad = 0; quad * 4 < w->columns; quad++) { // four columns each
    const uint8_t *q = base + quad / 8 * bytes + lane * 4;
    const int64_t j = quad % 8, at = (row / R * groups + quad * 4 / w->group) * R + lane;
    const float scale = half_to_float(w->scale[at]), lowest = w->minimum ? half_to_float(w->minimum[at]) : 0.0f;
    for (int64_t i = 0; i < 4 && quad * 4 + i < w->columns; i++) {
      int value;
      if (w->kind == OG_INT8) value = (int8_t)q[j * 4 * R + i];
      else {
        value = q[j / 2 * 4 * R + i] >> (4 * (j % 2)) & 15;
        if (w->kind == OG_INT6) value |= (q[(4 + j / 4) * 4 * R + i] >> (2 * (j % 4)) & 3) << 4;
        if (!w->minimum) value -= w->kind == OG_INT4 ? 8 : 32;
      }
      out[quad * 4 + i] = w->minimum ? (float)value * scale + lowest : (float)value * scale;
    }
  }
}

// Constant, so that nothing of an instruction set runs when the library is loaded.
template <class S> constexpr OgKernels table(const char *name) {
  return {name,        S::lanes,  S::tokens,   quantise<S>, norm<S>,  product<S>,
          activate<S>, rotate<S>, store_kv<S>, attend<S>,   join_segments<S>, sum_exp<S>, gather<S>,
          largest<S>,  likeliness<S>};
}

} // namespace
