"""openglm.ops.sampling: filters against a float64 reference, draws against the distribution, the random numbers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from openglm.ops import native
from openglm.ops.sampling import largest, log_normaliser, pick, splitmix64, uniform

Floats = np.ndarray[Any, np.dtype[np.float64]]
CASES: list[dict[str, Any]] = [
    dict(zip(("temperature", "top_k", "top_p", "min_p"), values, strict=True))
    for values in itertools.product((0.3, 1.0, 1.7), (0, 1, 7, 1000), (0.1, 0.9, 1.0), (0.0, 0.05))
]


def reference(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Floats:
    """Probabilities of one row by the book: sort everything, in float64."""
    row = logits.double().numpy()
    order = np.argsort(-row, kind="stable")[: top_k or None]
    probs = np.exp((row[order] - row[order[0]]) / temperature)
    probs /= probs.sum()
    before = probs.cumsum() - probs
    probs = np.where(((before < top_p) | (top_p == 1.0)) & (probs >= min_p * probs[0]), probs, 0.0)
    out = np.zeros_like(row)
    out[order] = probs / probs.sum()
    return out


def logits_of(vocab: int, scale: float) -> torch.Tensor:
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * scale
    row[3] = float("-inf")
    return row


def numbers(n: int) -> list[float]:
    return [(i + 0.5) / n for i in range(n)]


def picked(row: torch.Tensor, us: list[float], **filters: Any) -> list[int]:
    return [pick(row, u=u, **filters) for u in us]


@pytest.mark.parametrize("vocab,scale", [(50, 2.0), (1500, 0.05), (1500, 4.0)])  # 0.05: flat, the whole vocabulary
def test_draws_on_a_grid_follow_the_definition(vocab: int, scale: float) -> None:
    """Numbers spread evenly over [0, 1) hit every token as often as its probability says, to within one."""
    row, n = logits_of(vocab, scale), 400
    for filters in CASES:
        expected = reference(row, **filters)
        for ids in [picked(row, numbers(n), **filters)]:
            counts = np.bincount(ids, minlength=vocab)
            assert abs(counts - n * expected).max() < 1.1, filters
            # At the edge of top-p the two precisions may differ by one token of small mass.
            assert len(set(ids) - set(np.flatnonzero(expected))) <= 1, filters
            assert counts[3] == 0


def test_draws_follow_the_distribution() -> None:
    n, row = 20_000, logits_of(30, 1.5)
    filters: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.01}
    expected = reference(row, **filters)
    counts = np.bincount([pick(row, u=uniform(5, i), **filters) for i in range(n)], minlength=30)
    alive = expected > 0
    assert (counts[~alive] == 0).all()
    chi2 = ((counts - n * expected)[alive] ** 2 / (n * expected[alive])).sum()
    assert chi2 < 3.0 * alive.sum(), "the draws do not follow the probabilities"


def test_the_impossible_is_never_drawn_and_the_last_number_stays_inside() -> None:
    row = torch.full((1300,), float("-inf"))
    row[5], row[1100] = 0.0, 0.0
    last = 1.0 - 2.0**-53
    for top_p, top_k in ((1.0, 0), (0.9, 0), (1.0, 7), (0.9, 7)):
        for ids in [picked(row, [0.0, 0.25, 0.75, last], temperature=1.0, top_k=top_k, top_p=top_p, min_p=0.0)]:
            assert ids == [5, 5, 1100, 1100]


def test_equal_tokens_are_ordered_by_id() -> None:
    row = torch.zeros(2000)
    for ids in [picked(row, numbers(300), temperature=1.0, top_k=3, top_p=1.0, min_p=0.0)]:
        assert ids == [0] * 100 + [1] * 100 + [2] * 100
    assert largest(np.array([1.0, 3.0, 3.0, 2.0, 3.0]), 2, 5.0).tolist() == [1, 2]
    assert largest(np.array([1.0, 3.0, 3.0, 2.0, 3.0]), 9, 0.0).tolist() == [1, 2, 4, 3, 0]


def test_greedy_and_extreme_temperatures() -> None:
    row = logits_of(100, 3.0)
    best = int(row.argmax())
    for temperature in (0.0, 1e-30, 1e-5, 1e-3):
        assert pick(row, temperature, 0, 0.95, 0.0, 0.999) == best
    assert pick(row * 1e30, 1.0, 0, 1.0, 0.0, 0.999) == best  # no overflow
    assert len({pick(row, 1e30, 0, 1.0, 0.0, u) for u in numbers(300)}) == 99


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("scale,shift", [(1.0, 0.0), (5.0, 40.0), (30.0, -1000.0), (0.01, 0.0)])
def test_the_normaliser_equals_float64(
    scale: float, shift: float, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:
        monkeypatch.setattr(native, "library", lambda: None)
    row = torch.randn(70_000, generator=torch.Generator().manual_seed(2)) * scale + shift
    row[:100] = float("-inf")
    expected = float(row.double().logsumexp(-1))
    assert log_normaliser(row, float(row.max())) == pytest.approx(expected, abs=3e-6, rel=1e-7)


def test_random_numbers() -> None:
    # The published test vector of SplitMix64 for the seed 1234567.
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix64(1234567 + i * 0x9E3779B97F4A7C15) for i in range(4)] == outputs
    draws = np.array([[uniform(seed, n) for n in range(400)] for seed in (0, 1, 2, -1, 2**64 - 2)])
    assert ((0.0 <= draws) & (draws < 1.0)).all() and len(set(draws.flat)) == draws.size
    assert abs(draws.mean(1) - 0.5).max() < 0.06 and abs(np.corrcoef(draws) - np.eye(5)).max() < 0.2
    assert abs(np.bincount((draws * 10).astype(int).ravel()) - 200).max() < 60
