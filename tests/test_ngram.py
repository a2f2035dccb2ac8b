"""bench/ngram.py against a plain-dictionary Kneser-Ney, and as a probability distribution."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from bench.ngram import KneserNey

VOCAB, ORDER = 7, 5
BEGIN = VOCAB


def corpus(n_segments: int, seed: int) -> list[np.ndarray]:
    """A Markov chain with few successors, so that every order has counts of 1, 2, 3 and 4."""
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.full(VOCAB, 0.3), size=(VOCAB, VOCAB)).cumsum(axis=-1)
    segments = []
    for length in rng.integers(1, 60, n_segments):
        ids = [int(rng.integers(VOCAB)), int(rng.integers(VOCAB))]
        while len(ids) < length:
            ids.append(min(VOCAB - 1, int(table[ids[-2], ids[-1]].searchsorted(rng.random()))))
        segments.append(np.array(ids[:length], np.uint16))
    return segments


class Reference:
    """Interpolated modified Kneser-Ney with dictionaries, straight from the formulas."""

    def __init__(self, segments: list[np.ndarray], order: int) -> None:
        self.order = order
        plain: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
        for segment in segments:
            ids = [BEGIN, *segment.tolist()]
            for n in range(1, order + 1):
                plain[n].update(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
        # The highest order keeps its counts; below, a gram counts the distinct tokens in front of it.
        self.counts: list[dict[tuple[int, ...], int]] = [{} for _ in range(order + 1)]
        for n in range(1, order + 1):
            in_front: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
            if n < order:
                for gram in plain[n + 1]:
                    in_front[gram[1:]].add(gram[0])
            for gram, count in plain[n].items():
                if gram == (BEGIN,):
                    continue
                self.counts[n][gram] = count if n == order or gram[0] == BEGIN else len(in_front[gram])
        self.followers: list[defaultdict[tuple[int, ...], dict[int, int]]] = []
        for counts in self.counts:
            self.followers.append(defaultdict(dict))
            for gram, count in counts.items():
                self.followers[-1][gram[:-1]][gram[-1]] = count
        self.discounts = [self._estimate(counts) for counts in self.counts]

    @staticmethod
    def _estimate(counts: dict[tuple[int, ...], int]) -> list[float]:
        n = Counter(counts.values())
        if not (n[1] and n[2] and n[3]):
            return [0.0, 0.5, 1.0, 1.5]
        y = n[1] / (n[1] + 2 * n[2])
        found = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
        return [0.0, *(found if all(0 <= d <= k for k, d in enumerate(found, 1)) else (0.5, 1.0, 1.5))]

    def prob(self, token: int, context: tuple[int, ...]) -> float:
        n = len(context) + 1
        discounts, followers = self.discounts[n], self.followers[n][context]
        lower = self.prob(token, context[1:]) if context else 1 / VOCAB
        total = sum(followers.values())
        if not total:
            return lower
        own = followers.get(token, 0)
        left_over = sum(discounts[min(c, 3)] for c in followers.values())
        return (own - discounts[min(own, 3)]) / total + left_over / total * lower


@pytest.mark.parametrize(("order", "n_segments"), [(1, 30), (2, 30), (5, 40), (5, 3)])
def test_probabilities_equal_a_dictionary_implementation(order: int, n_segments: int) -> None:
    train, held_out = corpus(n_segments, seed=1), corpus(4, seed=2)
    model, reference = KneserNey.train(train, VOCAB, order), Reference(train, order)
    assert model.order == order
    expected = []
    for segment in held_out:
        ids = [BEGIN, *segment.tolist()]
        expected += [np.log(reference.prob(ids[i], tuple(ids[max(0, i - order + 1) : i]))) for i in range(1, len(ids))]
    np.testing.assert_allclose(model.log_probs(held_out), expected, rtol=1e-12)


def test_every_context_sums_to_one_and_agrees_with_log_probs() -> None:
    model = KneserNey.train(corpus(40, seed=3), VOCAB, ORDER)
    rng = np.random.default_rng(0)
    seen = [segment.tolist()[:k] for segment in corpus(40, seed=3) for k in (1, 2, 3, 4, 5)]
    random = [rng.integers(VOCAB, size=k).tolist() for k in (1, 2, 3, 4) for _ in range(20)]
    contexts = [[], [BEGIN], *([BEGIN, *c] for c in seen), *random]
    probs = model.distributions(contexts)
    np.testing.assert_allclose(probs.sum(axis=1), 1.0, rtol=1e-12)
    assert probs.min() > 0
    whole = [c[1:] for c in contexts if c and c[0] == BEGIN]
    rows = [i for i, c in enumerate(contexts) if c and c[0] == BEGIN]
    for token in range(VOCAB):
        scored = model.log_probs([np.array([*c, token]) for c in whole])[np.cumsum([len(c) + 1 for c in whole]) - 1]
        np.testing.assert_allclose(scored, np.log(probs[rows, token]), rtol=1e-12)


def test_a_higher_order_predicts_its_own_kind_of_text_better() -> None:
    train, held_out = corpus(100, seed=4), corpus(100, seed=4)[::7]
    losses = [-KneserNey.train(train, VOCAB, order).log_probs(held_out).mean() for order in (1, 2, 3)]
    assert losses[0] > losses[1] > losses[2]


def test_segments_are_separate() -> None:
    model = KneserNey.train([np.array([0, 1, 2])] * 5, VOCAB, 3)
    joined, apart = np.array([0, 1, 2, 0, 1, 2]), [np.array([0, 1, 2])] * 2
    np.testing.assert_allclose(model.log_probs(apart)[3:], model.log_probs(apart)[:3])
    assert model.log_probs([joined])[3] < model.log_probs(apart)[3]


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="vocab"):
        KneserNey.train([np.array([VOCAB + 3])], VOCAB)
    with pytest.raises(ValueError, match="no tokens"):
        KneserNey.train([], VOCAB)
