// Weights on their way in: blocks of GGUF files to our form, our form to the packed one, and back to floats.
//
// Our form (openglm/ops/quant.py): INT4 two columns to a byte, the even one low; INT8 a signed byte; float16 scales and
// minimums (rows, groups). Packed: for each block of `lanes` rows and 32 columns, eight quads of columns, each holding
// four neighbouring columns of every row in turn, so that one load feeds a dot product of all rows. INT4 keeps two
// quads in one run of bytes, the even one low. INT6 (INT8 that only uses -32 to 31) adds two runs with the upper two
// bits of four quads each.
#include <string.h>

#include <algorithm>

#include "openglm.h"
#include "simd.h"
#include "threads.h"

namespace openglm {
const OgKernels *kernels();

namespace {

// Items 0 .. n dealt out to all threads in runs.
template <class Work> void share(int64_t n, int64_t step, const Work &work) {
  parallel([&](int) {
    for (int64_t i = take(step); i < n; i = take(step)) work(i, std::min(i + step, n));
  });
}

inline uint32_t spread(uint32_t nibbles) { // four nibbles to four bytes
  nibbles = (nibbles | nibbles << 8) & 0x00FF00FF;
  return (nibbles | nibbles << 4) & 0x0F0F0F0F;
}

void pack_row(int kind, const uint8_t *q, int64_t columns, int64_t lanes, int64_t lane, uint8_t *out) {
  const int64_t run = 4 * lanes, bytes = (kind == OG_INT4 ? 4 : kind == OG_INT6 ? 6 : 8) * run;
  for (int64_t k = 0; k < columns; k += 32, out += bytes) {
    uint8_t v[32] = {0}, *to = out + 4 * lane;
    int64_t n = std::min<int64_t>(32, columns - k);
    if (kind == OG_INT4 && n == 32) { // eight columns, four bytes, at a time
      for (int j = 0; j < 4; j++) {
        uint32_t eight, packed;
        memcpy(&eight, q + k / 2 + 4 * j, 4);
        packed = spread(eight & 0xFFFF) | spread(eight >> 16) << 4;
        memcpy(to + j * run, &packed, 4);
      }
      continue;
    }
    if (kind == OG_INT4)
      for (int64_t i = 0; i < n; i++) v[i] = q[(k + i) / 2] >> (4 * ((k + i) % 2)) & 15;
    else
      for (int64_t i = 0; i < n; i++) v[i] = kind == OG_INT6 ? (uint8_t)(q[k + i] + 32) : q[k + i];
    for (int j = 0; j < 8; j++) {
      if (kind == OG_INT8) memcpy(to + j * run, v + 4 * j, 4);
      else if (j % 2 == 0)
        for (int i = 0; i < 4; i++) to[j / 2 * run + i] = (uint8_t)((v[4 * j + i] & 15) | (v[4 * j + 4 + i] & 15) << 4);
    }
    if (kind == OG_INT6)
      for (int h = 0; h < 2; h++)
        for (int i = 0; i < 4; i++) {
          const uint8_t *u = v + 16 * h + i;
          to[(4 + h) * run + i] = (uint8_t)(u[0] >> 4 | u[4] >> 4 << 2 | u[8] >> 4 << 4 | u[12] >> 4 << 6);
        }
  }
}

void pack_scales(const uint16_t *from, int64_t rows, int64_t row, int64_t groups, int64_t lanes, uint16_t *to) {
  for (int64_t g = 0; g < groups; g++)
    for (int64_t r = 0; r < lanes; r++) to[g * lanes + r] = row + r < rows ? from[(row + r) * groups + g] : 0;
}

// ---------------------------------------------------------------- GGUF blocks to our form

inline float half(const uint8_t *p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return half_to_float(h);
}

// GGUF keeps 2n columns in n bytes, the first n in the low halves; ours are neighbours.
inline void neighbours(const uint8_t *from, int n, uint8_t *to) {
  for (int i = 0; i < n; i += 2) {
    to[i / 2] = (uint8_t)((from[i] & 15) | (from[i + 1] & 15) << 4);
    to[(n + i) / 2] = (uint8_t)(from[i] >> 4 | (from[i + 1] & 0xF0));
  }
}

inline void scale_min(const uint8_t *s, int i, int *scale, int *minimum) { // six bits each of eight
  if (i < 4) {
    *scale = s[i] & 63;
    *minimum = s[i + 4] & 63;
  } else {
    *scale = (s[i + 4] & 15) | (s[i - 4] >> 6) << 4;
    *minimum = s[i + 4] >> 4 | (s[i] >> 6) << 4;
  }
}

struct Form {
  const char *name;
  int columns, bytes, groups; // of one block
  void (*unpack)(const uint8_t *b, uint8_t *q, uint16_t *scale, uint16_t *minimum);
};

const Form FORMS[] = {
    {"Q4_0", 32, 18, 1, [](const uint8_t *b, uint8_t *q, uint16_t *s, uint16_t *) {
       memcpy(s, b, 2);
       neighbours(b + 2, 16, q);
     }},
    {"Q4_1", 32, 20, 1, [](const uint8_t *b, uint8_t *q, uint16_t *s, uint16_t *m) {
       memcpy(s, b, 2);
       memcpy(m, b + 2, 2);
       neighbours(b + 4, 16, q);
     }},
    {"Q8_0", 32, 34, 1, [](const uint8_t *b, uint8_t *q, uint16_t *s, uint16_t *) {
       memcpy(s, b, 2);
       memcpy(q, b + 2, 32);
     }},
    {"Q5_0", 32, 22, 1, [](const uint8_t *b, uint8_t *q, uint16_t *s, uint16_t *) {
       uint32_t fifth;
       memcpy(s, b, 2);
       memcpy(&fifth, b + 2, 4);
       for (int i = 0; i < 16; i++) {
         q[i] = (uint8_t)(((b[6 + i] & 15) | (fifth >> i & 1) << 4) - 16);
         q[16 + i] = (uint8_t)((b[6 + i] >> 4 | (fifth >> (16 + i) & 1) << 4) - 16);
       }
     }},
    {"Q4_K", 256, 144, 8, [](const uint8_t *b, uint8_t *q, uint16_t *s, uint16_t *m) {
       float d = half(b), lowest = half(b + 2);
       for (int i = 0; i < 8; i++) {
         int scale, minimum;
         scale_min(b + 4, i, &scale, &minimum);
         s[i] = float_to_half(d * (float)scale);
         m[i] = float_to_half(-lowest * (float)minimum);
       }
       for (int i = 0; i < 4; i++) neighbours(b + 16 + 32 * i, 32, q + 32 * i);
     }},
    {"Q6_K", 256, 210, 16, [](const uint8_t *b, uint8_t *q, uint16_t *s, uint16_t *) {
       float d = half(b + 208);
       for (int i = 0; i < 16; i++) s[i] = float_to_half(d * (float)(int8_t)b[192 + i]);
       for (int n = 0; n < 2; n++)
         for (int i = 0; i < 32; i++) {
           uint8_t h = b[128 + 32 * n + i], a = b[64 * n + i], c = b[64 * n + 32 + i], *to = q + 128 * n + i;
           to[0] = (uint8_t)(((a & 15) | (h & 3) << 4) - 32);
           to[32] = (uint8_t)(((c & 15) | (h >> 2 & 3) << 4) - 32);
           to[64] = (uint8_t)((a >> 4 | (h >> 4 & 3) << 4) - 32);
           to[96] = (uint8_t)((c >> 4 | (h >> 6) << 4) - 32);
         }
     }},
};

} // namespace
} // namespace openglm

// A matrix in our form (rows, columns) to the packed one. q: the values; `to` says kind, group and where it goes.
OG_API void og_pack(const OgMatrix *to, const void *q, const uint16_t *scale, const uint16_t *minimum) {
  using namespace openglm;
  const int64_t lanes = kernels()->lanes, blocks = (to->columns + 31) / 32;
  const int64_t groups = (to->columns + to->group - 1) / to->group;
  const int64_t bytes = (to->kind == OG_INT4 ? 16 : to->kind == OG_INT6 ? 24 : 32) * lanes * blocks;
  const int64_t row_bytes = to->kind == OG_INT4 ? (to->columns + 1) / 2 : to->columns;
  share((to->rows + lanes - 1) / lanes, 8, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
      uint8_t *out = (uint8_t *)to->data + b * bytes;
      if ((b + 1) * lanes > to->rows) memset(out, 0, bytes);
      for (int64_t r = 0; r < lanes && b * lanes + r < to->rows; r++)
        pack_row(to->kind, (const uint8_t *)q + (b * lanes + r) * row_bytes, to->columns, lanes, r, out);
      pack_scales(scale, to->rows, b * lanes, groups, lanes, (uint16_t *)to->scale + b * groups * lanes);
      if (minimum)
        pack_scales(minimum, to->rows, b * lanes, groups, lanes, (uint16_t *)to->minimum + b * groups * lanes);
    }
  });
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
  for (const Form &form : FORMS) {
    if (strcmp(form.name, type)) continue;
    const int64_t q_bytes = type[1] == '4' ? form.columns / 2 : form.columns;
    share(n_blocks, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        form.unpack(data + i * form.bytes, q + i * q_bytes, scale + i * form.groups,
                    minimum ? minimum + i * form.groups : nullptr);
    });
    return 1;
  }
  return 0;
}
