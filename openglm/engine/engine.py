"""Engine: token ids in, token ids out. One prompt at a time, prefill then decode on a KV cache; knows no text.

    python -m pytest -q tests/test_engine.py

`stream` is the one loop; `generate` collects it, `beam` searches instead of drawing, `logits` and `logprobs` score
given ids. Positions and the context mask come from `prompt_layout`, so every generation of the family is served alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openglm.engine.beam import Beam, BeamSearch
from openglm.model.batch import ForwardBatch, PromptLayout, prompt_layout
from openglm.model.cache import KVCache
from openglm.model.transformer import Transformer
from openglm.ops.sampling import apply_repetition_penalty, sample
from openglm.types import SamplingParams

__all__ = ["Completion", "Engine", "FinishReason", "Step"]

FinishReason = Literal["stop", "length"]

_SCORE_ROWS = 128  # rows of logits held at once while scoring


@dataclass(frozen=True)
class Step:
    """One drawn token; `logprob` under the model itself, before temperature, filters and penalty (nats)."""

    token_id: int
    logprob: float
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """All drawn tokens; a stop id that ended them is the last one. "length": max_new_tokens or a full context."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...]


class Engine:
    """Runs one Transformer.

    special_ids: names to ids, for `prompt_layout`. vocab_size: ids that the tokenizer knows; rows of a padded
    embedding beyond it are never drawn (None: all may be).
    """

    def __init__(self, model: Transformer, special_ids: Mapping[str, int], vocab_size: int | None = None) -> None:
        self.model = model.eval()
        self.config = model.config
        self.special_ids = dict(special_ids)
        self.vocab_size = self.config.vocab_size if vocab_size is None else vocab_size
        assert 0 < self.vocab_size <= self.config.vocab_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    # ---------------------------------------------------------------- generation

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Step]:
        """Yield tokens as they are drawn; the last Step carries the finish reason.

        Raises ValueError at the call for an empty prompt, ids outside the vocabulary or no room in the context.
        """
        ids = self._checked(prompt_ids)
        return self._steps(ids, params, self._budget(ids, params.max_new_tokens))

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """`stream`, collected."""
        steps = list(self.stream(prompt_ids, params))
        reason = steps[-1].finish_reason
        assert reason is not None
        return Completion(tuple(s.token_id for s in steps), reason, tuple(s.logprob for s in steps))

    def _steps(self, ids: list[int], params: SamplingParams, budget: int) -> Iterator[Step]:
        generator = torch.Generator()
        generator.seed() if params.seed is None else generator.manual_seed(params.seed)
        layout, cache = self._layout(ids), self._cache(1, len(ids) + budget)
        positions = layout.positions(0, len(ids) + budget)[:, None].to(self.device)
        stop_ids = frozenset(params.stop_ids)
        # What the penalty sees: never a stop id, or an answer could not end after a prompt that holds one.
        seen = torch.tensor([[i for i in ids if i not in stop_ids]], device=self.device, dtype=torch.int64)
        logits = self._prefill(ids, layout, cache)
        for n_drawn in range(1, budget + 1):
            token, logprob = self._draw(logits, seen, params, generator)
            token_id = int(token)
            if logprob != logprob:
                raise FloatingPointError("the model computed NaN logits: its weights are damaged, or try float32")
            reason: FinishReason | None = "length" if n_drawn == budget else None
            if token_id in stop_ids:
                reason = "stop"
            yield Step(token_id, logprob, reason)
            if reason is not None:
                return
            if params.repetition_penalty != 1.0:
                seen = torch.cat([seen, token[:, None]], dim=1)
            at = len(ids) + n_drawn - 1
            logits = self._decode(token[:, None], positions[:, :, at : at + 1], cache)

    @torch.inference_mode()
    def _draw(
        self, logits: Tensor, seen: Tensor, params: SamplingParams, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        penalised = apply_repetition_penalty(logits, seen, params.repetition_penalty)
        token = sample(penalised, params.temperature, params.top_k, params.top_p, params.min_p, generator)
        return token, float(logits[0, token[0]] - logits[0].logsumexp(-1))

    # ---------------------------------------------------------------- beam search

    @torch.inference_mode()
    def beam(
        self,
        prompt_ids: Sequence[int],
        n_beams: int,
        max_new_tokens: int = 64,
        length_penalty: float = 0.0,
        no_repeat_ngram: int = 0,
        min_new_tokens: int = 0,
        stop_ids: Iterable[int] = (),
    ) -> list[Beam]:
        """(ids, score) of at most n_beams answers, best first; `BeamSearch` defines scores. Deterministic."""
        ids = self._checked(prompt_ids)
        budget = self._budget(ids, max_new_tokens)
        search = BeamSearch(ids, n_beams, budget, length_penalty, no_repeat_ngram, min_new_tokens, stop_ids)
        layout = self._layout(ids)
        positions = layout.positions(0, len(ids) + budget)[:, None].to(self.device).expand(-1, n_beams, -1)
        prompt_cache = self._cache(1, len(ids))
        search.advance(self._prefill(ids, layout, prompt_cache))
        if search.done:
            return search.results()
        cache = self._widened(prompt_cache, n_beams, len(ids) + budget)
        while not search.done:
            rows, tokens = search.last_step(self.device)
            if cache.length > len(ids):  # after the prompt all rows are equal
                cache.reorder(rows)
            search.advance(self._decode(tokens[:, None], positions[:, :, cache.length : cache.length + 1], cache))
        return search.results()

    def _widened(self, cache: KVCache, n_rows: int, max_len: int) -> KVCache:
        """The one row of `cache`, copied to every row of a new one."""
        wide = self._cache(n_rows, max_len)
        c = self.config
        nothing = torch.empty(1, c.n_kv_heads, 0, c.head_dim, device=self.device, dtype=self.model.dtype)
        for layer in range(c.n_layers):
            keys, values = (x[:, :, cache.n_prefix :] for x in cache.append(layer, nothing, nothing))
            wide.append(layer, keys.expand(n_rows, -1, -1, -1), values.expand(n_rows, -1, -1, -1))
        wide.advance(cache.length)
        return wide

    # ---------------------------------------------------------------- scoring

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """(T, vocab_size of the config) float32 on the engine's device: row t scores token t + 1. No row is masked."""
        return self.model.logits(self._hidden(self._checked(ids)))[0]

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int], start: int = 1) -> Tensor:
        """(T - start,) float32 log-probabilities (nats) of ids[start:], each given all before it."""
        ids = self._checked(ids)
        if not 1 <= start < len(ids):
            raise ValueError(f"nothing to score from token {start} on in {len(ids)} tokens")
        hidden = self._hidden(ids)[0, start - 1 : -1]
        targets = torch.tensor(ids[start:], device=self.device)
        parts = []
        for first in range(0, len(targets), _SCORE_ROWS):
            rows, wanted = hidden[first : first + _SCORE_ROWS], targets[first : first + _SCORE_ROWS, None]
            logits = self._masked(self.model.logits(rows))
            parts.append(logits.gather(-1, wanted)[:, 0] - logits.logsumexp(-1))
        return torch.cat(parts)

    def _hidden(self, ids: list[int]) -> Tensor:
        if len(ids) > self.config.max_seq_len:
            raise ValueError(f"{len(ids)} tokens are given but the context holds {self.config.max_seq_len}: give fewer")
        layout = self._layout(ids)
        return self.model(self._batch(ids, layout))

    # ---------------------------------------------------------------- passes

    def _checked(self, ids: Sequence[int]) -> list[int]:
        ids = [int(i) for i in ids]
        if not ids:
            raise ValueError("the prompt is empty: give at least one token")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(f"token id {wrong} is outside the vocabulary: ids are 0 to {self.config.vocab_size - 1}")
        return ids

    def _budget(self, ids: list[int], max_new_tokens: int) -> int:
        room = self.config.max_seq_len - len(ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(ids)} tokens but the context holds {self.config.max_seq_len} with the answer: "
                "shorten the prompt"
            )
        return min(max_new_tokens, room)

    def _layout(self, ids: list[int]) -> PromptLayout:
        return prompt_layout(ids, self.config, self.special_ids)

    def _cache(self, n_rows: int, max_len: int) -> KVCache:
        return KVCache(self.config, n_rows, max_len, self.device, self.model.dtype, self.model.kv_prefix)

    def _batch(self, ids: list[int], layout: PromptLayout) -> ForwardBatch:
        # A context of one token sees nothing that causal attention does not: keep the mask-free kernel.
        context = layout.context(len(ids))[None].to(self.device) if layout.n_context > 1 else None
        positions = layout.positions(0, len(ids))[:, None].to(self.device)
        return ForwardBatch(torch.tensor([ids], device=self.device), positions, context=context)

    def _masked(self, logits: Tensor) -> Tensor:
        if self.vocab_size < logits.shape[-1]:
            logits[..., self.vocab_size :] = float("-inf")
        return logits

    @torch.inference_mode()
    def _prefill(self, ids: list[int], layout: PromptLayout, cache: KVCache) -> Tensor:
        """Logits (1, V) behind the whole prompt."""
        hidden = self.model(self._batch(ids, layout), cache)
        return self._masked(self.model.logits(hidden[:, -1]))

    @torch.inference_mode()
    def _decode(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) behind one more token a row. tokens: (B, 1); positions: (axes, B, 1)."""
        hidden = self.model(ForwardBatch(tokens, positions), cache)
        return self._masked(self.model.logits(hidden[:, -1]))
