"""GPTQ, and what a matrix moves to before: against short float64 references, and through tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from openglm.config import GLMConfig
from openglm.convert import convert
from openglm.model.batch import ForwardBatch
from openglm.model.load import build_transformer
from openglm.ops.quant import QuantTensor, floats
from openglm.quant import QuantSpec, moments, quantise
from openglm.quant.calibrate import MATRICES, Calibration, windows
from openglm.quant.gptq import DAMPING, gptq
from openglm.quant.moments import Moments
from openglm.tokenizer import Tokenizer
from tests.quant_helpers import GQA, LAYER_NORM, NORMED, TEXT, checkpoint, inputs, output_error

add = Moments.add


def obq(weight: np.ndarray, hessian: np.ndarray, grid: QuantTensor, order: list[int]) -> np.ndarray:
    """Optimal brain quantisation in a fixed order, by the definition: round one column, move all that are left by
    -error / [F^-1]_jj F^-1_j with F the Hessian of what is left, inverted anew for each column."""
    w, left = weight.copy(), list(order)
    out = np.zeros_like(w)
    for j in order:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        scale = grid.scale.double().numpy()[:, j // grid.group_size]
        if grid.minimum is None:
            top = 127 if grid.bits == 8 else 7
            out[:, j] = np.clip(np.rint(w[:, j] / scale), -top - 1, top) * scale
        else:
            low = grid.minimum.double().numpy()[:, j // grid.group_size]
            out[:, j] = np.clip(np.rint((w[:, j] - low) / scale), 0, 15) * scale + low
        w[:, left] -= np.outer((w[:, j] - out[:, j]) / inverse[0, 0], inverse[0])
        left.remove(j)
    return out


@pytest.mark.parametrize("spec", [QuantSpec(group=16), QuantSpec(group=16, symmetric=True), QuantSpec(8, 16),
                                  QuantSpec(4, None, method="mse")])  # fmt: skip
def test_gptq_is_optimal_brain_quantisation_in_its_order(spec: QuantSpec) -> None:
    weight, x = torch.randn(6, 48, generator=torch.Generator().manual_seed(1)), inputs(300, 48)
    hessian = x.t() @ x
    found = gptq(weight, hessian, spec, refit=False)
    damped = hessian.double() + DAMPING * float(hessian.diagonal().mean()) * torch.eye(48)
    order = hessian.diagonal().argsort(descending=True).tolist()
    expected = obq(weight.double().numpy(), damped.numpy(), found, order)  # on its own grid
    close = np.isclose(found.dequantise().double().numpy(), expected, atol=1e-3)
    assert close.mean() > 0.98, "but for a rare tie, which turns what follows in its row"


@pytest.mark.parametrize("spec", [QuantSpec(4, None, method="mse"), QuantSpec(4, None, True), QuantSpec(8, None)])
def test_refitted_grids_are_the_least_squares_solution(spec: QuantSpec) -> None:
    """In one group, where there are no others to wait for. float16 rounds what is found."""
    weight, x = torch.randn(6, 48, generator=torch.Generator().manual_seed(1)), inputs(300, 48)
    hessian = x.t() @ x
    plain, found = (gptq(weight, hessian, spec, refit=refit) for refit in (False, True))
    assert torch.equal(plain.q, found.q) and not torch.equal(plain.scale, found.scale)
    damped = hessian.double() + DAMPING * float(hessian.diagonal().mean()) * torch.eye(48)
    root = np.linalg.cholesky(damped.numpy()).T
    low = torch.zeros(6, 1) if plain.minimum is None else plain.minimum.float()
    integers = ((plain.dequantise() - low) / plain.scale.float()).round().double().numpy()
    for row in range(6):
        columns = [integers[row]] if plain.minimum is None else [integers[row], np.ones(48)]
        expected = np.linalg.lstsq(root @ np.stack(columns, 1), root @ weight[row].double().numpy(), rcond=None)[0]
        stored = [s[row, 0].item() for s in (found.scale, found.minimum) if s is not None]
        assert np.allclose(stored, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("spec", [QuantSpec(group=32), QuantSpec(4, 32, True), QuantSpec(8, 64)])
def test_refitting_loses_less_of_the_output(spec: QuantSpec) -> None:
    weight, x = torch.randn(40, 256, generator=torch.Generator().manual_seed(2)), inputs(1000, 256)
    plain, found = (gptq(weight, x.t() @ x, replace(spec, method="gptq"), refit=refit) for refit in (False, True))
    lost = [((q.dequantise() - weight) @ x.t()).square().sum(1) for q in (plain, found)]
    assert bool((lost[1] < 1.001 * lost[0]).all()) and float(lost[1].sum()) < 0.99 * float(lost[0].sum())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(4, None), QuantSpec(8, 64), QuantSpec(4, 128, True)])
def test_gptq_loses_less_of_the_output_than_rounding(spec: QuantSpec, act_order: bool) -> None:
    weight, x = torch.randn(40, 256, generator=torch.Generator().manual_seed(2)), inputs(1000, 256)
    lost = [
        float(((q.dequantise() - weight) @ x.t()).square().sum())
        for q in (gptq(weight, x.t() @ x, replace(spec, method="gptq"), act_order), quantise(weight, spec))
    ]
    assert lost[0] < 0.7 * lost[1]


def test_gptq_does_not_learn_few_inputs_by_heart() -> None:
    """With fewer inputs than columns: on other inputs better than rounding, and than if these were all there are."""
    g = torch.Generator().manual_seed(5)
    weight, common = torch.randn(40, 512, generator=g), torch.randn(40, 512, generator=g) / 40**0.5
    few, many = (torch.randn(n, 40, generator=g) @ common + torch.randn(n, 512, generator=g) for n in (300, 4000))
    hessian, spec = few.t() @ few, QuantSpec(method="gptq")

    def lost(q: QuantTensor) -> float:
        return float(((q.dequantise() - weight) @ many.t()).square().sum())

    shrunk, by_heart = gptq(weight, hessian, spec, n_inputs=300), gptq(weight, hessian, spec)
    rounded = quantise(weight, QuantSpec(method="mse"))
    assert lost(shrunk) < 0.9 * lost(rounded) < 0.9 * lost(by_heart)
    assert torch.equal(gptq(weight, hessian, spec, n_inputs=10**12).q, by_heart.q)


def test_gptq_without_inputs_is_rounding() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    found, plain = gptq(weight, torch.zeros(64, 64), QuantSpec()), quantise(weight, QuantSpec())
    assert torch.equal(found.q, plain.q) and torch.equal(found.scale, plain.scale)


def drifted(n: int, columns: int) -> tuple[Tensor, Tensor]:
    """(n, columns) inputs behind rounded matrices, and behind the true ones: another linear map of them, and noise."""
    g = torch.Generator().manual_seed(3)
    x = inputs(n, columns)
    off = x @ torch.randn(columns, columns, generator=g) / columns**0.5
    return x, x + 0.1 * off + 0.05 * x.std() * torch.randn(n, columns, generator=g)


@pytest.mark.parametrize("rows", [8, 40])
def test_a_matrix_moves_towards_the_true_outputs(rows: int) -> None:
    """Half way to the least-squares solution, by its definition in float64."""
    weight, (x, true) = torch.randn(rows, 48, generator=torch.Generator().manual_seed(1)), drifted(300, 48)
    found = Moments(weight)
    for some, others in zip(x.split(128), true.split(128), strict=True):
        found.add(some, others)
    assert found.n == 300 and found.by_outputs == (rows == 8)
    seen, d, w = x.double().numpy(), (true - x).double().numpy(), weight.double().numpy()
    kept = 1 - 48 / (48 + 300 / 2)
    h, cross = seen.T @ seen, d.T @ seen
    np.testing.assert_allclose(found.hessian.numpy(), h, rtol=1e-4, atol=1e-3)
    damped = kept * h + np.diag((1 - kept + 0.2) * np.diag(h) + 0.02 * np.diag(h).mean())
    cross = kept * cross + (1 - kept) * np.diag(np.diag(cross))
    expected = w + 0.5 * w @ cross @ np.linalg.inv(damped)
    np.testing.assert_allclose(found.compensated().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_moved_matrix_gives_more_of_the_true_outputs_on_other_inputs() -> None:
    weight, (x, true) = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)), drifted(4000, 64)
    x, new, true, new_true = *x.chunk(2), *true.chunk(2)
    found = Moments(weight)
    found.add(x, true)
    spec = QuantSpec(8, 64, method="gptq")
    lost = [
        float((gptq(w, found.hessian, spec).dequantise() @ new.t() - weight @ new_true.t()).norm())
        for w in (weight, found.compensated())
    ]
    assert lost[1] < 0.8 * lost[0]


def test_where_nothing_drifted_nothing_moves() -> None:
    weight, x = torch.randn(8, 48, generator=torch.Generator().manual_seed(1)), inputs(300, 48)
    found = Moments(weight)
    found.add(x, x)
    assert torch.equal(found.compensated(), weight)


# -------------------------------------------------------------------- in models


@pytest.mark.parametrize("config", [GQA, LAYER_NORM, NORMED])
def test_a_matrix_sees_the_rounded_ones_before_it_and_is_told_the_true_inputs(
    config: GLMConfig, tmp_path: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against hooks in whole runs of the two models: the source, and the source with what is rounded so far."""
    source = checkpoint(tmp_path / "source", config, tiny_tokenizer)
    ids = windows([tiny_tokenizer.encode(TEXT)], [], 128)[:3]
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(self: Moments, x: Tensor, true: Tensor) -> None:
        seen.append((x, true))
        add(self, x, true)

    monkeypatch.setattr(Moments, "add", watched)
    calibration = Calibration(source.opened, QuantSpec(group=16, method="gptq"), ids, tiny_tokenizer.special_ids)
    stored = {f"layers.{i}.{m}.weight": calibration.weight(f"layers.{i}.{m}.weight") for i in (0, 1) for m in MATRICES}
    assert len(seen) == 8
    models = [build_transformer(source.opened, dtype=torch.float32) for _ in range(2)]
    positions = torch.arange(ids.shape[1]).expand(1, *ids.shape)
    for (name, weight), found in zip(stored.items(), seen, strict=True):
        for model, x in zip(models[::-1], found, strict=True):
            met: list[Tensor] = []
            hook = model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                lambda module, args, met=met: met.append(args[0].flatten(0, 1))
            )
            model(ForwardBatch(ids, positions))
            hook.remove()
            torch.testing.assert_close(x, met[0], rtol=1e-4, atol=1e-4)
        models[1].load_state_dict({name: floats(weight).float()}, strict=False)


def test_what_earlier_blocks_lost_is_made_up_for(
    tmp_path: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "source", replace(GQA, n_layers=6), tiny_tokenizer)
    ids = windows([tiny_tokenizer.encode(TEXT[200:] + TEXT)], [], 100)
    errors = []
    for far in (0.0, moments.FAR):
        monkeypatch.setattr(moments, "FAR", far)
        convert(source, tmp_path / str(far), spec=QuantSpec(group=16, method="gptq"), calibration=[TEXT])
        errors.append(output_error(source, tmp_path / str(far), ids))
    assert 0 < errors[1] < 0.95 * errors[0]
