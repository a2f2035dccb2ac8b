"""GGUF's tensor types, between their bytes and our weights, a few rows at a time.

    python -m pytest -q tests/test_gguf_types.py

Q4_0, Q4_1, Q5_0 and Q8_0 are kept quantised bit for bit, Q4_K and Q6_K up to the rounding of their sub-scales to
float16 (Q5_0 and Q6_K as INT8, which holds their values exactly); the others are dequantised to bfloat16. A block of
32 columns (256 for the K types) lies together. Block layouts: ggml's, as the `gguf` library documents them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openglm.ops.native import GgufMatrix, unpack_gguf
from openglm.ops.quant import QuantTensor, Weight

__all__ = ["TYPES", "GgufType", "as_matrix", "decode", "encode", "kept_type", "type_name"]

Array = np.ndarray[Any, np.dtype[Any]]
CHUNK_BYTES = 1 << 18  # of packed blocks: small enough that temporaries stay on the heap and in a core's cache


@dataclass(frozen=True)
class GgufType:
    """Number in the file, columns of a block, bytes of a block."""

    id: int
    block: int
    n_bytes: int


TYPES = {
    "F32": GgufType(0, 1, 4), "F16": GgufType(1, 1, 2), "BF16": GgufType(30, 1, 2), "Q8_0": GgufType(8, 32, 34),
    "Q4_0": GgufType(2, 32, 18), "Q4_1": GgufType(3, 32, 20), "Q5_0": GgufType(6, 32, 22), "Q5_1": GgufType(7, 32, 24),
    "Q2_K": GgufType(10, 256, 84), "Q3_K": GgufType(11, 256, 110), "Q4_K": GgufType(12, 256, 144),
    "Q5_K": GgufType(13, 256, 176), "Q6_K": GgufType(14, 256, 210), "IQ4_NL": GgufType(20, 32, 18),
}  # fmt: skip
_NAMES = {kind.id: name for name, kind in TYPES.items()}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def type_name(id: int) -> str:
    """Name of a type number, whether it is supported or not."""
    if id in _NAMES:
        return _NAMES[id]
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(id).name
    except ValueError:
        return f"number {id}"


# -------------------------------------------------------------------- decoding


def decode(type: str, data: Tensor, shape: tuple[int, ...]) -> Weight:
    """A tensor of `shape` from its bytes (n,) uint8, in memory of its own."""
    if type in _DTYPES:
        return data.view(_DTYPES[type]).view(shape).clone()
    blocks = data.numpy().reshape(-1, TYPES[type].n_bytes)
    columns = shape[-1]
    rows = blocks.shape[0] * TYPES[type].block // columns
    if type not in _UNPACK or len(shape) != 2:
        return _dequantised(type, blocks).view(shape)
    unpack, bits, group, has_minimum = _UNPACK[type]
    q = np.empty((blocks.shape[0], TYPES[type].block * bits // 8), np.uint8 if bits == 4 else np.int8)
    scale = np.empty((blocks.shape[0], TYPES[type].block // group), np.float16)
    minimum = np.empty_like(scale) if has_minimum else None
    parts = [None if a is None else torch.from_numpy(a) for a in (q, scale, minimum)]
    assert parts[0] is not None and parts[1] is not None
    if not unpack_gguf(type, data.view(blocks.shape), parts[0], parts[1], parts[2]):
        for part in _chunks(blocks):
            unpack(blocks[part], q[part], scale[part], None if minimum is None else minimum[part])
    q_part, scale_part, minimum_part = (None if t is None else t.view(rows, -1) for t in parts)
    assert q_part is not None and scale_part is not None
    return QuantTensor(q_part, scale_part, minimum_part)


def _chunks(blocks: Array) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // blocks.shape[1])
    for first in range(0, len(blocks), step):
        yield slice(first, first + step)


def _dequantised(type: str, blocks: Array) -> Tensor:
    """(blocks, columns of a block) bfloat16."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    out = torch.empty(blocks.shape[0], TYPES[type].block, dtype=torch.bfloat16)
    for part in _chunks(blocks):
        # As one long row: the library goes through rows sixteen at a time.
        values = dequantize(blocks[part].reshape(1, -1), GGMLQuantizationType[type])
        out[part] = torch.from_numpy(values).view(-1, out.shape[1])
    return out


# Blocks are too short for NumPy to work along (a call's inner loop would be 8 or 16 long), so bytes are first copied
# out of them as numbers of 8 or 16 bytes, then worked on as one long run.


def _run(blocks: Array, first: int, n_bytes: int) -> Array:
    """Bytes first .. first + n_bytes (a multiple of 16) of every block, contiguous: (blocks * n_bytes,) uint8."""
    out = np.empty((len(blocks), n_bytes // 16), np.complex128)
    for i in range(n_bytes // 16):
        out[:, i] = np.ndarray(len(blocks), np.complex128, blocks.data, first + 16 * i, (blocks.shape[1],))
    return out.view(np.uint8).reshape(-1)


def _half(blocks: Array, first: int) -> Array:
    """The float16 at byte `first` of every block."""
    return np.ndarray(len(blocks), np.float16, blocks.data, first, (blocks.shape[1],))


def _interleave(q: Array, low: Array, high: Array, number: Any) -> None:
    """q gets runs of one number's bytes from low and high in turn."""
    out = q.view(number).reshape(-1, 2)
    out[:, 0], out[:, 1] = low.view(number), high.view(number)


def _pair(packed: Array) -> tuple[Array, Array]:
    """The low halves of 2n bytes, two to a byte, and the high halves: (n,) uint8 each.

    GGUF's low halves are one run of columns and the high halves the next; ours are neighbours.
    """
    words = packed.view("<u2")
    shifted = words >> 4
    low = (words & 0x0F) | (shifted & 0xF0)
    high = (shifted & 0x0F) | ((words >> 8) & 0xF0)
    return low.astype(np.uint8), high.astype(np.uint8)


def _rounded(out: Array, values: Array) -> None:
    """float16 of (groups of a block, blocks) float32; PyTorch's conversion is several times NumPy's speed."""
    torch.from_numpy(out).copy_(torch.from_numpy(values).half().T)


def _unpack_4_0(blocks: Array, q: Array, scale: Array, minimum: Array | None) -> None:
    scale[:, 0] = _half(blocks, 0)
    _interleave(q, *_pair(_run(blocks, 2, 16)), np.uint64)


def _unpack_4_1(blocks: Array, q: Array, scale: Array, minimum: Array | None) -> None:
    assert minimum is not None
    scale[:, 0], minimum[:, 0] = _half(blocks, 0), _half(blocks, 2)
    _interleave(q, *_pair(_run(blocks, 4, 16)), np.uint64)


def _unpack_8_0(blocks: Array, q: Array, scale: Array, minimum: Array | None) -> None:
    scale[:, 0] = _half(blocks, 0)
    q[...] = _run(blocks, 2, 32).view(np.int8).reshape(q.shape)


def _unpack_5_0(blocks: Array, q: Array, scale: Array, minimum: Array | None) -> None:
    scale[:, 0] = _half(blocks, 0)
    packed, fifth = _run(blocks, 6, 16), np.ascontiguousarray(blocks[:, 2:6])
    _interleave(q, packed & 15, packed >> 4, np.complex128)
    flat = q.reshape(-1)
    flat |= np.unpackbits(fifth.reshape(-1), bitorder="little").view(np.int8) << 4
    flat -= 16


def _unpack_4_k(blocks: Array, q: Array, scale: Array, minimum: Array | None) -> None:
    assert minimum is not None
    packed = np.ascontiguousarray(blocks[:, 4:16].T)
    a, b, c = packed[:4], packed[4:8], packed[8:]  # six bits each of eight scales and eight minimums
    _rounded(scale, _half(blocks, 0).astype(np.float32) * np.concatenate([a & 63, (c & 15) | ((a >> 2) & 48)]))
    _rounded(minimum, -_half(blocks, 2).astype(np.float32) * np.concatenate([b & 63, (c >> 4) | ((b >> 2) & 48)]))
    _interleave(q, *_pair(_run(blocks, 16, 128)), np.complex128)


def _unpack_6_k(blocks: Array, q: Array, scale: Array, minimum: Array | None) -> None:
    """Four low bits, two high ones, a signed byte of scale for 16 columns."""
    scales = np.ascontiguousarray(blocks[:, 192:208].T).view(np.int8)
    _rounded(scale, _half(blocks, 208).astype(np.float32) * scales)
    low = _run(blocks, 0, 128).reshape(-1, 2, 64)
    high = _run(blocks, 128, 64).reshape(-1, 2, 32)
    out = q.view(np.uint8).reshape(-1, 2, 128)
    out[..., :64], out[..., 64:] = low & 15, low >> 4
    for i, bits in enumerate((high << 4, high << 2, high, high >> 2)):
        out[..., 32 * i : 32 * i + 32] |= bits & 48
    flat = q.reshape(-1)
    flat -= 32


# How each kept type is unpacked, its bits and columns of a group in our form, and whether it has a minimum.
_UNPACK: dict[str, tuple[Callable[[Array, Array, Array, Array | None], None], int, int, bool]] = {
    "Q4_0": (_unpack_4_0, 4, 32, False), "Q4_1": (_unpack_4_1, 4, 32, True), "Q4_K": (_unpack_4_k, 4, 32, True),
    "Q8_0": (_unpack_8_0, 8, 32, False), "Q5_0": (_unpack_5_0, 8, 32, False), "Q6_K": (_unpack_6_k, 8, 16, False),
}  # fmt: skip


def as_matrix(type: str, data: Tensor, shape: tuple[int, ...], order: Tensor | None) -> GgufMatrix | None:
    """A mapped matrix that can be packed from where it lies, rows in that order; None if its type is not kept."""
    if type not in _UNPACK or len(shape) != 2:
        return None
    _, _, group, has_minimum = _UNPACK[type]
    return GgufMatrix(type, (shape[0], shape[1]), group, has_minimum, data, order, mapped=True)


# -------------------------------------------------------------------- encoding


def kept_type(weight: QuantTensor) -> str | None:
    """The type that holds a quantised weight bit for bit, or None."""
    if weight.group_size != 32 or weight.scale.dtype != torch.float16:
        return None
    if weight.bits == 8:
        return "Q8_0" if weight.minimum is None else None
    return "Q4_0" if weight.minimum is None else "Q4_1"


def encode(type: str, weight: Weight) -> Iterator[memoryview]:
    """The bytes of a weight in a type, a few rows at a time: F32, F16, BF16, Q8_0, Q4_0 and Q4_1.

    A QuantTensor whose form `type` is goes over bit for bit. Raises ValueError for a value that F16 cannot hold.
    """
    if isinstance(weight, QuantTensor) and kept_type(weight) == type:
        yield from _packed(type, weight)
        return
    n_rows, columns = weight.shape if len(weight.shape) == 2 else (1, weight.shape[0])
    step = max(1, (1 << 22) // columns)
    for first in range(0, n_rows, step):
        rows = slice(first, first + step)
        if isinstance(weight, QuantTensor):
            values = weight.take_rows(rows).dequantise()
        else:
            values = weight.reshape(n_rows, columns)[rows]
        yield _encoded(type, values).data.cast("B")


def _encoded(type: str, values: Tensor) -> Array:
    if type in _DTYPES:
        stored = values.to(_DTYPES[type]).contiguous()
        if type == "F16" and (stored.isinf() & ~values.isinf()).any():
            raise ValueError(f"a weight of {float(values.abs().max()):.3g} does not fit F16 (65504): write BF16 or F32")
        return stored.view(torch.uint8).numpy()
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return np.ascontiguousarray(quantize(values.float().contiguous().numpy(), GGMLQuantizationType[type]))


def _packed(type: str, weight: QuantTensor) -> Iterator[memoryview]:
    """Blocks of scale, minimum and values: the inverse of `_UNPACK`."""
    n_blocks = weight.scale.numel()
    scales = [t.reshape(n_blocks, 1).numpy().view(np.uint8) for t in (weight.scale, weight.minimum) if t is not None]
    q = weight.q.reshape(n_blocks, -1).numpy().view(np.uint8)
    blocks = np.empty((min(n_blocks, 1 << 16), TYPES[type].n_bytes), np.uint8)
    for first in range(0, n_blocks, len(blocks)):
        part = slice(first, min(first + len(blocks), n_blocks))
        out = blocks[: part.stop - first]
        for i, scale in enumerate(scales):
            out[:, 2 * i : 2 * i + 2] = scale[part]
        values = q[part]
        if weight.bits == 4:
            nibbles = np.stack([values & 15, values >> 4], -1).reshape(-1, 2, 16)
            values = nibbles[:, 0] | (nibbles[:, 1] << 4)
        out[:, 2 * len(scales) :] = values
        yield out.copy().data.cast("B")
