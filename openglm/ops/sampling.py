"""Drawing one token from logits: temperature, top-k, top-p, min-p. Knows tensors only, keeps no state.

`pick` draws from one row on the CPU without sorting the vocabulary. It takes its random number as an argument, and
`uniform` makes these from a seed and a position alone: a draw can be repeated, and what one request draws depends on no
other.

    python -m pytest -q tests/test_sampling.py
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openglm.ops import native

__all__ = ["GREEDY_BELOW", "largest", "log_normaliser", "pick", "splitmix64", "uniform"]

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Ids = np.ndarray[Any, np.dtype[np.int64]]

GREEDY_BELOW = 1e-5  # a smaller temperature would overflow float32 and pick the arg-max anyway
_LIKELY = 1e-4  # share of the mass above which a token is looked at first: there are at most 10,000 such tokens
_CHUNK = 512
# Elements that PyTorch works on with one thread. Its other threads spin for a while after their work, on the CPUs that
# the native library's need for the next pass.
_ONE_THREAD = 16384
_LOG2E = math.log2(math.e)
_MASK64 = 2**64 - 1


def splitmix64(state: int) -> int:
    """The output that follows a state of the generator SplitMix64 (Steele, Lea and Flood 2014), 64 bits."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def uniform(seed: int, n: int) -> float:
    """Number n of the stream of a seed, in [0, 1). Equal on every machine; streams of different seeds are unrelated."""
    state = splitmix64(seed & _MASK64) + n * 0x9E3779B97F4A7C15
    return (splitmix64(state & _MASK64) >> 11) * 2.0**-53


def log_normaliser(row: Tensor, peak: float) -> float:
    """log of the summed exp (nats). row: (V,) float32 on the CPU; peak: its maximum. NaN unless that is finite."""
    if not math.isfinite(peak):
        return math.nan
    if (summed := native.sum_exp(row, peak)) is not None:
        return peak + math.log(summed)
    # exp2 is nearly twice as fast as exp. The shift is a float32, so that the sum knows it exactly.
    shift = float(np.float32(peak * _LOG2E))
    offset, total = torch.tensor(-shift), 0.0
    for part in row.split(_ONE_THREAD):
        total += float(torch.add(offset, part, alpha=_LOG2E).exp2_().sum())
    return (shift + math.log2(total)) / _LOG2E if total > 0.0 else math.nan


def largest(values: Floats, n: int, likely: float) -> Ids:
    """Indices of the n largest values, largest first, of equal ones the lower index first. values: (V,), no NaN.

    likely: a guess; when n values lie above it the rest need not be ordered.
    """
    if n >= len(values):
        return np.argsort(-values, kind="stable")
    ids = np.flatnonzero(values > likely)
    if len(ids) < n:
        ids = np.flatnonzero(values >= np.partition(values, len(values) - n)[len(values) - n])
    return ids[np.argsort(-values[ids], kind="stable")][:n]


def pick(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """One id. row: (V,) float32 on the CPU, -inf = impossible, some value finite; u: a number in [0, 1).

    The filters apply in the order temperature, top-k, top-p (of what top-k left), min-p (relative to the likeliest
    token); top_k 0, top_p 1 and min_p 0 switch one off. Of equally likely tokens the lower id comes first.
    """
    logits = row.numpy()
    if temperature < GREEDY_BELOW:
        return int(logits.argmax())
    if (drawn := native.pick(row, temperature, top_k, top_p, min_p, u)) is not None:
        return drawn
    weights = (row - float(logits.max())).mul_(_LOG2E / temperature).exp2_()
    likeliness = weights.numpy()  # relative to the likeliest token
    if top_k == 0 and top_p >= 1.0 and min_p == 0.0:
        return _pick_any(likeliness, u)
    total = float(weights.sum())
    if top_k:
        ids = largest(likeliness, top_k, total * _LIKELY)
    else:
        ids = _shortlist(likeliness, total, top_p, min_p)
        if top_p < 1.0:
            ids = ids[np.argsort(-likeliness[ids], kind="stable")]
    kept = likeliness[ids].astype(np.float64)
    if top_p < 1.0:
        before = kept.cumsum() - kept
        kept = kept[before < top_p * (float(kept.sum()) if top_k else total)]
    if min_p > 0.0:
        passes = kept >= min_p
        ids, kept = ids[: len(kept)][passes], kept[passes]
    return int(ids[_place(kept, u)])


def _shortlist(likeliness: Floats, total: float, top_p: float, min_p: float) -> Ids:
    """Ids, upwards, of all tokens that top-p and min-p may keep."""
    if top_p >= 1.0:
        return np.flatnonzero(likeliness >= min_p)
    likely = max(min_p, total * _LIKELY)
    ids = np.flatnonzero(likeliness >= likely)
    if likely > min_p and float(likeliness[ids].sum(dtype=np.float64)) < top_p * total:
        # All tokens below this bound together have less than what top-p leaves out (half: for rounding).
        bound = 0.5 * (1.0 - top_p) * total / len(likeliness)
        ids = np.flatnonzero(likeliness >= max(min_p, bound))
    return ids


def _pick_any(likeliness: Floats, u: float) -> int:
    """From the whole vocabulary, found through sums of chunks."""
    starts = np.arange(0, len(likeliness), _CHUNK)
    sums = np.add.reduceat(likeliness, starts).astype(np.float64)
    chunk = _place(sums, u)
    start = int(starts[chunk])
    kept = likeliness[start : start + _CHUNK].astype(np.float64)
    rest = (u * float(sums.sum()) - float(sums[:chunk].sum())) / float(sums[chunk])
    return start + _place(kept, min(max(rest, 0.0), 1.0))


def _place(mass: Floats, u: float) -> int:
    """The first place whose cumulated mass exceeds u of the total; one of mass zero is never the first."""
    total = mass.cumsum()
    below = min(u * total[-1], np.nextafter(total[-1], 0.0))
    return int(np.searchsorted(total, below, side="right"))
