"""Layers whose matrix stays quantised, put in place of nn.Linear and nn.Embedding from outside.

    python -m pytest -q tests/test_load.py

They dequantise a block of rows at a time into the dtype of the activations: the definition that faster kernels are
compared with. The quantised matrix itself is held once; a tied head shares the embedding's tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openglm.ops.quant import QuantTensor

__all__ = ["QuantEmbedding", "QuantLinear"]

# Weights dequantised at a time: on a CPU 2 MiB in float32, which stay in a core's cache; else few launches count more.
CPU_BLOCK_ELEMENTS, BLOCK_ELEMENTS = 1 << 19, 1 << 23


class _Quantised(nn.Module):
    """Holds a QuantTensor as buffers, so that it moves with the model."""

    q: Tensor
    scale: Tensor
    minimum: Tensor | None

    def __init__(self, weight: QuantTensor) -> None:
        super().__init__()
        self.register_buffer("q", weight.q)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("minimum", weight.minimum)

    @property
    def weight(self) -> QuantTensor:
        return QuantTensor(self.q, self.scale, self.minimum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Follow the device of `.to(...)`, never its dtype: scales keep their stored precision."""
        quantised = {name: self._buffers.pop(name) for name in ("q", "scale", "minimum")}
        super()._apply(fn, recurse)
        for name, tensor in quantised.items():
            self._buffers[name] = None if tensor is None else tensor.to(fn(tensor).device)
        return self


class QuantLinear(_Quantised):
    """x (..., columns) -> x @ weight.T + bias (..., rows), in x's dtype."""

    def __init__(self, weight: QuantTensor, bias: Tensor | None = None) -> None:
        super().__init__(weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        rows, columns = weight.shape
        block_elements = CPU_BLOCK_ELEMENTS if x.device.type == "cpu" else BLOCK_ELEMENTS
        step = max(1, block_elements // columns)
        if rows <= step:
            return F.linear(x, weight.dequantise(x.dtype), self.bias)
        out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
        for first in range(0, rows, step):
            block = slice(first, min(first + step, rows))
            bias = None if self.bias is None else self.bias[block]
            out[..., block] = F.linear(x, weight.take_rows(block).dequantise(x.dtype), bias)
        return out


class QuantEmbedding(_Quantised):
    """ids (...) -> rows of the weight (..., columns) in `dtype`."""

    def __init__(self, weight: QuantTensor, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight.take_rows(ids.reshape(-1)).dequantise(self.dtype)
        return rows.view(*ids.shape, rows.shape[-1])
