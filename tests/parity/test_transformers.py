"""Every Hugging Face shape we cover against `transformers` with the same tiny random weights, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from openglm.config import GLMConfig, RopeConfig
from openglm.convert import convert
from openglm.engine import Engine
from openglm.loading import open_reference
from openglm.model.batch import ForwardBatch
from openglm.model.load import build_transformer
from openglm.model.opened import open_model
from openglm.model.transformer import Transformer
from openglm.model.weights import FAMILIES, export_weights, import_weights

SIZE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 88, "max_position_embeddings": 128, "pad_token_id": None, "attn_implementation": "eager",
}  # fmt: skip
OURS: dict[str, Any] = {
    "vocab_size": 131, "dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "ffn_dim": 88, "max_seq_len": 128,
}  # fmt: skip


def rope(theta: float, fraction: float | None = None) -> dict[str, Any]:
    """transformers' name for our RopeConfig."""
    return {"rope_type": "default", "rope_theta": theta} | ({"partial_rotary_factor": fraction} if fraction else {})


# name -> (transformers class prefix, its extra fields, our weight table, our extra fields)
SHAPES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "glm-4-9b": ("Glm", {"head_dim": 16, "rms_norm_eps": 1.5625e-7, "rope_parameters": rope(5e6, 0.5)},
                 "hf-glm", {"head_dim": 16, "norm_eps": 1.5625e-7, "rope": RopeConfig(theta=5e6, fraction=0.5)}),
    "glm-edge": ("Glm", {"head_dim": 8, "attention_bias": False, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
                          "rope_parameters": rope(1e4, 1.0)},
                 "hf-glm", {"head_dim": 8, "qkv_bias": False, "tie_embeddings": True}),
    "glm-4-0414-9b": ("Glm4", {"head_dim": 16, "attention_bias": True, "rms_norm_eps": 1e-5,
                               "rope_parameters": rope(1e4, 0.5)},
                      "hf-glm4", {"head_dim": 16, "sandwich": True, "rope": RopeConfig(fraction=0.5)}),
    "glm-4-0414-32b": ("Glm4", {"head_dim": 16, "attention_bias": False, "rms_norm_eps": 1e-5,
                               "rope_parameters": rope(1e4, 0.5)},
                       "hf-glm4",
                       {"head_dim": 16, "sandwich": True, "qkv_bias": False, "rope": RopeConfig(fraction=0.5)}),
    "llama": ("Llama", {"head_dim": 8, "rms_norm_eps": 1e-5}, "hf-llama", {"head_dim": 8, "qkv_bias": False}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_parameters": rope(1e6)},
              "hf-llama", {"head_dim": 8, "norm_eps": 1e-6, "tie_embeddings": True, "rope": RopeConfig(theta=1e6)}),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request: pytest.FixtureRequest) -> tuple[Any, Transformer, str]:
    transformers = pytest.importorskip("transformers", reason="needs the test extra: transformers")
    prefix, theirs, table, ours = SHAPES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**SIZE, **theirs})
    reference = getattr(transformers, f"{prefix}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in reference.parameters():  # norms and biases must not be trivial
        parameter.add_(torch.randn_like(parameter) * 0.1)
    model = Transformer(GLMConfig(**{**OURS, **ours}), device="meta")
    state = reference.state_dict()
    model.load_state_dict(dict(import_weights(FAMILIES[table], model.config, state.__getitem__)), assign=True)
    return reference, model.requires_grad_(False), table


def test_logits(pair: tuple[Any, Transformer, str]) -> None:
    reference, model, _ = pair
    ids = torch.randint(0, 131, (2, 40), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(40).expand(1, 2, 40)
    ours = model.logits(model(ForwardBatch(ids, positions)))
    torch.testing.assert_close(ours, reference(ids).logits, rtol=0, atol=2e-5)


def test_export_gives_the_same_tensors(pair: tuple[Any, Transformer, str]) -> None:
    reference, model, table = pair
    theirs = reference.state_dict()
    exported = dict(export_weights(FAMILIES[table], model.config, model.state_dict()))
    assert exported.keys() == theirs.keys() - ({"lm_head.weight"} if model.head is None else set())
    for name, tensor in exported.items():
        assert isinstance(tensor, torch.Tensor) and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_saved_folder_loads_as_it_lies(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the test extra: transformers")
    prefix, theirs, _, ours = SHAPES[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{prefix}Config")(**{**SIZE, **theirs})
    reference = getattr(transformers, f"{prefix}ForCausalLM")(config).eval().requires_grad_(False)
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    opened = open_model(tmp_path)
    assert opened.config == GLMConfig(**{**OURS, **ours})
    ids = torch.randint(0, 131, (30,)).tolist()
    engine = Engine(build_transformer(opened, dtype=torch.float32), {})
    torch.testing.assert_close(engine.logits(ids), reference(torch.tensor([ids])).logits[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("prefix", ["Glm", "Glm4", "Llama", "Qwen2"])
def test_fields_that_a_config_leaves_out(prefix: str, tmp_path: Path) -> None:
    """Those at the default of their class need not be in the file, and rope_theta may stand by itself."""
    transformers = pytest.importorskip("transformers", reason="needs the test extra: transformers")
    torch.manual_seed(3)
    kind = getattr(transformers, f"{prefix}Config")
    small = {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 88,
             "num_attention_heads": 32 if prefix == "Qwen2" else 4, "pad_token_id": None}  # fmt: skip
    reference = getattr(transformers, f"{prefix}ForCausalLM")(kind(**small)).eval().requires_grad_(False)
    reference.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written, default = json.loads(file.read_text()), kind().to_dict()
    rope = written.pop("rope_parameters")
    kept = ("model_type", "num_attention_heads")
    left = {name: value for name, value in written.items() if name in kept or default.get(name) != value}
    if prefix == "Llama":  # its default of key-value heads is as many as heads, and of a head's width their share
        left = {name: value for name, value in left.items() if name not in ("num_key_value_heads", "head_dim")}
    assert "rms_norm_eps" not in left and "max_position_embeddings" not in left
    file.write_text(json.dumps(left | {"rope_theta": rope["rope_theta"]}))
    opened = open_model(tmp_path)
    assert opened.config.max_seq_len == default["max_position_embeddings"]
    ids = torch.randint(0, 131, (30,)).tolist()
    engine = Engine(build_transformer(opened, dtype=torch.float32), {})
    torch.testing.assert_close(engine.logits(ids), reference(torch.tensor([ids])).logits[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("prefix", ["Glm4", "Qwen2", "Llama"])
def test_yarn_when_the_config_asks(prefix: str, tmp_path: Path) -> None:
    """Positions past the context trained on, as the README of GLM-4-0414 advises for long prompts."""
    transformers = pytest.importorskip("transformers", reason="needs the test extra: transformers")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    fraction = {"partial_rotary_factor": 0.5} if prefix == "Glm4" else {}
    torch.manual_seed(2)
    config = getattr(transformers, f"{prefix}Config")(**{**SIZE, "head_dim": 16, "rope_parameters": yarn | fraction})
    reference = getattr(transformers, f"{prefix}ForCausalLM")(config).eval().requires_grad_(False)
    reference.save_pretrained(tmp_path)
    opened = open_model(tmp_path)
    assert opened.config.rope.yarn_factor == 4.0 and opened.config.rope.yarn_context == 32
    ids = torch.randint(0, 131, (100,)).tolist()
    engine = Engine(build_transformer(opened, dtype=torch.float32), {})
    torch.testing.assert_close(engine.logits(ids), reference(torch.tensor([ids])).logits[0], rtol=0, atol=5e-5)


def test_llama_3_scaling_here_and_through_every_format(tmp_path: Path) -> None:
    """Positions past the context trained on; then out to transformers, and to GGUF, which holds divisors alone."""
    transformers = pytest.importorskip("transformers", reason="needs the test extra: transformers")
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}  # fmt: skip
    torch.manual_seed(2)
    config = transformers.LlamaConfig(**{**SIZE, "head_dim": 16, "rope_parameters": rope})
    reference = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    reference.save_pretrained(tmp_path / "theirs")
    ids = torch.randint(0, 131, (100,)).tolist()
    wanted = reference(torch.tensor([ids])).logits[0]
    given = open_reference(tmp_path / "theirs")
    convert(given, tmp_path / "hf", "hf")
    convert(given, tmp_path / "m.gguf", "gguf", dtype="float32")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(again(torch.tensor([ids])).logits[0], wanted, rtol=0, atol=1e-6)
    for path in (tmp_path / "theirs", tmp_path / "hf", tmp_path / "m.gguf"):
        opened = open_model(path)
        assert opened.config.rope == RopeConfig(llama3_factor=8.0, llama3_context=32), path
        engine = Engine(build_transformer(opened, dtype=torch.float32), {})
        torch.testing.assert_close(engine.logits(ids), wanted, rtol=0, atol=5e-5)
