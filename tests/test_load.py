"""Released folders that are damaged, incomplete or unknown get one line; quantised layers against plain ones."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openglm.config import GLMConfig, RopeConfig
from openglm.convert import convert
from openglm.loading import open_reference, with_text
from openglm.model.adapters import apply_adapter
from openglm.model.checkpoint import CheckpointMeta, save_checkpoint
from openglm.model.init import init_weights
from openglm.model.linear import QuantEmbedding, QuantLinear
from openglm.model.load import build_transformer
from openglm.model.opened import open_model
from openglm.model.released import released_config
from openglm.model.transformer import Transformer
from openglm.ops.quant import QuantTensor
from openglm.quant import QuantSpec, quantise
from openglm.tokenizer import Tokenizer

# -------------------------------------------------------------------- quantised layers


@pytest.mark.parametrize("spec", [QuantSpec(8, 32, True), QuantSpec(4, 32, False), QuantSpec(4, None, True)])
def test_quantised_layers_compute_with_the_dequantised_matrix(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openglm.model.linear.CPU_BLOCK_ELEMENTS", 64 * 7)  # several blocks, the last one ragged
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(45, 64, generator=generator)
    x, bias = torch.randn(3, 5, 64, generator=generator), torch.randn(45, generator=generator)
    packed = quantise(weight, spec)
    exact = packed.dequantise(torch.float64)
    wanted = x.double() @ exact.T + bias.double()
    torch.testing.assert_close(QuantLinear(packed, bias)(x).double(), wanted, rtol=0, atol=1e-5)
    ids = torch.tensor([[0, 44], [7, 7]])
    rows = QuantEmbedding(packed, torch.float32)(ids)
    torch.testing.assert_close(rows.double(), exact[ids], rtol=0, atol=1e-6)


def test_moving_a_quantised_layer_keeps_its_scales() -> None:
    layer = QuantLinear(quantise(torch.randn(4, 64), QuantSpec()), torch.zeros(4)).to(torch.bfloat16)
    assert layer.scale.dtype == torch.float16 and layer.q.dtype == torch.uint8
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16


def test_a_tied_quantised_embedding_is_held_once(shared_data: Path, tmp_path: Path) -> None:
    """A ChatGLM-6B release packed its embedding too; the head shares it."""
    source = shared_data / "golden" / "chatglm-6b" / "int8"
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    packed = quantise(state["transformer.word_embeddings.weight"], QuantSpec(8, None, True))
    state["transformer.word_embeddings.weight"] = packed.q
    state["transformer.word_embeddings.weight_scale"] = packed.scale[:, 0].contiguous()
    state.pop("lm_head.weight")
    torch.save(state, tmp_path / "pytorch_model.bin")
    shutil.copy(source / "config.json", tmp_path)
    model = build_transformer(open_model(tmp_path), dtype=torch.float32)
    assert isinstance(model.embed, QuantEmbedding) and isinstance(model.head, QuantLinear)
    assert model.embed.q.data_ptr() == model.head.q.data_ptr()
    hidden = torch.randn(1, 2, model.config.dim)
    torch.testing.assert_close(model.logits(hidden), hidden @ packed.dequantise().T, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------- configs


BASE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "intermediate_size": 80, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(("change", "rope"), [
    ({"model_type": "glm4", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, RopeConfig(fraction=0.5)),
    ({"model_type": "glm4", "rope_scaling": {"type": "yarn", **YARN}, "partial_rotary_factor": 0.5},
     RopeConfig(fraction=0.5, yarn_factor=4.0, yarn_context=32768)),
    ({"model_type": "glm", "rope_parameters": {"rope_theta": 5e6, "rope_type": "default",
                                               "partial_rotary_factor": 1.0}}, RopeConfig(theta=5e6)),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, RopeConfig(position_scale=2.0)),
    ({"model_type": "glm", "partial_rotary_factor": 1.0, "rope_parameters": {
        "rope_theta": 1e4, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25,
    }}, RopeConfig(fraction=0.25, position_scale=2.0)),  # what lies with the others counts
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": None, "max_window_layers": 0,
      "rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 8192, "beta_fast": 32,
                       "beta_slow": 1.0, "attention_factor": None}}, RopeConfig(yarn_factor=4.0, yarn_context=8192)),
    ({"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }}, RopeConfig(theta=5e5, llama3_factor=8.0, llama3_context=8192)),
])  # fmt: skip
def test_rotary_fields_of_hugging_face_configs(change: dict[str, Any], rope: RopeConfig) -> None:
    names = frozenset({"lm_head.weight"})
    _, config = released_config(BASE | change, Path("x"), names, lambda name: ())
    assert config.rope == rope and not config.tie_embeddings and not config.qkv_bias
    assert config.sandwich == (change["model_type"] == "glm4")


@pytest.mark.parametrize(("change", "words"), [
    ({"model_type": "gpt2"}, "unknown model_type 'gpt2'; known: ChatGLM-6B"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "longrope", "factor": 8.0}},
     "'longrope' is not supported; known: default, linear, llama3, yarn"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 8.0,
                                              "original_max_position_embeddings": 8192}}, "factors 1, 8"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
     "lacks 'original_max_position_embeddings'"),
    ({"model_type": "llama", "mlp_bias": True}, "biases outside of QKV"),
    ({"model_type": "llama", "hidden_act": "relu"}, "hidden_act 'relu'"),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window"),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 9,
      "layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
    ({"model_type": "llama", "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
     "rotary fields of their own for full_attention"),
    ({"model_type": "chatglm"}, "lacks"),
    ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 of a llama"),
    ({"model_type": "glm4", "rope_scaling": {"type": "yarn", "beta_fast": 16, **YARN}}, "YaRN with beta_fast"),
])  # fmt: skip
def test_configs_that_no_decoder_here_computes(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        released_config(BASE | change, Path("x"), frozenset(), lambda name: ())
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------- damage


@pytest.fixture
def chatglm2(shared_data: Path, tmp_path: Path) -> Path:
    """A copy of a released folder that may be broken."""
    return copy(shared_data / "golden" / "chatglm2-6b", tmp_path / "m")


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.npz", "int*", "cases.json", "*.md"))
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755)
    return target


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def drop_tensor(folder: Path, name: str) -> None:
    for path in folder.glob("*.bin"):
        state = torch.load(path, weights_only=True)
        if state.pop(name, None) is not None:
            torch.save(state, path)
    index = folder / "pytorch_model.bin.index.json"
    table = json.loads(index.read_text())
    table["weight_map"].pop(name)
    index.write_text(json.dumps(table))


def add_tensor(folder: Path, name: str) -> None:
    path = folder / "pytorch_model-00002-of-00002.bin"
    torch.save(torch.load(path, weights_only=True) | {name: torch.zeros(2)}, path)
    index = folder / "pytorch_model.bin.index.json"
    table = json.loads(index.read_text())
    table["weight_map"][name] = path.name
    index.write_text(json.dumps(table))


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


SECOND = "pytorch_model-00002-of-00002.bin"
DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda m: cut(m / SECOND), rf"{SECOND} was cut short inside the tensor transformer.encoder.layers.2.mlp"),
    (lambda m: (m / SECOND).unlink(), rf"{SECOND} is missing, .* names it"),
    (lambda m: (m / SECOND).write_bytes(b""), SECOND),
    (lambda m: (m / "config.json").unlink(), "no config.json"),
    (lambda m: (m / "config.json").write_text("{"), "config.json is not valid JSON"),
    (lambda m: (m / "config.json").write_text("[]"), "config.json must hold an object"),
    (lambda m: drop_tensor(m, "transformer.output_layer.weight"), "lacks transformer.output_layer.weight"),
    (lambda m: drop_tensor(m, "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"),
     "lacks transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"),
    (lambda m: add_tensor(m, "transformer.encoder.layers.0.post_mlp_layernorm.weight"),
     "no use for: transformer.encoder.layers.0.post_mlp_layernorm.weight"),
    (lambda m: (m / "pytorch_model.bin.index.json").write_text("{}"), "needs a weight_map"),
    (lambda m: change_config(m, quantization_bit=4), "says quantization_bit 4, but no weight is packed"),
    (lambda m: change_config(m, hidden_size=None), "lacks 'hidden_size'"),
    (lambda m: change_config(m, hidden_size="64", kv_channels=None), "has a field of a wrong type"),
    (lambda m: change_config(m, layernorm_epsilon=-1e-5), "norm_eps must be a small positive number, not -1e-05"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damaged_folders(chatglm2: Path, number: int) -> None:
    damage, words = DAMAGE[number]
    damage(chatglm2)
    with pytest.raises(ValueError, match=words) as error:
        build_transformer(open_model(chatglm2))
    assert "\n" not in str(error.value)


def test_another_models_config(chatglm2: Path) -> None:
    config = json.loads((chatglm2 / "config.json").read_text())
    (chatglm2 / "config.json").write_text(json.dumps(config | {"hidden_size": 80}))
    with pytest.raises(ValueError, match=r"embed.weight is \(320, 64\), the config says \(320, 80\)"):
        build_transformer(open_model(chatglm2))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("bombed"),))


def test_pickled_code_is_refused_and_never_run(chatglm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"transformer.x": Bomb()}, chatglm2 / SECOND)
    with pytest.raises(ValueError, match=r"is refused, nothing of it was run \(it names \S+\)$"):
        open_model(chatglm2)
    (chatglm2 / SECOND).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=SECOND):
        open_model(chatglm2)
    assert not (tmp_path / "bombed").exists()


def test_safetensors_cut_short_names_the_tensor(shared_data: Path, tmp_path: Path) -> None:
    folder = copy(shared_data / "golden" / "glm-4-9b", tmp_path / "m")
    cut(folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors was cut short inside the tensor"):
        open_model(folder)


def test_shards_of_ranks(shared_data: Path, tmp_path: Path) -> None:
    folder = copy(shared_data / "golden" / "glm-130b" / "mp2", tmp_path / "m")
    shard = folder / "4930" / "mp_rank_00_model_states.pt"
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match="lacks mp_rank_00_model_states.pt"):
        open_model(folder)
    shard.write_bytes(kept)
    (folder / "latest").write_text("77")
    with pytest.raises(ValueError, match="names 77, which is no folder"):
        open_model(folder)
    (folder / "latest").write_text("4930")
    (folder / "model_args.json").write_text(json.dumps({"num_layers": 9}))
    with pytest.raises(ValueError, match="model_args.json says num_layers 9, the shards hold 3"):
        open_model(folder)
    (folder / "model_args.json").write_text(json.dumps({"layernorm_order": "pre"}))
    with pytest.raises(ValueError, match="layernorm_order pre was never released"):
        open_model(folder)
    (folder / "model_args.json").write_text(json.dumps({"special_ids": [1]}))
    with pytest.raises(ValueError, match="special_ids must be an object"):
        open_model(folder)


def test_quantised_by_another_tool(chatglm2: Path) -> None:
    config = json.loads((chatglm2 / "config.json").read_text())
    (chatglm2 / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="quantised by 'gptq', which is not supported"):
        open_model(chatglm2)


def test_prefix_of_another_base(shared_data: Path) -> None:
    golden = shared_data / "golden"
    with pytest.raises(ValueError, match="it was trained for another base"):
        apply_adapter(open_model(golden / "chatglm2-6b"), golden / "ptuning-v2-chatglm-6b" / "plain")
    with pytest.raises(ValueError, match="holds no transformer.prefix_encoder"):
        apply_adapter(open_model(golden / "chatglm2-6b"), golden / "chatglm2-6b")
    with pytest.raises(ValueError, match="is no adapter"):
        apply_adapter(open_model(golden / "chatglm2-6b"), golden / "chat-chatglm3")


def test_config_field_of_presets_matches_released_shapes() -> None:
    """A config as THUDM published it gives the preset."""
    from openglm.presets import preset

    published = {
        "model_type": "chatglm", "padded_vocab_size": 151552, "hidden_size": 4096, "num_layers": 40,
        "num_attention_heads": 32, "multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 128,
        "ffn_hidden_size": 13696, "seq_length": 131072, "layernorm_epsilon": 1.5625e-07, "add_qkv_bias": True,
        "rmsnorm": True, "post_layer_norm": True, "rope_ratio": 500, "transformers_version": "4.40.2",
    }  # fmt: skip
    names = frozenset({"transformer.output_layer.weight"})
    _, config = released_config(published, Path("x"), names, lambda name: ())
    assert config == preset("glm-4-9b-chat")
    assert isinstance(config, GLMConfig)


def test_fields_that_a_chatglm2_config_leaves_out() -> None:
    """As ChatGLMConfig defines them: no groups of queries; the bias is there where the file holds one."""
    bias = "transformer.encoder.layers.0.self_attention.query_key_value.bias"
    least = {"model_type": "chatglm", "padded_vocab_size": 320, "hidden_size": 64, "num_layers": 1,
             "num_attention_heads": 4, "kv_channels": 16, "ffn_hidden_size": 172}  # fmt: skip
    for names in (frozenset({bias}), frozenset[str]()):
        _, config = released_config(least, Path("x"), names, lambda name: ())
        assert (config.n_kv_heads, config.max_seq_len, config.norm_eps) == (4, 2048, 1e-5)
        assert config.qkv_bias == bool(names)


def test_forms_that_the_packed_layout_cannot_hold() -> None:
    from openglm.model.sources import pack_thudm_quant

    with pytest.raises(ValueError, match="--group row"):
        pack_thudm_quant(quantise(torch.randn(4, 64), QuantSpec()))
    packed = quantise(torch.randn(4, 64), QuantSpec(4, None, True))
    assert isinstance(packed, QuantTensor) and pack_thudm_quant(packed)[0].shape == (4, 32)


def test_a_gguf_of_others_has_the_chat_format_that_its_tokens_tell(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What we wrote says it itself; any other file is known by its tokens and template."""
    special = tiny_tokenizer.special_ids
    config = GLMConfig(
        vocab_size=tiny_tokenizer.vocab_size, dim=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=64,
        max_seq_len=64, rope=RopeConfig(fraction=0.5),
    )  # fmt: skip
    meta = CheckpointMeta(special, (special["<|user|>"],), "glm-4", tiny_tokenizer.kind)
    save_checkpoint(tmp_path / "a", init_weights(Transformer(config), seed=1), config, meta, tiny_tokenizer.files)
    convert(open_reference(tmp_path / "a"), tmp_path / "a.gguf", "gguf")
    ours = open_model(tmp_path / "a.gguf")
    assert ours.family == "gguf" and with_text(ours).meta.chat_format == "glm-4"
    foreign = with_text(replace(ours, meta=CheckpointMeta()))
    assert foreign.meta.chat_format == "glm-4" and foreign.chat_format is not None
