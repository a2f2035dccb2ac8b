"""Drawing tokens from logits: temperature, top-k, top-p, min-p and the repetition penalty. Knows tensors only.

`filtered_probs` is the definition, over the whole vocabulary; `candidates` finds the same distribution without
sorting the vocabulary where it can. `sample` draws from it with one uniform number a row, so that a seeded
generator gives the same ids on every device.

    python -m pytest -q tests/test_sampling.py
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_repetition_penalty", "candidates", "filtered_probs", "sample"]

GREEDY_BELOW = 1e-5  # a smaller temperature would overflow float32 and pick the arg-max anyway
_FIRST_LOOK = 256  # candidates in which top-p is tried before the whole vocabulary is sorted


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens already seen less likely (CTRL, Keskar et al. 2019): divide positive logits, multiply negative.

    logits: (B, V) float32; seen: (B, T) int64 ids, repeats allowed; penalty above 0, 1 does nothing.
    Returns new (B, V) logits, or the given ones when there is nothing to do.
    """
    if penalty == 1.0 or seen.shape[1] == 0:
        return logits
    scores = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One id a row. logits: (B, V) float32, -inf = impossible; returns (B,) int64 on their device.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch a filter off. The filters apply in the order
    temperature, top-k, top-p (of what top-k left), min-p (relative to the likeliest token). `generator` lives on the
    CPU and gives one number a row: equal seeds give equal ids whatever the device.
    """
    if temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    probs, ids = candidates(logits, temperature, top_k, top_p, min_p)
    uniform = torch.rand(logits.shape[0], 1, generator=generator, dtype=torch.float64).to(logits.device)
    mass = probs.cumsum(-1, dtype=torch.float64)
    # First candidate whose cumulated mass exceeds the number; one of mass zero is never the first.
    picked = torch.searchsorted(mass, uniform * mass[:, -1:], right=True).clamp_(max=probs.shape[1] - 1)
    return picked[:, 0] if ids is None else ids.gather(1, picked)[:, 0]


def candidates(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Tokens that pass the filters: (probs (B, K), ids (B, K) or None where K is the vocabulary in order).

    Rows need not sum to one, and dropped tokens may stay with probability zero.
    """
    size = logits.shape[1]
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < size:
        values, ids = scaled.topk(top_k)
        return _cut(values.softmax(-1), top_p, min_p), ids
    if top_p >= 1.0:
        probs = scaled.softmax(-1)
        return _cut(probs, 1.0, min_p), None
    log_total = scaled.logsumexp(-1, keepdim=True)
    values, ids = scaled.topk(min(_FIRST_LOOK, size))
    probs = (values - log_total).exp()
    if size > _FIRST_LOOK and bool((probs.sum(-1) < top_p).any()):  # a flat distribution: look at all of it
        values, ids = scaled.sort(descending=True)
        probs = (values - log_total).exp()
    return _cut(probs, top_p, min_p), ids


def _cut(probs: Tensor, top_p: float, min_p: float) -> Tensor:
    """Zero what top-p (rows sorted downwards) and min-p drop; the likeliest token always stays."""
    keep = torch.ones_like(probs, dtype=torch.bool)
    if top_p < 1.0:
        keep = probs.cumsum(-1) - probs < top_p
    if min_p > 0.0:
        keep = keep & (probs >= min_p * probs.amax(-1, keepdim=True))
    return probs * keep if top_p < 1.0 or min_p > 0.0 else probs


def filtered_probs(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """The definition: (B, V) float64 probabilities after all filters, rows sum to one. Slow; for tests."""
    out = torch.zeros_like(logits, dtype=torch.float64)
    for row, values in enumerate(logits.double()):
        if temperature < GREEDY_BELOW:
            out[row, values.argmax()] = 1.0
            continue
        order = values.argsort(descending=True, stable=True)
        kept = order[: top_k or None]
        probs = (values[kept] / temperature).softmax(-1)
        before = probs.cumsum(-1) - probs
        probs = torch.where((before < top_p) & (probs >= min_p * probs[0]), probs, 0.0)
        out[row, kept] = probs / probs.sum()
    return out
