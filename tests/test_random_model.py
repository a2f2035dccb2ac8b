"""Random models: the same weights quantised or not, one tensor at a time, and keys that are refused by name.

python -m pytest -q tests/test_random_model.py
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

import openglm
from openglm.cli import main
from openglm.model.load import load_weights, weight_bytes
from openglm.ops.quant import QuantTensor
from openglm.quant.random_model import open_random

TINY = "random:glm-edge-1.5b?n_layers=2&dim=64&ffn_dim=128&n_heads=2&n_kv_heads=1&head_dim=32&vocab_size=320"


def rounded(weight: torch.Tensor, bits: int, group: int | None, symmetric: bool) -> torch.Tensor:
    """Nearest values on the grid of each group, written out anew: what absmax rounding is defined as."""
    groups = weight.float().view(len(weight), -1, group or weight.shape[1])
    if symmetric:
        scale = (groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).half().float()
        return ((groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).view_as(weight)
    low = groups.amin(-1, keepdim=True).half().float()
    scale = ((groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15).half().float()
    return (((groups - low) / scale).round().clamp(0, 15) * scale + low).view_as(weight)


@pytest.mark.parametrize(
    ("keys", "blocks", "embedding"),
    [
        ("quantize=int4", (4, 32, False), (8, 32, True)),
        ("quantize=int4&group=64&symmetric=1&embeddings=none", (4, 64, True), None),
        ("quantize=int8&group=row&embeddings=int4", (8, None, True), (4, None, True)),
    ],
)
def test_quantised_weights_are_the_unquantised_ones_rounded(
    keys: str, blocks: tuple[int, int | None, bool], embedding: tuple[int, int | None, bool] | None
) -> None:
    plain, quantised = open_random(TINY), open_random(f"{TINY}&{keys}")
    for name, weight in quantised.weights():
        reference = plain.get(name)
        assert isinstance(reference, torch.Tensor) and reference.dtype == torch.bfloat16
        form = embedding if name == "embed.weight" else blocks if reference.dim() == 2 else None
        if form is None:
            assert isinstance(weight, torch.Tensor) and torch.equal(weight, reference)
            continue
        assert isinstance(weight, QuantTensor) and weight.bits == form[0]
        error = (weight.dequantise() - rounded(reference, *form)).abs()
        # Float16 scales are rounded after the fact, so a value between two integers may go to either.
        assert float((error > 1e-6).float().mean()) < 0.01 and float(error.max()) <= float(weight.scale.max()) * 1.01
    kinds = [(kind, n) for _, kind, n in quantised.stored()]
    loaded = load_weights(quantised)
    buffers = sum(t.nbytes for name, t in loaded.named_buffers())
    assert sum(n for kind, n in kinds if kind.startswith("int")) == buffers


def test_inspect_and_plan_know_the_bytes_without_drawing_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    model = f"{TINY}&quantize=int4"
    loaded = weight_bytes(load_weights(open_random(model)))
    for argv in (["inspect", model], ["plan", model, "--devices", "24GB"]):
        assert main([*argv, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["weight_bytes"] == loaded


def test_draws_depend_on_the_seed_alone() -> None:
    one, again, other = (open_random(f"{TINY}&seed={seed}") for seed in (1, 1, 2))
    names = list(one.names())
    values: dict[str, Any] = {name: one.get(name) for name in reversed(names)}
    assert all(torch.equal(values[name], again.get(name)) for name in names)  # type: ignore[arg-type]
    assert not torch.equal(values["embed.weight"], other.get("embed.weight"))  # type: ignore[arg-type]
    up = [values[f"layers.{i}.mlp.up.weight"] for i in range(2)]
    assert not torch.equal(*up) and abs(float(up[0].float().std()) - 0.02) < 0.001
    assert abs(float(values["layers.0.mlp.down.weight"].float().std()) - 0.02 / 2) < 0.001  # 0.02 / sqrt(2 n_layers)


def test_a_quantised_random_model_runs_and_resembles_the_plain_one() -> None:
    plain, quantised = (openglm.load(TINY + keys, device="cpu") for keys in ("", "&quantize=int8"))
    ids = [5, 6, 7, 300]
    difference = abs(plain.logits(ids) - quantised.logits(ids)).max()
    assert 0 < difference < 0.05 * abs(plain.logits(ids)).max()
    assert len(quantised.generate(ids, max_new_tokens=3, seed=0).token_ids) == 3


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("quantise=int4", "unknown key 'quantise' (did you mean 'quantize'?)"),
        ("quantize=int3", "give int4 or int8"),
        ("group=32", "group goes with quantize"),
        ("quantize=int4&group=48", "columns, which groups of 48 do not divide"),
        ("quantize=int4&head=int2", "head are stored as none, int4, int8"),
        ("seed=-1", "seed is a whole number"),
        ("seed", "is not key=value"),
    ],
)
def test_mistakes_in_keys_are_named(keys: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        open_random(f"{TINY}&{keys}")
