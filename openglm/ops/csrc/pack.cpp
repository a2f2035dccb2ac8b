// Weights on their way in: blocks of GGUF files to our form or straight to the packed one, our form to the packed one,
// and packed rows back to floats.
//
// Our form (openglm/ops/quant.py): INT4 two columns to a byte, the even one low; INT8 a signed byte; float16 scales and
// minimums (rows, groups). Packed: for each block of `lanes` rows and 32 columns, eight quads of columns, each holding
// four neighbouring columns of every row in turn, so that one load feeds a dot product of all rows. INT4 keeps two
// quads in one run of bytes, the even one low. INT6 (INT8 that only uses -32 to 31) adds two runs with the upper two
// bits of four quads each.
#include <string.h>

#include <algorithm>

#if !defined(_WIN32)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "openglm.h"
#include "simd.h"
#include "threads.h"

struct OgGgufMatrix { // a quantised matrix of a GGUF file, to be packed
  OgMatrix to;            // where it goes; kind and group are those of the type
  const char *type;       // "Q4_K", ...
  const uint8_t *blocks;  // of all rows
  const int64_t *order;   // row r comes from row order[r], or NULL
  int64_t n_mapped;       // bytes from `blocks` on that lie in a mapped file, to be given back; 0: none
};

namespace openglm {
const OgKernels *kernels();

namespace {

// Items 0 .. n dealt out to all threads in runs.
template <class Work> void share(int64_t n, int64_t step, const Work &work) {
  parallel([&](int) {
    for (int64_t i = take(step); i < n; i = take(step)) work(i, std::min(i + step, n));
  });
}

inline uint64_t load64(const uint8_t *p) {
  uint64_t x;
  memcpy(&x, p, 8);
  return x;
}

inline uint32_t load32(const uint8_t *p) {
  uint32_t x;
  memcpy(&x, p, 4);
  return x;
}

inline void store32(uint8_t *p, uint32_t x) { memcpy(p, &x, 4); }

// ---------------------------------------------------------------- the packed form

// Blocks of one row go to `data`, its scales to `scale` (one every `lanes`), minimums likewise.
struct Place {
  uint8_t *data;
  uint16_t *scale, *minimum;
};

inline int64_t block_bytes(int kind, int64_t lanes) {
  return (kind == OG_INT4 ? 16 : kind == OG_INT6 ? 24 : 32) * lanes;
}

// Where 32-column block `block` and group `group` of a row go.
inline Place place_of(const OgMatrix &to, int64_t lanes, int64_t row, int64_t block, int64_t group) {
  const int64_t blocks = (to.columns + 31) / 32, groups = (to.columns + to.group - 1) / to.group;
  const int64_t b = row / lanes, lane = row % lanes, at = (b * groups + group) * lanes + lane;
  return {(uint8_t *)to.data + (b * blocks + block) * block_bytes(to.kind, lanes) + 4 * lane,
          (uint16_t *)to.scale + at, to.minimum ? (uint16_t *)to.minimum + at : nullptr};
}

// Zeros for a block of rows that the matrix does not fill.
void clear(const OgMatrix &to, int64_t lanes, int64_t row) {
  const int64_t blocks = (to.columns + 31) / 32, groups = (to.columns + to.group - 1) / to.group;
  Place place = place_of(to, lanes, row, 0, 0);
  memset(place.data, 0, block_bytes(to.kind, lanes) * blocks);
  memset(place.scale, 0, 2 * groups * lanes);
  if (place.minimum) memset(place.minimum, 0, 2 * groups * lanes);
}

// 32 columns of a row. v: 0 to 15 for INT4, else signed bytes.
template <int KIND> inline void put(const uint8_t *v, int64_t lanes, uint8_t *to) {
  const int64_t run = 4 * lanes;
  if (KIND == OG_INT8) {
    for (int j = 0; j < 8; j++) memcpy(to + j * run, v + 4 * j, 4);
    return;
  }
  for (int j = 0; j < 4; j++) {
    uint64_t x = load64(v + 8 * j) & 0x0F0F0F0F0F0F0F0Full;
    store32(to + j * run, (uint32_t)x | (uint32_t)(x >> 32) << 4);
  }
  if (KIND == OG_INT4) return;
  for (int h = 0; h < 2; h++) { // counted from -32: the sixth bit is turned over
    uint32_t bits = 0;
    for (int i = 0; i < 4; i++) bits |= (((load32(v + 16 * h + 4 * i) ^ 0x20202020u) >> 4) & 0x03030303u) << (2 * i);
    store32(to + (4 + h) * run, bits);
  }
}

// `n` columns, a multiple of 32.
void put_columns(int kind, const uint8_t *v, int n, int64_t lanes, uint8_t *to) {
  for (int i = 0; i < n; i += 32, to += block_bytes(kind, lanes)) {
    if (kind == OG_INT4) put<OG_INT4>(v + i, lanes, to);
    else if (kind == OG_INT6) put<OG_INT6>(v + i, lanes, to);
    else put<OG_INT8>(v + i, lanes, to);
  }
}

// ---------------------------------------------------------------- GGUF's blocks, one value to a byte

inline float half(const uint8_t *p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return half_to_float(h);
}

// Low halves of n bytes, then the high ones.
inline void halves_of(const uint8_t *from, int n, uint8_t *v) {
  for (int i = 0; i < n; i++) v[i] = from[i] & 15;
  for (int i = 0; i < n; i++) v[n + i] = from[i] >> 4;
}

// float_to_half without a branch, so that the compiler takes several at once.
inline void to_halves(const float *x, int n, uint16_t *out) {
  for (int i = 0; i < n; i++) {
    uint32_t bits, small;
    memcpy(&bits, x + i, 4);
    uint32_t sign = (bits >> 16) & 0x8000, top = bits & 0x7FFFFFFFu;
    float shifted; // subnormal: adding 0.5 shifts the mantissa into place and rounds it
    memcpy(&shifted, &top, 4);
    shifted += 0.5f;
    memcpy(&small, &shifted, 4);
    uint32_t y = (top + 0xC8000FFFu + ((top >> 13) & 1)) >> 13;
    y = top < 0x38800000u ? small - 0x3F000000u : y;
    y = top >= 0x477FF000u ? 0x7C00u : y;
    y = top > 0x7F800000u ? 0x7E00u : y;
    out[i] = (uint16_t)(sign | y);
  }
}

void unpack_q4_k(const uint8_t *b, uint8_t *v, uint16_t *s, uint16_t *m) {
  const uint8_t *p = b + 4; // six bits each of eight scales and eight minimums
  float x[16], d = half(b), lowest = -half(b + 2);
  for (int i = 0; i < 4; i++) {
    x[i] = d * (float)(p[i] & 63);
    x[4 + i] = d * (float)((p[8 + i] & 15) | (p[i] >> 6) << 4);
    x[8 + i] = lowest * (float)(p[4 + i] & 63);
    x[12 + i] = lowest * (float)(p[8 + i] >> 4 | (p[4 + i] >> 6) << 4);
  }
  to_halves(x, 8, s);
  to_halves(x + 8, 8, m);
  for (int i = 0; i < 4; i++) halves_of(b + 16 + 32 * i, 32, v + 64 * i);
}

void unpack_q6_k(const uint8_t *b, uint8_t *v, uint16_t *s, uint16_t *) {
  float x[16], d = half(b + 208);
  for (int i = 0; i < 16; i++) x[i] = d * (float)(int8_t)b[192 + i];
  to_halves(x, 16, s);
  for (int n = 0; n < 2; n++) {
    const uint8_t *low = b + 64 * n, *high = b + 128 + 32 * n;
    uint8_t *to = v + 128 * n;
    for (int i = 0; i < 32; i++) to[i] = (uint8_t)(((low[i] & 15) | (high[i] & 3) << 4) - 32);
    for (int i = 0; i < 32; i++) to[32 + i] = (uint8_t)(((low[32 + i] & 15) | (high[i] >> 2 & 3) << 4) - 32);
    for (int i = 0; i < 32; i++) to[64 + i] = (uint8_t)((low[i] >> 4 | (high[i] >> 4 & 3) << 4) - 32);
    for (int i = 0; i < 32; i++) to[96 + i] = (uint8_t)((low[32 + i] >> 4 | (high[i] >> 6) << 4) - 32);
  }
}

void unpack_q5_0(const uint8_t *b, uint8_t *v, uint16_t *s, uint16_t *) {
  memcpy(s, b, 2);
  halves_of(b + 6, 16, v);
  for (int i = 0; i < 4; i++) { // eight fifth bits at a time, each to a byte of its own
    uint64_t bits = (b[2 + i] * 0x0101010101010101ull) & 0x8040201008040201ull;
    bits = ((bits + 0x7F7F7F7F7F7F7F7Full) & 0x8080808080808080ull) >> 3;
    bits |= load64(v + 8 * i);
    memcpy(v + 8 * i, &bits, 8);
  }
  for (int i = 0; i < 32; i++) v[i] = (uint8_t)(v[i] - 16);
}

struct Form {
  const char *name;
  int kind, columns, bytes, groups; // of one block
  void (*unpack)(const uint8_t *b, uint8_t *v, uint16_t *scale, uint16_t *minimum);
};

const Form FORMS[] = {
    {"Q4_0", OG_INT4, 32, 18, 1, [](const uint8_t *b, uint8_t *v, uint16_t *s, uint16_t *) {
       memcpy(s, b, 2);
       halves_of(b + 2, 16, v);
     }},
    {"Q4_1", OG_INT4, 32, 20, 1, [](const uint8_t *b, uint8_t *v, uint16_t *s, uint16_t *m) {
       memcpy(s, b, 2);
       memcpy(m, b + 2, 2);
       halves_of(b + 4, 16, v);
     }},
    {"Q8_0", OG_INT8, 32, 34, 1, [](const uint8_t *b, uint8_t *v, uint16_t *s, uint16_t *) {
       memcpy(s, b, 2);
       memcpy(v, b + 2, 32);
     }},
    {"Q5_0", OG_INT6, 32, 22, 1, unpack_q5_0},
    {"Q4_K", OG_INT4, 256, 144, 8, unpack_q4_k},
    {"Q6_K", OG_INT6, 256, 210, 16, unpack_q6_k},
};

const Form *form_of(const char *type) {
  for (const Form &form : FORMS)
    if (!strcmp(form.name, type)) return &form;
  return nullptr;
}

// Gives pages of a mapped file back, of those that hold nothing but these bytes.
void release(const uint8_t *data, int64_t n) {
#if !defined(_WIN32)
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = ((uintptr_t)data + page - 1) / page * page;
  const uintptr_t last = ((uintptr_t)data + n) / page * page;
  if (first < last) madvise((void *)first, last - first, MADV_DONTNEED);
#else
  (void)data, (void)n;
#endif
}

void pack_gguf(const OgGgufMatrix &m, const Form &form) {
  const OgMatrix &to = m.to;
  const int64_t lanes = kernels()->lanes, n_blocks = to.columns / form.columns, row_bytes = n_blocks * form.bytes;
  const int64_t block_step = form.columns / 32;
  share((to.rows + lanes - 1) / lanes, 4, [&](int64_t first, int64_t last) {
    uint8_t v[256];
    uint16_t scale[16], minimum[16];
    for (int64_t row = first * lanes; row < last * lanes; row += lanes) {
      const int64_t n = std::min(lanes, to.rows - row);
      if (n < lanes) clear(to, lanes, row);
      for (int64_t k = 0; k < n_blocks; k++)
        for (int64_t r = row; r < row + n; r++) {
          form.unpack(m.blocks + (m.order ? m.order[r] : r) * row_bytes + k * form.bytes, v, scale, minimum);
          Place place = place_of(to, lanes, r, k * block_step, k * form.groups);
          put_columns(to.kind, v, form.columns, lanes, place.data);
          for (int g = 0; g < form.groups; g++) {
            place.scale[g * lanes] = scale[g];
            if (place.minimum) place.minimum[g * lanes] = minimum[g];
          }
        }
    }
  });
}

} // namespace
} // namespace openglm

// A matrix in our form (rows, columns) to the packed one. q: the values; `to` says kind, group and where it goes.
OG_API void og_pack(const OgMatrix *to, const void *q, const uint16_t *scale, const uint16_t *minimum) {
  using namespace openglm;
  const int64_t lanes = kernels()->lanes, columns = to->columns, groups = (columns + to->group - 1) / to->group;
  const int64_t row_bytes = to->kind == OG_INT4 ? (columns + 1) / 2 : columns;
  share((to->rows + lanes - 1) / lanes, 4, [&](int64_t first, int64_t last) {
    for (int64_t row = first * lanes; row < last * lanes; row += lanes) {
      const int64_t n = std::min(lanes, to->rows - row);
      if (n < lanes) clear(*to, lanes, row);
      for (int64_t k = 0; k < columns; k += 32)
        for (int64_t r = row; r < row + n; r++) {
          uint8_t v[32] = {0};
          const int width = (int)std::min<int64_t>(32, columns - k);
          const uint8_t *from = (const uint8_t *)q + r * row_bytes + (to->kind == OG_INT4 ? k / 2 : k);
          if (to->kind != OG_INT4) memcpy(v, from, width);
          else
            for (int i = 0; i < width; i++) v[i] = from[i / 2] >> (4 * (i % 2)) & 15;
          put_columns(to->kind, v, 32, lanes, place_of(*to, lanes, r, k / 32, 0).data);
        }
      for (int64_t r = row; r < row + n; r++)
        for (int64_t g = 0; g < groups; g++) {
          Place place = place_of(*to, lanes, r, 0, g);
          *place.scale = scale[r * groups + g];
          if (minimum) *place.minimum = minimum[r * groups + g];
        }
    }
  });
}

// Matrices of a GGUF file to the packed form, one after another. Pages of the file are given back behind them.
OG_API void og_pack_gguf(const OgGgufMatrix *matrices, int64_t n) {
  using namespace openglm;
  for (int64_t i = 0; i < n; i++) {
    const OgGgufMatrix &m = matrices[i];
    const Form &form = *form_of(m.type);
    pack_gguf(m, form);
    release(m.blocks, m.n_mapped);
  }
}

// 1 if all n values lie between -32 and 31, so that six bits hold them.
OG_API int og_fits_int6(const int8_t *q, int64_t n) {
  uint8_t beyond = 0;
  for (int64_t i = 0; i < n && !beyond; i += 4096)
    for (int64_t j = i; j < std::min(i + 4096, n); j++) beyond |= (uint8_t)(q[j] + 32) & 0xC0;
  return !beyond;
}

// Rows of a matrix as float32 (n, columns): `rows` names them, or NULL for first, first + 1, ...
OG_API void og_rows(const OgMatrix *w, const int64_t *rows, int64_t first, int64_t n, float *out) {
  using namespace openglm;
  share(n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) kernels()->gather(w, rows ? rows[i] : first + i, out + i * w->columns);
  });
}

// Blocks of a GGUF tensor to our form; 0 for a type that has none.
OG_API int og_unpack_gguf(const char *type, const uint8_t *data, int64_t n_blocks, uint8_t *q, uint16_t *scale,
                          uint16_t *minimum) {
  using namespace openglm;
  const Form *form = form_of(type);
  if (!form) return 0;
  const int64_t columns = form->columns, groups = form->groups;
  share(n_blocks, 4096, [&](int64_t begin, int64_t end) {
    uint8_t v[256];
    uint16_t unused[16];
    for (int64_t i = begin; i < end; i++) {
      uint8_t *to = form->kind == OG_INT4 ? v : q + i * columns;
      form->unpack(data + i * form->bytes, to, scale + i * groups, minimum ? minimum + i * groups : unused);
      if (form->kind == OG_INT4)
        for (int64_t j = 0; j < columns / 2; j++) q[i * columns / 2 + j] = (uint8_t)(v[2 * j] | v[2 * j + 1] << 4);
    }
  });
  return 1;
}
