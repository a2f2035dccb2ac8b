"""Example, one training sample, and Rows, a packed micro-batch of them. numpy only.

An Example is laid out as the model reads it: `targets[t]` is the token to predict at position t. Rows put several
examples one behind the other in rows of fixed length; `segments` keeps them from seeing each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openglm.types import IGNORE

__all__ = ["KINDS", "Example", "Rows", "causal_example", "chat_example", "collate"]

KINDS = ("mask", "smask", "gmask", "lm", "sft")


@dataclass(frozen=True)
class Example:
    """One training sample, unpacked.

    ids: (T,) int32 input tokens.
    targets: (T,) int32 token to predict at each position, IGNORE where there is no loss.
    positions: (2, T) int32; row 0 position, row 1 block position (models with one axis use row 0 only).
    context: (T,) bool; True: bidirectional context, visible to the whole sample.
    kind: one of KINDS. weight: weight of each target token.
    """

    ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    positions: NDArray[np.int32]
    context: NDArray[np.bool_]
    kind: str
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Rows:
    """A micro-batch of B packed rows of length L.

    ids, targets: (B, L) int64. positions: (2, B, L) int64. segments: (B, L) int32, 0, 1, ... within a row and -1 on
    padding. context: (B, L) bool. kinds: (B, L) int8, index into KINDS. weights: (B, L) float32, 0 where no target.
    """

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int32]
    context: NDArray[np.bool_]
    kinds: NDArray[np.int8]
    weights: NDArray[np.float32]

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segments >= 0).sum())


def collate(rows: Sequence[Sequence[Example]], row_len: int, pad_id: int) -> Rows:
    """Rows from the examples of each row. The caller sees to it that they fit in row_len."""
    shape = (len(rows), row_len)
    out = Rows(
        ids=np.full(shape, pad_id, np.int64),
        targets=np.full(shape, IGNORE, np.int64),
        positions=np.zeros((2, *shape), np.int64),
        segments=np.full(shape, -1, np.int32),
        context=np.zeros(shape, np.bool_),
        kinds=np.zeros(shape, np.int8),
        weights=np.zeros(shape, np.float32),
    )
    for b, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples):
            stop = start + len(example)
            assert stop <= row_len, f"examples of {stop} tokens in a row of {row_len}"
            out.ids[b, start:stop] = example.ids
            out.targets[b, start:stop] = example.targets
            out.positions[:, b, start:stop] = example.positions
            out.segments[b, start:stop] = segment
            out.context[b, start:stop] = example.context
            out.kinds[b, start:stop] = KINDS.index(example.kind)
            out.weights[b, start:stop] = np.where(example.targets != IGNORE, example.weight, 0.0)
            start = stop
    return out


def causal_example(window: NDArray[np.integer]) -> Example:
    """Plain language modelling: input window[:-1], targets window[1:], positions 0, 1, ..., no special tokens."""
    n = len(window) - 1
    positions = np.broadcast_to(np.arange(n, dtype=np.int32), (2, n))
    ids, targets = window[:-1].astype(np.int32), window[1:].astype(np.int32)
    return Example(ids, targets, positions, np.zeros(n, np.bool_), "lm")


def chat_example(
    ids: NDArray[np.int32], loss_mask: NDArray[np.bool_], n_context: int, frozen: bool, weight: float = 1.0
) -> Example:
    """A rendered dialogue as an "sft" Example.

    ids, loss_mask: (N,); token i is a training target where loss_mask[i]. The input is ids[:-1].
    n_context: tokens before the first <sop> for prefix models, 0 for causal ones.
    frozen: positions stay at the last context token from <sop> on (two-axis models; see model/batch.py prompt_layout,
    whose mask index is the [gMASK] right before <sop>).
    """
    targets = np.where(loss_mask[1:], ids[1:], np.int32(IGNORE))
    index = np.arange(len(ids) - 1, dtype=np.int32)
    positions = np.stack([index, np.maximum(index - np.int32(n_context - 1), 0)])
    if frozen:
        np.minimum(positions[0], max(n_context - 1, 0), out=positions[0])
    return Example(ids[:-1], targets, positions, index < n_context, "sft", weight)
