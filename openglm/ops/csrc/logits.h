// What drawing a token does with a whole row of logits, over the vectors of simd.h.
#pragma once

#include <float.h>

#include "kernels.h"

namespace {

// Index of the largest number, of equal ones the first; -1 where one is NaN or +infinity.
template <class S> int64_t largest(const float *x, int64_t n) {
  const int64_t RUN = 1024, whole = n / S::lanes * S::lanes;
  typename S::F odd = S::zero(); // becomes NaN with NaN and infinity; -infinity is allowed
  int64_t run = 0;
  float most = -INFINITY;
  for (int64_t first = 0; first < whole; first += RUN) {
    const int64_t end = whole - first < RUN ? whole : first + RUN;
    typename S::F top = S::set(-INFINITY);
    for (int64_t i = first; i < end; i += S::lanes) {
      typename S::F v = S::max(S::set(-FLT_MAX), S::load(x + i)); // of the two, a NaN is the second one and stays
      top = S::max(top, v);
      odd = S::fma(v, S::zero(), odd);
    }
    if (S::top(top) > most) most = S::top(top), run = first;
  }
  if (S::sum(odd) != 0.0f) return -1;
  int64_t best = n;
  for (int64_t i = run; i < whole && best == n; i++)
    if (x[i] >= most) best = i;
  if (best == n) best = 0; // nothing but -infinity, or less than a vector
  for (int64_t i = whole; i < n; i++) {
    if (x[i] - x[i] != 0.0f && x[i] != -INFINITY) return -1;
    if (x[i] > x[best]) best = i;
  }
  return best;
}

// exp(factor * (x - peak)), peak being the largest; 0 where that is as good as 0. Returns their sum. n: some hundreds.
template <class S> double likeliness(const float *x, int64_t n, float peak, float factor, float *out) {
  const typename S::F least = S::set(1.22e-38f); // what `exponential` gives for anything smaller
  typename S::F sum = S::zero();
  int64_t i = 0;
  for (; i + S::lanes <= n; i += S::lanes) {
    typename S::F y = exponential<S>(S::mul(S::sub(S::load(x + i), S::set(peak)), S::set(factor)));
    y = S::max(S::sub(y, least), S::zero());
    S::store(out + i, y);
    sum = S::add(sum, y);
  }
  double total = S::sum(sum);
  for (; i < n; i++) total += out[i] = expf((x[i] - peak) * factor);
  return total;
}

} // namespace
