"""Layers whose matrix stays quantised, put in place of nn.Linear and nn.Embedding from outside.

    python -m pytest -q tests/test_load.py

They dequantise a block of rows at a time into the dtype of the activations: the definition that faster kernels are
compared with. The quantised matrix itself is held once; a tied head shares the embedding's tensors. Packed ones hold
it in the order that the native library reads, and compute the same here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openglm.ops.native import PackedMatrix, pack, packable
from openglm.ops.quant import QuantParts, QuantTensor

__all__ = ["PackedEmbedding", "PackedLinear", "QuantEmbedding", "QuantLinear", "RowParts", "quantised_linear"]

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
        return by_blocks(x, *weight.shape, lambda rows: weight.take_rows(rows).dequantise(x.dtype), self.bias)


def by_blocks(
    x: Tensor, rows: int, columns: int, block_of: Callable[[slice], Tensor], bias: Tensor | None
) -> Tensor:
    """F.linear with a matrix (rows, columns) that is made a block of rows at a time."""
    block_elements = CPU_BLOCK_ELEMENTS if x.device.type == "cpu" else BLOCK_ELEMENTS
    step = max(1, block_elements // columns)
    if rows <= step:
        return F.linear(x, block_of(slice(0, rows)), bias)
    out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    for first in range(0, rows, step):
        block = slice(first, min(first + step, rows))
        out[..., block] = F.linear(x, block_of(block), None if bias is None else bias[block])
    return out


class QuantEmbedding(_Quantised):
    """ids (...) -> rows of the weight (..., columns) in `dtype`."""

    def __init__(self, weight: QuantTensor, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight.take_rows(ids.reshape(-1)).dequantise(self.dtype)
        return rows.view(*ids.shape, rows.shape[-1])


class PackedLinear(nn.Module):
    """`QuantLinear` with its matrix packed for the native library. Stays on the CPU."""

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        m = self.matrix

        def block_of(rows: slice) -> Tensor:
            return m.dequantise(rows.start, rows.stop - rows.start).to(x.dtype)

        return by_blocks(x, m.rows, m.columns, block_of, self.bias)


class PackedEmbedding(nn.Module):
    """`QuantEmbedding` with its matrix packed."""

    def __init__(self, matrix: PackedMatrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.take(ids.reshape(-1)).to(self.dtype).view(*ids.shape, self.matrix.columns)


class RowParts(nn.Module):
    """Quantised layers over rows below each other, and one bias: a matrix of several forms."""

    def __init__(self, parts: list[nn.Module], bias: Tensor | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([part(x) for part in self.parts], dim=-1)
        return y if self.bias is None else y + self.bias


def quantised_linear(weight: QuantTensor | QuantParts, packed: bool = False, cut: int | None = None) -> nn.Module:
    """The layer of a quantised matrix, without its bias. packed: for the native library, where it knows the form.

    cut: rows after which a packed matrix is held in two parts, as the kernels want a gate and what it multiplies.
    """
    if isinstance(weight, QuantParts):
        return RowParts([quantised_linear(part, packed) for part in weight.parts])
    if not packed or not packable(weight):
        return QuantLinear(weight)
    if cut is not None:
        return RowParts([PackedLinear(pack(weight.take_rows(r))) for r in (slice(0, cut), slice(cut, None))])
    return PackedLinear(pack(weight))
