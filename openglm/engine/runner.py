"""ModelRunner: executes one planned pass, tokens of many sequences at once. TorchRunner: the same with PyTorch.

python -m pytest -q tests/test_engine_paged.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from openglm.config import GLMConfig
from openglm.model.batch import ForwardBatch
from openglm.model.paged import PagedCache, PagedPool, Span, key_centres
from openglm.model.transformer import Transformer
from openglm.ops.kv import CODE_BITS
from openglm.types import SamplingParams

__all__ = ["KV_DTYPES", "Burst", "Chunk", "Decoding", "ModelRunner", "TorchRunner"]

KV_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence to run through the model.

    ids: n tokens. start: tokens of the sequence whose keys and values are in the pool, all those in front of `ids`.
    positions: (axes, n) int64 on the CPU. pages: the sequence's pages in order, with room for start + n tokens.
    n_context: leading tokens that see each other both ways (prefix models); above 0 only with start == 0, and n holds
    them all. n_logits: rows of logits wanted, for the last n_logits tokens; 0 in the middle of a prompt.
    """

    ids: Sequence[int]
    start: int
    positions: Tensor
    pages: Sequence[int]
    n_context: int = 0
    n_logits: int = 1


@dataclass(frozen=True, slots=True)
class Decoding:
    """A sequence that is written, token by token.

    id: its last token, which has yet to run. start: tokens in the pool, all those in front of it. positions: (axes, n)
    int64 on the CPU, of the whole sequence. pages: as of a Chunk, with room for every step. seed and n_drawn: of the
    random numbers, see `ops.sampling.uniform`. stop_ids: those after which nothing follows.
    """

    id: int
    start: int
    positions: Tensor
    pages: Sequence[int]
    params: SamplingParams
    seed: int
    n_drawn: int
    stop_ids: Sequence[int]


class Burst(NamedTuple):
    """Steps of decoding. ids, logprobs: of each step, those drawn, in the order of the sequences; NO_TOKEN where the
    logits are no numbers. at: when each step ended, in seconds of time.perf_counter."""

    ids: list[list[int]]
    logprobs: list[list[float]]
    at: list[float]


class ModelRunner(Protocol):
    """Runs chunks of different sequences; at most one chunk of a sequence in a pass."""

    @property
    def config(self) -> GLMConfig: ...

    @property
    def page_size(self) -> int: ...

    @property
    def n_pages(self) -> int: ...

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pool."""

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """(sum of n_logits, vocab_size) float32, rows in the order of the chunks.

        Stores keys and values of all tokens. After an exception it may be called again with the same chunks.
        """


class TorchRunner:
    """A Transformer with a paged pool of its own. kv_dtype: a name of KV_DTYPES; None: the model's dtype."""

    def __init__(self, model: Transformer, n_pages: int, page_size: int = 16, kv_dtype: str | None = None) -> None:
        self.model, self.config = model, model.config
        dtype = kv_type(model, kv_dtype)
        self.pool = PagedPool(model.config, n_pages, page_size, dtype, model.device, key_centres(model))

    @property
    def page_size(self) -> int:
        return self.pool.page_size

    @property
    def n_pages(self) -> int:
        return self.pool.n_pages

    @property
    def kv_bytes(self) -> int:
        return self.pool.n_bytes

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        device = self.model.device
        ids = torch.tensor([[i for chunk in chunks for i in chunk.ids]], device=device)
        positions = chunks[0].positions if len(chunks) == 1 else torch.cat([c.positions for c in chunks], dim=1)
        spans = [Span(c.start, len(c.ids), c.pages, c.n_context) for c in chunks]
        cache = PagedCache(self.pool, spans, self.model.kv_prefix, self.model.dtype, device)
        hidden = self.model(ForwardBatch(ids, positions[:, None].to(device)), cache)[0]
        return self.model.logits(hidden[_wanted(chunks, device)])


def kv_type(model: Transformer, name: str | None) -> torch.dtype:
    if name is None:
        return model.dtype
    if name not in KV_DTYPES:
        raise ValueError(f"unknown kv_dtype {name!r}: give one of {', '.join(KV_DTYPES)}")
    if name == "int8" and model.config.head_dim < CODE_BITS:
        raise ValueError(f"kv_dtype int8 needs heads of at least {CODE_BITS} numbers, not {model.config.head_dim}")
    return KV_DTYPES[name]


def _wanted(chunks: Sequence[Chunk], device: torch.device) -> slice | Tensor:
    """Rows of the pass that logits are wanted for."""
    rows: list[int] = []
    end = 0
    for chunk in chunks:
        end += len(chunk.ids)
        rows += range(end - chunk.n_logits, end)
    if rows and rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, dtype=torch.int64, device=device)
