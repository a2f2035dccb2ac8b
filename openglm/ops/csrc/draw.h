// Drawing tokens from rows of logits (draw.cpp).
#pragma once

#include "workspace.h"

namespace openglm {

// One token from each of some rows of logits, drawn by all threads together.
struct Draws {
  const OgStream *streams; // to whom the rows belong
  const float *logits;     // (n_rows, stride), of which the first n_ids count
  int64_t n_rows, stride, n_ids;
  int64_t *ids;     // (n_rows): -1 where the logits hold NaN or infinity
  double *logprobs; // (n_rows): under the model itself (nats)

  void reserve(Workspace &w) const; // memory, before the threads start; throws std::bad_alloc
  void run(int thread, Workspace &w) const; // inside of `parallel`
};

} // namespace openglm
