// Memory of forward passes (forward.cpp), kept from one to the next.
#pragma once

#include <stdint.h>

#include <memory>
#include <vector>

#include "openglm.h"

namespace openglm {

const OgKernels *kernels(); // dispatch.cpp

struct Buffer { // grows, is never cleared; lines of the cache are not shared with others
  std::unique_ptr<char[]> memory;
  size_t size = 0;
  template <class T> T *get(int64_t n) {
    size_t wanted = n * sizeof(T) + 128;
    if (wanted > size) {
      memory.reset(new char[wanted]);
      size = wanted;
    }
    return (T *)(((uintptr_t)memory.get() + 63) / 64 * 64);
  }
};

struct Quantised { // activations of one input, with their memory
  Buffer q, scale, sums, minus;
  OgActivations of(int64_t tokens, int64_t columns) {
    const int64_t tile = kernels()->tokens, blocks = (columns + 31) / 32;
    const int64_t n = (tokens + tile - 1) / tile * tile * blocks;
    return {q.get<int8_t>(n * 32), scale.get<float>(n), sums.get<float>(n), minus.get<int32_t>(3 * n), blocks};
  }
};

struct Drawing { // of a token (draw.cpp)
  Buffer weights, sums, tokens;
};

struct Mine { // what each thread has for itself
  Buffer x, scratch, gate;
  Quantised activations;
  Drawing drawing;
};

struct Workspace {
  Buffer h, x, qkv, attended, middle, y, cosines, sines, wide, segments, unfinished, logits, bests, masses;
  Quantised activations, activations_ffn;
  std::vector<Mine> mine;
};

} // namespace openglm
