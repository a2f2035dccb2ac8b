"""GGUF files written by the `gguf` library with transformers' weights, read by us: configs, logits, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openglm.config import GLMConfig, RopeConfig
from openglm.model.batch import ForwardBatch
from openglm.model.gguf import GgufModel, open_gguf
from openglm.model.linear import PackedLinear
from openglm.model.load import build_transformer, start_loading
from openglm.model.opened import open_model
from openglm.model.transformer import Transformer
from openglm.model.weights import import_weights
from openglm.ops import native
from openglm.ops.quant import QuantTensor

gguf = pytest.importorskip("gguf")
LAYERS = 2
SIZE = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128, "pad_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
OURS: dict[str, Any] = {
    "vocab_size": 96, "dim": 32, "n_layers": LAYERS, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 64, "max_seq_len": 128,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
# architecture: transformers' class and fields, our fields.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 16, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default",
                        "rope_theta": 5e5}},
              {"head_dim": 16, "norm_eps": 1e-5, "qkv_bias": False, "rope": RopeConfig(theta=5e5)}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_parameters": YARN},
              {"head_dim": 8, "norm_eps": 1e-6, "tie_embeddings": True,
               "rope": RopeConfig(yarn_factor=4.0, yarn_context=32)}),
    "chatglm": ("Glm", {"head_dim": 16, "rms_norm_eps": 1.5625e-7, "attention_bias": True,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
                {"head_dim": 16, "norm_eps": 1.5625e-7, "rope": RopeConfig(fraction=0.5)}),
    "glm4": ("Glm4", {"head_dim": 16, "rms_norm_eps": 1e-5, "attention_bias": False,
                      "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
             {"head_dim": 16, "norm_eps": 1e-5, "qkv_bias": False, "sandwich": True, "rope": RopeConfig(fraction=0.5)}),
}  # fmt: skip
PERMUTED = "llama"  # llama.cpp's converter turns its half-split heads into neighbouring rows


def reference_model(architecture: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the test extra: transformers")
    name, theirs, _ = MODELS[architecture]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**{**SIZE, **theirs})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms and biases must not be trivial
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tensors_of(architecture: str, model: Any) -> dict[str, torch.Tensor]:
    """transformers' tensors under the names that the `gguf` library's own map gives."""
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, LAYERS)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if architecture == PERMUTED and ("q_proj" in name or "k_proj" in name):
            heads = SIZE["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            assert isinstance(heads, int)
            tensor = tensor.view(heads, 2, 8, -1).transpose(1, 2).reshape(tensor.shape)
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor
    return tensors


def write(
    path: Path, architecture: str, tensors: dict[str, torch.Tensor], kinds: dict[str, str] | None = None, **fields: Any
) -> Path:
    """A file by the `gguf` library. fields: further metadata below the architecture's prefix, dots as __.

    kinds: types of matrices by the last part of their names; the others stay float32.
    """
    _, theirs, _ = MODELS[architecture]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(theirs["rms_norm_eps"])
    rope = theirs["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if "head_dim" in theirs:
        writer.add_key_length(16)
        writer.add_value_length(16)
        writer.add_rope_dimension_count(int(16 * rope.get("partial_rotary_factor", 1)))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)
    writer.add_eos_token_id(7)
    writer.add_eot_token_id(9)
    writer.add_token_list([f"t{i}" for i in range(95)] + ["<|endoftext|>"])
    writer.add_token_types([1] * 95 + [3])
    writer.add_chat_template("{{ messages }}")
    for key, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"{architecture}.{key.replace('__', '.')}", value)
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name.split(".")[-2]) if tensor.dim() == 2 else None
        if kind is None:
            writer.add_tensor(name, tensor.numpy())
        else:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def built(opened: GgufModel) -> Transformer:
    model = Transformer(opened.config, device="meta")
    state = {
        name: w.dequantise() if isinstance(w, QuantTensor) else w.float()
        for name, w in import_weights(opened.family, opened.config, opened.source.get)
    }
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model(ForwardBatch(ids, torch.arange(ids.shape[1]).expand(1, *ids.shape))))


IDS = torch.randint(0, 96, (2, 60), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", MODELS)
def test_config_and_logits(architecture: str, tmp_path: Path) -> None:
    reference = reference_model(architecture)
    opened = open_gguf(write(tmp_path / "m.gguf", architecture, tensors_of(architecture, reference)))
    assert opened.config == GLMConfig(**{**OURS, **MODELS[architecture][2]})
    assert opened.stop_ids == (7, 9, 95) and opened.chat_template == "{{ messages }}"
    assert opened.tokenizer_fields["tokenizer.ggml.tokens"][3] == "t3"
    torch.testing.assert_close(logits(built(opened), IDS), reference(IDS).logits, rtol=0, atol=5e-5)


def test_fused_tensors_are_the_same_model(tmp_path: Path) -> None:
    """chatglm from a THUDM release has q, k and v in one tensor, from a Hugging Face one in three."""
    tensors = tensors_of("chatglm", reference_model("chatglm"))
    apart = built(open_gguf(write(tmp_path / "apart.gguf", "chatglm", tensors)))
    for i in range(LAYERS):
        for part in ("weight", "bias"):
            tensors[f"blk.{i}.attn_qkv.{part}"] = torch.cat([tensors.pop(f"blk.{i}.attn_{x}.{part}") for x in "qkv"])
    opened = open_gguf(write(tmp_path / "fused.gguf", "chatglm", tensors))
    assert opened.config.qkv_bias
    fused = built(opened)
    assert all(torch.equal(a, b) for a, b in zip(apart.parameters(), fused.parameters(), strict=True))


@pytest.mark.skipif(not native.available(), reason="the native library was not built: no C++ compiler")
@pytest.mark.parametrize("alike", [True, False], ids=["one type", "mixed"])
@pytest.mark.parametrize("architecture", MODELS)
def test_matrices_packed_from_where_they_lie(architecture: str, alike: bool, tmp_path: Path) -> None:
    tensors = tensors_of(architecture, reference_model(architecture))
    kinds = dict.fromkeys((name.split(".")[-2] for name in tensors), "Q4_0")
    if not alike:
        kinds |= {"attn_v": "Q8_0", "ffn_up": "Q4_1", "attn_output": "Q5_1", "token_embd": "Q8_0"}
    opened = open_model(write(tmp_path / "m.gguf", architecture, tensors, kinds))
    kept = opened.kept_matrices()
    assert len(kept) == 4 * LAYERS + 1 + ("output.weight" in tensors) - (0 if alike else LAYERS)  # Q5_1 is not kept
    packed = start_loading(opened, dtype=torch.float32, packed=True)()
    plain = build_transformer(opened, dtype=torch.float32)
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) > len(kept)
    torch.testing.assert_close(logits(packed, IDS), logits(plain, IDS), rtol=0, atol=1e-5)


def test_linear_scaling_and_per_layer_lists(tmp_path: Path) -> None:
    tensors = tensors_of("llama", reference_model("llama"))
    path = write(tmp_path / "m.gguf", "llama", tensors, rope__scaling__type="linear", rope__scaling__factor=2.5)
    assert open_gguf(path).config.rope.position_scale == 2.5
    scaled = tmp_path / "n.gguf"
    tensors["rope_freqs.weight"] = torch.ones(8)
    assert open_gguf(write(scaled, "llama", tensors)).config.rope == RopeConfig(theta=5e5)


# -------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = tensors_of("llama", reference_model("llama"))
    return write(tmp_path_factory.mktemp("gguf") / "llama.gguf", "llama", tensors), tensors


def refused(path: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        open_gguf(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_no_gguf(tmp_path: Path) -> None:
    refused(tmp_path / "missing.gguf", "cannot be read")
    for content in (b"", b"GG", b"PK\x03\x04 not one"):
        (tmp_path / "x.gguf").write_bytes(content)
        refused(tmp_path / "x.gguf", "not a GGUF file")


def test_cut_short_anywhere(llama: tuple[Path, Any], tmp_path: Path) -> None:
    data, cut = llama[0].read_bytes(), tmp_path / "cut.gguf"
    first = min(t.offset for t in open_gguf(llama[0]).source.file.tensors.values())
    for size in (*range(5, first, 97), first - 1):
        cut.write_bytes(data[:size])
        refused(cut, "damaged header or was cut short|cut short inside")
    cut.write_bytes(data[: len(data) - 64])
    refused(cut, "cut short inside the tensor blk.1.ffn_up|cut short inside the tensor")


def test_damaged_bytes_never_crash(llama: tuple[Path, Any], tmp_path: Path) -> None:
    data, rng = llama[0].read_bytes(), np.random.default_rng(0)
    first = min(t.offset for t in open_gguf(llama[0]).source.file.tensors.values())
    n_refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.integers(4, first)] = rng.integers(0, 256)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(damaged)
        try:
            open_gguf(path)
        except ValueError as error:
            assert "\n" not in str(error)
            n_refused += 1
    assert n_refused > 50


def test_unknown_architecture_lists_the_known(llama: tuple[Path, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(llama[0].read_bytes().replace(b"llama", b"mamba"))
    refused(path, "architecture 'mamba'; known are chatglm, glm4, llama, qwen2")


def test_unsupported_tensor_type_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    data = np.zeros((4, 66), np.uint8)
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "x.gguf", "tensor blk.0.ffn_up.weight has type IQ2_XXS, which is not supported")


def test_tensors_and_metadata_must_fit(llama: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    tensors, path = llama[1], tmp_path / "x.gguf"
    refused(write(path, "llama", {k: t for k, t in tensors.items() if k != "blk.1.ffn_up.weight"}), "lacks the tensor")
    refused(write(path, "llama", tensors | {"blk.0.attn_output.bias": torch.zeros(32)}), "holds the tensor blk.0.attn_")
    refused(write(path, "llama", tensors | {"output.weight": torch.zeros(96, 16)}), "does not fit the metadata")
    refused(write(path, "llama", tensors | {"rope_freqs.weight": torch.full((8,), 2.0)}), "rule of Llama 3.1")
    refused(write(path, "llama", tensors, expert_count=8), "mixture of experts is .* not supported")
    refused(write(path, "llama", tensors, rope__scaling__type="longrope"), "rotary scaling 'longrope'")
    refused(write(path, "qwen2", tensors, attention__sliding_window=64), "sliding attention window")
    refused(write(path, "qwen2", tensors, rope__dimension_sections=[8, 12, 12, 0]), "sections")
    refused(write(path, "llama", tensors, attention__scale=0.5), "scale of attention scores is .*= 0.5. not supported")
    refused(write(path, "qwen2", tensors, rope__scaling__yarn_beta_fast=16.0), "YaRN with another ramp")
    refused(write(path, "llama", tensors, nextn_predict_layers=1), "layers for tokens further on")
    open_gguf(write(path, "llama", tensors, rope__scaling__yarn_beta_fast=32.0, logit_scale=1.0))
