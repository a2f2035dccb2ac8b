// The library's own threads. `parallel(work)` runs work(thread) once on every thread, the caller being thread 0; inside,
// `barrier()` waits for all. Waiting threads spin for a while, since a token step is made of waits of microseconds.
#pragma once

#include <stdint.h>

#include <functional>

namespace openglm {

int n_threads();
void set_threads(int n); // not while `parallel` runs
void parallel(const std::function<void(int)> &work);
void barrier();
// The next `step` items of the phase; every phase ends with a barrier, which resets it. Each thread has items of its
// own, so that all can begin with theirs and go on with those of others.
int64_t take(int64_t step, int of_thread = 0);

} // namespace openglm
