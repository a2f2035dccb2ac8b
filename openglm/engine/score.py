"""How likely a long text is: every token scored once, in windows that slide over it. Token ids only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from openglm.engine.engine import Engine

__all__ = ["Score", "score", "sliding_windows"]


@dataclass(frozen=True)
class Score:
    """nll: summed negative log-likelihood in nats of n_tokens scored tokens, the last n_tokens of the text."""

    nll: float
    n_tokens: int


def sliding_windows(n_tokens: int, width: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, stop, first): each window holds tokens start..stop-1 and scores first..stop-1; together all, once.

    Windows start `stride` tokens apart and hold at most `width`; the last one ends with the text.
    """
    windows: list[tuple[int, int, int]] = []
    first = 0
    for start in range(0, n_tokens, stride):
        stop = min(start + width, n_tokens)
        windows.append((start, stop, first))
        first = stop
        if stop == n_tokens:
            break
    return windows


def score(engine: Engine, ids: Sequence[int], head: Sequence[int], window: int = 1024, stride: int = 512) -> Score:
    """Negative log-likelihood of ids, `head` put in front of every window (such as [gMASK] <sop>).

    window: tokens of a pass, head included, at most the model's context. stride: new tokens of every later window.
    Without a head the very first token has nothing before it and is not scored.
    """
    context = engine.config.max_seq_len
    if not 2 <= window <= context:
        raise ValueError(f"window must be between 2 and the context of {context} tokens, not {window}")
    width = window - len(head)
    if not 1 <= stride <= width:
        raise ValueError(f"stride must be between 1 and {width} (window less {len(head)} leading tokens), not {stride}")
    ids = list(ids)
    if len(ids) + len(head) < 2:
        raise ValueError("the text has too few tokens to score: give a longer one")
    windows = sliding_windows(len(ids), width, stride)
    nll, n_scored = 0.0, 0
    for start, stop, first in tqdm(windows, desc="perplexity", unit="window", delay=2, leave=False):
        if not head and first == 0:
            first = 1
        logprobs = engine.logprobs([*head, *ids[start:stop]], len(head) + first - start)
        nll -= float(logprobs.double().sum())
        n_scored += len(logprobs)
    return Score(nll, n_scored)
