"""AWQ against short float64 references, and calibrated conversions of tiny models."""

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
from openglm.model.init import init_weights
from openglm.model.transformer import Transformer
from openglm.ops.quant import QuantTensor, floats
from openglm.quant import QuantSpec, quantise
from openglm.quant.awq import ALPHAS, _search, fold, sites
from openglm.quant.calibrate import windows
from openglm.tokenizer import Tokenizer
from tests.quant_helpers import GQA, LAYER_NORM, NORMED, TEXT, checkpoint, inputs, output_error


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
