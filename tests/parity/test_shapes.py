"""Released layouts in shapes that no release has, as files may lie: against short formulas of the original codes.

python -m pytest -q tests/parity/test_shapes.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from openglm.config import GLMConfig
from openglm.engine import Engine
from openglm.loading import open_weights
from openglm.model.load import load_weights
from openglm.types import SamplingParams
from tests.parity import originals
from tests.parity.test_golden import ATOL

Shape = tuple[int, ...]
Tensors = dict[str, Tensor]


def random_state(shapes: Mapping[str, Shape], seed: int, dtype: torch.dtype) -> Tensors:
    """Weights of a sensible size; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("layernorm.weight"):
            values = 1 + 0.2 * values
        else:
            values = values * (0.2 if len(shape) == 1 else 0.6 if "embedding" in name else shape[1] ** -0.5)
        state[name] = values.to(dtype)
    return state


def quantised(state: Tensors, bits: int) -> Tensors:
    """The release's form of the four matrices of each layer: scales of rows, the even column in the high half."""
    out = dict(state)
    for name, weight in state.items():
        if ".layers." in name and name.endswith(".weight") and weight.dim() == 2:
            scale = (weight.float().abs().amax(1) / (2 ** (bits - 1) - 1)).half()
            q = (weight.float() / scale.float()[:, None]).round().to(torch.int8)
            if bits == 4:
                pairs = q.view(len(q), -1, 2).to(torch.int16)
                q = ((pairs[..., 0] << 4) | (pairs[..., 1] & 15)).to(torch.int8)
            out[name], out[f"{name}_scale"] = q, scale
    return out


def both(name: str, weight: Shape) -> dict[str, Shape]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def six(c: Mapping[str, Any], ffn: int) -> dict[str, Shape]:
    d = c["hidden_size"]
    shapes: dict[str, Shape] = {"transformer.word_embeddings.weight": (c["vocab_size"], d)}
    for i in range(c["num_layers"]):
        p = f"transformer.layers.{i}."
        shapes |= both(f"{p}input_layernorm", (d,)) | both(f"{p}post_attention_layernorm", (d,))
        shapes |= both(f"{p}attention.query_key_value", (3 * d, d)) | both(f"{p}attention.dense", (d, d))
        shapes |= both(f"{p}mlp.dense_h_to_4h", (ffn, d)) | both(f"{p}mlp.dense_4h_to_h", (d, ffn))
    return shapes | both("transformer.final_layernorm", (d,))


def two(c: Mapping[str, Any]) -> dict[str, Shape]:
    d, hd, heads, ffn = c["hidden_size"], c.get("kv_channels"), c["num_attention_heads"], c["ffn_hidden_size"]
    hd = hd or d // heads
    groups = c["multi_query_group_num"] if c.get("multi_query_attention") else heads
    norm = (lambda name: {f"{name}.weight": (d,)}) if c.get("rmsnorm", True) else (lambda name: both(name, (d,)))

    def linear(name: str, shape: Shape, bias: bool) -> dict[str, Shape]:
        return both(name, shape) if bias else {f"{name}.weight": shape}

    biased = bool(c.get("add_bias_linear"))
    shapes: dict[str, Shape] = {"transformer.embedding.word_embeddings.weight": (c["padded_vocab_size"], d)}
    for i in range(c["num_layers"]):
        p = f"transformer.encoder.layers.{i}."
        shapes |= norm(f"{p}input_layernorm") | norm(f"{p}post_attention_layernorm")
        shapes |= linear(f"{p}self_attention.query_key_value", ((heads + 2 * groups) * hd, d),
                         biased or bool(c.get("add_qkv_bias")))  # fmt: skip
        shapes |= linear(f"{p}self_attention.dense", (d, heads * hd), biased)
        shapes |= linear(f"{p}mlp.dense_h_to_4h", (2 * ffn, d), biased)
        shapes |= linear(f"{p}mlp.dense_4h_to_h", (d, ffn), biased)
    return shapes | norm("transformer.encoder.final_layernorm") | {
        "transformer.output_layer.weight": (c["padded_vocab_size"], d)
    }  # fmt: skip


def check(
    folder: Path, ids: list[int], wanted: Callable[[list[int]], Tensor], adapter: Path | None = None
) -> GLMConfig:
    """Logits of ids, and that each greedily drawn token, with the cache, is one that the formula ranks first."""
    opened = open_weights(folder, adapter)
    engine = Engine(load_weights(opened, dtype=torch.float32), opened.meta.special_ids)
    torch.testing.assert_close(engine.logits(ids), wanted(ids).float(), rtol=0, atol=ATOL)
    row = list(ids)
    for token in engine.generate(ids, SamplingParams(max_new_tokens=5, temperature=0.0)).token_ids:
        last = wanted(row)[-1]
        assert last.max() - last[token] < 1e-3
        row.append(token)
    return opened.config


def write(folder: Path, config: Mapping[str, Any], state: Tensors, form: str = "bin") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    return folder


# -------------------------------------------------------------------- ChatGLM-6B

SIX: dict[str, Any] = {
    "model_type": "chatglm", "hidden_size": 60, "num_attention_heads": 5, "num_layers": 3, "vocab_size": 71,
    "bos_token_id": 68, "mask_token_id": 64, "gmask_token_id": 65,
}  # fmt: skip
GMASK, MASK = [7, 9, 11, 3, 65, 68], [7, 64, 9, 11, 3, 68, 5, 6]


@pytest.mark.parametrize(("change", "ffn", "bits", "ids"), [
    ({}, 240, 0, GMASK), ({"layernorm_epsilon": 1e-3}, 50, 4, MASK), ({"num_layers": 1}, 26, 8, GMASK),
    ({}, 64, 0, [7, 65, 9, 64, 3, 68, 5]),
])  # fmt: skip
def test_chatglm_6b(tmp_path: Path, change: dict[str, Any], ffn: int, bits: int, ids: list[int]) -> None:
    """The config leaves out what the code has defaults for, and the width of the MLP."""
    config = SIX | change
    state = random_state(six(config, ffn), 1, torch.float16)
    if bits:
        state, config = quantised(state, bits), config | {"quantization_bit": bits}
    folder = write(tmp_path / "m", config, state, "safetensors")
    check(folder, ids, lambda row: originals.chatglm_6b(state | {"bits": torch.tensor(bits)}, config, row))


@pytest.mark.parametrize("ids", [[7, 9, 150001, 150004, 5, 6], [7, 150000, 9, 150001, 150004, 5]])
def test_first_release_of_chatglm_6b(tmp_path: Path, ids: list[int]) -> None:
    """<sop> keeps its own position behind a [gMASK], and a [MASK] goes before it."""
    config = {k: v for k, v in SIX.items() if "mask" not in k} | {
        "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 150528, "bos_token_id": 150004, "num_layers": 2,
    }  # fmt: skip
    state = random_state(six(config, 16), 2, torch.float16)
    found = check(write(tmp_path / "m", config, state), ids, lambda row: originals.chatglm_6b(state, config, row))
    assert found.sop_position == "index"


@pytest.mark.parametrize("projected", [False, True])
def test_a_prefix_is_found_with_its_base(tmp_path: Path, projected: bool) -> None:
    """A prefix alone finds the folder of its base's name beside it."""
    state = random_state(six(SIX, 64), 3, torch.float32)
    width, d = 2 * SIX["num_layers"] * SIX["hidden_size"], SIX["hidden_size"]
    p = "transformer.prefix_encoder."
    shapes: dict[str, Shape] = {f"{p}embedding.weight": (4, d if projected else width)}
    if projected:
        shapes |= both(f"{p}trans.0", (d, d)) | both(f"{p}trans.2", (width, d))
    prefix = random_state(shapes, 4, torch.float32)
    table = prefix[f"{p}embedding.weight"].double()
    if projected:
        table = originals.linear(originals.linear(table, prefix, f"{p}trans.0").tanh(), prefix, f"{p}trans.2")
    keys_values = table.view(4, 2 * SIX["num_layers"], SIX["num_attention_heads"], -1).transpose(0, 1)
    before = list(zip(keys_values[::2], keys_values[1::2], strict=True))

    def wanted(row: list[int]) -> Tensor:
        return originals.chatglm_6b(state, SIX, row, before)

    base = write(tmp_path / "base", SIX, state)
    alone = write(tmp_path / "prefix", SIX | {"pre_seq_len": 4, "_name_or_path": "THUDM/base"}, prefix)
    check(alone, GMASK, wanted)
    check(base, GMASK, wanted, adapter=alone)
    check(write(tmp_path / "whole", SIX | {"pre_seq_len": 4}, state | prefix), GMASK, wanted)
    config = SIX | {"pre_seq_len": 4, "_name_or_path": "THUDM/another"}
    with pytest.raises(ValueError, match="a P-Tuning v2 prefix for 'THUDM/another': give the folder of that model"):
        open_weights(write(tmp_path / "lost", config, prefix))


# -------------------------------------------------------------------- ChatGLM2 and later

TWO: dict[str, Any] = {
    "model_type": "chatglm", "hidden_size": 36, "num_attention_heads": 6, "num_layers": 3, "kv_channels": 12,
    "ffn_hidden_size": 22, "padded_vocab_size": 53, "multi_query_attention": True, "multi_query_group_num": 3,
    "add_qkv_bias": True, "layernorm_epsilon": 1.5625e-7,
}  # fmt: skip


@pytest.mark.parametrize(("change", "bits"), [
    ({}, 0), ({"multi_query_group_num": 1}, 4), ({"multi_query_group_num": 6, "rope_ratio": 500}, 8),
    ({"add_qkv_bias": False, "tie_word_embeddings": True}, 0),  # a field that the code does not read
    ({"multi_query_attention": False}, 0), ({"multi_query_attention": False, "kv_channels": None}, 4),
    ({"rmsnorm": False, "add_bias_linear": True}, 0), ({"apply_residual_connection_post_layernorm": True}, 8),
])  # fmt: skip
def test_chatglm2(tmp_path: Path, change: dict[str, Any], bits: int) -> None:
    config = TWO | change | {"transformers_version": "4.40.2"}
    if config["kv_channels"] is None:  # half of a head is rotated, in pairs
        config["hidden_size"] = 48
    state = random_state(two(config), 5, torch.bfloat16)
    if bits:
        state, config = quantised(state, bits), config | {"quantization_bit": bits}
    folder = write(tmp_path / "m", config, state)
    ids = torch.randint(0, 53, (21,), generator=torch.Generator().manual_seed(0)).tolist()
    check(folder, ids, lambda row: originals.chatglm2(state | {"bits": torch.tensor(bits)}, config, row))


@pytest.mark.parametrize(("field", "value"), [
    ("post_layer_norm", False), ("original_rope", False), ("interleaved_qkv", True), ("rotary_percent", 1.0),
])  # fmt: skip
def test_chatglm2_with_what_no_release_has(tmp_path: Path, field: str, value: object) -> None:
    folder = write(tmp_path / "m", TWO | {field: value}, random_state(two(TWO), 5, torch.float16))
    with pytest.raises(ValueError, match=f"{field} {value} was never released"):
        open_weights(folder)


# -------------------------------------------------------------------- model-parallel shards


def shards(folder: Path, args: dict[str, Any], ranks: list[Tensors], turned: bool = False) -> Path:
    """As DeepSpeed leaves them. turned: matrices whose columns lie one after another in the file."""
    inner = folder / "3000"
    inner.mkdir(parents=True)
    for i, rank in enumerate(ranks):
        state = {k: v.T.contiguous().T if turned and v.dim() == 2 else v for k, v in rank.items()}
        torch.save({"module": state, "iteration": 3000}, inner / f"mp_rank_{i:02d}_model_states.pt")
    (folder / "latest").write_text("3000\n")
    (folder / "model_args.json").write_text(json.dumps(args))
    return folder


def cut(whole: dict[str, Shape], n_ranks: int, seed: int, embed: str) -> list[Tensors]:
    """Random parts of each rank; what is not cut is the same on all."""
    def part(name: str, shape: Shape) -> Shape | None:
        if name == embed or "query_key_value" in name or "dense_h_to_4h" in name:
            return (shape[0] // n_ranks, *shape[1:])
        if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
            return shape[0], shape[1] // n_ranks
        return None

    parts = {name: part(name, shape) for name, shape in whole.items()}
    same = random_state({name: whole[name] for name, shape in parts.items() if shape is None}, seed, torch.float16)
    own = {name: shape for name, shape in parts.items() if shape is not None}
    return [random_state(own, seed + 1 + rank, torch.float16) | same for rank in range(n_ranks)]


SPECIAL_130B = {"[MASK]": 88, "[gMASK]": 89, "[sMASK]": 90, "sop": 92, "eop": 93, "eos": 2}


@pytest.mark.parametrize(("n_ranks", "bits", "ids"), [
    (1, 0, [5, 9, 89, 92, 6]), (4, 0, [5, 90, 9, 88, 2, 92, 6]), (8, 4, [5, 88, 9, 89, 92, 6]), (2, 8, [5, 90, 9, 92]),
])  # fmt: skip
def test_glm_130b(tmp_path: Path, n_ranks: int, bits: int, ids: list[int]) -> None:
    """Of several kinds of blanks the first [MASK] is filled, then an [sMASK]; scales are those of each rank."""
    args = {"num_layers": 2, "hidden_size": 96, "num_attention_heads": 8, "vocab_size": 96,
            "inner_hidden_size": 80, "layernorm_epsilon": 1e-4, "special_ids": SPECIAL_130B}  # fmt: skip
    shapes = six(args, 160) | {f"transformer.layers.{i}.mlp.dense_4h_to_h.weight": (96, 80) for i in range(2)}
    ranks = cut(shapes, n_ranks, 7, "transformer.word_embeddings.weight")
    if bits:
        ranks = [quantised(rank, bits) for rank in ranks]
    folder = shards(tmp_path / "m", args, ranks, turned=n_ranks == 4)
    read = [rank | {"bits": torch.tensor(bits)} for rank in ranks]
    for path in (folder, folder / "3000"):
        found = check(path, ids, lambda row: originals.glm_130b(read, args, row))
        assert found.residual_alpha == math.sqrt(4)


SPECIAL_2021 = {"eos": 90, "sop": 91, "eop": 92, "ENC": 93, "MASK": 94, "gMASK": 95, "sMASK": 89}


def glm_2021(n_ranks: int) -> tuple[dict[str, Any], list[Tensors]]:
    args = {"num_layers": 2, "hidden_size": 36, "num_attention_heads": 12, "vocab_size": 96,
            "max_position_embeddings": 30, "special_ids": SPECIAL_2021}  # fmt: skip
    shapes = six(args, 24)
    shapes = {"word_embeddings.weight": shapes.pop("transformer.word_embeddings.weight")} | shapes
    tables = {f"transformer.{name}_embeddings.weight": (31, 36) for name in ("position", "block_position")}
    return args, cut(shapes | tables, n_ranks, 11, "word_embeddings.weight")


@pytest.mark.parametrize("n_ranks", [1, 4])
def test_the_original_glm(tmp_path: Path, n_ranks: int) -> None:
    """Heads of an odd size, which nothing rotates; two answers in a row."""
    args, ranks = glm_2021(n_ranks)
    folder = shards(tmp_path / "m", args, ranks, turned=n_ranks == 4)
    for ids in ([93, 5, 6, 95, 91, 7], [93, 94, 5, 89, 6, 91, 7, 8, 91]):
        check(folder, ids, lambda row: originals.glm_2021(ranks, args, row))


def test_the_original_glm_under_other_names(tmp_path: Path) -> None:
    """The Chinese 10B's shards name two tensors otherwise; Hugging Face folders of the model have a config.json."""
    args, (state,) = glm_2021(1)
    ids = [93, 5, 94, 6, 91, 7]

    def wanted(row: list[int]) -> Tensor:
        return originals.glm_2021([state], args, row)

    names = {"word_embeddings.weight": "transformer.word_embeddings.weight",
             "transformer.block_position_embeddings.weight":
             "mixins.block_position_embedding.block_position_embeddings.weight"}  # fmt: skip
    check(shards(tmp_path / "zh", args, [{names.get(name, name): t for name, t in state.items()}]), ids, wanted)
    config = {"model_type": "glm", "num_layers": 2, "hidden_size": 36, "num_attention_heads": 12,
              "max_sequence_length": 30, "block_position_encoding": True, "special_ids": SPECIAL_2021}  # fmt: skip
    check(write(tmp_path / "hf", config, state), ids, wanted)
    inside = {f"glm.{name}": tensor for name, tensor in state.items()}
    check(write(tmp_path / "inside", config, inside), ids, wanted)
    with pytest.raises(ValueError, match="relative_encoding True of the original GLM is not supported"):
        open_weights(write(tmp_path / "xl", config | {"relative_encoding": True}, state))
