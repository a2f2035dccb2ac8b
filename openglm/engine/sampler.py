"""Sampler: how one request draws its tokens. `draw_batch` draws for many at once, each as if it were alone.

    sampler = Sampler(params, prompt_ids, vocab_size)
    drawn = sampler.draw(logits)            # changes nothing: the same logits give the same token again
    sampler.accept(drawn.token_id)          # only now do penalties, grammar and random numbers move on

Order of the steps, on the logits of the model: repetition penalty (Keskar et al. 2019) over prompt and answer,
frequency and presence penalty (OpenAI's definition) over the answer, logit bias, no end before min_new_tokens, the
grammar; then temperature and filters (`ops.sampling.pick`).

    python -m pytest -q tests/test_sampler.py
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from openglm.engine.request import NO_TOKEN
from openglm.ops.sampling import GREEDY_BELOW, largest, log_normaliser, pick, uniform
from openglm.types import SamplingParams

__all__ = ["DAMAGED", "Drawn", "GrammarState", "Sampler", "draw_batch"]

DAMAGED = "the model computed logits that are no numbers: its weights are damaged, or try float32"
_IMPOSSIBLE = "no token is possible here: logit_bias or the grammar rules out every one in the vocabulary"
_LIKELY_NATS = 8.0  # of a distribution's peak, within which the likeliest tokens are looked for first


@dataclass(frozen=True, slots=True)
class Drawn:
    """logprob: under the model itself, before temperature, filters, penalties and grammar (nats).

    top_logprobs: (id, logprob) of the likeliest tokens under the model, best first. error: why nothing could be drawn
    (FloatingPointError: the logits hold NaN or infinity; ValueError: no token is possible); token_id is NO_TOKEN then.
    """

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: Exception | None = None


class GrammarState(Protocol):
    """Where one answer stands in a grammar (`engine.grammar.TokenGrammar`)."""

    def allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(vocab_size,) bool, the caller's own: ids of text that may come next; now and then one too many."""

    def accepts(self, token_id: int) -> bool:
        """Whether one of them may come next in truth."""

    @property
    def may_end(self) -> bool:
        """Whether the answer is complete, be it that more may follow."""

    @property
    def done(self) -> bool:
        """Whether it is complete and nothing may follow."""

    def accept(self, token_id: int) -> None:
        """Move on by a token that is allowed."""


class _Counts:
    """The distinct tokens that penalties look at, and how often the answer holds each."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))}
        room = max(64, 2 * len(self._places))
        self._ids, self._counts = np.zeros(room, np.int64), np.zeros(room, np.float32)
        self._ids[: len(self._places)] = list(self._places)

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids, self._counts = (np.concatenate([x, np.zeros_like(x)]) for x in (self._ids, self._counts))
        self._ids[place] = token_id
        self._counts[place] += 1

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(n,) int64 ids and (n,) float32 counts."""
        n = len(self._places)
        return torch.from_numpy(self._ids[:n]).to(device), torch.from_numpy(self._counts[:n]).to(device)


class Sampler:
    """State of one request's draws.

    prompt_ids: what the repetition penalty also looks at. vocab_size: ids from here on, by which models pad their
    tables, are never drawn. grammar_state: a fresh state of `params.grammar`, which belongs to this request.
    done: the answer is complete and nothing may follow. It ends even where no stop id was drawn.
    Raises ValueError for ids outside the vocabulary, and for what the caller has to do but did not.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        grammar_state: GrammarState | None = None,
    ) -> None:
        self.params, self.vocab_size, self.grammar = params, vocab_size, grammar_state
        self.n_accepted = 0
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.greedy = params.temperature < GREEDY_BELOW
        if params.stop_strings:
            raise ValueError("stop_strings need text, which an engine does not know: give them to a ChatModel")
        if (params.grammar is None) != (grammar_state is None):
            raise ValueError("a grammar needs a tokenizer, and this engine was given none: use a ChatModel")
        bias = dict(params.logit_bias)
        for token in bias:
            if not 0 <= token < vocab_size:
                raise ValueError(f"logit_bias has token id {token}: the vocabulary has 0 to {vocab_size - 1}")
        self._bias = (torch.tensor([*bias]), torch.tensor([*bias.values()], dtype=torch.float32)) if bias else None
        self._stop_ids = frozenset(i for i in params.stop_ids if 0 <= i < vocab_size)
        self._penalised = params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        # Stop ids stay out of the penalties: an answer could not end after a prompt that holds one.
        repeated = params.repetition_penalty != 1.0
        seen = (i for i in prompt_ids if i < vocab_size and i not in self._stop_ids) if repeated else ()
        self._counts = _Counts(seen) if repeated or self._penalised else None
        self._adjusts_nothing = self._counts is None and self._bias is None and self.grammar is None
        self._waits_for = params.min_new_tokens if self._stop_ids else 0

    @property
    def done(self) -> bool:
        return self.grammar is not None and self.grammar.done

    @property
    def plain(self) -> bool:
        """Whether the next token, and those behind it, are drawn by temperature and filters from the logits alone."""
        return self._adjusts_nothing and self.n_accepted >= self._waits_for and not self.params.top_logprobs

    def draw(self, logits: Tensor) -> Drawn:
        """The next token. logits: (V,) float32, V at least vocab_size. Never raises for the values in it."""
        return draw_batch([self], logits[None])[0]

    def accept(self, token_id: int) -> None:
        """Take a drawn token into the answer."""
        self.n_accepted += 1
        if self._counts is not None and token_id not in self._stop_ids:
            self._counts.add(token_id)
        if self.grammar is not None and token_id not in self._stop_ids:
            self.grammar.accept(token_id)

    def adjusted(self, row: Tensor) -> Tensor:
        """Logits after penalties, bias and what is forbidden: new ones, or the given where there is nothing to do."""
        waits = self.n_accepted < self._waits_for
        if self._adjusts_nothing and not waits:
            return row
        row = row.clone()
        if self._counts is not None:
            self._penalise(row, *self._counts.tensors(row.device))
        if self._bias is not None:
            ids, values = (x.to(row.device) for x in self._bias)
            row[ids] += values
        stop_ids = sorted(self._stop_ids)
        if self.grammar is not None:
            allowed = self.grammar.allowed()
            allowed[stop_ids] = False
            if self.grammar.may_end and not (waits and allowed.any()):  # where a grammar only leaves the end, it ends
                allowed[stop_ids] = True
            row.masked_fill_(torch.from_numpy(~allowed).to(row.device), -torch.inf)
        elif waits:
            row[stop_ids] = -torch.inf
        return row

    def _penalise(self, row: Tensor, ids: Tensor, counts: Tensor) -> None:
        p, scores = self.params, row[ids]
        if p.repetition_penalty != 1.0:
            scores = torch.where(scores > 0, scores / p.repetition_penalty, scores * p.repetition_penalty)
        if self._penalised:
            scores = scores - counts * p.frequency_penalty - (counts > 0) * p.presence_penalty
        row[ids] = scores

    def _choose(self, adjusted: Tensor) -> int | None:
        """One id of adjusted logits, of which those that the grammar let through wrongly are struck; None: no token."""
        p, values, attempt = self.params, adjusted.numpy(), 0
        while math.isfinite(values[best := int(values.argmax())]):
            if not self.greedy:
                u = uniform(self.seed + attempt, self.n_accepted)
                best = pick(adjusted, p.temperature, p.top_k, p.top_p, p.min_p, u)
            if self.grammar is None or best in self._stop_ids or self.grammar.accepts(best):
                return best
            values[best] = -math.inf
            attempt += 1
        return None

    def _draw_on_cpu(self, row: Tensor) -> Drawn:
        p, logits = self.params, row.numpy()
        best = int(logits.argmax())  # of NaN, where there is one
        log_total = log_normaliser(row, float(logits[best]))
        if math.isnan(log_total):
            return Drawn(NO_TOKEN, math.nan, error=FloatingPointError(DAMAGED))
        adjusted = self.adjusted(row)
        if adjusted is not row or not self.greedy:
            chosen = self._choose(adjusted)
            if chosen is None:
                return Drawn(NO_TOKEN, math.nan, error=ValueError(_IMPOSSIBLE))
            best = chosen
        top: tuple[tuple[int, float], ...] = ()
        if p.top_logprobs:
            ids = largest(logits, p.top_logprobs, float(logits.max()) - _LIKELY_NATS)
            top = tuple((int(i), float(logits[i]) - log_total) for i in ids)
        return Drawn(best, float(logits[best]) - log_total, top)


def draw_batch(samplers: Sequence[Sampler], logits: Tensor) -> list[Drawn]:
    """The next token of each. logits: (n, V) float32, row i for sampler i.

    Every row is computed by itself, on the CPU, so that all that is drawn is bit for bit what it would be alone, and
    the same on every device.
    """
    assert len(samplers) == len(logits) and logits.dtype == torch.float32
    return [s._draw_on_cpu(row[: s.vocab_size]) for s, row in zip(samplers, logits.cpu(), strict=True)]
