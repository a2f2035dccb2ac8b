"""Rounding without data: both forms against their definition in float64, the search against every grid there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from openglm.ops.quant import QuantTensor
from openglm.quant import QuantSpec, quantise
from openglm.quant.rounding import fit, integers


def weights(rows: int = 24, columns: int = 128, seed: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g) * torch.rand(rows, 1, generator=g)


def error(weight: Tensor, spec: QuantSpec) -> float:
    return float((quantise(weight, spec).dequantise().double() - weight.double()).square().sum())


def stored_integers(found: QuantTensor) -> np.ndarray:
    q = found.q.numpy()
    return np.stack([q & 15, q >> 4], -1).reshape(len(q), -1) if found.bits == 4 else q


@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("bits,symmetric", [(4, False), (4, True), (8, True)])
def test_absmax_is_the_definition(bits: int, symmetric: bool, group: int | None) -> None:
    """Integers, scales and minimums from NumPy in float64, with scales rounded to half first."""
    weight = weights()
    found = quantise(weight, QuantSpec(bits, group, symmetric, method="absmax"))  # type: ignore[arg-type]
    grouped = weight.numpy().astype(np.float64).reshape(24, -1, group or 128)
    if symmetric:
        top = 127 if bits == 8 else 7
        scale = (np.abs(grouped).max(-1) / top).astype(np.float16)
        q = np.clip(np.rint(grouped / scale.astype(np.float64)[..., None]), -top - 1, top)
        q = q + 8 if bits == 4 else q
        assert found.minimum is None
    else:
        minimum = grouped.min(-1).astype(np.float16)
        scale = ((grouped.max(-1) - minimum.astype(np.float64)) / 15).astype(np.float16)
        steps = (grouped - minimum.astype(np.float64)[..., None]) / scale.astype(np.float64)[..., None]
        q = np.clip(np.rint(steps), 0, 15)
        assert found.minimum is not None and np.array_equal(found.minimum.numpy(), minimum)
    assert np.array_equal(found.scale.numpy(), scale)
    wrong = stored_integers(found) != q.reshape(24, -1)
    assert wrong.mean() < 1e-3, "but for ties that float32 breaks otherwise"


@pytest.mark.parametrize("group", [32, 128, None])
@pytest.mark.parametrize("bits,symmetric", [(4, False), (4, True), (8, True)])
def test_the_search_never_loses_to_the_range(bits: int, symmetric: bool, group: int | None) -> None:
    for weight in (weights(), weights().pow(3), torch.full((4, 128), 0.25), torch.zeros(4, 128), weights() * 1e-6):
        plain, searched = (
            QuantSpec(bits, group, symmetric, method=m) for m in ("absmax", "mse")  # type: ignore[arg-type]
        )  # fmt: skip
        for a, b in zip(weight, weight, strict=True):
            assert error(a[None], searched) <= error(b[None], plain) * (1 + 1e-5)
    share = 0.9 if bits == 4 else 0.99
    assert error(weights(), QuantSpec(bits, group, symmetric, method="mse")) < share * error(  # type: ignore[arg-type]
        weights(), QuantSpec(bits, group, symmetric, method="absmax")  # type: ignore[arg-type]
    )


def test_the_search_is_close_to_the_best_grid_there_is() -> None:
    """Against every scale and minimum of a fine mesh, on a few groups."""
    weight = weights(6, 32)
    found = error(weight, QuantSpec())
    best = 0.0
    for row in weight.double():
        low, span = row.min(), row.max() - row.min()
        errors = []
        for narrow, shift in itertools.product(np.linspace(0.6, 1.1, 101), np.linspace(-0.2, 0.4, 121)):
            scale, minimum = span * narrow / 15, low + span * shift
            q = ((row - minimum) / scale).round().clamp(0, 15)
            errors.append(float((q * scale + minimum - row).square().sum()))
        best += min(errors)
    assert found < 1.06 * best


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_goes_by_importance(symmetric: bool) -> None:
    """Against every scale (and minimum) of a fine mesh, under the weighted error; all equal: as without."""
    groups = weights(4, 32).t().contiguous()
    importance = torch.logspace(-2, 2, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    spec = QuantSpec(symmetric=symmetric)

    def lost(importance: Tensor | None) -> float:
        scale, low = fit(groups, spec, None if importance is None else importance[:, None].expand_as(groups))
        q = integers(groups, scale, low, spec).double()
        values = (q - 8) * scale.double() if low is None else q * scale.double() + low.double()
        return float((by * (values - groups).square()).sum())

    by = importance.double()[:, None]
    best = 0.0
    for row in groups.t().double():
        low, span, reach = row.min(), row.max() - row.min(), row.abs().max()
        if symmetric:
            grids = [(sign * reach * share / 7, 8.0) for share in np.linspace(0.5, 1.2, 701) for sign in (-1, 1)]
            errors = [float((by[:, 0] * (((row / s).round().clamp(-8, 7)) * s - row).square()).sum()) for s, _ in grids]
        else:
            mesh = itertools.product(np.linspace(0.5, 1.1, 61), np.linspace(-0.2, 0.5, 71))
            grids = [(span * narrow / 15, low + span * shift) for narrow, shift in mesh]
            values = [((row - m) / s).round().clamp(0, 15) * s + m for s, m in grids]
            errors = [float((by[:, 0] * (v - row).square()).sum()) for v in values]
        best += min(errors)
    assert best * 0.9 < lost(importance) < min(1.25 * best, 0.8 * lost(None))
    assert lost(torch.full((32,), 7.0)) == pytest.approx(lost(None), rel=0.02)


@pytest.mark.parametrize("n_levels", [16, 15, 14])
def test_weights_on_a_grid_come_back(n_levels: int) -> None:
    """What was INT4 before: its integers use all of 16 levels, or few of them."""
    g = torch.Generator().manual_seed(1)
    q = torch.randint(0, n_levels, (16, 4, 32), generator=g).float()
    q[..., 0], q[..., 1] = 0, n_levels - 1
    scale, minimum = torch.rand(16, 4, 1, generator=g).half().float() / 64, -torch.rand(16, 4, 1, generator=g).half()
    weight = (q * scale + minimum.float()).view(16, 128)
    assert float((quantise(weight, QuantSpec()).dequantise() - weight).norm() / weight.norm()) < 1e-3


def test_threads_do_not_matter_and_blocks_hardly(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(64)
    whole = error(weight, QuantSpec())
    monkeypatch.setattr("openglm.quant.rounding.BLOCK_ELEMENTS", 128 * 5)
    n_threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(quantise(weight, QuantSpec()))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(found[0].q, found[1].q) and torch.equal(found[0].scale, found[1].scale)
    assert error(weight, QuantSpec()) == pytest.approx(whole, rel=1e-3)  # sums in another order: near ties turn


def test_defaults() -> None:
    for spec, symmetric, with_text, without in [
        (QuantSpec(), False, "gptq", "mse"), (QuantSpec(4, None), True, "absmax", "absmax"),
        (QuantSpec(8), True, "absmax", "absmax"), (QuantSpec(method="absmax"), False, "absmax", "absmax"),
    ]:  # fmt: skip
        assert spec.symmetric == symmetric
        assert (spec.resolved(True).method, spec.resolved(False).method) == (with_text, without)
        assert torch.equal(quantise(weights(), spec).q, quantise(weights(), spec.resolved(False)).q)
    spec = QuantSpec.parse("int4", "64", embeddings="int8", method="gptq")
    assert spec.of("layers.0.attn.qkv.weight", (4, 64)) is spec and spec.of("head.weight", (4, 64)) is None
    embedding = spec.of("embed.weight", (4, 64))
    assert embedding is not None and (embedding.bits, embedding.symmetric, embedding.method) == (8, True, "mse")
    head = QuantSpec.parse("int8", head="int4").of("head.weight", (4, 64))
    assert head is not None and (head.bits, head.symmetric, head.group) == (4, True, 32)
    assert spec.of("norm.weight", (64,)) is None and spec.of("embed_position.weight", (4, 64)) is None


@pytest.mark.parametrize(("words", "message"), [
    ({"name": "int3"}, "give int4 or int8"), ({"name": "int4", "group": "x"}, "a number of columns or row"),
    ({"name": "int4", "method": "best"}, "give one of absmax, mse, gptq, awq"),
    ({"name": "int4", "embeddings": "int2"}, "embeddings are stored as none, int4, int8"),
    ({"name": "int4", "group": "33"}, "even number of columns"),
])  # fmt: skip
def test_mistakes(words: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSpec.parse(**words)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(symmetric=True), QuantSpec(4, None), QuantSpec(8)])
def test_weights_that_cannot_be_stored(bad: float, spec: QuantSpec) -> None:
    weight = weights()
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantise(weight, spec)
