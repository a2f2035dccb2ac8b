"""N-gram language models over token ids: interpolated modified Kneser-Ney of any order, in numpy.

    python -m pytest tests/test_ngram.py

The baseline of bench/nano.py. Chen and Goodman (1999), "An empirical study of smoothing techniques for language
modeling", section 3: three discounts per order, continuation counts below the highest order. A segment starts behind
a begin mark, which is context but never predicted; n-grams that start with it keep their plain counts, as in KenLM.

An n-gram is named by one integer: (number of its first n-1 tokens) * (vocabulary + 1) + its last token. The sorted
keys of each order are the model; a look-up is one binary search per order, done for all positions at once. Ten million
tokens of a 16k vocabulary take about half a minute and well under 2 GB at order 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["KneserNey"]

IntArray = NDArray[np.int64]
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # where counts of counts are missing, as in KenLM; unseen in large corpora


@dataclass(frozen=True)
class _Level:
    """One order n. keys (G,) int64 sorted names of its n-grams; values (G,) float64 discounted probabilities;
    backoff (contexts,) float64 weight of the lower order for each (n-1)-gram, 1 where it was never a context."""

    keys: IntArray
    values: NDArray[np.float64]
    backoff: NDArray[np.float64]

    def find(self, prefixes: IntArray, tokens: IntArray, base: int) -> IntArray:
        """Numbers of the n-grams (prefix, token), -1 where there is none. Prefix -1 stands for an unknown one."""
        names = prefixes * base + tokens
        at = np.minimum(np.searchsorted(self.keys, names), max(len(self.keys) - 1, 0))
        found = (prefixes >= 0) & (self.keys[at] == names) if len(self.keys) else np.zeros(len(names), np.bool_)
        return np.where(found, at, -1)


class KneserNey:
    """p(token | up to order-1 tokens before it); order 1 is the unigram model. Made by `train`."""

    def __init__(self, vocab_size: int, unigrams: NDArray[np.float64], levels: Sequence[_Level]) -> None:
        self.vocab_size = vocab_size
        self.begin = vocab_size  # the mark in front of a segment
        self._base = vocab_size + 1
        self._unigrams = unigrams
        self._levels = list(levels)

    @property
    def order(self) -> int:
        return 1 + len(self._levels)

    @property
    def n_grams(self) -> list[int]:
        """Distinct n-grams of order 2, 3, ..."""
        return [len(level.keys) for level in self._levels]

    @classmethod
    def train(cls, segments: Iterable[NDArray[np.integer]], vocab_size: int, order: int = 5) -> KneserNey:
        """Count the segments (ids below vocab_size; n-grams do not cross them) and smooth."""
        stream = _joined(segments, vocab_size)
        base = vocab_size + 1
        if len(stream) < 2 or int(stream.max()) > vocab_size:
            raise ValueError("no tokens to count, or ids outside the vocabulary: check the corpus and vocab_size")
        ids = stream  # number of the n-gram that starts at each position, -1 where there is none
        plain = np.bincount(stream, minlength=base)
        marked = np.arange(base) == vocab_size  # n-grams that start with the begin mark
        keys: IntArray = np.arange(base)
        unigrams, n_contexts = np.empty(0), 0
        levels: list[_Level] = []
        for n in range(1, order + 1):
            if n < order:
                next_keys, next_ids, next_plain, first = _extend(ids, stream, n, base)
                left_contexts = np.bincount(ids[first + 1], minlength=len(keys))  # distinct tokens in front
                counts = np.where(marked, plain, left_contexts)
            else:
                counts = plain
            if n == 1:
                unigrams = _smooth_unigrams(counts[:vocab_size])
            else:
                levels.append(_smooth(keys, counts, base, n_contexts))
            if n < order:
                n_contexts = len(keys)
                marked = marked[next_keys // base]
                keys, ids, plain = next_keys, next_ids, next_plain
        return cls(vocab_size, unigrams, levels)

    def log_probs(self, segments: Iterable[NDArray[np.integer]]) -> NDArray[np.float64]:
        """Natural log-probability of every token of the segments, joined; each segment starts anew."""
        stream = _joined(segments, self.vocab_size)
        where = np.flatnonzero(stream != self.begin)
        probs = self._unigrams[stream[where]]
        ids = stream
        for n, level in enumerate(self._levels, start=2):
            starts = where - (n - 1)  # the n-gram that ends at each token; before the stream there is nothing
            context = np.where(starts >= 0, ids[np.maximum(starts, 0)], -1)
            last = max(0, len(stream) - (n - 1))
            following = np.full(len(stream), -1)
            following[:last] = level.find(ids[:last], stream[n - 1 :], self._base)
            gram = np.where(context >= 0, following[np.maximum(starts, 0)], -1)
            probs = np.where(context >= 0, level.backoff[np.maximum(context, 0)], 1.0) * probs
            probs += np.where(gram >= 0, level.values[np.maximum(gram, 0)], 0.0) if len(level.keys) else 0.0
            ids = following
        return np.log(probs)

    def distributions(self, contexts: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """(len(contexts), vocab_size) probabilities of the next token; of each context the last order-1 ids count.

        Put `begin` in front of a context that reaches back to the start of its segment.
        """
        probs = np.repeat(self._unigrams[None], len(contexts), axis=0)
        for n, level in enumerate(self._levels, start=2):
            rows = [r for r, context in enumerate(contexts) if len(context) >= n - 1]
            if not rows:
                break
            history = np.array([list(contexts[r])[1 - n :] for r in rows], np.int64)
            ids = history[:, 0]
            for column, lower in zip(range(1, n - 1), self._levels, strict=False):
                ids = lower.find(ids, history[:, column], self._base)
            bounds = np.searchsorted(level.keys, np.stack([ids * self._base, (ids + 1) * self._base]))
            for r, context_id, low, high in zip(rows, ids, *bounds, strict=True):
                if context_id >= 0:
                    probs[r] *= level.backoff[context_id]
                    probs[r, level.keys[low:high] % self._base] += level.values[low:high]
        return probs


def _joined(segments: Iterable[NDArray[np.integer]], begin: int) -> IntArray:
    """Segments with the begin mark in front of each."""
    mark = np.array([begin], np.int64)
    pieces: list[IntArray] = []
    for segment in segments:
        pieces += [mark, np.asarray(segment, np.int64)]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def _extend(ids: IntArray, stream: IntArray, n: int, base: int) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """From n-grams to (n+1)-grams: sorted names, number at each position, plain counts, first position of each.

    An (n+1)-gram may start with the begin mark (base - 1) but not hold it further on.
    """
    last = max(0, len(stream) - n)
    starts = np.flatnonzero((ids[:last] >= 0) & (stream[n:] != base - 1))
    names = ids[starts] * base + stream[starts + n]
    order = np.argsort(names, kind="stable")
    ordered = names[order]
    new = np.ones(len(ordered), np.bool_)
    new[1:] = ordered[1:] != ordered[:-1]
    heads = np.flatnonzero(new)
    next_ids = np.full(len(stream), -1)
    next_ids[starts[order]] = np.cumsum(new) - 1
    counts = np.diff(heads, append=len(ordered))
    return ordered[heads], next_ids, counts, starts[order[heads]]


def _discounts(counts: IntArray) -> NDArray[np.float64]:
    """What is taken from counts 0, 1, 2 and 3 or more: (4,)."""
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return np.array([0.0, *FALLBACK_DISCOUNTS])
    y = n1 / (n1 + 2 * n2)
    estimates = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    usable = all(0 <= d <= k for k, d in enumerate(estimates, start=1))
    return np.array([0.0, *(estimates if usable else FALLBACK_DISCOUNTS)])


def _smooth_unigrams(counts: IntArray) -> NDArray[np.float64]:
    """Discounted unigrams, what was taken spread evenly over the vocabulary."""
    taken = _discounts(counts)[np.minimum(counts, 3)]
    return (counts - taken + taken.sum() / len(counts)) / counts.sum()


def _smooth(keys: IntArray, counts: IntArray, base: int, n_contexts: int) -> _Level:
    """Discounted probabilities and the weight left for the lower order."""
    prefix = keys // base
    taken = _discounts(counts)[np.minimum(counts, 3)]
    total = np.bincount(prefix, weights=counts, minlength=n_contexts)
    seen = total > 0
    backoff = np.ones(n_contexts)
    backoff[seen] = np.bincount(prefix, weights=taken, minlength=n_contexts)[seen] / total[seen]
    return _Level(keys, (counts - taken) / total[prefix], backoff)
