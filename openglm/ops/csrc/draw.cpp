// Drawing one token from a row of logits: temperature, top-k, top-p, min-p, random numbers from a seed.
// openglm/ops/sampling.py defines all of it and is the reference.
#include "draw.h"
#include "threads.h"

#include <algorithm>
#include <cmath>

namespace openglm {
namespace {

const int64_t PART = 8192;       // numbers of a row that a thread takes at once
const int64_t RUN = 512;         // numbers of a row whose sum is known
const double LIKELY = 1e-4;      // share of the mass above which tokens are looked at first
const double GREEDY_BELOW = 1e-5; // temperature
const uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

struct Token {
  float weight; // relative to the likeliest
  int32_t id;
};

uint64_t splitmix64(uint64_t state) {
  uint64_t z = state + GOLDEN;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

double uniform(uint64_t seed, int64_t number) {
  return (double)(splitmix64(splitmix64(seed) + (uint64_t)number * GOLDEN) >> 11) * 0x1p-53;
}

// The first of n places whose cumulated mass exceeds u of the total; one of mass zero is never the first.
template <class Mass> int64_t place(int64_t n, double u, const Mass &mass) {
  double total = 0.0, sum = 0.0;
  for (int64_t i = 0; i < n; i++) total += mass(i);
  const double below = std::min(u * total, std::nextafter(total, 0.0));
  for (int64_t i = 0; i < n; i++)
    if ((sum += mass(i)) > below) return i;
  return n - 1;
}

// One row's weights, with their sums by runs; and the tokens that are looked at.
struct Row {
  const int64_t n, n_runs;
  float *weights;
  double *sums, total = 0.0;
  Token *tokens;
  int64_t n_tokens = 0;

  Row(const float *x, int64_t n, float peak, double temperature, Drawing &d)
      : n(n), n_runs((n + RUN - 1) / RUN), weights(d.weights.get<float>(n)), sums(d.sums.get<double>(n_runs)),
        tokens(d.tokens.get<Token>(n)) {
    for (int64_t r = 0; r < n_runs; r++) {
      const int64_t at = r * RUN;
      sums[r] = kernels()->likeliness(x + at, std::min(RUN, n - at), peak, (float)(1.0 / temperature), weights + at);
      total += sums[r];
    }
  }

  double collect(double least) { // all tokens that are at least so likely, in the order of their ids; their mass
    double mass = 0.0;
    n_tokens = 0;
    for (int64_t r = 0; r < n_runs; r++) {
      if (sums[r] < least) continue;
      for (int64_t i = r * RUN; i < std::min(n, (r + 1) * RUN); i++)
        if (weights[i] >= least) tokens[n_tokens++] = {weights[i], (int32_t)i}, mass += weights[i];
    }
    return mass;
  }

  void sort(int64_t most) { // the `most` likeliest, likeliest first
    auto before = [](const Token &a, const Token &b) {
      return a.weight > b.weight || (a.weight == b.weight && a.id < b.id);
    };
    if (most < n_tokens) std::nth_element(tokens, tokens + most, tokens + n_tokens, before);
    n_tokens = std::min(n_tokens, most);
    std::sort(tokens, tokens + n_tokens, before);
  }

  int64_t any(double u) const { // from the whole vocabulary, found through the runs
    const int64_t r = place(n_runs, u, [&](int64_t i) { return sums[i]; });
    double before = 0.0;
    for (int64_t i = 0; i < r; i++) before += sums[i];
    const double rest = std::min(std::max((u * total - before) / sums[r], 0.0), 1.0);
    const float *run = weights + r * RUN;
    return r * RUN + place(std::min(RUN, n - r * RUN), rest, [&](int64_t i) { return (double)run[i]; });
  }

  int64_t filtered(const OgSampling &s, double u) {
    if (s.top_k) {
      double least = total * LIKELY;
      for (collect(least); n_tokens < s.top_k && least > 0.0; collect(least))
        least = least > 1e-20 ? least * 1e-3 : 0.0;
      sort(s.top_k);
    } else if (s.top_p >= 1.0) {
      collect(s.min_p);
    } else {
      const double likely = std::max(s.min_p, total * LIKELY);
      // All tokens below the second bound together have less than what top-p leaves out (half: for rounding).
      if (collect(likely) < s.top_p * total && likely > s.min_p)
        collect(std::max(s.min_p, 0.5 * (1.0 - s.top_p) * total / (double)n));
      sort(n_tokens);
    }
    if (s.top_p < 1.0) {
      double mass = total, sum = 0.0;
      if (s.top_k) {
        mass = 0.0;
        for (int64_t i = 0; i < n_tokens; i++) mass += tokens[i].weight;
      }
      int64_t kept = 0;
      for (; kept < n_tokens && sum < s.top_p * mass; kept++) sum += tokens[kept].weight;
      n_tokens = kept;
    }
    if (s.min_p > 0.0) {
      auto unlikely = [&](const Token &t) { return t.weight < s.min_p; };
      n_tokens = std::remove_if(tokens, tokens + n_tokens, unlikely) - tokens;
    }
    return tokens[place(n_tokens, u, [&](int64_t i) { return (double)tokens[i].weight; })].id;
  }
};

// best: index of the largest, which is finite.
int64_t pick(const float *x, int64_t n, int64_t best, const OgSampling &s, double u, Drawing &d) {
  if (s.temperature < GREEDY_BELOW) return best;
  Row row(x, n, x[best], s.temperature, d);
  return s.top_k == 0 && s.top_p >= 1.0 && s.min_p == 0.0 ? row.any(u) : row.filtered(s, u);
}

void reserve_for(Drawing &d, int64_t n) {
  d.weights.get<float>(n), d.sums.get<double>(n / RUN + 1), d.tokens.get<Token>(n);
}

int64_t n_parts(int64_t n) { return (n + PART - 1) / PART; }

// Index of the largest number of a row, of equal ones the first; -1 where there is none, or NaN or infinity.
int64_t largest_of(const float *x, int64_t n, const int64_t *of_parts) {
  int64_t best = 0;
  for (int64_t p = 0; p < n_parts(n); p++) {
    if (of_parts[p] < 0) return -1;
    if (x[of_parts[p]] > x[best]) best = of_parts[p];
  }
  return x[best] == -INFINITY ? -1 : best;
}

int64_t largest_of_part(const float *x, int64_t n, int64_t part) {
  const int64_t found = kernels()->largest(x + part * PART, std::min(PART, n - part * PART));
  return found < 0 ? -1 : part * PART + found;
}

double mass_of_part(const float *x, int64_t n, int64_t part, float peak) {
  return kernels()->sum_exp(x + part * PART, std::min(PART, n - part * PART), peak);
}

} // namespace

void Draws::reserve(Workspace &w) const {
  w.bests.get<int64_t>(n_rows * n_parts(n_ids)), w.masses.get<double>(n_rows * n_parts(n_ids));
  w.mine.resize(n_threads());
  for (Mine &mine : w.mine) reserve_for(mine.drawing, n_ids);
}

void Draws::run(int thread, Workspace &w) const {
  const int64_t parts = n_parts(n_ids);
  int64_t *bests = w.bests.get<int64_t>(0);
  double *masses = w.masses.get<double>(0);
  for (int64_t at = take(1); at < n_rows * parts; at = take(1))
    bests[at] = largest_of_part(logits + at / parts * stride, n_ids, at % parts);
  barrier();
  for (int64_t at = take(1); at < n_rows * parts; at = take(1)) {
    const float *x = logits + at / parts * stride;
    const int64_t best = largest_of(x, n_ids, bests + at / parts * parts);
    masses[at] = best < 0 ? NAN : mass_of_part(x, n_ids, at % parts, x[best]);
  }
  barrier();
  for (int64_t i = take(1); i < n_rows; i = take(1)) {
    const float *x = logits + i * stride;
    const OgStream &s = streams[i];
    const int64_t best = largest_of(x, n_ids, bests + i * parts);
    double mass = 0.0;
    for (int64_t p = 0; p < parts; p++) mass += masses[i * parts + p];
    ids[i] = best;
    if (best >= 0 && s.sampling.temperature >= GREEDY_BELOW)
      ids[i] = pick(x, n_ids, best, s.sampling, uniform(s.sampling.seed, s.n_drawn), w.mine[thread].drawing);
    logprobs[i] = best < 0 ? NAN : x[ids[i]] - (x[best] + std::log(mass));
  }
}

} // namespace openglm

// Sum of exp(x - peak) over n numbers, peak being the largest.
OG_API double og_sum_exp(const float *x, int64_t n, float peak) {
  double mass = 0.0;
  for (int64_t p = 0; p < openglm::n_parts(n); p++) mass += openglm::mass_of_part(x, n, p, peak);
  return mass;
}

// One token of a row of logits, *u being a number in [0, 1). -1: NaN, infinity or nothing possible; -2: no memory.
OG_API int64_t og_pick(const float *row, int64_t n, const OgSampling *sampling, const double *u) {
  using namespace openglm;
  static thread_local Drawing drawing;
  const int64_t best = kernels()->largest(row, n);
  if (best < 0 || row[best] == -INFINITY) return -1;
  try {
    reserve_for(drawing, n);
  } catch (const std::bad_alloc &) {
    return -2;
  }
  return pick(row, n, best, *sampling, *u, drawing);
}
