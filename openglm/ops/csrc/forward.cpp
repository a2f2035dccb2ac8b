// One forward pass of a decoder over a ragged batch, from token ids to logits: one call a step, all threads inside it.
//
// Few tokens (decoding): every thread normalises and quantises them for itself, which costs less than a barrier. Many
// tokens (prefill): threads share that work. The arithmetic is the same in both.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "threads.h"
#include "workspace.h"

namespace openglm {
namespace {

const int64_t FEW = 4, MANY = 64;

bool wants_bytes(const OgLinear &l) {
  return std::any_of(l.parts, l.parts + l.n_parts, [](const OgMatrix &m) { return m.kind <= OG_INT8; });
}

bool wants_floats(const OgLinear &l) {
  return std::any_of(l.parts, l.parts + l.n_parts, [](const OgMatrix &m) { return m.kind > OG_INT8; });
}

int64_t n_segments(const OgChunk &single) {
  int64_t keys = single.start < single.n_context ? single.n_context : single.start + 1;
  return (keys + OG_SEGMENT - 1) / OG_SEGMENT;
}

struct Pass {
  const OgModel &m;
  const OgPool &pool;
  const OgBatch &b;
  Workspace &w;
  const OgKernels &k;
  const int threads;
  const int64_t T, D;

  struct Input { // of a linear map: floats and their quantised form, as far as they are wanted
    const float *x;
    OgActivations q;
  };

  // Tokens that this thread prepares: all of few ones, else its share. Of very many it multiplies its own share first,
  // and all rows with it, though that unpacks weights once for each thread: what it needs is in its own cache.
  std::pair<int64_t, int64_t> share(int thread, int64_t n) const {
    if (n <= FEW) return {0, n};
    if (parts(n) == 1) return {n * thread / threads, n * (thread + 1) / threads};
    return part(thread, n);
  }
  int parts(int64_t n) const { return n >= 128 * threads ? threads : 1; }
  std::pair<int64_t, int64_t> part(int i, int64_t n) const { // whole tiles
    auto cut = [&](int64_t i) { return i == parts(n) ? n : n * i / parts(n) / k.tokens * k.tokens; };
    return {cut(i), cut(i + 1)};
  }
  static Input from(const Input &in, int64_t columns, int64_t token) { // a whole number of tiles
    const int64_t n = token * in.q.blocks;
    return {in.x ? in.x + token * columns : nullptr,
            {in.q.q + n * 32, in.q.scale + n, in.q.sums + n, in.q.minus + 3 * n, in.q.blocks}};
  }

  // Zeros for tokens that the last tile does not have: kernels multiply them, and what memory held before may be slow.
  void fill_up(const OgActivations &a, int64_t n) const {
    const int64_t tile = n / k.tokens * a.blocks;
    for (int64_t i = n % k.tokens; i && i < k.tokens; i++)
      for (int64_t b = 0; b < a.blocks; b++)
        a.scale[(tile + b) * k.tokens + i] = a.sums[(tile + b) * k.tokens + i] = 0.0f;
  }

  // Norm (where there is one) and quantisation of `n` rows; ends with a barrier if threads share the work. The floats
  // are private for few tokens, as they are for all when the next map and the residual do not need them.
  Input prepare(int thread, const float *from, int64_t columns, int64_t n, const OgNorm *norm, const OgLinear &to) {
    Mine &mine = w.mine[thread];
    bool few = n <= FEW;
    Input in;
    in.q = few ? mine.activations.of(n, columns) : w.activations.of(n, columns);
    float *x = !norm ? nullptr : few ? mine.x.get<float>(n * columns) : w.x.get<float>(n * columns);
    in.x = norm ? x : from;
    auto [first, last] = share(thread, n);
    for (int64_t t = first; t < last; t++) {
      if (norm) k.norm(from + t * columns, norm, m.layer_norm, m.norm_eps, columns, x + t * columns);
      if (wants_bytes(to)) k.quantise(in.x + t * columns, columns, t, &in.q, 0);
    }
    if (!few) {
      if (thread == 0 && wants_bytes(to)) fill_up(in.q, n);
      barrier();
    }
    return in;
  }

  // f(0) ... f(n - 1), each in one thread of those that work on share `mine` of the tokens. Where all work on the same,
  // each has a run of its own, so that it reads memory in one go, and helps the others when that is done.
  template <class Work> void deal(int thread, int mine, int64_t n_tokens, int64_t n, const Work &f) {
    if (parts(n_tokens) > 1) {
      for (int64_t i = take(1, mine); i < n; i = take(1, mine)) f(i);
      return;
    }
    for (int p = 0; p < threads; p++) {
      const int of = (thread + p) % threads;
      const int64_t first = n * of / threads, last = n * (of + 1) / threads;
      for (int64_t i = first + take(1, of); i < last; i = first + take(1, of)) f(i);
    }
  }

  // y = x W^T + bias, rows dealt out to the threads; ends with a barrier.
  void linear(int thread, const OgLinear &l, const Input &in, int64_t columns, int64_t n, const float *residual,
              float alpha, float *out, int64_t out_stride) {
    int64_t rows = 0, chunks = 0;
    for (int i = 0; i < l.n_parts; i++) rows += l.parts[i].rows;
    const int64_t step = n > MANY ? 32 : (rows / (threads * 16) + 32) / 32 * 32; // whole panels of rows
    for (int i = 0; i < l.n_parts; i++) chunks += (l.parts[i].rows + step - 1) / step;
    for (int p = 0; p < parts(n); p++) {
      const int mine = (thread + p) % parts(n);
      const auto [first, last] = part(mine, n);
      const Input x = from(in, columns, first);
      deal(thread, mine, n, chunks, [&, first = first, last = last](int64_t chunk) {
        const OgMatrix *m = l.parts;
        int64_t offset = 0;
        for (int64_t of_part; chunk >= (of_part = (m->rows + step - 1) / step); m++) {
          chunk -= of_part;
          offset += m->rows;
        }
        const int64_t row = chunk * step, end = std::min(row + step, m->rows);
        k.product(m, &x.q, x.x, columns, last - first, row, end, l.bias ? l.bias + offset : nullptr,
                  residual ? residual + first * D + offset : nullptr, D, alpha,
                  out + first * out_stride + offset + row, out_stride);
      });
    }
    barrier();
  }

  void embed(int thread) {
    const int64_t half = (int64_t)m.axes * m.n_frequencies;
    float *h = w.h.get<float>(T * D), *c = w.cosines.get<float>(T * half), *s = w.sines.get<float>(T * half);
    float *row = w.mine[thread].x.get<float>(FEW * D);
    for (int64_t t = T * thread / threads; t < T * (thread + 1) / threads; t++) {
      k.gather(&m.embed, b.ids[t], h + t * D);
      const OgMatrix *learned[2] = {&m.embed_position, &m.embed_block};
      for (int axis = 0; axis < 2 && learned[axis]->data; axis++) {
        k.gather(learned[axis], b.positions[axis * (int64_t)b.n_tokens + t], row);
        for (int64_t d = 0; d < D; d++) h[t * D + d] += row[d];
      }
      for (int axis = 0; axis < m.axes; axis++)
        for (int64_t i = 0; i < m.n_frequencies; i++) {
          float angle = (float)b.positions[axis * (int64_t)b.n_tokens + t] * m.inv_freq[i];
          c[t * half + axis * m.n_frequencies + i] = cosf(angle) * m.rope_scale;
          s[t * half + axis * m.n_frequencies + i] = sinf(angle) * m.rope_scale;
        }
    }
    barrier();
  }

  void rotate(int64_t token, float *heads, int64_t n) {
    const int64_t half = (int64_t)m.axes * m.n_frequencies;
    const float *c = w.cosines.get<float>(0) + token * half, *s = w.sines.get<float>(0) + token * half;
    for (int64_t i = 0; half && i < n; i++) k.rotate(heads + i * m.head_dim, c, s, half);
  }

  // Rotates one key of a token, the i-th of its chunk, and stores it and its value.
  void enter(int64_t layer, const OgChunk &chunk, int64_t i, int64_t token, int64_t g, float *qkv) {
    const int64_t hd = m.head_dim;
    float *key = qkv + (m.n_heads + g) * hd, *value = qkv + (m.n_heads + m.n_kv_heads + g) * hd;
    rotate(token, key, 1);
    const float *centre = m.layers[layer].key_centre;
    if (centre && pool.kind == OG_INT8)
      for (int64_t d = 0; d < hd; d++) key[d] -= centre[g * hd + d];
    int64_t at = chunk.start + i;
    k.store_kv(&pool, layer, m.n_kv_heads, hd, g, chunk.pages[at / pool.page_size], at % pool.page_size, key, value);
  }

  // Query tokens in a tile of attention: several tiles for each thread, and rows come by the eight.
  int64_t tile_tokens(int64_t n_tokens) const {
    const int64_t group = m.n_heads / m.n_kv_heads, most = std::max<int64_t>(1, OG_TILE_ROWS / group);
    const int64_t wanted = std::max<int64_t>(8 / group, n_tokens * m.n_kv_heads / (4 * threads));
    const int64_t size = std::max<int64_t>(1, std::min(most, wanted));
    for (int64_t n = size; n > size / 2; n--)
      if (n * group % 8 == 0) return n;
    return size;
  }

  // Whether the last layer can leave out most tokens: only those whose logits are wanted need more of it than their
  // keys and values.
  bool cuts() const { return T > FEW && 2 * b.n_outputs <= T && !m.normed_residual; }

  bool wanted(int64_t first, int64_t last) const { // whether logits of one of these tokens are
    const int32_t *next = std::lower_bound(b.outputs, b.outputs + b.n_outputs, (int32_t)first);
    return next < b.outputs + b.n_outputs && *next < last;
  }

  void attend(int thread, int64_t layer, float *qkv, float *out) {
    const bool all = layer + 1 < m.n_layers || !cuts();
    const int64_t hd = m.head_dim, G = m.n_kv_heads, group = m.n_heads / G;
    const int64_t qkv_dim = (m.n_heads + 2 * G) * hd, out_dim = m.n_heads * hd;
    if (b.n_chunks == b.n_tokens) return attend_singly(thread, layer, qkv, out);
    const auto mine = share(thread, T);
    for (int64_t c = 0, token = 0; c < b.n_chunks; token += b.chunks[c++].n_tokens)
      for (int64_t i = 0; i < b.chunks[c].n_tokens; i++)
        if (parts(T) == 1 ? (token + i) % threads == thread : token + i >= mine.first && token + i < mine.second) {
          rotate(token + i, qkv + (token + i) * qkv_dim, m.n_heads);
          for (int64_t g = 0; g < G; g++) enter(layer, b.chunks[c], i, token + i, g, qkv + (token + i) * qkv_dim);
        }
    barrier();
    float *scratch = w.mine[thread].scratch.get<float>(og_scratch(OG_TILE_ROWS, hd));
    int64_t next = take(1), before = 0;
    for (int64_t c = 0, token = 0; c < b.n_chunks; token += b.chunks[c++].n_tokens) {
      const OgChunk &chunk = b.chunks[c];
      const int64_t per_tile = tile_tokens(chunk.n_tokens), tiles = (chunk.n_tokens + per_tile - 1) / per_tile * G;
      for (; next < before + tiles; next = take(1)) { // from behind: the last ones have most keys, small ones fill up
        int64_t g = (next - before) % G, first = (tiles - 1 - (next - before)) / G * per_tile;
        int64_t n = std::min(per_tile, chunk.n_tokens - first), head = g * group * hd;
        if (!all && !wanted(token + first, token + first + n)) continue;
        OgTile tile = {&pool, &chunk, layer, G, g, group, hd, first, n, qkv + (token + first) * qkv_dim + head,
                       out + (token + first) * out_dim + head, qkv_dim, out_dim, 0, nullptr};
        k.attend(&tile, scratch);
      }
      before += tiles;
    }
    barrier();
  }

  // One token of each sequence: nobody waits for another's key, and threads share a long context. Whoever computes the
  // last segment enters the token's key and value first; whoever is last to finish joins all.
  void attend_singly(int thread, int64_t layer, float *qkv, float *out) {
    const int64_t hd = m.head_dim, G = m.n_kv_heads, group = m.n_heads / G, size = group * (hd + 2);
    const int64_t qkv_dim = (m.n_heads + 2 * G) * hd, out_dim = m.n_heads * hd;
    float *q = w.mine[thread].scratch.get<float>(group * hd + og_scratch(group, hd)), *scratch = q + group * hd;
    float *partial = w.segments.get<float>(0);
    std::atomic<int32_t> *unfinished = w.unfinished.get<std::atomic<int32_t>>(0);
    int64_t next = take(1), before = 0;
    for (int64_t c = 0; c < b.n_chunks; c++) {
      const OgChunk &chunk = b.chunks[c];
      const int64_t n = n_segments(chunk);
      for (; next < before + n * G; next = take(1)) {
        int64_t g = (next - before) / n, s = (next - before) % n;
        memcpy(q, qkv + c * qkv_dim + g * group * hd, group * hd * sizeof(float));
        rotate(c, q, group);
        if (s == n - 1) enter(layer, chunk, 0, c, g, qkv + c * qkv_dim);
        OgTile tile = {&pool, &chunk, layer, G, g, group, hd, 0, 1, q, out + c * out_dim + g * group * hd, qkv_dim,
                       out_dim, s, n == 1 ? nullptr : partial + (g * n + s) * size};
        k.attend(&tile, scratch);
        if (n == 1 || unfinished[c * G + g].fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
        tile.partial = partial + g * n * size;
        k.join_segments(&tile, n, scratch);
        unfinished[c * G + g].store(n, std::memory_order_relaxed); // for the next layer
      }
      before += n * G;
      partial += G * n * size;
    }
    barrier();
  }

  // The MLP's middle, a strip of its columns at a time: gate and up product, activation, quantisation for `down`.
  Input middle(int thread, const OgLayer &layer, const Input &in) {
    const int64_t F = m.ffn_dim, n_up = layer.up.n_parts;
    const bool bytes = wants_bytes(layer.down), floats = wants_floats(layer.down);
    Input result = {floats ? w.middle.get<float>(T * F) : nullptr, w.activations_ffn.of(T, F)};
    int64_t step = (F / (threads * 16) + 32) / 32 * 32;
    step = std::max<int64_t>(32, std::min(step, 65536 / T / 32 * 32));
    float *gate = w.mine[thread].gate.get<float>(2 * T * step), *up = n_up == 2 ? gate + T * step : nullptr;
    for (int p = 0; p < parts(T); p++) {
      const int mine = (thread + p) % parts(T);
      const auto [first, last] = part(mine, T);
      const Input x = from(in, D, first);
      deal(thread, mine, T, (F + step - 1) / step, [&, first = first, last = last](int64_t strip) {
        const int64_t at = strip * step, n = std::min(step, F - at);
        for (int64_t i = 0; i < n_up; i++)
          k.product(&layer.up.parts[i], &x.q, x.x, D, last - first, at, at + n,
                    layer.up.bias ? layer.up.bias + i * F : nullptr, nullptr, 0, 0.0f, i ? up : gate, step);
        for (int64_t t = first; t < last; t++) {
          float *g = gate + (t - first) * step;
          k.activate(m.mlp, g, up ? up + (t - first) * step : nullptr, n, g);
          if (bytes) k.quantise(g, n, t, &result.q, at / 32);
          if (floats) memcpy((float *)result.x + t * F + at, g, n * sizeof(float));
        }
      });
    }
    if (thread == 0 && bytes) fill_up(result.q, T);
    barrier();
    return result;
  }

  // h = alpha * (x or h) + post_norm(map(in))
  void close(int thread, const OgLinear &map, const Input &in, int64_t columns, const float *x, const OgNorm &post) {
    float *h = w.h.get<float>(0);
    if (!post.weight) {
      linear(thread, map, in, columns, T, m.normed_residual ? x : h, m.normed_residual ? m.alpha : 1.0f, h, D);
      return;
    }
    float *y = w.y.get<float>(T * D), *row = w.mine[thread].x.get<float>(FEW * D);
    linear(thread, map, in, columns, T, nullptr, 0.0f, y, D);
    for (int64_t t = T * thread / threads; t < T * (thread + 1) / threads; t++) {
      k.norm(y + t * D, &post, m.layer_norm, m.norm_eps, D, row);
      for (int64_t d = 0; d < D; d++) h[t * D + d] += row[d];
    }
    barrier();
  }

  void run(int thread) {
    const int64_t H = m.n_heads * (int64_t)m.head_dim, qkv_dim = H + 2 * m.n_kv_heads * (int64_t)m.head_dim;
    embed(thread);
    float *h = w.h.get<float>(0), *qkv = w.qkv.get<float>(T * qkv_dim), *attended = w.attended.get<float>(T * H);
    for (int64_t i = 0; i < m.n_layers; i++) {
      const OgLayer &layer = m.layers[i];
      const Input in = prepare(thread, h, D, T, &layer.norm1, layer.qkv);
      linear(thread, layer.qkv, in, D, T, nullptr, 0.0f, qkv, qkv_dim);
      attend(thread, i, qkv, attended);
      if (i + 1 == m.n_layers && cuts()) return end(thread, layer, attended);
      go_on(thread, layer, attended, in.x);
    }
    finish(thread, b.outputs);
  }

  // A layer behind its attention. A normed residual wants the layer's input x again: `prepare` without a norm leaves its
  // buffer alone.
  void go_on(int thread, const OgLayer &layer, const float *attended, const float *x) {
    const int64_t H = m.n_heads * (int64_t)m.head_dim;
    close(thread, layer.out, prepare(thread, attended, H, T, nullptr, layer.out), H, x, layer.post_norm1);
    const Input in = prepare(thread, w.h.get<float>(0), D, T, &layer.norm2, layer.up);
    close(thread, layer.down, middle(thread, layer, in), m.ffn_dim, in.x, layer.post_norm2);
  }

  // What is left of the last layer, of the tokens whose logits are wanted.
  void end(int thread, const OgLayer &layer, float *attended) {
    const int64_t n = b.n_outputs, H = m.n_heads * (int64_t)m.head_dim;
    float *h = w.h.get<float>(0);
    if (!n) return;
    if (thread == 0)
      for (int64_t i = 0; i < n; i++) {
        memmove(h + i * D, h + b.outputs[i] * D, D * sizeof(float));
        memmove(attended + i * H, attended + b.outputs[i] * H, H * sizeof(float));
      }
    barrier();
    Pass rest = {m, pool, b, w, k, threads, n, D};
    rest.go_on(thread, layer, attended, nullptr);
    rest.finish(thread, nullptr);
  }

  // Logits of those rows of the stream; NULL: of all.
  void finish(int thread, const int32_t *outputs) {
    const int64_t n = b.n_outputs;
    if (!n) return;
    float *h = w.h.get<float>(0), *rows = w.wide.get<float>(n * D);
    if (thread == 0)
      for (int64_t i = 0; i < n; i++) memcpy(rows + i * D, h + (outputs ? outputs[i] : i) * D, D * sizeof(float));
    barrier();
    const Input in = prepare(thread, rows, D, n, &m.norm, m.head);
    linear(thread, m.head, in, D, n, nullptr, 0.0f, b.logits, m.vocab_size);
  }
};

// Memory is taken before the threads start: they only ask for what is there.
void reserve(const Pass &p, Workspace &w) {
  const OgModel &m = p.m;
  const int64_t T = p.T, H = (int64_t)m.n_heads * m.head_dim, half = (int64_t)m.axes * m.n_frequencies;
  const int64_t n = std::max<int64_t>(T, p.b.n_outputs), widest = std::max(p.D, H);
  const int64_t group = m.n_heads / m.n_kv_heads, rows = std::max<int64_t>(OG_TILE_ROWS, group);
  w.mine.resize(p.threads);
  for (Mine &mine : w.mine) {
    mine.x.get<float>(FEW * p.D);
    mine.activations.of(FEW, widest);
    mine.scratch.get<float>(rows * m.head_dim + og_scratch(rows, m.head_dim));
    mine.gate.get<float>(2 * std::max(T * 32, T * ((int64_t)m.ffn_dim / (p.threads * 8) / 32 + 1) * 32));
  }
  w.h.get<float>(T * p.D), w.x.get<float>(n * p.D), w.y.get<float>(T * p.D), w.wide.get<float>(n * p.D);
  w.qkv.get<float>(T * (H + 2 * (int64_t)m.n_kv_heads * m.head_dim)), w.attended.get<float>(T * H);
  w.cosines.get<float>(T * half), w.sines.get<float>(T * half);
  if (p.b.n_chunks == T) {
    int64_t segments = 0, i = 0;
    auto *unfinished = w.unfinished.get<std::atomic<int32_t>>(T * m.n_kv_heads);
    for (int64_t c = 0; c < T; c++) {
      segments += n_segments(p.b.chunks[c]);
      for (int64_t g = 0; g < m.n_kv_heads; g++) new (&unfinished[i++]) std::atomic<int32_t>(n_segments(p.b.chunks[c]));
    }
    w.segments.get<float>(segments * m.n_heads * (m.head_dim + 2));
  }
  w.activations.of(n, widest), w.activations_ffn.of(T, m.ffn_dim);
  for (int64_t i = 0; i < m.n_layers; i++)
    if (wants_floats(m.layers[i].down)) w.middle.get<float>(T * m.ffn_dim);
}

} // namespace
} // namespace openglm

// 1; 0 where there is no memory for a pass of so many tokens, and nothing was computed.
OG_API int og_forward(const OgModel *model, const OgPool *pool, const OgBatch *batch, void *workspace) {
  using namespace openglm;
  Pass pass = {*model, *pool, *batch, *(Workspace *)workspace, *kernels(), n_threads(), batch->n_tokens, model->dim};
  try {
    reserve(pass, pass.w);
  } catch (const std::bad_alloc &) {
    return 0;
  }
  parallel([&](int thread) { pass.run(thread); });
  return 1;
}
