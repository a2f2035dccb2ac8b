// Several steps of decoding in one call: run the last token of every request, draw the next one, and again, until
// something needs the caller: a request has come to its end, or time is up.
#include <algorithm>
#include <chrono>
#include <new>

#include "draw.h"
#include "threads.h"

namespace openglm {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Burst {
  const OgModel &model;
  const OgPool &pool;
  const OgBurst &b;
  Workspace &w;
  std::vector<OgStream> streams; // where each request stands
  std::vector<OgChunk> chunks;
  std::vector<int64_t> ids, positions;
  std::vector<int32_t> outputs;

  Burst(const OgModel &model, const OgPool &pool, const OgBurst &b, Workspace &w)
      : model(model), pool(pool), b(b), w(w), streams(b.streams, b.streams + b.n_streams), chunks(b.n_streams),
        ids(b.n_streams), positions(b.n_streams * std::max(model.axes, 2)), outputs(b.n_streams) {
    w.logits.get<float>((int64_t)b.n_streams * model.vocab_size);
    draws(0).reserve(w);
  }

  bool forward() {
    const int32_t n = b.n_streams;
    for (int32_t i = 0; i < n; i++) {
      const OgStream &s = streams[i];
      chunks[i] = {1, s.start, 0, s.pages};
      ids[i] = s.id;
      outputs[i] = i;
      for (int32_t axis = 0; axis < s.axes; axis++) positions[axis * n + i] = s.positions[axis * s.stride];
    }
    const OgBatch batch = {n, n, n, ids.data(), positions.data(), chunks.data(), outputs.data(),
                           w.logits.get<float>(0)};
    return og_forward(&model, &pool, &batch, &w);
  }

  Draws draws(int64_t step) const {
    const int64_t n = b.n_streams;
    float *logits = w.logits.get<float>(0);
    return {streams.data(), logits, n, model.vocab_size, b.n_ids, b.ids + step * n, b.logprobs + step * n};
  }

  bool move_on(int64_t step) { // false: someone has come to its end
    bool all = true;
    for (int32_t i = 0; i < b.n_streams; i++) {
      OgStream &s = streams[i];
      s.id = b.ids[step * b.n_streams + i];
      s.start++, s.positions++, s.n_drawn++;
      all = all && s.id >= 0 && std::find(s.stop_ids, s.stop_ids + s.n_stop_ids, s.id) == s.stop_ids + s.n_stop_ids;
    }
    return all;
  }

  int64_t run() {
    const double start = now();
    for (int64_t step = 0; step < b.n_steps; step++) {
      if (!forward()) return step;
      parallel([&, draws = draws(step)](int thread) { draws.run(thread, w); });
      const double passed = b.seconds[step] = now() - start;
      const bool time_for_another = passed + passed / (double)(step + 1) <= b.most_seconds;
      if (!move_on(step) || !time_for_another || *(const volatile int32_t *)b.wanted) return step + 1;
    }
    return b.n_steps;
  }
};

} // namespace
} // namespace openglm

// Number of steps that were run; 0 where there is no memory for one, and nothing was computed.
OG_API int64_t og_decode(const OgModel *model, const OgPool *pool, const OgBurst *burst, void *workspace) {
  using namespace openglm;
  try {
    return Burst(*model, *pool, *burst, *(Workspace *)workspace).run();
  } catch (const std::bad_alloc &) {
    return 0;
  }
}
