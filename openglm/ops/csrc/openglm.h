// The C interface of OpenGLM's CPU kernels, and the structures that the instruction sets share. No PyTorch headers:
// the caller (openglm/ops/native.py) passes pointers to memory that it owns and keeps alive.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define OG_API extern "C" __declspec(dllexport)
#else
#define OG_API extern "C" __attribute__((visibility("default")))
#endif

// How the elements of a matrix are stored. The quantised kinds are packed (see pack.cpp): blocks of `lanes` rows by 32
// columns; the others are row-major.
enum OgKind : int32_t { OG_INT4 = 0, OG_INT6 = 1, OG_INT8 = 2, OG_F32 = 3, OG_F16 = 4, OG_BF16 = 5 };

struct OgMatrix {        // weights of y = x W^T
  int32_t kind;          // OgKind
  int32_t group;         // columns that share a scale: 16 or a multiple of 32; quantised kinds only
  int64_t rows, columns; // of the matrix as the model sees it; a packed one is padded with zeros
  const void *data;
  const uint16_t *scale;   // float16 (row blocks, groups, lanes), or NULL
  const uint16_t *minimum; // like scale, or NULL: then INT4 counts from -8, INT6 from -32
};

struct OgLinear { // up to three matrices below each other, and a bias over all rows or NULL
  int32_t n_parts;
  OgMatrix parts[3];
  const float *bias;
};

struct OgNorm { // bias NULL: no bias; weight NULL: no norm
  const float *weight, *bias;
};

struct OgLayer {
  OgNorm norm1, norm2, post_norm1, post_norm2;
  OgLinear qkv, out, up, down;
  const float *key_centre; // (kv heads, head_dim), subtracted from keys that are stored in INT8, or NULL
};

enum OgMlp : int32_t { OG_GELU_TANH = 0, OG_GEGLU = 1, OG_SWIGLU = 2 };

struct OgModel { // the fields of GLMConfig that a forward pass reads
  int32_t n_layers, dim, n_heads, n_kv_heads, head_dim, ffn_dim, vocab_size;
  int32_t layer_norm;      // 1: LayerNorm, 0: RMSNorm
  int32_t normed_residual; // 1: the residual comes from the normalised stream
  int32_t mlp;             // OgMlp
  int32_t axes, n_frequencies; // rotary: positions of a token, and pairs turned by each; 0 frequencies: none
  float norm_eps, alpha, rope_scale;
  const float *inv_freq;
  OgMatrix embed;
  OgMatrix embed_position, embed_block; // learned positions; data NULL where there are none
  const OgLayer *layers;
  OgNorm norm;
  OgLinear head;
};

struct OgPool { // paged keys and values; n_pages pages of page_size (a multiple of 16) tokens in every layer
  int32_t kind; // OG_F32, OG_F16, OG_BF16 or OG_INT8
  int32_t page_size;
  int64_t n_pages;
  void *keys;   // (layers, pages, kv heads, page_size / 16, head_dim, 16): tokens side by side, as scores want them
  void *values; // (layers, pages, kv heads, page_size, head_dim)
};

struct OgChunk { // consecutive tokens of one sequence
  int32_t n_tokens, start, n_context;
  const int32_t *pages;
};

struct OgBatch {
  int32_t n_tokens, n_chunks, n_outputs;
  const int64_t *ids;       // (n_tokens)
  const int64_t *positions; // (axes, n_tokens)
  const OgChunk *chunks;
  const int32_t *outputs; // tokens whose logits are wanted, upwards
  float *logits;          // (n_outputs, vocab_size)
};

struct OgSampling { // how a request draws its tokens: fields of SamplingParams
  double temperature, top_p, min_p;
  int64_t top_k;
  uint64_t seed;
};

struct OgStream { // a request that decodes, one token a step
  int64_t id;               // its last token, which has yet to run
  int32_t start, axes;      // tokens in the pool
  const int32_t *pages;     // with room for every step
  const int64_t *positions; // (axes, n), rows `stride` apart: of that token, and those behind it
  int64_t stride;
  OgSampling sampling;
  int64_t n_drawn; // number of its next draw
  const int64_t *stop_ids;
  int64_t n_stop_ids;
};

// Steps of decoding. They end with the first one in which a request draws a stop id or has logits that are no numbers,
// when another one would take longer than `most_seconds` in all, and when someone sets `wanted`.
struct OgBurst {
  int32_t n_streams, n_steps; // at most
  int64_t n_ids;              // ids from here on are never drawn
  double most_seconds;
  const OgStream *streams;
  const int32_t *wanted;
  int64_t *ids;     // (n_steps, n_streams): what was drawn; -1 where the logits hold NaN or infinity
  double *logprobs; // (n_steps, n_streams)
  double *seconds;  // (n_steps): from the call to the end of the step
};

OG_API int og_forward(const OgModel *model, const OgPool *pool, const OgBatch *batch, void *workspace);

// Activations quantised for a product: symmetric INT8, blocks of 32 columns to a scale, padded with zeros. In tiles of
// as many tokens as a kernel takes at once (OgKernels.tokens), a block of all of them side by side.
struct OgActivations {
  int8_t *q;      // (tiles, blocks, tokens, 32)
  float *scale;   // (tiles, blocks, tokens)
  float *sums;    // (tiles, blocks, tokens): the sum of q
  int32_t *minus; // (tiles, blocks, 3, tokens): -128 times the sum of q over columns 0-15, 16-31 and all
  int64_t blocks;
};

// One query tile of attention: consecutive query tokens of one chunk, all query heads of one key-value head. Keys come
// in segments of OG_SEGMENT; where there is only one query token, they can be computed apart.
struct OgTile {
  const OgPool *pool;
  const OgChunk *chunk;
  int64_t layer, n_kv_heads, kv_head, group, head_dim;
  int64_t first, n_tokens; // query tokens within the chunk
  const float *q;          // rotated queries of the first token and head, (tokens, q_stride)
  float *out;              // likewise (tokens, out_stride)
  int64_t q_stride, out_stride;
  int64_t segment; // with `partial`: the only one to compute
  float *partial;  // its sums, (group, head_dim + 2) floats; NULL: all segments, to `out`
};

// What an instruction set provides. Rows and tokens are processed independently of each other: a result never depends
// on how many others are computed beside it.
struct OgKernels {
  const char *name;
  int32_t lanes, tokens;
  void (*quantise)(const float *x, int64_t n, int64_t token, const OgActivations *out, int64_t first_block);
  void (*norm)(const float *x, const OgNorm *norm, int32_t layer_norm, float eps, int64_t n, float *out);
  // out[t, r - row0] = residual ? alpha * residual[t, r] + y : y, for rows [row0, row1) that start at a row block
  void (*product)(const OgMatrix *w, const OgActivations *a, const float *x, int64_t x_stride, int64_t n_tokens,
                  int64_t row0, int64_t row1, const float *bias, const float *residual, int64_t residual_stride,
                  float alpha, float *out, int64_t out_stride);
  void (*activate)(int32_t mlp, const float *gate, const float *up, int64_t n, float *out);
  void (*rotate)(float *x, const float *cosines, const float *sines, int64_t half);
  void (*store_kv)(const OgPool *pool, int64_t layer, int64_t n_kv_heads, int64_t head_dim, int64_t kv_head,
                   int64_t page, int64_t slot, float *key, const float *value); // may overwrite the key
  void (*attend)(const OgTile *tile, float *scratch); // og_scratch() floats
  void (*join_segments)(const OgTile *tile, int64_t n, float *scratch); // n of them, side by side at `partial`
  double (*sum_exp)(const float *x, int64_t n, float peak); // of exp(x - peak); peak: the largest
  void (*gather)(const OgMatrix *w, int64_t row, float *out); // one row, dequantised
  int64_t (*largest)(const float *x, int64_t n);
  double (*likeliness)(const float *x, int64_t n, float peak, float factor, float *out);
};

// Query rows that `attend` handles at once, and keys that it has in one softmax.
enum { OG_TILE_ROWS = 96, OG_SEGMENT = 256 };
inline int64_t og_scratch(int64_t rows, int64_t head_dim) { // floats
  return rows * (3 * head_dim + OG_SEGMENT + 4) + 2 * OG_SEGMENT * head_dim;
}
