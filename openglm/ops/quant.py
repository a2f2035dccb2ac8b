"""Quantised weights: groups of a row share a scale, and, when asymmetric, a minimum. One form for every release.

A 4-bit weight is stored two to a byte, the even column in the low half. It stands for scale * (q - 8), or, with a
minimum, for scale * q + minimum (q from 0 to 15). An 8-bit one is a signed byte and stands for scale * q.
A group is a whole row in GLM-130B and ChatGLM, 32 columns in GGUF's Q4_0, Q4_1, Q4_K and Q8_0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["QuantParts", "QuantTensor", "Weight", "floats", "pack_int4", "unpack_int4"]


@dataclass(frozen=True)
class QuantTensor:
    """A matrix (rows, columns) of 4- or 8-bit weights.

    q: (rows, columns / 2) uint8, or (rows, columns) int8. scale: (rows, groups) float16 or float32.
    minimum: like scale, or None.
    """

    q: Tensor
    scale: Tensor
    minimum: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.q.dtype in (torch.uint8, torch.int8) and self.q.dim() == self.scale.dim() == 2
        assert self.q.shape[0] == self.scale.shape[0] and self.columns % self.scale.shape[1] == 0
        assert self.minimum is None or self.minimum.shape == self.scale.shape

    @property
    def bits(self) -> int:
        return 4 if self.q.dtype == torch.uint8 else 8

    @property
    def columns(self) -> int:
        return self.q.shape[1] * (2 if self.bits == 4 else 1)

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.columns

    @property
    def group_size(self) -> int:
        return self.columns // self.scale.shape[1]

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(rows, columns); the product is taken in float32 and rounded once."""
        values = unpack_int4(self.q) if self.bits == 4 else self.q
        grouped = values.view(values.shape[0], self.scale.shape[1], -1).to(torch.float32)
        scale = self.scale.float()[..., None]
        if self.minimum is not None:
            grouped = torch.addcmul(self.minimum.float()[..., None], grouped, scale)
        elif self.bits == 4:
            grouped = torch.addcmul(-8.0 * scale, grouped, scale)
        else:
            grouped.mul_(scale)
        return grouped.flatten(1).to(dtype)

    def to(self, device: torch.device | str) -> QuantTensor:
        minimum = None if self.minimum is None else self.minimum.to(device)
        return QuantTensor(self.q.to(device), self.scale.to(device), minimum)

    def take_rows(self, index: Tensor | slice) -> QuantTensor:
        minimum = None if self.minimum is None else self.minimum[index]
        return QuantTensor(self.q[index], self.scale[index], minimum)

    @staticmethod
    def cat(parts: Sequence[QuantTensor], dim: int = 0) -> QuantTensor:
        """Parts of one form below (0) or beside (1) each other; beside each other each keeps groups of its own."""
        assert QuantTensor.alike(parts), "parts of different forms"
        minimums = [p.minimum for p in parts if p.minimum is not None]
        return QuantTensor(
            torch.cat([p.q for p in parts], dim),
            torch.cat([p.scale for p in parts], dim),
            torch.cat(minimums, dim) if minimums else None,
        )

    @staticmethod
    def alike(parts: Sequence[object]) -> bool:
        """Whether all are QuantTensors of one form, so that `cat` takes them."""
        forms = {
            (p.bits, p.group_size, p.minimum is None) if isinstance(p, QuantTensor) else None for p in parts
        }  # fmt: skip
        return len(forms) == 1 and None not in forms


@dataclass(frozen=True)
class QuantParts:
    """Quantised matrices of different forms below each other, as files that mix types hold a fused projection."""

    parts: tuple[QuantTensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(p.shape[0] for p in self.parts), self.parts[0].columns

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(rows, columns), as `QuantTensor.dequantise`."""
        return torch.cat([p.dequantise(dtype) for p in self.parts])

    def to(self, device: torch.device | str) -> QuantParts:
        return QuantParts(tuple(p.to(device) for p in self.parts))

    def take_rows(self, index: Tensor) -> QuantParts:
        """Rows of an order that keeps each part together."""
        found, first = [], 0
        for part in self.parts:
            inside = index[first : first + part.shape[0]] - first
            assert int(inside.min()) >= 0 and int(inside.max()) < part.shape[0], "rows cross from part to part"
            found.append(part.take_rows(inside))
            first += part.shape[0]
        return QuantParts(tuple(found))


Weight = Tensor | QuantTensor  # a tensor of a checkpoint


def unpack_int4(q: Tensor) -> Tensor:
    """(rows, n) uint8 -> (rows, 2n) uint8 of 0..15, the low half first."""
    if sys.byteorder != "little":
        return torch.stack([q & 15, q >> 4], dim=-1).flatten(-2)
    spread = q.to(torch.int16)  # a byte's halves become the two bytes of one number
    return (spread | (spread << 4)).bitwise_and_(0x0F0F).view(torch.uint8)


def pack_int4(values: Tensor) -> Tensor:
    """(rows, 2n) integers of 0..15 -> (rows, n) uint8: the inverse of `unpack_int4`."""
    pairs = values.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def floats(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor itself, in its own dtype, or a quantised one in `dtype`."""
    return weight.dequantise(dtype) if isinstance(weight, QuantTensor) else weight
