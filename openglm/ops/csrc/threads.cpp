// Threads that stay: see threads.h.
#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace openglm {
namespace {

// A wait spins this often (some 50 us, longer than threads differ in a phase), then lets others run between looks: a
// thread that shares its CPU with another program must not burn a time slice at every barrier. Workers without a job
// spin longer, over what Python needs between two tokens, and then sleep.
const int SPINS = 2000, IDLE_SPINS = 20000;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb"); // takes about as long as the pause of x86; `yield` takes no time
#endif
}

struct Pool {
  std::vector<std::thread> workers;
  std::mutex mutex, users;
  std::condition_variable wake;
  std::atomic<uint64_t> job{0};      // counts calls of `parallel`
  std::atomic<int> running{0}, waiting{0};
  std::atomic<uint64_t> phase{0};    // counts barriers passed
  struct alignas(64) Count { std::atomic<int64_t> taken[2] = {}; }; // of this phase, and the next one
  std::vector<Count> items{1};       // of each thread
  std::atomic<bool> stop{false};
  const std::function<void(int)> *work = nullptr;
  int n = 1;

  ~Pool() { resize(1); }

  void resize(int wanted) {
    stop = true;
    { std::lock_guard<std::mutex> lock(mutex); job.fetch_add(1); }
    wake.notify_all();
    for (auto &worker : workers) worker.join();
    workers.clear();
    stop = false;
    n = wanted;
    items = std::vector<Count>(n);
    uint64_t seen = job.load();
    for (int i = 1; i < n; i++) workers.emplace_back([this, i, seen] { serve(i, seen); });
  }

  void serve(int index, uint64_t seen) {
    while (true) {
      for (int i = 0; i < IDLE_SPINS && job.load(std::memory_order_acquire) == seen; i++) pause();
      if (job.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return job.load() != seen; });
      }
      seen++;
      if (stop) return;
      (*work)(index);
      running.fetch_sub(1, std::memory_order_release);
    }
  }

  void run(const std::function<void(int)> &f) {
    std::lock_guard<std::mutex> one_at_a_time(users);
    if (n == 1) {
      f(0);
      reset(0), reset(1);
      return;
    }
    work = &f;
    running = n - 1;
    { std::lock_guard<std::mutex> lock(mutex); job.fetch_add(1, std::memory_order_release); }
    wake.notify_all();
    f(0);
    for (int i = 0; running.load(std::memory_order_acquire); i++) i < SPINS ? pause() : std::this_thread::yield();
    reset(0), reset(1);
  }

  void reset(uint64_t of_phase) {
    for (Count &count : items) count.taken[of_phase & 1].store(0, std::memory_order_relaxed);
  }

  void barrier() {
    uint64_t mine = phase.load(std::memory_order_acquire);
    if (n == 1) {
      reset(mine);
      phase = mine + 1;
      return;
    }
    if (waiting.fetch_add(1, std::memory_order_acq_rel) == n - 1) {
      waiting.store(0, std::memory_order_relaxed);
      reset(mine); // whoever is in the next phase counts on the other
      phase.store(mine + 1, std::memory_order_release);
      return;
    }
    for (int i = 0; phase.load(std::memory_order_acquire) == mine; i++) i < SPINS ? pause() : std::this_thread::yield();
  }
};

Pool *current = nullptr;

Pool &pool() { return *current; }

// The pool of this process: never destroyed, since workers may outlive main(); made anew after a fork, which leaves
// the threads behind.
Pool &of_process() {
#if !defined(_WIN32)
  static pid_t owner = 0;
  if (owner != getpid()) {
    owner = getpid();
    int n = current ? current->n : 1;
    current = new Pool;
    current->resize(n);
  }
#else
  if (!current) current = new Pool;
#endif
  return *current;
}

} // namespace

int n_threads() { return of_process().n; }
void set_threads(int n) {
  Pool &p = of_process();
  std::lock_guard<std::mutex> one_at_a_time(p.users);
  if (n != p.n) p.resize(n);
}
void parallel(const std::function<void(int)> &work) { of_process().run(work); }
void barrier() { pool().barrier(); }
int64_t take(int64_t step, int of_thread) {
  Pool &p = pool();
  auto &taken = p.items[of_thread].taken[p.phase.load(std::memory_order_relaxed) & 1];
  return taken.fetch_add(step, std::memory_order_relaxed);
}

} // namespace openglm
