// Products with quantised weights, over the vectors of simd.h; INT8 activations in tiles (OgActivations).
//
// Few tokens (decoding) read packed weights once, straight from memory. Many tokens (prefill) have a panel of rows
// unpacked to bytes that stay in the first-level cache while all tokens pass, where the instruction set multiplies
// bytes in one instruction. An output element is the same, bit for bit, on both ways.
#pragma once

#include <type_traits>
#include <utility>

#include "simd.h"

namespace {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// f(0), f(1), ... f(N - 1) with constants, so that they can be template arguments.
template <class Work, int... J> inline void each_of(std::integer_sequence<int, J...>, const Work &f) {
  (f(std::integral_constant<int, J>()), ...);
}
template <int N, class Work> inline void each(const Work &f) { each_of(std::make_integer_sequence<int, N>(), f); }

// ---------------------------------------------------------------- where results go

struct Output { // where results go: out[t, r] = residual ? alpha * residual[t, r] + y : y
  const float *bias, *residual;
  int64_t residual_stride, out_stride;
  float alpha;
  float *out;
  void put(int64_t token, int64_t row, int64_t column, float y) const {
    if (bias) y += bias[row];
    if (residual) y += alpha * residual[token * residual_stride + row];
    out[token * out_stride + column] = y;
  }
};

template <class S> inline void put_whole(const Output &o, int64_t token, int64_t row, int64_t column, typename S::F y) {
  if (o.bias) y = S::add(y, S::load(o.bias + row));
  if (o.residual) y = S::fma(S::load(o.residual + token * o.residual_stride + row), S::set(o.alpha), y);
  S::store(o.out + token * o.out_stride + column, y);
}

template <class S>
void put_block(const Output &o, int64_t token, int64_t row, int64_t column, int64_t n, typename S::F y) {
  if (n >= S::lanes) return put_whole<S>(o, token, row, column, y);
  float values[S::lanes];
  S::store(values, y);
  for (int64_t i = 0; i < n; i++) o.put(token, row + i, column + i, values[i]);
}

// ---------------------------------------------------------------- packed weights

template <int KIND, int R> constexpr int64_t block_bytes() {
  return (KIND == OG_INT4 ? 16 : KIND == OG_INT6 ? 24 : 32) * R;
}

// Quad J of a block: four columns of every row, as they are stored (INT4 and INT6 count from zero).
template <class S, int KIND, int J> inline typename S::B quad(const uint8_t *q) {
  const int run = 4 * S::lanes;
  if constexpr (KIND == OG_INT8) return S::bytes(q + J * run);
  else {
    typename S::B pair = S::bytes(q + J / 2 * run), value = J % 2 ? S::high(pair) : S::low(pair);
    if constexpr (KIND == OG_INT4) return value;
    else return S::template with_bits<J % 4>(value, S::bytes(q + (4 + J / 4) * run));
  }
}

// Quad J of the m-th token's block, in the form that the dot product takes.
template <class S, int J> inline auto four(const int8_t *x, int64_t stride, int m) {
  return S::template four<J>(x + m / S::tokens * stride + m % S::tokens * 32);
}

// `init` plus products of quads FIRST .. FIRST + N with MT tokens, whose tiles lie `stride` bytes apart.
template <class S, int KIND, int FIRST, int N, int MT>
inline void dots(const uint8_t *q, const int8_t *x, int64_t stride, const typename S::I *init, typename S::I *sums) {
  if constexpr (KIND == OG_INT4) {
    typename S::Dot4 c[MT];
    for (int m = 0; m < MT; m++) c[m] = S::dot4_start(init[m]);
    each<N>([&](auto j) {
      typename S::B w = quad<S, KIND, FIRST + j>(q);
      for (int m = 0; m < MT; m++) c[m] = S::dot4(c[m], w, four<S, FIRST + j>(x, stride, m));
    });
    for (int m = 0; m < MT; m++) sums[m] = S::dot4_sum(c[m], init[m]);
  } else if constexpr (KIND == OG_INT6) {
    for (int m = 0; m < MT; m++) sums[m] = init[m];
    each<N / 2>([&](auto i) {
      constexpr int j = FIRST + 2 * i;
      typename S::B w0 = quad<S, KIND, j>(q), w1 = quad<S, KIND, j + 1>(q);
      for (int m = 0; m < MT; m++)
        sums[m] = S::dot6(sums[m], w0, four<S, j>(x, stride, m), w1, four<S, j + 1>(x, stride, m));
    });
  } else {
    for (int m = 0; m < MT; m++) sums[m] = init[m];
    each<N>([&](auto j) {
      typename S::W8 w = S::w8(quad<S, KIND, FIRST + j>(q));
      for (int m = 0; m < MT; m++) sums[m] = S::dot8(sums[m], w, four<S, FIRST + j>(x, stride, m));
    });
  }
}

// How far ahead of its use memory is asked for, in each of up to two runs of it; in more, half as far. Two threads that
// only wait for it reach the machine's bandwidth.
const int64_t AHEAD = 4096;
const int RUNS = 4; // blocks of rows that one token meets at once

// NR blocks of rows with MT tokens of the tiles from `tile` on; acc: (NR, MT).
template <class S, int KIND, bool G16, bool MIN, int NR, int MT>
void packed_tile(const OgMatrix *w, const OgActivations *a, int64_t row_block, int64_t tile, typename S::F *acc) {
  const int R = S::lanes, TS = S::tokens, HALVES = G16 ? 2 : 1;
  // a->minus is for weights that count from -128: stored INT4 counts from -8 and INT6 from -32.
  const int shift = KIND == OG_INT4 ? 4 : KIND == OG_INT6 ? 2 : 0;
  const bool counted = !MIN && (KIND != OG_INT8 || S::unsigned8);
  const int64_t bytes = block_bytes<KIND, R>(), blocks = a->blocks, per_group = G16 ? 1 : w->group / 32;
  const int64_t groups = G16 ? 2 * blocks : round_up(blocks, per_group) / per_group;
  const int64_t next = blocks * bytes, next_scales = groups * R; // from one block of rows to the one below
  const uint8_t *q = (const uint8_t *)w->data + row_block * next;
  const uint16_t *scale = w->scale + row_block * next_scales;
  const uint16_t *minimum = MIN ? w->minimum + row_block * next_scales : nullptr;
  const int8_t *x = a->q + tile * blocks * TS * 32;
  const float *xs = a->scale + tile * blocks * TS, *x_sums = a->sums + tile * blocks * TS;
  const int32_t *minus = a->minus + tile * blocks * TS * 3;
  const int64_t tile_stride = blocks * TS;
  auto at = [&](const float *p, int m) { return p[m / TS * tile_stride + m % TS]; };
  for (int i = 0; i < NR * MT; i++) acc[i] = S::zero();
  const int64_t reach = NR > 2 ? AHEAD / 2 : AHEAD;
  int64_t in_group = 0, ahead = NR == 1 || next > reach ? reach : next;
  int64_t ahead_scales = NR == 1 ? AHEAD / 8 : ahead * next_scales / next;
  const int64_t leap = blocks - ahead / bytes; // from there on what is ahead belongs to the NR blocks of rows below
  for (int64_t b = 0; b < blocks; b++, q += bytes, x += TS * 32, xs += TS, x_sums += TS, minus += 3 * TS) {
    if (NR > 1 && b == leap) ahead += (NR - 1) * next, ahead_scales += (NR - 1) * next_scales;
    for (int r = 0; r < NR; r++)
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(q + r * next + ahead + i);
    each<HALVES>([&](auto h) {
      typename S::I init[MT], sums[MT];
      const int32_t *from = minus + (G16 ? h : 2) * TS;
      for (int m = 0; m < MT; m++)
        init[m] = counted ? S::shifted(from + m / TS * 3 * tile_stride + m % TS, shift) : S::izero();
      for (int r = 0; r < NR; r++) {
        dots<S, KIND, 4 * h, 8 / HALVES, MT>(q + r * next, x, 32 * tile_stride, init, sums);
        typename S::F s = S::f16(scale + r * next_scales + h * R);
        typename S::F lowest = MIN ? S::f16(minimum + r * next_scales) : S::zero();
        for (int m = 0; m < MT; m++) {
          typename S::F y = S::mul(s, S::to_float(sums[m]));
          if (MIN) y = S::fma(lowest, S::set(at(x_sums, m)), y);
          acc[r * MT + m] = S::fma(y, S::set(at(xs, m)), acc[r * MT + m]);
        }
      }
    });
    if (++in_group == per_group) {
      in_group = 0;
      for (int r = 0; r < NR; r++) {
        __builtin_prefetch(scale + r * next_scales + ahead_scales);
        if (MIN) __builtin_prefetch(minimum + r * next_scales + ahead_scales);
      }
      scale += HALVES * R;
      if (MIN) minimum += R;
    }
  }
}

template <class S, int KIND, bool G16, bool MIN, int NR, int MT>
void packed_tokens(const OgMatrix *w, const OgActivations *a, int64_t n_tokens, int64_t tile, int64_t row,
                   int64_t shift, const Output &o) {
  if constexpr (MT > 1)
    if (n_tokens < MT) return packed_tokens<S, KIND, G16, MIN, NR, MT - 1>(w, a, n_tokens, tile, row, shift, o);
  typename S::F acc[NR * MT];
  packed_tile<S, KIND, G16, MIN, NR, MT>(w, a, row / S::lanes, tile, acc);
  for (int r = 0; r < NR; r++, row += S::lanes) {
    int64_t n = w->rows - row < S::lanes ? w->rows - row : S::lanes;
    for (int m = 0; m < MT; m++) put_block<S>(o, tile * S::tokens + m, row, row - shift, n, acc[r * MT + m]);
  }
}

// Weights of a block of rows stay in the cache while further tiles pass. Few tokens meet several blocks of rows at once:
// a core has more requests to memory under way for several runs of it than for one.
template <class S, int KIND, bool G16, bool MIN>
void packed_product(const OgMatrix *w, const OgActivations *a, int64_t n_tokens, int64_t row0, int64_t row1,
                    const Output &o) {
  int64_t begin = row0;
  auto runs = [&](auto n_runs, auto most) {
    for (; begin + n_runs * S::lanes <= row1; begin += n_runs * S::lanes)
      packed_tokens<S, KIND, G16, MIN, n_runs, most>(w, a, n_tokens, 0, begin, row0, o);
  };
  if (n_tokens == 1) runs(std::integral_constant<int, RUNS>(), std::integral_constant<int, 1>());
  if (n_tokens <= S::at_once / 2) runs(std::integral_constant<int, 2>(), std::integral_constant<int, S::at_once / 2>());
  const int64_t per_strip = 131072 / (a->blocks * 32), strip = n_tokens <= S::at_once || per_strip < S::lanes
      ? S::lanes : per_strip / S::lanes * S::lanes;
  for (int64_t first = begin; first < row1; first += strip)
    for (int64_t token = 0; token < n_tokens; token += S::at_once)
      for (int64_t row = first; row < row1 && row < first + strip; row += S::lanes)
        packed_tokens<S, KIND, G16, MIN, 1, S::at_once>(w, a, n_tokens - token, token / S::tokens, row, row0, o);
}

// ---------------------------------------------------------------- unpacked panels

// NR blocks of rows, PANEL blocks of columns: bytes that count from 0 (MIN) or -128, and scales as floats. Where bytes
// are signed (not S::unsigned8) they are the values themselves, paired as S::panel_dots wants them.
const int PANEL = 48;

// Sums of whole numbers become floats in the same step as they meet their scale, where registers allow: a sum n that
// starts at the bits of the float 1.5 * 2^23 is that float plus n, and fma(scale, it, -1.5 * 2^23 scale) = scale * n,
// rounded once like a product, since a float16 scale leaves room for the difference.
const int32_t RAISED_BITS = 0x4B400000;
const float RAISED = 12582912.0f;

template <class S, class = void> struct Raised { // without
  static typename S::I start(typename S::I init) { return init; }
  static typename S::F times(typename S::I sum, typename S::F scale, const float *) {
    return S::mul(scale, S::to_float(sum));
  }
};
template <class S> struct Raised<S, std::enable_if_t<sizeof(S::as_float(S::izero())) != 0>> { // with
  static typename S::I start(typename S::I init) { return S::plus(init, RAISED_BITS); }
  static typename S::F times(typename S::I sum, typename S::F scale, const float *below) {
    return S::fma(scale, S::as_float(sum), S::load(below));
  }
};

template <class S, int NR> struct Panel {
  alignas(64) uint8_t q[PANEL * 32 * S::lanes * NR]; // (blocks, 8 quads, NR, lanes, 4)
  alignas(64) float scale[PANEL * 2 * S::lanes * NR]; // (blocks, halves, NR, lanes)
  alignas(64) float below[PANEL * 2 * S::lanes * NR]; // -RAISED times that
  alignas(64) float minimum[PANEL * S::lanes * NR];
};

template <class S, int KIND, bool G16, bool MIN, int NR>
void unpack_panel(const OgMatrix *w, int64_t blocks, int64_t row_block, int64_t first, int64_t n, Panel<S, NR> *to) {
  const int R = S::lanes, HALVES = G16 ? 2 : 1;
  const int64_t per_group = G16 ? 1 : w->group / 32;
  const int64_t groups = G16 ? 2 * blocks : round_up(blocks, per_group) / per_group;
  for (int r = 0; r < NR; r++) {
    const uint8_t *q = (const uint8_t *)w->data + ((row_block + r) * blocks + first) * block_bytes<KIND, R>();
    for (int64_t b = 0; b < n; b++, q += block_bytes<KIND, R>()) {
      each<4>([&](auto i) {
        typename S::B pair[2] = {quad<S, KIND, 2 * i>(q), quad<S, KIND, 2 * i + 1>(q)};
        for (typename S::B &value : pair)
          if (!MIN) value = S::from_128(value, KIND == OG_INT4 ? 120 : KIND == OG_INT6 ? 96 : 128);
        if constexpr (!S::unsigned8) S::pair(pair[0], pair[1]);
        for (int j = 0; j < 2; j++) S::store_bytes(to->q + ((b * 8 + 2 * i + j) * NR + r) * 4 * R, pair[j]);
      });
      int64_t at = (row_block + r) * groups + (G16 ? 2 * (first + b) : (first + b) / per_group);
      for (int h = 0; h < HALVES; h++) {
        const int64_t place = ((b * HALVES + h) * NR + r) * R;
        S::store(to->scale + place, S::f16(w->scale + (at + h) * R));
        S::store(to->below + place, S::mul(S::f16(w->scale + (at + h) * R), S::set(-RAISED)));
      }
      if (MIN) S::store(to->minimum + (b * NR + r) * R, S::f16(w->minimum + at * R));
    }
  }
}

// A panel with one tile: sums of blocks before `first` come from `sums` (NR, tokens, lanes), those so far go there, or,
// after the last block, to where results go.
template <class S, bool G16, bool MIN, int NR>
void panel_tile(const Panel<S, NR> *p, const OgActivations *a, int64_t tile, int64_t first, int64_t n, float *sums,
                int64_t n_tokens, int64_t rows, int64_t row, int64_t shift, const Output &o) {
  const int R = S::lanes, TS = S::tokens, HALVES = G16 ? 2 : 1, QUADS = 8 / HALVES;
  const int64_t at = (tile * a->blocks + first) * TS;
  const int8_t *x = a->q + at * 32;
  const float *xs = a->scale + at, *x_sums = a->sums + at, *scale = p->scale, *below = p->below;
  const float *minimum = p->minimum;
  const int32_t *minus = a->minus + at * 3;
  const uint8_t *q = p->q;
  typename S::F acc[NR][TS];
  for (int r = 0; r < NR; r++)
    for (int m = 0; m < TS; m++) acc[r][m] = first ? S::load(sums + (r * TS + m) * R) : S::zero();
  for (int64_t b = 0; b < n; b++, x += TS * 32, xs += TS, x_sums += TS, minus += 3 * TS) {
    for (int h = 0; h < HALVES; h++) {
      typename S::I c[NR][TS];
      if constexpr (!S::unsigned8) {
        S::template panel_dots<NR, QUADS>(q, x + 4 * h * QUADS, c);
        q += QUADS * NR * 4 * R;
      } else {
        for (int m = 0; m < TS; m++) {
          c[0][m] = Raised<S>::start(MIN ? S::izero() : S::shifted(minus + (G16 ? h : 2) * TS + m, 0));
          for (int r = 1; r < NR; r++) c[r][m] = c[0][m];
        }
        for (int j = 0; j < QUADS; j++, q += NR * 4 * R) {
          typename S::B value[NR];
          for (int r = 0; r < NR; r++) value[r] = S::bytes(q + r * 4 * R);
          for (int m = 0; m < TS; m++) {
            typename S::B four = S::template four<0>(x + m * 32 + 4 * (h * QUADS + j));
            for (int r = 0; r < NR; r++) c[r][m] = S::dot4(c[r][m], value[r], four);
          }
        }
      }
      for (int r = 0; r < NR; r++, scale += R, below += R) {
        typename S::F s = S::load(scale), lowest = MIN ? S::load(minimum) : S::zero();
        if (MIN) minimum += R;
        for (int m = 0; m < TS; m++) {
          typename S::F y = Raised<S>::times(c[r][m], s, below);
          if (MIN) y = S::fma(lowest, S::set(x_sums[m]), y);
          acc[r][m] = S::fma(y, S::set(xs[m]), acc[r][m]);
        }
      }
    }
  }
  if (first + n < a->blocks) {
    for (int r = 0; r < NR; r++)
      for (int m = 0; m < TS; m++) S::store(sums + (r * TS + m) * R, acc[r][m]);
    return;
  }
  const int64_t token = tile * TS;
  if (row + NR * R <= rows) {
    for (int m = 0; m < TS && token + m < n_tokens; m++)
      for (int r = 0; r < NR; r++) put_whole<S>(o, token + m, row + r * R, row + r * R - shift, acc[r][m]);
    return;
  }
  for (int m = 0; m < TS && token + m < n_tokens; m++)
    for (int r = 0; r < NR && row + r * R < rows; r++) {
      int64_t to = row + r * R, left = rows - to < R ? rows - to : R;
      put_block<S>(o, token + m, to, to - shift, left, acc[r][m]);
    }
}

const int TILES = 96; // in one go where columns take several panels: their sums stay in the second-level cache

template <class S, int KIND, bool G16, bool MIN, int NR>
void panel_rows(const OgMatrix *w, const OgActivations *a, int64_t n_tokens, int64_t row, int64_t shift,
                const Output &o) {
  const int TS = S::tokens;
  Panel<S, NR> panel;
  alignas(64) float sums[TILES * NR * TS * S::lanes];
  const int64_t tiles = round_up(n_tokens, TS) / TS, step = a->blocks > PANEL ? TILES : tiles;
  for (int64_t tile = 0; tile < tiles; tile += step)
    for (int64_t first = 0; first < a->blocks; first += PANEL) {
      int64_t n = a->blocks - first < PANEL ? a->blocks - first : PANEL;
      unpack_panel<S, KIND, G16, MIN, NR>(w, a->blocks, row / S::lanes, first, n, &panel);
      for (int64_t i = 0; i < step && tile + i < tiles; i++)
        panel_tile<S, G16, MIN, NR>(&panel, a, tile + i, first, n, sums + i * NR * TS * S::lanes, n_tokens, w->rows,
                                    row, shift, o);
    }
}

template <class S, int KIND, bool G16, bool MIN>
void quantised_product(const OgMatrix *w, const OgActivations *a, int64_t n_tokens, int64_t row0, int64_t row1,
                       const Output &o) {
  if constexpr (S::panel_rows > 0)
    if (n_tokens > 2 * S::at_once) {
      const int NR = S::panel_rows;
      int64_t row = row0;
      for (; row + (NR - 1) * S::lanes < row1; row += NR * S::lanes)
        panel_rows<S, KIND, G16, MIN, NR>(w, a, n_tokens, row, row0, o);
      for (; row < row1; row += S::lanes) panel_rows<S, KIND, G16, MIN, 1>(w, a, n_tokens, row, row0, o);
      return;
    }
  packed_product<S, KIND, G16, MIN>(w, a, n_tokens, row0, row1, o);
}

} // namespace
