"""openglm.ops.kv and the centres of keys: INT8 in half of float16's room, close to what was stored."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openglm.config import GLMConfig, RopeConfig
from openglm.engine.native_runner import NativeRunner
from openglm.engine.runner import Chunk, TorchRunner
from openglm.model.init import init_weights
from openglm.model.paged import PagedPool, key_centres
from openglm.model.transformer import Transformer
from openglm.ops import native
from openglm.ops.kv import from_bytes, spread, to_bytes
from openglm.ops.rope import apply_rope, rope_angles

SHAPE: dict[str, Any] = {"vocab_size": 72, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16,
                         "ffn_dim": 96, "max_seq_len": 256}  # fmt: skip
needs_library = pytest.mark.skipif(not native.available(), reason="the native library was not built: no C++ compiler")


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0, 1.5e4])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
def test_a_number_is_off_by_a_step_at_most(size: float, head_dim: int) -> None:
    x = size * randn(50, 3, head_dim)
    got, top = from_bytes(to_bytes(x)), x.abs().amax(-1, keepdim=True)
    step = (top / 127 * 1.125).clamp(min=2.0**-22)  # three bits of mantissa
    off = (got - x).abs() / step
    assert to_bytes(x).shape == x.shape and to_bytes(x).dtype == torch.int8
    assert off[..., :8].max() <= 1.001 and (head_dim == 8 or off[..., 8:].max() <= 0.501)


def test_zero_stays_and_what_is_no_number_is_not_lost() -> None:
    x = randn(4, 64)
    x[0], x[1, 40], x[2, 3] = 0.0, float("nan"), float("inf")
    got = from_bytes(to_bytes(x))
    assert got[0].eq(0.0).all() and got[1:3].isnan().all() and got[3].isfinite().all()


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 128])
def test_spread_is_the_walsh_hadamard_transform(head_dim: int) -> None:
    block = head_dim & -head_dim
    matrix: np.ndarray[Any, Any] = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    matrix = np.kron(np.eye(head_dim // block), matrix) / np.sqrt(block)
    x = randn(3, 2, head_dim)
    torch.testing.assert_close(spread(x), x @ torch.from_numpy(matrix).float())
    torch.testing.assert_close(spread(spread(x)), x)


@pytest.mark.parametrize("rope", [
    RopeConfig(), RopeConfig(fraction=0.5, theta=1e6), RopeConfig(yarn_factor=4.0, yarn_context=64)
])  # fmt: skip
def test_a_centre_is_the_mean_over_the_context_of_the_rotated_bias(rope: RopeConfig) -> None:
    config = GLMConfig(**SHAPE, rope=rope)
    model = Transformer(config).requires_grad_(False)
    bias = torch.cat([block.attn.qkv.bias.copy_(randn(128))[64:96] for block in model.layers])
    centres = key_centres(model)
    assert centres is not None and centres.shape == (2, 2, 16)
    places = torch.linspace(0.0, config.max_seq_len, 20001)[None, None]
    angles = rope_angles(places, model._inv_freq, model._rope_scale)
    turned = apply_rope(bias.view(1, 1, 4, 16).expand(1, 20001, 4, 16), *angles)
    torch.testing.assert_close(centres.view(4, 16), turned[0].mean(0), rtol=0, atol=1e-3)


def test_without_a_bias_and_with_learned_positions() -> None:
    assert key_centres(Transformer(GLMConfig(**SHAPE, qkv_bias=False))) is None
    assert key_centres(Transformer(GLMConfig(**SHAPE, rope=RopeConfig(axes=2), mask="prefix"))) is None
    model = Transformer(GLMConfig(**SHAPE, positions="learned", mask="prefix"))
    centres = key_centres(model)
    assert centres is not None and torch.equal(centres[0].flatten(), model.layers[0].attn.qkv.bias[64:96].detach())


def biased(size: float) -> Transformer:
    """Two layers whose keys have a bias of that size in the pair that turns least."""
    model = init_weights(Transformer(GLMConfig(**SHAPE, rope=RopeConfig(theta=1e8))), seed=1, std=0.15)
    model.eval().requires_grad_(False)
    for block in model.layers:
        block.attn.qkv.bias.view(-1, 16)[4:6, [7, 15]] = size
    return model


def logits(runner: Any) -> Tensor:
    ids = torch.randint(0, 72, (100,), generator=torch.Generator().manual_seed(5)).tolist()
    return runner.run([Chunk(ids, 0, torch.arange(100)[None], list(range(7)), 0, 100)])


@pytest.mark.parametrize("kind", [TorchRunner, pytest.param(NativeRunner, marks=needs_library)])
def test_a_large_bias_of_keys_costs_no_precision(kind: Any) -> None:
    def off(size: float) -> float:
        model = biased(size)
        return float((logits(kind(model, 7, 16, "int8")) - logits(kind(model, 7, 16, "float32"))).abs().max())

    assert 1e-5 < off(300.0) < 2 * off(0.0) < 0.2


@needs_library
def test_both_runners_keep_the_same_bytes() -> None:
    model = biased(30.0)
    ours, theirs = NativeRunner(model, 7, 16, "int8"), TorchRunner(model, 7, 16, "int8")
    logits(ours), logits(theirs)
    layers, pages, heads, size, head_dim = ours._keys.shape
    keys = ours._keys.view(layers, pages, heads, head_dim, size).transpose(-1, -2)  # tokens lie side by side
    for which, native_form in enumerate((keys, ours._values)):
        form = native_form.permute(0, 1, 3, 2, 4).reshape(layers, pages * size, heads, head_dim)[:, :100]
        other = theirs.pool._data[:, which, :100]
        assert form[0].ne(other[0]).float().mean() < 2e-3  # sums in another order may fall to the other side of a half
        torch.testing.assert_close(from_bytes(form), from_bytes(other), rtol=0, atol=0.05)
    assert ours.kv_bytes == theirs.kv_bytes == NativeRunner(model, 7, 16, "float16").kv_bytes // 2


def test_a_head_must_hold_the_bits() -> None:
    config = dataclasses.replace(GLMConfig(**SHAPE), head_dim=4)
    assert PagedPool.bytes_per_token(config, torch.int8) == 2 * 2 * 2 * 4
    for kind in (TorchRunner, NativeRunner):
        with pytest.raises(ValueError, match="int8 needs heads of at least 8 numbers, not 4"):
            kind(Transformer(config).requires_grad_(False), 4, 16, "int8")
