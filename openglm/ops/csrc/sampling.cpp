// What decoding asks of a row of logits: the likeliest token and the log of the sum of exponentials, in one pass.
#include <math.h>

#include "openglm.h"

// For each of n rows of `size` float32 logits, `stride` apart: the first index of the largest, and log(sum(exp)). A NaN
// anywhere makes the latter NaN.
OG_API void og_greedy(const float *logits, int64_t n, int64_t size, int64_t stride, int64_t *best, float *log_total) {
  for (int64_t row = 0; row < n; row++) {
    const float *x = logits + row * stride;
    float top = x[0];
    for (int64_t i = 1; i < size; i++) top = x[i] > top ? x[i] : top;
    int64_t at = 0;
    while (at < size - 1 && x[at] != top) at++;
    double total = 0.0;
    for (int64_t i = 0; i < size; i++) {
      float d = x[i] - top;
      if (!(d < -30.0f)) total += exp((double)d);
    }
    best[row] = at;
    log_total[row] = (float)((double)top + log(total));
  }
}
