"""Direct: whole passes over one prompt, without pool and scheduler: scores of given ids, and beam search.

python -m pytest -q tests/test_engine.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from openglm.config import GLMConfig
from openglm.engine.beam import Beam, BeamSearch
from openglm.engine.sampler import DAMAGED
from openglm.model.batch import ForwardBatch, PromptLayout, prompt_layout
from openglm.model.cache import KVCache
from openglm.model.transformer import Transformer

__all__ = ["Direct", "WholePasses", "check_ids", "room_in_context"]

_SCORE_ROWS = 128  # rows of logits held at once while scoring


def check_ids(ids: Sequence[int], config: GLMConfig) -> list[int]:
    """ids as a list of ints; ValueError when there are none, or one that is no token."""
    ids = [int(i) for i in ids]
    if not ids:
        raise ValueError("the prompt is empty: give at least one token")
    if min(ids) < 0 or max(ids) >= config.vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(f"token id {wrong} is outside the vocabulary: ids are 0 to {config.vocab_size - 1}")
    return ids


def room_in_context(n_prompt: int, config: GLMConfig) -> int:
    """Tokens that an answer may have; ValueError when there is room for none."""
    if n_prompt >= config.max_seq_len:
        raise ValueError(
            f"the prompt has {n_prompt} tokens but the context holds {config.max_seq_len} with the answer: "
            "shorten the prompt"
        )
    return config.max_seq_len - n_prompt


class Direct:
    """vocab_size: ids that may be drawn and share the probability; rows beyond belong to no token."""

    def __init__(self, model: Transformer, special_ids: Mapping[str, int], vocab_size: int) -> None:
        self.model, self.config = model, model.config
        self.special_ids, self.vocab_size = special_ids, vocab_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    # ---------------------------------------------------------------- beam search

    @torch.inference_mode()
    def beam(
        self,
        prompt_ids: Sequence[int],
        n_beams: int,
        max_new_tokens: int,
        length_penalty: float,
        no_repeat_ngram: int,
        min_new_tokens: int,
        stop_ids: Iterable[int],
    ) -> list[Beam]:
        """`Engine.beam`."""
        ids = check_ids(prompt_ids, self.config)
        budget = min(max_new_tokens, room_in_context(len(ids), self.config))
        search = BeamSearch(ids, n_beams, budget, length_penalty, no_repeat_ngram, min_new_tokens, stop_ids)
        layout = self._layout(ids)
        positions = layout.positions(0, len(ids) + budget)[:, None].to(self.device).expand(-1, n_beams, -1)
        prompt_cache = self._cache(1, len(ids))
        hidden = self.model(self._batch(ids, layout), prompt_cache)
        search.advance(self._masked(self.model.logits(hidden[:, -1])))
        if search.done:
            return search.results()
        cache = self._widened(prompt_cache, n_beams, len(ids) + budget)
        while not search.done:
            rows, tokens = search.last_step(self.device)
            if cache.length > len(ids):  # after the prompt all rows are equal
                cache.reorder(rows)
            batch = ForwardBatch(tokens[:, None], positions[:, :, cache.length : cache.length + 1])
            search.advance(self._masked(self.model.logits(self.model(batch, cache)[:, -1])))
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
        """`Engine.logits`."""
        logits = self.model.logits(self._hidden(check_ids(ids, self.config)))[0]
        if not logits.isfinite().all():
            raise FloatingPointError(DAMAGED)
        return logits

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int], start: int) -> Tensor:
        """`Engine.logprobs`."""
        ids = check_ids(ids, self.config)
        if not 1 <= start < len(ids):
            raise ValueError(f"nothing to score from token {start} on in {len(ids)} tokens")
        hidden = self._hidden(ids)[0, start - 1 : -1]
        targets = torch.tensor(ids[start:], device=self.device)
        parts = []
        for first in range(0, len(targets), _SCORE_ROWS):
            rows, wanted = hidden[first : first + _SCORE_ROWS], targets[first : first + _SCORE_ROWS, None]
            logits = self._masked(self.model.logits(rows))
            parts.append(logits.gather(-1, wanted)[:, 0] - logits.logsumexp(-1))
        found = torch.cat(parts)
        if found.isnan().any():
            raise FloatingPointError(DAMAGED)
        return found

    @torch.inference_mode()
    def top_logprobs(self, ids: Sequence[int], k: int) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
        """`Engine.top_logprobs`."""
        ids = check_ids(ids, self.config)
        hidden = self._hidden(ids)[0, :-1]
        targets = torch.tensor(ids[1:], device=self.device)
        found: list[tuple[float, tuple[tuple[int, float], ...]]] = []
        for first in range(0, len(targets), _SCORE_ROWS):
            rows, wanted = hidden[first : first + _SCORE_ROWS], targets[first : first + _SCORE_ROWS, None]
            logprobs = self._masked(self.model.logits(rows)).log_softmax(-1)
            top = logprobs.topk(k, -1)
            found += [
                (value, tuple(zip(top_ids, top_values, strict=True)))
                for value, top_ids, top_values in zip(
                    logprobs.gather(-1, wanted)[:, 0].tolist(), top.indices.tolist(), top.values.tolist(), strict=True
                )
            ]
        return found

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """`Engine.embed`."""
        ids = check_ids(ids, self.config)
        n, special = len(ids), self.special_ids
        if self.config.mask == "prefix" and "[gMASK]" in special and "<sop>" in special:
            ids = [*ids, special["[gMASK]"], special["<sop>"]]
        mean = self._hidden(ids)[0, :n].float().mean(0)
        return mean / mean.norm().clamp_min(1e-12)

    # ---------------------------------------------------------------- passes

    def _hidden(self, ids: list[int]) -> Tensor:
        if len(ids) > self.config.max_seq_len:
            raise ValueError(f"{len(ids)} tokens are given but the context holds {self.config.max_seq_len}: give fewer")
        return self.model(self._batch(ids, self._layout(ids)))

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


class WholePasses:
    """What an Engine offers of it. _turn: makes sure that nothing else runs meanwhile."""

    _direct: Direct
    _turn: Callable[[], AbstractContextManager[None]]

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
        with self._turn():
            return self._direct.beam(
                prompt_ids, n_beams, max_new_tokens, length_penalty, no_repeat_ngram, min_new_tokens, stop_ids
            )

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(T, vocab_size of the config) float32 on the engine's device: row t scores token t + 1. No row is masked."""
        with self._turn():
            return self._direct.logits(ids)

    def logprobs(self, ids: Sequence[int], start: int = 1) -> Tensor:
        """(T - start,) float32 log-probabilities (nats) of ids[start:], each given all before it."""
        with self._turn():
            return self._direct.logprobs(ids, start)

    def top_logprobs(self, ids: Sequence[int], k: int) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
        """For each of ids[1:] its log-probability (nats) given all before it, and the k likeliest (id, value) there."""
        with self._turn():
            return self._direct.top_logprobs(ids, k)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """(dim,) float32 of length 1: the mean of the tokens' hidden states. A prefix model reads them both ways."""
        with self._turn():
            return self._direct.embed(ids)
