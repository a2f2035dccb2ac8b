"""GGUF files that we write, read back by the `gguf` library and by us: bit-identical, and refused where GGUF ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openglm.config import GLMConfig, RopeConfig
from openglm.model.checkpoint import CheckpointMeta
from openglm.model.gguf import open_gguf
from openglm.model.gguf_tokenizer import gguf_tokenizer_fields
from openglm.model.gguf_write import architecture_of, write_gguf
from openglm.model.opened import open_model
from openglm.model.transformer import Transformer
from openglm.model.weights import import_weights
from openglm.ops.quant import QuantTensor, Weight
from openglm.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
BASE: dict[str, Any] = {
    "vocab_size": 40, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "max_seq_len": 128,
    "head_dim": 16,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"qkv_bias": False, "rope": RopeConfig(theta=5e5, position_scale=2.0)}),
    "qwen2": ("qwen2", {"tie_embeddings": True, "norm_eps": 1e-6}),
    "chatglm": ("chatglm", {"rope": RopeConfig(fraction=0.5)}),
    "glm4": ("glm4", {"qkv_bias": False, "sandwich": True, "head_dim": 32,
                      "rope": RopeConfig(fraction=0.5, yarn_factor=4.0, yarn_context=32)}),
}  # fmt: skip
META = CheckpointMeta(
    special_ids={"<|user|>": 39}, stop_ids=(38, 39), chat_format="glm-4", generation={"temperature": 0.6, "top_k": 5}
)
TOKENS = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"t{i}" for i in range(30)],
    "tokenizer.ggml.token_type": [1] * 30,
}  # fmt: skip


def state_of(config: GLMConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Transformer(config).requires_grad_(False)
    return {name: torch.randn_like(t).mul_(0.3).to(dtype if t.dim() == 2 else torch.float32)
            for name, t in model.state_dict().items()}  # fmt: skip


def back(path: Path) -> dict[str, Weight]:
    opened = open_gguf(path)
    return dict(import_weights(opened.family, opened.config, opened.source.get))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("type", ["F32", "F16", "BF16"])
def test_out_and_back_is_bit_identical(case: str, type: str, tmp_path: Path) -> None:
    architecture, fields = CASES[case]
    config = GLMConfig(**{**BASE, **fields})
    state = state_of(config, {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type])
    path = tmp_path / "m.gguf"
    write_gguf(path, config, META, reversed(state.items()), TOKENS, type, chat_template="{{ x }}")
    opened = open_gguf(path)
    assert opened.architecture == architecture and opened.config == config
    assert opened.meta == META and opened.stop_ids == (38, 39) and opened.chat_template == "{{ x }}"
    found = back(path)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        weight = found[name]
        assert isinstance(weight, torch.Tensor) and weight.dtype == tensor.dtype and torch.equal(weight, tensor), name
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_the_gguf_library_reads_it(tmp_path: Path) -> None:
    config = GLMConfig(**{**BASE, **CASES["chatglm"][1]})
    state = state_of(config)
    write_gguf(tmp_path / "m.gguf", config, META, state.items(), TOKENS, "F16")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "chatglm" and fields["chatglm.rope.dimension_count"] == 8
    assert fields["tokenizer.ggml.eos_token_id"] == 38 and fields["tokenizer.ggml.eot_token_id"] == 39
    assert fields["general.sampling.temp"] == pytest.approx(0.6) and fields["general.sampling.top_k"] == 5
    assert fields["tokenizer.ggml.tokens"] == [f"t{i}" for i in range(30)] + [f"[PAD{i}]" for i in range(30, 40)]
    assert fields["tokenizer.ggml.token_type"] == [1] * 30 + [5] * 10
    tensors = {t.name: t for t in reader.tensors}
    assert all(t.data_offset % 32 == 0 for t in reader.tensors)
    assert tensors["blk.1.attn_norm.weight"].tensor_type.name == tensors["blk.0.attn_k.bias"].tensor_type.name == "F32"
    up = state["layers.1.mlp.up.weight"].half().numpy()
    assert np.array_equal(tensors["blk.1.ffn_up.weight"].data, up)
    q = state["layers.0.attn.qkv.weight"][:16].half().numpy()  # the first head: pairs (i, i + 4) become neighbours
    order = [0, 4, 1, 5, 2, 6, 3, 7, *range(8, 16)]
    assert np.array_equal(tensors["blk.0.attn_q.weight"].data[:16], q[order])


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0"])
def test_quantised_weights_stay_as_they_are(type: str, tmp_path: Path) -> None:
    """The first file rounds; writing what was read from it changes nothing more."""
    config = GLMConfig(**{**BASE, **CASES["glm4"][1]})
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write_gguf(first, config, META, state_of(config).items(), TOKENS, type)
    weights = back(first)
    kinds = {name: t.type for name, t in open_gguf(first).source.file.tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == type and kinds["output.weight"] == "Q8_0"
    assert isinstance(weights["layers.0.mlp.up.weight"], QuantTensor)
    write_gguf(second, config, META, weights.items(), TOKENS, type)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(("source", "type"), [("int8", "Q8_0"), ("int4", "Q4_0"), ("int4", "Q8_0")])
def test_whole_rows_of_the_releases_keep_their_numbers(
    shared_data: Path, source: str, type: str, tmp_path: Path
) -> None:
    """ChatGLM2's INT8 and INT4 have a scale a row; 32 columns at a time it is GGUF's form."""
    opened = open_model(shared_data / "golden" / "chatglm2-6b" / source)
    write_gguf(tmp_path / "m.gguf", opened.config, META, opened.weights(), TOKENS, type)
    found, kept = back(tmp_path / "m.gguf"), 0
    for name, weight in opened.weights():
        if isinstance(weight, QuantTensor) and weight.columns % 32 == 0:
            there = found[name]
            assert isinstance(there, QuantTensor) and there.bits == weight.bits and there.group_size == 32
            assert torch.equal(there.dequantise(), weight.dequantise()), name
            kept += 1
    assert kept == 3 * opened.config.n_layers  # the down projection has 172 columns


def test_rows_that_do_not_split_into_blocks_become_half(tmp_path: Path) -> None:
    config = GLMConfig(**{**BASE, "ffn_dim": 40, **CASES["llama"][1]})
    write_gguf(tmp_path / "m.gguf", config, META, state_of(config).items(), TOKENS, "Q4_0")
    kinds = {name: t.type for name, t in open_gguf(tmp_path / "m.gguf").source.file.tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q4_0"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    config, path = GLMConfig(**{**BASE, **CASES["llama"][1]}), tmp_path / "m.gguf"
    path.write_bytes(b"old")
    state = state_of(config)
    state["layers.1.mlp.down.weight"][0, 0] = 1e6
    with pytest.raises(ValueError, match="does not fit F16"):
        write_gguf(path, config, META, state.items(), TOKENS, "F16")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(("fields", "match"), [
    ({"mask": "prefix"}, "mask 'prefix'"), ({"norm": "layer"}, "norm 'layer'"), ({"mlp": "geglu"}, "mlp 'geglu'"),
    ({"mask": "causal", "linear_bias": True}, "linear_bias True"),
    ({"residual": "normed"}, "residual 'normed'"),
    ({"rope": RopeConfig(freq_dtype="float16")}, "rotary frequencies"),
    ({"head_dim": 32, "rope": RopeConfig(fraction=0.5)}, "needs heads as wide as the model"),
])  # fmt: skip
def test_configs_beyond_gguf_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        architecture_of(GLMConfig(**{**BASE, **fields}))
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------- tokenizers

TEXTS = ["Hello, world! 12345 it's", "  spaces\n\n and\ttabs ", "你好，世界。春天来了", "a" * 50, "naïve café 😀"]


def same_after_a_round_trip(tokenizer: Tokenizer) -> dict[str, Any]:
    fields = gguf_tokenizer_fields(tokenizer)
    again = Tokenizer.from_gguf(fields)
    assert again.special_ids == tokenizer.special_ids and again.vocab_size == tokenizer.vocab_size
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    return fields


def test_trained_vocabulary_comes_back() -> None:
    from openglm.tokenizer.train import train_bpe

    tokenizer = train_bpe(TEXTS * 3, 330, at_most=True)
    fields = same_after_a_round_trip(tokenizer)
    assert fields["tokenizer.ggml.pre"] == "glm4" and not fields["tokenizer.ggml.add_bos_token"]


def test_tiktoken_merges_are_recovered(tmp_path: Path) -> None:
    """The fields of a vocabulary with known merges, saved as ranks and read again, hold the same merges."""
    from openglm.tokenizer.train import train_bpe

    fields = gguf_tokenizer_fields(train_bpe(TEXTS * 3, 330, at_most=True))
    ranked = Tokenizer.from_gguf(fields)
    ranked.save(tmp_path)
    again = gguf_tokenizer_fields(Tokenizer.load(tmp_path))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["kind"] == "tiktoken"
    for key in ("tokens", "token_type", "merges", "pre"):
        assert again[f"tokenizer.ggml.{key}"] == fields[f"tokenizer.ggml.{key}"], key


@pytest.mark.parametrize(("options", "match"), [
    ({}, None), ({"model_type": "unigram"}, "SentencePiece BPE"),
    ({"normalization_rule_name": "nfkc"}, "not normalise"),
    ({"remove_extra_whitespaces": True}, "not normalise"),
])  # fmt: skip
def test_sentencepiece_comes_back(options: dict[str, Any], match: str | None, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXTS * 5), encoding="utf-8")
    kind = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options}
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=320, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, **kind,
    )  # fmt: skip
    tokenizer = Tokenizer({"tokenizer.model": (tmp_path / "tokenizer.model").read_bytes()})
    if match is not None:
        with pytest.raises(ValueError, match=match):
            gguf_tokenizer_fields(tokenizer)
        return
    fields = same_after_a_round_trip(tokenizer)
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is True
