"""GGUF tensor types against the `gguf` library's own dequantisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from openglm.model.gguf_types import TYPES, decode, encode, kept_type, type_name
from openglm.ops.quant import QuantTensor

gguf = pytest.importorskip("gguf")
KEPT = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 8, "Q6_K": 8, "Q8_0": 8}
TWO = dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))
HALVES = {**TWO, "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}  # where a block's float16 numbers are


def blocks(type: str, rows: int = 24, columns: int = 768) -> np.ndarray[Any, Any]:
    """Random blocks (rows, bytes of a row): every bit pattern but for scales, which are numbers around 0.01."""
    rng = np.random.default_rng(TYPES[type].id)
    n = rows * columns // TYPES[type].block
    data = rng.integers(0, 256, (n, TYPES[type].n_bytes), dtype=np.uint8)
    for at in HALVES.get(type, (0,)):
        data[:, at : at + 2] = (rng.standard_normal((n, 1)) / 100).astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("type", [t for t in TYPES if t.startswith(("Q", "IQ"))])
def test_values_are_those_of_the_gguf_library(type: str) -> None:
    data = blocks(type)
    reference = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type]))
    weight = decode(type, torch.from_numpy(data).flatten(), (24, 768))
    assert weight.shape == (24, 768)
    if type not in KEPT:
        assert isinstance(weight, torch.Tensor) and torch.equal(weight, reference.bfloat16())
        return
    assert isinstance(weight, QuantTensor) and weight.bits == KEPT[type]
    ours = weight.dequantise()
    if type == "Q4_K":  # scale and minimum are rounded to half, each in its own part of the value
        assert weight.minimum is not None
        minimum = weight.minimum.float().repeat_interleave(32, 1)
        assert ((ours - reference).abs() <= 2**-11 * ((reference - minimum).abs() + 2.1 * minimum.abs()) + 1e-7).all()
    elif type == "Q6_K":
        assert weight.group_size == 16 and ((ours - reference).abs() <= 2**-10.99 * reference.abs() + 1e-6).all()
    else:
        assert weight.group_size == 32 and torch.equal(ours, reference)


@pytest.mark.parametrize("type", ["F32", "F16", "BF16"])
def test_plain_types_and_memory_of_their_own(type: str) -> None:
    values = torch.randn(5, 7).to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type])
    data = b"".join(encode(type, values))
    buffer = bytearray(data)
    back = decode(type, torch.frombuffer(buffer, dtype=torch.uint8), (5, 7))
    buffer[:] = bytes(len(buffer))
    assert isinstance(back, torch.Tensor) and back.dtype == values.dtype and torch.equal(back, values)


@pytest.mark.parametrize("type", ["Q4_0", "Q4_1", "Q8_0"])
def test_quantised_bytes_come_back(type: str) -> None:
    data = blocks(type)
    weight = decode(type, torch.from_numpy(data).flatten(), (24, 768))
    assert isinstance(weight, QuantTensor) and kept_type(weight) == type
    assert b"".join(encode(type, weight)) == data.tobytes()


@pytest.mark.parametrize("type", ["Q4_0", "Q8_0"])
def test_quantising_is_the_gguf_librarys(type: str) -> None:
    values = torch.randn(6, 64)
    reference = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[type])
    assert b"".join(encode(type, values)) == reference.tobytes()


def test_forms_without_a_type_are_not_kept() -> None:
    q, scale = torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1, dtype=torch.float16)
    assert kept_type(QuantTensor(q, scale)) is None  # groups of 64
    assert kept_type(QuantTensor(q[:, :16], scale.float())) is None  # scales that float16 may not hold
    assert kept_type(QuantTensor(q[:, :16], scale)) == "Q4_0"


def test_a_value_beyond_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit F16"):
        list(encode("F16", torch.tensor([[1e5]])))


def test_unsupported_types_have_their_names() -> None:
    assert type_name(gguf.GGMLQuantizationType.IQ4_XS) == "IQ4_XS"
    assert type_name(gguf.GGMLQuantizationType.TQ1_0) == "TQ1_0"
    assert type_name(999) == "number 999"
    for name, kind in TYPES.items():
        assert gguf.GGMLQuantizationType[name] == kind.id
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (kind.block, kind.n_bytes)
