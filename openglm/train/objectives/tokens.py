"""TokenLoss: weighted cross-entropy of the tokens that have a target. Serves infill, lm and sft alike."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from openglm.data.example import KINDS
from openglm.ops.loss import linear_cross_entropy
from openglm.train.objectives.base import ObjectiveLoss, TensorRows

__all__ = ["TokenLoss"]


class TokenLoss:
    """Sum over target tokens of weight * -log p(token). Only positions with a target reach the vocabulary matrix."""

    def __init__(self, chunk: int | None = None) -> None:
        """chunk: targets whose logits exist at once; default as in ops.loss."""
        self.chunk = chunk

    def loss(self, model: nn.Module, rows: TensorRows) -> ObjectiveLoss:
        glm = cast(Any, model)
        hidden: Tensor = model(rows.forward_batch(glm.config))
        hidden = hidden.flatten(0, 1).index_select(0, rows.index)
        loss, losses = linear_cross_entropy(hidden, glm.head_weight(), rows.targets, rows.weights, chunk=self.chunk)
        sums = torch.zeros(len(KINDS), device=losses.device).index_add_(0, rows.kinds, losses.float())
        metrics: dict[str, Tensor | float] = {}
        for kind, count in rows.kind_counts.items():
            metrics[f"loss_sum/{kind}"] = sums[KINDS.index(kind)]
            metrics[f"count/{kind}"] = float(count)
        return ObjectiveLoss(loss, rows.weights.sum(), metrics)
