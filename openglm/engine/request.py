"""Request: one sequence on its way through the engine. Step and Completion: what comes out. Pure Python.

python -m pytest -q tests/test_engine_scheduler.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["NO_TOKEN", "Completion", "FinishReason", "Request", "State", "Step"]

FinishReason = Literal["stop", "length", "error", "cancelled"]
NO_TOKEN = -1
State = Literal["waiting", "running", "finished"]


@dataclass(eq=False, slots=True)
class Request:
    """ids: the prompt, and behind it every token drawn so far.

    max_new_tokens: tokens that are drawn at most, so that all but the last find room in context and pool.
    n_context: leading tokens that see each other both ways, so that they run in one piece (prefix models).
    client: whose request it is; the queue serves clients in turn.
    pages: pages of the pool that hold its keys and values, in order. n_cached: tokens whose keys and values are there.
    n_shared: leading pages that the prefix cache knows. drafts: guesses of the next tokens, to be verified.
    order: number of its latest admission; of two running requests the larger one is the newer. n_reused: tokens of the
    prompt that the prefix cache had when it was first admitted.
    """

    id: int
    ids: list[int]
    n_prompt: int
    max_new_tokens: int
    n_context: int = 0
    client: str = ""
    state: State = "waiting"
    pages: list[int] = field(default_factory=list)
    n_cached: int = 0
    n_shared: int = 0
    drafts: list[int] = field(default_factory=list)
    order: int = -1
    n_preempted: int = 0
    n_reused: int = 0

    @property
    def n_pending(self) -> int:
        """Tokens still to run before the next one can be drawn."""
        return len(self.ids) - self.n_cached

    @property
    def n_drawn(self) -> int:
        return len(self.ids) - self.n_prompt

    @property
    def n_left(self) -> int:
        """Tokens that may still be drawn."""
        return self.max_new_tokens - self.n_drawn


@dataclass(frozen=True, slots=True)
class Step:
    """One drawn token of one request; `logprob` under the model itself, before temperature, filters and penalty (nats).

    top_logprobs: (id, logprob) of the likeliest tokens, as many as were asked for. finish_reason: on the last one only:
    "stop" (a stop id, or the grammar is complete), "length" (max_new_tokens, or context or pool are full), or, without
    a token (token_id NO_TOKEN), "cancelled" and "error", whose cause `error` holds. n_reused: tokens of the prompt that
    the prefix cache saved. at: when the token was drawn, in seconds of time.perf_counter.
    """

    token_id: int
    logprob: float
    finish_reason: FinishReason | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    request_id: int = 0
    error: Exception | None = None
    n_reused: int = 0
    at: float = 0.0


@dataclass(frozen=True)
class Completion:
    """All drawn tokens; a stop id that ended them is the last one."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
