"""Live: what the engine keeps of an unfinished request.

python -m pytest -q tests/test_engine_batching.py
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from torch import Tensor

from openglm.engine.request import FinishReason, Request, Step
from openglm.engine.runner import Chunk, Decoding
from openglm.engine.sampler import Drawn, Sampler
from openglm.engine.scheduler import Work

__all__ = ["Live"]


@dataclass(eq=False, slots=True)
class Live:
    """positions: (axes, prompt and answer). steps: where its results go; None: to `Engine.step`."""

    request: Request
    sampler: Sampler
    positions: Tensor
    stop_ids: frozenset[int]
    steps: deque[Step] | None

    def chunk(self, work: Work) -> Chunk:
        request, start, n = self.request, work.start, work.n_tokens
        n_known = n - work.n_drafts
        ids = request.ids[start : start + n_known]
        if work.n_drafts:
            ids = ids + request.drafts
        n_context = request.n_context if start == 0 else 0
        return Chunk(ids, start, self.positions[:, start : start + n], request.pages, n_context, work.n_logits)

    def decoding(self, work: Work) -> Decoding | None:
        """For a runner that also draws; None where there is more to do than that, or the first token is awaited."""
        request, sampler = self.request, self.sampler
        if work.n_tokens > 1 or work.n_logits != 1 or request.n_drawn == 0 or not sampler.plain:
            return None
        return Decoding(
            request.ids[-1], work.start, self.positions, request.pages, sampler.params, sampler.seed,
            sampler.n_accepted, tuple(self.stop_ids),
        )  # fmt: skip

    def take(self, drawn: Drawn, n: int, at: float | None = None) -> Step:
        """The n-th token of this pass enters the answer, drawn at that time; the step to hand out."""
        self.sampler.accept(drawn.token_id)
        reason: FinishReason | None = None
        if drawn.token_id in self.stop_ids or self.sampler.done:
            reason = "stop"
        elif n == self.request.n_left:
            reason = "length"
        request, at = self.request, time.perf_counter() if at is None else at
        return Step(drawn.token_id, drawn.logprob, reason, drawn.top_logprobs, request.id, None, request.n_reused, at)
