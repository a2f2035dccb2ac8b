"""openglm.ops.sampling: filters against a float64 reference, draws against the distribution, seeds."""

from __future__ import annotations

import itertools

import pytest
import torch

from openglm.ops.sampling import apply_repetition_penalty, candidates, filtered_probs, sample

CASES = [
    dict(zip(("temperature", "top_k", "top_p", "min_p"), values, strict=True))
    for values in itertools.product((0.3, 1.0, 1.7), (0, 1, 7, 1000), (0.1, 0.9, 1.0), (0.0, 0.05))
]


def logits_of(vocab: int, scale: float, rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * scale


def fast_probs(logits: torch.Tensor, **filters: float) -> torch.Tensor:
    probs, ids = candidates(logits, **filters)  # type: ignore[arg-type]
    if ids is not None:
        probs = torch.zeros_like(logits).scatter(1, ids, probs)
    return probs.double() / probs.double().sum(-1, keepdim=True)


@pytest.mark.parametrize("vocab,scale", [(50, 2.0), (1000, 0.05), (1000, 4.0)])  # 0.05: flat, the whole vocabulary
def test_candidates_equal_the_definition(vocab: int, scale: float) -> None:
    logits = logits_of(vocab, scale)
    logits[:, 3] = float("-inf")
    for filters in CASES:
        expected = filtered_probs(logits, **filters)  # type: ignore[arg-type]
        got = fast_probs(logits, **filters)
        # At the edge of top-p the two precisions may differ by one token of small mass.
        assert (expected - got).abs().max() < 5e-3, filters
        assert ((expected > 0).sum(-1) - (got > 0).sum(-1)).abs().max() <= 1, filters
        assert (got[:, 3] == 0).all()


def test_the_definition_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    assert filtered_probs(logits, top_k=2)[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert filtered_probs(logits, top_p=0.6)[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert filtered_probs(logits, min_p=0.29)[0].tolist() == pytest.approx([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0])
    assert filtered_probs(logits, temperature=0.5)[0, 0].item() == pytest.approx(0.25 / (0.25 + 0.0625 + 0.0225 + 0.01))


def test_draws_follow_the_distribution() -> None:
    n = 40_000
    row = logits_of(30, 1.5, rows=1)
    filters = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.01}
    ids = sample(row.expand(n, -1), generator=torch.Generator().manual_seed(0), **filters)  # type: ignore[arg-type]
    expected = filtered_probs(row, **filters)[0]  # type: ignore[arg-type]
    counts = torch.bincount(ids, minlength=30).double()
    assert (counts[expected == 0] == 0).all()
    alive = expected > 0
    chi2 = ((counts - n * expected)[alive] ** 2 / (n * expected[alive])).sum().item()
    assert chi2 < 3.0 * int(alive.sum()), "the draws do not follow the probabilities"


def test_unfiltered_draws_never_hit_the_impossible() -> None:
    logits = torch.full((2000, 40), float("-inf"))
    logits[:, 5], logits[:, 39] = 0.0, 0.0
    ids = sample(logits, generator=torch.Generator().manual_seed(1))
    assert set(ids.tolist()) == {5, 39}


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.5}])
def test_same_seed_same_ids(filters: dict[str, float]) -> None:
    logits = logits_of(500, 1.0, rows=64)
    first, again, other = (
        sample(logits, generator=torch.Generator().manual_seed(s), **filters).tolist()  # type: ignore[arg-type]
        for s in (7, 7, 8)
    )
    assert first == again != other


def test_greedy_and_extreme_temperatures() -> None:
    logits = logits_of(100, 3.0)
    best = logits.argmax(-1).tolist()
    for temperature in (0.0, 1e-30, 1e-5, 1e-3):
        assert sample(logits, temperature).tolist() == best
    assert (sample(logits * 1e30, 1.0) == logits.argmax(-1)).all()  # no overflow
    assert sample(logits, 1e30).shape == (3,)


def test_repetition_penalty() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    out = apply_repetition_penalty(logits, torch.tensor([[0, 1, 0]]), 2.0)
    assert out.tolist() == [[1.0, -4.0, 1.0, 0.5]]
    assert logits.tolist() == [[2.0, -2.0, 1.0, 0.5]], "the given logits must not change"
    assert apply_repetition_penalty(logits, torch.tensor([[0]]), 1.0) is logits
