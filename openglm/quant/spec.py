"""QuantSpec: INT8 or INT4 weights in groups of columns, and rounding to nearest into that form.

    python -m openglm convert MODEL OUT --format openglm --quantize int4
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openglm.ops.quant import QuantTensor, pack_int4

__all__ = ["QuantSpec", "quantise"]

BLOCK_ELEMENTS = 1 << 23  # weights in float32 at a time: 32 MiB


@dataclass(frozen=True)
class QuantSpec:
    """How matrices are stored.

    bits: 4 or 8. group: columns that share a scale, None for a whole row (GLM-130B). symmetric: scale alone, from the
    largest magnitude; else scale and minimum from the smallest and largest value. embeddings: embedding and head too.
    """

    bits: Literal[4, 8] = 4
    group: int | None = 32
    symmetric: bool = False
    embeddings: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"quantisation to {self.bits} bits is not supported: int4 or int8")
        if self.group is not None and (self.group < 2 or self.group % 2):
            raise ValueError(f"a group must be an even number of columns, or row, not {self.group}")

    @classmethod
    def parse(cls, name: str, group: str | None = None, embeddings: bool = False) -> QuantSpec:
        """From the words of the command line: int4 or int8, and a number of columns or "row".

        INT4 has a minimum unless it is by rows; INT8 and whole rows are symmetric, as GLM-130B stores them.
        """
        if name not in ("int4", "int8"):
            raise ValueError(f"unknown quantisation {name!r}: give int4 or int8")
        if group is not None and group != "row" and not group.isdecimal():
            raise ValueError(f"a group is a number of columns or row, not {group!r}")
        width = 32 if group is None else None if group == "row" else int(group)
        return cls(4 if name == "int4" else 8, width, name == "int8" or width is None, embeddings)

    def applies(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor of that name (ours) is quantised. Raises ValueError when the groups do not fit it."""
        if len(shape) != 2 or name.startswith(("embed_position", "embed_block")):
            return False
        if name in ("embed.weight", "head.weight") and not self.embeddings:
            return False
        columns = shape[1]
        if columns % (self.group or 2):
            raise ValueError(f"{name} has {columns} columns, which groups of {self.group or 2} do not divide")
        return True

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a matrix of this shape takes."""
        n_groups = 1 if self.group is None else shape[1] // self.group
        return shape[0] * (shape[1] * self.bits // 8 + n_groups * (2 if self.symmetric else 4))


def quantise(weight: Tensor, spec: QuantSpec) -> QuantTensor:
    """Round (rows, columns) to the nearest values of the form, a block of rows at a time; half goes to even.

    Symmetric: scale = max |w| / (2^(bits-1) - 1), as GLM-130B (paper, section 2.4); else scale = (max - min) /
    (2^bits - 1). Scales and minimums are float16, and the integers are found with the rounded ones.
    """
    if spec.bits == 8 and not spec.symmetric:
        raise ValueError("INT8 is symmetric: its integers are signed")
    step = max(1, BLOCK_ELEMENTS // weight.shape[1])
    return QuantTensor.cat([_block(part, spec) for part in weight.split(step)])


def _block(weight: Tensor, spec: QuantSpec) -> QuantTensor:
    rows, columns = weight.shape
    grouped = weight.float().view(rows, -1, columns if spec.group is None else spec.group)
    tiny = torch.finfo(torch.float16).tiny
    if spec.symmetric:
        top = 2 ** (spec.bits - 1) - 1
        scale = (grouped.abs().amax(-1) / top).half()
        q = grouped / scale.float().clamp(min=tiny)[..., None]
        if spec.group is None and weight.dtype == torch.float16:
            q = q.half().float()  # the original divides in half precision: one weight in fifty differs by one
        q = q.round_().clamp_(-top - 1, top)
        if spec.bits == 8:
            return QuantTensor(q.to(torch.int8).view(rows, columns), scale)
        return QuantTensor(pack_int4((q + 8).view(rows, columns)), scale)
    minimum = grouped.amin(-1).half()
    scale = ((grouped.amax(-1) - minimum.float()) / 15).half()
    q = ((grouped - minimum.float()[..., None]) / scale.float().clamp(min=tiny)[..., None]).round_().clamp_(0, 15)
    return QuantTensor(pack_int4(q.view(rows, columns)), scale, minimum)
