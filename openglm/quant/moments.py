"""Moments: what a matrix sees behind rounded ones, and what it would see behind the true ones.

    python -m pytest -q tests/test_gptq.py

Arai and Ichikawa, "Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization", 2025: before a
matrix is rounded it moves to where it gives, of the inputs x that it will have, what it should give of the true ones.
With d = true x - x that is weight + weight (sum of d x^T) H^-1, H = sum of x x^T; and it moves only part of the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openglm.quant.gptq import shrinkage

__all__ = ["Moments"]

FAR = 0.5  # of the way: what is left of it is mostly this text learnt by heart
DAMPING = 0.2, 0.02  # of each entry of H's diagonal, and of its mean, added to it


class Moments:
    """Of the inputs of one matrix.

    weight: (rows, columns) float32, as it was before rounding. hessian: (columns, columns) float32, the sum of x x^T
    over inputs x. n: how many.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.n = weight, 0
        rows, columns = weight.shape
        self.hessian = torch.zeros(columns, columns)
        self.by_outputs = 2 * rows < columns  # then sums over weight @ d are less work than over d
        self.drift = torch.zeros(rows if self.by_outputs else columns, columns)
        self.own = torch.zeros(columns)  # the diagonal of the sum of d x^T

    def add(self, x: Tensor, true: Tensor) -> None:
        """Count inputs in. x: (n, columns). true: the same in the model that is not rounded."""
        d = true - x
        self.hessian.addmm_(x.t(), x)
        self.drift.addmm_((d @ self.weight.t() if self.by_outputs else d).t(), x)
        self.own += (d * x).sum(0)
        self.n += len(x)

    def compensated(self) -> Tensor:
        """(rows, columns): the weight, moved. Ends the gathering, and frees what it alone needed."""
        part, drift = shrinkage(len(self.hessian), self.n), self.drift  # columns have in common what they have in GPTQ
        self.drift = torch.empty(0)
        push = (drift if self.by_outputs else self.weight @ drift).mul_(1.0 - part)
        del drift
        push.addcmul_(self.own, self.weight, value=part)
        if not bool(push.any()):  # nothing before it is rounded
            return self.weight
        seen = self.hessian.diagonal()
        h = self.hessian * (1.0 - part)
        h.diagonal().copy_(seen * (1 + DAMPING[0]) + DAMPING[1] * seen.mean())
        factor, failed = torch.linalg.cholesky_ex(h)
        if failed:  # what is not finite: gptq says so
            return self.weight
        del h
        return self.weight + FAR * torch.cholesky_solve(push.t(), factor).t()
