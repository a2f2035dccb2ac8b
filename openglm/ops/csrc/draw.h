// Drawing tokens from rows of logits (draw.cpp).
#pragma once

#include "workspace.h"

namespace openglm {

struct Drawn {
  int64_t id;     // -1: the logits hold NaN or infinity
  double logprob; // under the model itself (nats)
};

void reserve(Drawing &d, int64_t n); // memory for rows of n numbers; throws std::bad_alloc
Drawn draw(const float *row, int64_t n, const OgSampling &s, int64_t number, Drawing &d);

} // namespace openglm
