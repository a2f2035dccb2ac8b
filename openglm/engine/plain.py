"""Sampler: the state of one request's draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openglm.ops.sampling import apply_repetition_penalty, sample
from openglm.types import SamplingParams

__all__ = ["Drawn", "Sampler", "draw_batch"]


@dataclass(frozen=True, slots=True)
class Drawn:
    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """params: how to draw. What the penalty sees: never a stop id, or an answer could not end after one."""

    done = False

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int) -> None:
        self.params = params
        self._generator = torch.Generator()
        self._generator.seed() if params.seed is None else self._generator.manual_seed(params.seed)
        self._seen = [i for i in prompt_ids if i not in params.stop_ids] if params.repetition_penalty != 1.0 else []

    def draw(self, logits: Tensor) -> Drawn:
        p, row = self.params, logits[None]
        if p.repetition_penalty != 1.0:
            row = apply_repetition_penalty(row, torch.tensor([self._seen], dtype=torch.int64), p.repetition_penalty)
        token = int(sample(row, p.temperature, p.top_k, p.top_p, p.min_p, self._generator))
        return Drawn(token, float(logits[token] - logits.logsumexp(-1)))

    def accept(self, token_id: int) -> None:
        if self.params.repetition_penalty != 1.0:
            self._seen.append(token_id)


def draw_batch(samplers: Sequence[Sampler], logits: Tensor) -> list[Drawn]:
    return [sampler.draw(row) for sampler, row in zip(samplers, logits, strict=True)]
