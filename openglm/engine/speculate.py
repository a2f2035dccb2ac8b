"""Proposers: guesses of the tokens that come next, cheap enough that verifying several at once pays.

    python -m pytest -q tests/test_engine_batching.py

The engine runs the guesses behind a request's last token and draws behind each as if it were the answer; the first
wrong one ends the pass. So the tokens are those the request's own sampler would have drawn one by one, whatever its
temperature, and a bad proposer costs time only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from openglm.engine.blocks import BlockManager
from openglm.engine.request import Request
from openglm.engine.runner import Chunk, ModelRunner

__all__ = ["DraftProposer", "NgramProposer", "Positions", "Proposer"]

Positions = Callable[[Request, int, int], Tensor]  # (axes, stop - start) of a request's tokens


class Proposer(Protocol):
    def propose(self, requests: Sequence[Request], positions: Positions) -> None:
        """Set `drafts` of every request. These are all that are being written; of others nothing need be kept."""


class NgramProposer:
    """Looks up where the last tokens stood before, in prompt or answer, and guesses that the same follows again.

    n_drafts: tokens guessed at most. sizes: numbers of last tokens that must be equal, tried in this order.
    """

    def __init__(self, n_drafts: int = 8, sizes: Sequence[int] = (4, 3, 2)) -> None:
        if n_drafts < 1 or not sizes or min(sizes) < 1:
            raise ValueError(f"n-gram speculation needs tokens to guess and to compare, not {n_drafts} and {sizes}")
        self.n_drafts, self.sizes = n_drafts, tuple(sizes)
        self._seen: dict[int, tuple[dict[tuple[int, ...], int], int]] = {}

    def propose(self, requests: Sequence[Request], positions: Positions) -> None:
        self._seen = {r.id: self._seen.get(r.id, ({}, 0)) for r in requests}
        for request in requests:
            request.drafts = self._guess(request)

    def _guess(self, request: Request) -> list[int]:
        """What followed the latest earlier place of the last tokens; each place is indexed once, by what ends there."""
        ids = request.ids
        places, n_indexed = self._seen[request.id]
        for end in range(max(n_indexed, 1), len(ids)):  # the ending of all ids stays out: it is what we look for
            for size in self.sizes:
                if size <= end:
                    places[tuple(ids[end - size : end])] = end
        self._seen[request.id] = (places, len(ids))
        for size in self.sizes:
            found = places.get(tuple(ids[-size:])) if size < len(ids) else None
            if found is not None:
                return ids[found : found + min(self.n_drafts, request.n_left - 1)]
        return []


@dataclass(eq=False, slots=True)
class _Draft:
    """What the small model holds of one request: n_cached of its tokens, and behind them these guesses."""

    pages: list[int] = field(default_factory=list)
    n_cached: int = 0
    guesses: list[int] = field(default_factory=list)


class DraftProposer:
    """Guesses what a small model of the same vocabulary would write, greedily.

    runner: of the small model, with a pool of its own; a request that finds no room in it goes without guesses.
    """

    def __init__(self, runner: ModelRunner, n_drafts: int = 4) -> None:
        if n_drafts < 1:
            raise ValueError(f"a draft model needs tokens to guess, not {n_drafts}")
        self.runner, self.n_drafts = runner, n_drafts
        self.blocks = BlockManager(runner.n_pages, runner.page_size, share=False)
        self._drafts: dict[int, _Draft] = {}

    def propose(self, requests: Sequence[Request], positions: Positions) -> None:
        alive = {r.id for r in requests}
        for gone in [i for i in self._drafts if i not in alive]:
            self.blocks.release(self._drafts.pop(gone).pages)
        for request in requests:
            request.drafts = []
        ready = [r for r in requests if self._prepare(r)]
        for n in range(self.n_drafts):
            ready = [r for r in ready if n < r.n_left - 1]
            if ready:
                logits = self.runner.run([self._chunk(r, positions) for r in ready])
                for request, token in zip(ready, logits.argmax(-1).tolist(), strict=True):
                    draft = self._drafts[request.id]
                    draft.n_cached, draft.guesses = len(request.ids), list(request.drafts)
                    request.drafts.append(token)

    def _prepare(self, request: Request) -> bool:
        """Room for all guesses, and what is cached cut back to what is true. False: no guesses this time."""
        draft = self._drafts.setdefault(request.id, _Draft())
        for guess in draft.guesses:  # those that came true stay, but one token must be left to run
            if draft.n_cached + 1 >= len(request.ids) or request.ids[draft.n_cached] != guess:
                break
            draft.n_cached += 1
        draft.guesses = []
        n_tokens = len(request.ids) + min(self.n_drafts, request.n_left)
        if n_tokens > self.runner.config.max_seq_len:
            return False
        pages = self.blocks.allocate(max(self.blocks.pages_for(n_tokens) - len(draft.pages), 0))
        draft.pages += pages or []
        return pages is not None

    def _chunk(self, request: Request, positions: Positions) -> Chunk:
        draft = self._drafts[request.id]
        start = draft.n_cached + len(draft.guesses)
        ids = (request.ids[draft.n_cached :] + request.drafts)[len(draft.guesses) :]
        n_context = request.n_context if start == 0 else 0
        return Chunk(ids, start, positions(request, start, start + len(ids)), draft.pages, n_context)
