"""Heads of keys and values in INT8, as many bytes as they have numbers: the scale hides in the lowest bits.

    python -m pytest -q tests/test_kv.py

A head is divided by a scale and rounded. The scale's eight bits, five of exponent and three of mantissa from 2^-22 on,
are the lowest bits of the first eight numbers, which are rounded to odd or even ones accordingly. So a cache in INT8
takes half of one in float16, and nothing besides. The native library keeps its cache in the same form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["CODE_BITS", "from_bytes", "spread", "to_bytes"]

CODE_BITS = 8
_BASE = (127 - 22) << 23  # float32 bits of the least scale, 2^-22
_NAN = 255  # the code of a head that holds infinities or no numbers


def to_bytes(x: Tensor) -> Tensor:
    """(..., D) float32 to int8, D at least 8. Absmax, the scale rounded up; a head with NaN or infinity is all NaN."""
    top = x.abs().amax(-1, keepdim=True)
    finite = top.isfinite()
    bits = (top.nan_to_num(0.0, posinf=0.0) / 127.0).contiguous().view(torch.int32)
    code = ((bits.clamp(min=_BASE) - _BASE + (1 << 20) - 1) >> 20).clamp(max=_NAN - 1)
    y = torch.where(finite, x, 0.0) / _scale(code)
    code = torch.where(finite, code, _NAN)
    bit = ((code >> torch.arange(CODE_BITS, device=x.device)) & 1).float()
    coded = torch.where(finite, ((y[..., :CODE_BITS] - bit) / 2).round() * 2, 0.0).clamp(-128, 126) + bit
    return torch.cat([coded, y[..., CODE_BITS:].round().clamp(-128, 127)], dim=-1).to(torch.int8)


def from_bytes(x: Tensor) -> Tensor:
    """What `to_bytes` made: (..., D) float32."""
    bit = (x[..., :CODE_BITS] & 1).to(torch.int32)
    return x.float() * _scale((bit << torch.arange(CODE_BITS, device=x.device)).sum(-1, keepdim=True))


def _scale(code: Tensor) -> Tensor:
    bits = (code.to(torch.int32) << 20) + _BASE
    return bits.view(torch.float32).masked_fill(code == _NAN, math.nan)


def spread(x: Tensor) -> Tensor:
    """(..., D) by blocks of as many numbers as the largest power of two in D: their Walsh-Hadamard transform.

    Its own inverse. A turn that shares what is large in one number among all of a block, so that a scale fits them.
    """
    n_rows, block = x.shape[:-1], x.shape[-1] & -x.shape[-1]
    for h in (1 << i for i in range(block.bit_length() - 1)):
        pairs = x.reshape(*n_rows, -1, 2, h)
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], dim=-2)
    return x.reshape(*n_rows, -1) * block**-0.5
