"""The contract between the Trainer and an objective: rows as tensors in, a loss sum and its normaliser out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from openglm.config import GLMConfig, nearest
from openglm.data.example import Rows
from openglm.data.stream import RowStream
from openglm.model.batch import ForwardBatch
from openglm.tokenizer import Tokenizer
from openglm.types import IGNORE

__all__ = [
    "Objective", "ObjectiveEntry", "ObjectiveLoss", "Split", "TensorRows", "normaliser", "parse_data",
]  # fmt: skip

Split = Literal["train", "val"]


@dataclass(frozen=True)
class TensorRows:
    """Rows on a device, with the loss positions already gathered (on the host, so that no device sync is needed).

    ids (B, L) int64; positions (2, B, L) int64; segments (B, L) int32, -1 padding; context (B, L) bool.
    index (N,) int64: positions with a target in the flattened (B * L) rows; targets (N,) int64; weights (N,) float32;
    kinds (N,) int64, index into KINDS. kind_counts: number of targets per kind, known without looking at the device.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    context: Tensor
    index: Tensor
    targets: Tensor
    weights: Tensor
    kinds: Tensor
    kind_counts: Mapping[str, int]

    @classmethod
    def from_rows(cls, rows: Rows, device: torch.device | str = "cpu") -> TensorRows:
        """Copy numpy rows to a device."""
        from openglm.data.example import KINDS

        targets = rows.targets.reshape(-1)
        index = np.flatnonzero(targets != IGNORE)
        kinds = rows.kinds.reshape(-1)[index].astype(np.int64)
        counts = np.bincount(kinds, minlength=len(KINDS))

        def move(array: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            if torch.device(device).type == "cuda":
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        return cls(
            move(rows.ids), move(rows.positions), move(rows.segments), move(rows.context), move(index),
            move(targets[index]), move(rows.weights.reshape(-1)[index]), move(kinds),
            {kind: int(n) for kind, n in zip(KINDS, counts, strict=True) if n},
        )  # fmt: skip

    def forward_batch(self, config: GLMConfig) -> ForwardBatch:
        """Input of the model: as many position axes as it has, and no context flags for a causal one."""
        context = self.context if config.mask == "prefix" else None
        return ForwardBatch(self.ids, self.positions[: config.n_axes], self.segments, context)


class ObjectiveLoss(NamedTuple):
    """loss: differentiable scalar, sum of weight * token loss. normaliser: scalar tensor, sum of the weights.

    metrics: additive over micro-batches and ranks, detached: "loss_sum/KIND" (unweighted token losses, nats) and
    "count/KIND" (tokens) for each kind present. A report shows loss_sum / count.
    """

    loss: Tensor
    normaliser: Tensor
    metrics: dict[str, Tensor | float]


class Objective(Protocol):
    def loss(self, model: nn.Module, rows: TensorRows) -> ObjectiveLoss:
        """Loss of one micro-batch. `model` has `.config`, `.head_weight()` and maps a ForwardBatch to (B, L, dim)."""
        ...


def normaliser(rows: Rows) -> float:
    """Sum of target weights, from the host arrays: what the losses of all micro-batches of a step are divided by."""
    return float(rows.weights[rows.targets != IGNORE].sum(dtype=np.float64))


@dataclass(frozen=True)
class ObjectiveEntry:
    """One line of the registry.

    data: frozen dataclass of the run's `data:` section.
    build_stream(data, model_config, tokenizer, row_len, seed, split) -> RowStream; ValueError when split has no data.
    build_objective(chunk=None) -> Objective; chunk: targets whose logits exist at once.
    """

    data: type[Any]
    build_stream: Callable[[Any, GLMConfig, Tokenizer, int, int, Split], RowStream]
    build_objective: Callable[..., Objective]

    def parse_data(self, values: Mapping[str, Any]) -> Any:
        return parse_data(self.data, values)


def parse_data(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """Dataclass from the `data:` mapping; ValueError names an unknown key and its nearest field."""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key data.{key}{nearest(key, known)}; known: {', '.join(known)}")
    try:
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    except TypeError as error:
        raise ValueError(f"data section: {error}") from None
