"""GPTQ and AWQ: against short float64 references, and through whole conversions of tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from openglm.cli import main
from openglm.config import GLMConfig
from openglm.convert import convert
from openglm.loading import Reference, open_reference
from openglm.model.checkpoint import CheckpointMeta, save_checkpoint
from openglm.model.init import init_weights
from openglm.model.load import build_transformer
from openglm.model.transformer import Transformer
from openglm.ops.quant import QuantTensor, floats
from openglm.quant import QuantSpec, quantise
from openglm.quant.awq import ALPHAS, _search, fold, sites
from openglm.quant.calibrate import windows
from openglm.quant.gptq import DAMPING, gptq
from openglm.tokenizer import Tokenizer

GQA = GLMConfig(vocab_size=640, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=64, max_seq_len=128)
LAYER_NORM = replace(GQA, norm="layer", mlp="geglu", linear_bias=True)
NORMED = replace(LAYER_NORM, residual="normed", residual_alpha=2.0, n_kv_heads=4, mlp="gelu", mask="prefix")
TEXT = "The quick brown fox jumps over the lazy dog. 北京是中华人民共和国的首都。 In 1998 there were 42 people. " * 60


def inputs(n: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated, some columns much larger."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, columns, generator=g) @ torch.randn(columns, columns, generator=g) / columns**0.5
    return mixed * torch.logspace(-1, 0.7, columns)[torch.randperm(columns, generator=g)]


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
    found = gptq(weight, hessian, spec)
    damped = hessian.double() + DAMPING * float(hessian.diagonal().mean()) * torch.eye(48)
    order = hessian.diagonal().argsort(descending=True).tolist()
    expected = obq(weight.double().numpy(), damped.numpy(), found, order)  # on its own grid
    close = np.isclose(found.dequantise().double().numpy(), expected, atol=1e-3)
    assert close.mean() > 0.98, "but for a rare tie, which turns what follows in its row"


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


@pytest.mark.parametrize(("config", "n_sites"), [(GQA, 4), (LAYER_NORM, 4), (NORMED, 1), (replace(GQA, mlp="gelu"), 3)])
def test_folded_scales_change_nothing(config: GLMConfig, n_sites: int) -> None:
    """Any factors in all places where they may go: the same function."""
    model = init_weights(Transformer(config), seed=1, std=0.3).eval()
    for norm in (m for name, m in model.layers[0].named_modules() if "norm" in name and hasattr(m, "weight")):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    block = model.layers[0].double()
    h = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        before = block(h, None)
        state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        assert len(sites(config)) == n_sites
        for i, name in enumerate(sites(config)):
            factor = torch.rand(state[name].shape[1], generator=torch.Generator().manual_seed(i)).double() + 0.5
            if name == "attn.out.weight":
                factor = factor.view(config.n_kv_heads, -1, 8)[:, :1].expand(-1, config.n_heads // config.n_kv_heads, 8)
                factor = factor.reshape(-1)
            fold(state, config, name, factor)
        assert not torch.equal(state["attn.out.weight"], block.state_dict()["attn.out.weight"])
        block.load_state_dict(state)
        torch.testing.assert_close(block(h, None), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_awq_takes_the_power_with_the_least_error_of_the_output(seed: int) -> None:
    """Against the search spelled out in NumPy: every power tried, rounded on the range of its values, in float64."""
    weight, x = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed)), inputs(200, 64, seed)
    mean = x.abs().mean(0)
    alpha, factor = _search(weight, mean, x, QuantSpec(group=16, method="absmax"))
    w, m = weight.double().numpy(), mean.double().numpy()

    def lost(power: float) -> tuple[float, np.ndarray]:
        s = m**power
        s /= np.sqrt(s.max() * s.min())
        grouped = (w * s).reshape(24, 4, 16)
        low = grouped.min(-1, keepdims=True).astype(np.float16).astype(np.float64)
        step = ((grouped.max(-1, keepdims=True) - low) / 15).astype(np.float16).astype(np.float64)
        rounded = (np.clip(np.rint((grouped - low) / step), 0, 15) * step + low).reshape(24, 64) / s
        return float(((x.double().numpy() @ (rounded - w).T) ** 2).mean()), s

    errors = {power: lost(power)[0] for power in (0.0, *ALPHAS)}
    assert alpha > 0 and errors[alpha] <= 1.001 * min(errors.values()) < 0.9 * errors[0.0]
    np.testing.assert_allclose(factor.numpy(), lost(alpha)[1], rtol=1e-4)


# -------------------------------------------------------------------- whole conversions


def checkpoint(folder: Path, config: GLMConfig, tokenizer: Tokenizer, shared: float = 0.0) -> Reference:
    """Random weights whose channels differ in size, as trained ones do. shared: what all embeddings have in common."""
    model = init_weights(Transformer(config), seed=3, std=0.2)
    with torch.no_grad():
        model.embed.weight += shared * torch.linspace(-1, 1, config.dim)
        for block in model.layers:
            for norm in (block.norm1, block.norm2):
                norm.weight.copy_(torch.logspace(-1.5, 0.5, config.dim))
    meta = CheckpointMeta(special_ids=tokenizer.special_ids, tokenizer=tokenizer.kind)
    save_checkpoint(folder, model, config, meta, tokenizer.files)
    return open_reference(folder)


def output_error(source: Reference, converted: Path, ids: Tensor) -> float:
    """Of the hidden states, relative."""
    from openglm.model.batch import ForwardBatch

    positions = torch.arange(ids.shape[1]).expand(1, *ids.shape)
    a, b = (
        build_transformer(r.opened, dtype=torch.float32)(ForwardBatch(ids, positions))
        for r in (source, open_reference(converted))
    )
    return float((a - b).norm() / a.norm())


def first_inputs(source: Reference) -> np.ndarray:
    """(vocab_size, dim): what the first block's qkv sees of every token, by the definition of the norms."""
    h, weight = (floats(source.opened.get(n)).double().numpy() for n in ("embed.weight", "layers.0.norm1.weight"))
    if source.opened.config.norm == "rms":
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + source.opened.config.norm_eps) * weight
    centred = h - h.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + source.opened.config.norm_eps) * weight
    return normed + floats(source.opened.get("layers.0.norm1.bias")).double().numpy()


@pytest.mark.parametrize("config", [GQA, LAYER_NORM, NORMED])
def test_without_text_rounding_never_loses_to_the_range(
    config: GLMConfig, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    """Under what it goes by: error of the weights; in the first block's qkv, of the output for every token."""
    source = checkpoint(tmp_path / "source", config, tiny_tokenizer, shared=0.5)
    for method in ("mse", "absmax"):
        convert(source, tmp_path / method, spec=QuantSpec.parse("int4", "16", method=method))
    stored = [open_reference(tmp_path / method).opened for method in ("mse", "absmax")]
    kinds = [name for name, weight in stored[0].weights() if isinstance(weight, QuantTensor)]
    assert len(kinds) == 4 * config.n_layers
    x = first_inputs(source)
    for name in kinds:
        wrong = [(floats(o.get(name)) - floats(source.opened.get(name))).double().numpy() for o in stored]
        first = name == "layers.0.attn.qkv.weight"
        lost = [float(((x @ w.T if first else w) ** 2).sum()) for w in wrong]
        assert lost[0] < (0.5 if first else 1) * lost[1], name


def test_learned_positions_leave_the_first_block_to_rounding(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    """They are added to the embedding, which then does not tell the inputs."""
    config = replace(NORMED, residual="stream", residual_alpha=1.0, positions="learned")
    source = checkpoint(tmp_path / "source", config, tiny_tokenizer)
    convert(source, tmp_path / "out", spec=QuantSpec.parse("int4", "16", method="mse"))
    name = "layers.0.attn.qkv.weight"
    found, plain = open_reference(tmp_path / "out").opened.get(name), floats(source.opened.get(name)).float()
    assert isinstance(found, QuantTensor) and torch.equal(found.q, quantise(plain, QuantSpec(group=16)).q)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("config", [GQA, LAYER_NORM, NORMED])
def test_text_makes_a_conversion_better(
    config: GLMConfig, method: str, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    source = checkpoint(tmp_path / "source", config, tiny_tokenizer)
    for name in ("mse", method):
        spec = QuantSpec.parse("int4", "16", method=name)
        convert(source, tmp_path / name, spec=spec, calibration=[TEXT] if spec.calibrated else [])
    ids = windows([tiny_tokenizer.encode(TEXT[200:] + TEXT)], [], 100)
    plain, better = (output_error(source, tmp_path / name, ids) for name in ("mse", method))
    assert 0 < better < (plain if config is NORMED and method == "awq" else 0.95 * plain)
    stored = open_reference(tmp_path / method).opened
    kinds = [name for name, weight in stored.weights() if isinstance(weight, QuantTensor)]
    assert len(kinds) == 4 * config.n_layers
    if config is NORMED:  # its norms feed the residual: nothing may go there
        name = "layers.1.norm2.weight"
        assert torch.equal(stored.get(name), source.opened.get(name))  # type: ignore[arg-type]


def test_a_calibrated_conversion_is_continued(
    tmp_path: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after some shards: the rest comes out as it would have."""
    from openglm.model.writer import OutputFolder

    source = checkpoint(tmp_path / "source", replace(GQA, n_layers=3), tiny_tokenizer)
    monkeypatch.setattr("openglm.convert.plan.SHARD_BYTES", 30_000)
    spec = QuantSpec.parse("int4", method="gptq")
    convert(source, tmp_path / "whole", spec=spec, calibration=[TEXT])
    finish, written = OutputFolder._finish, []

    def killed(self: OutputFolder, name: str, *rest: object) -> None:
        finish(self, name, *rest)  # type: ignore[arg-type]
        written.append(name)
        if len(written) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OutputFolder, "_finish", killed)
        convert(source, tmp_path / "parts", spec=spec, calibration=[TEXT])
    assert convert(source, tmp_path / "parts", spec=spec, calibration=[TEXT]).continued
    assert (tmp_path / "parts" / "manifest.json").read_text() == (tmp_path / "whole" / "manifest.json").read_text()


def test_text_alone_chooses_gptq(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    checkpoint(tmp_path / "source", GQA, tiny_tokenizer)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    for name, method in (("default", []), ("gptq", ["--method", "gptq"]), ("awq", ["--method", "awq"])):
        words = ["convert", str(tmp_path / "source"), str(tmp_path / name), "--format", "openglm", "--quantize", "int4"]
        assert main([*words, "--calibration", str(tmp_path / "text.txt"), *method]) == 0
    default, gptq_, awq = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("default", "gptq", "awq")
    )  # fmt: skip
    assert default == gptq_ != awq


def test_the_default_runs_the_packages_own_text(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    """Where the model has a tokenizer; else it rounds without. Both are said."""
    source = checkpoint(tmp_path / "source", GQA, tiny_tokenizer)
    folder = Path(__file__).resolve().parent.parent / "openglm" / "assets" / "calibration"
    texts = [(folder / name).read_text(encoding="utf-8") for name in ("en.txt", "zh.txt")]
    made = [
        convert(source, tmp_path / "default", spec=QuantSpec()),
        convert(source, tmp_path / "gptq", spec=QuantSpec(method="gptq"), calibration=texts),
        convert(replace(source, tokenizer=None), tmp_path / "bare", spec=QuantSpec()),
        convert(source, tmp_path / "mse", spec=QuantSpec(method="mse")),
    ]
    assert [m.method for m in made] == ["gptq", "gptq", "mse", "mse"]
    stored = [(m.path / "model.safetensors").read_bytes() for m in made]
    assert stored[0] == stored[1] != stored[2] == stored[3]


@pytest.mark.parametrize(("leaf", "message"), [("mlp.up", "not finite, or beyond"), ("norm1", "its inputs are")])
def test_what_is_not_finite_is_refused(leaf: str, message: str, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    source = checkpoint(tmp_path / "source", GQA, tiny_tokenizer)

    def spoil(name: str, weight: Tensor | QuantTensor) -> Tensor | QuantTensor:
        if name == f"layers.1.{leaf}.weight":
            assert isinstance(weight, Tensor)
            return weight * (1e9 if leaf == "mlp.up" else float("nan"))
        return weight

    broken = replace(source, opened=replace(source.opened, change=spoil))
    with pytest.raises(ValueError, match=rf"^layers\.1\.[a-z.0-9]+: .*{message}"):
        convert(broken, tmp_path / "out", spec=QuantSpec())


def test_mistakes(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    source = checkpoint(tmp_path / "source", replace(GQA, tie_embeddings=True), tiny_tokenizer)
    gptq_spec, plain = QuantSpec.parse("int4", method="gptq"), QuantSpec.parse("int4", method="mse")
    for spec, texts, message in [
        (plain, ["x"], "goes with --quantize and --method"),
        (gptq_spec, ["short"], "has . tokens: give one of 12. or more"),
        (QuantSpec.parse("int4", head="int8"), [], "are one matrix: choose its form with --embeddings"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "out", spec=spec, calibration=texts)
    with pytest.raises(ValueError, match="leave out --group, --symmetric"):
        convert(source, tmp_path / "m.gguf", "gguf", gptq_spec)
    bare = replace(source, tokenizer=None)
    with pytest.raises(ValueError, match="has no tokenizer to read text with"):
        convert(bare, tmp_path / "out", spec=gptq_spec, calibration=[TEXT])
    assert not (tmp_path / "out").exists()


def test_windows() -> None:
    found = windows([list(range(1000)), list(range(2000, 2040))], [7, 8], 42, n_tokens=42 * 6)
    assert found.shape == (4, 42) and found[:, :2].tolist() == [[7, 8]] * 4
    assert found[:, 2].tolist() == [0, 480, 960, 2000] and found[2, -1] == 999
