"""Our Transformer against logits that the originals' own code computed on tiny checkpoints in released layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openglm.config import GLMConfig, RopeConfig
from openglm.model.batch import ForwardBatch, PromptLayout, prompt_layout
from openglm.model.cache import KVCache
from openglm.model.transformer import Transformer
from openglm.model.weights import FAMILIES, export_weights, import_weights

HALF_ROPE = {"freq_dtype": "float16"}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a .bin, .safetensors or one-rank SAT set."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("pytorch_model*.bin")):
        tensors |= torch.load(path, weights_only=True)
    for path in sorted(folder.glob("*.safetensors")):
        from safetensors.torch import load_file

        tensors |= load_file(path)
    for path in sorted(folder.glob("*/mp_rank_00_model_states.pt")):
        tensors |= torch.load(path, weights_only=True)["module"]
    return tensors


def glm_130b_config(a: dict[str, Any]) -> GLMConfig:
    heads = a["num_attention_heads"]
    return GLMConfig(
        vocab_size=a["vocab_size"], dim=a["hidden_size"], n_layers=a["num_layers"], n_heads=heads, n_kv_heads=heads,
        head_dim=a["hidden_size"] // heads, ffn_dim=a["inner_hidden_size"], max_seq_len=a["max_sequence_length"],
        norm="layer", residual="normed", residual_alpha=(2 * a["num_layers"]) ** 0.5, mlp="geglu", linear_bias=True,
        rope=RopeConfig(freq_dtype="float16"), mask="prefix", tie_embeddings=True,
    )  # fmt: skip


def chatglm_6b_config(a: dict[str, Any]) -> GLMConfig:
    heads = a["num_attention_heads"]
    return GLMConfig(
        vocab_size=a["vocab_size"], dim=a["hidden_size"], n_layers=a["num_layers"], n_heads=heads, n_kv_heads=heads,
        head_dim=a["hidden_size"] // heads, ffn_dim=a["inner_hidden_size"], max_seq_len=a["max_sequence_length"],
        norm="layer", residual="normed", residual_alpha=56**0.5, mlp="gelu", linear_bias=True,
        rope=RopeConfig(axes=2, freq_dtype="float16"), mask="prefix", tie_embeddings=True,
    )  # fmt: skip


def chatglm2_config(a: dict[str, Any]) -> GLMConfig:
    theta = 10000.0 * a.get("rope_ratio", 1)
    return GLMConfig(
        vocab_size=a["padded_vocab_size"], dim=a["hidden_size"], n_layers=a["num_layers"],
        n_heads=a["num_attention_heads"], n_kv_heads=a["multi_query_group_num"], head_dim=a["kv_channels"],
        ffn_dim=a["ffn_hidden_size"], max_seq_len=a["seq_length"], norm_eps=a["layernorm_epsilon"],
        rope=RopeConfig(theta=theta, fraction=0.5),
    )  # fmt: skip


SETS = {  # set -> (flags file, weights folder, weight table, config)
    "glm-130b": ("model_args.json", "mp1", "glm-130b", glm_130b_config),
    "chatglm-6b": ("config.json", ".", "chatglm-6b", chatglm_6b_config),
    "chatglm2-6b": ("config.json", ".", "chatglm2", chatglm2_config),
    "chatglm3-6b": ("config.json", ".", "chatglm2", chatglm2_config),
    "codegeex2-6b": ("config.json", ".", "chatglm2", chatglm2_config),
    "glm-4-9b": ("config.json", ".", "chatglm2", chatglm2_config),
}
CASES = [
    ("glm-130b", "gmask"), ("glm-130b", "mask"), ("glm-130b", "smask"), ("glm-130b", "lm_window0_uni"),
    ("glm-130b", "lm_window1_prefix"), ("glm-130b", "choice_mask"), ("glm-130b", "choice_gmask"),
    ("chatglm-6b", "gmask"), ("chatglm-6b", "mask_multi"), ("chatglm-6b", "mask_and_gmask"),
    ("chatglm-6b", "mid_target"), ("chatglm2-6b", "prompt"), ("chatglm2-6b", "long"), ("chatglm3-6b", "chat"),
    ("codegeex2-6b", "prompt"), ("glm-4-9b", "prompt"), ("glm-4-9b", "chat"),
]  # fmt: skip


class Golden:
    """One golden set: our model with its weights, its cases and arrays."""

    def __init__(self, folder: Path, name: str) -> None:
        flags, weights, table, make_config = SETS[name]
        root = folder / name
        self.config = make_config(json.loads((root / flags).read_text()))
        self.cases = json.loads((root / "cases.json").read_text())
        self.arrays = np.load(root / "cases.npz")
        self.tensors = read_tensors(root / weights)
        self.family = FAMILIES[table]
        self.model = Transformer(self.config, device="meta")
        state = {n: t.float() for n, t in import_weights(self.family, self.config, self.tensors.__getitem__)}
        self.model.load_state_dict(state, assign=True)
        self.model.requires_grad_(False)
        self.special_ids = {f"<{k}>" if k in ("sop", "eop") else k: v for k, v in self.cases["special_ids"].items()}

    def array(self, case: str, *names: str) -> torch.Tensor:
        name = next(f"{case}.{n}" for n in names if f"{case}.{n}" in self.arrays)
        return torch.from_numpy(self.arrays[name])

    def batch(self, case: str) -> ForwardBatch:
        """As stored: ids, positions; the mask is turned into context flags and segments by `as_given`."""
        ids = self.array(case, "input_ids", "tokens").long()[None]
        positions = self.array(case, "position_ids").long()
        return ForwardBatch(ids, positions.view(self.config.rope.axes, 1, -1))


@pytest.fixture(scope="session")
def golden(shared_data: Path) -> dict[str, Golden]:
    return {name: Golden(shared_data / "golden", name) for name in SETS}


def run_with_mask(model: Transformer, batch: ForwardBatch, visible: torch.Tensor | None) -> torch.Tensor:
    """Forward with an arbitrary (T, T) visibility, which multi-choice packing needs."""
    import openglm.model.transformer as module

    original = module.visible
    module.visible = lambda *a, **k: None if visible is None else visible[None, None]
    try:
        return model.logits(model(batch))[0]
    finally:
        module.visible = original


def layout_of(g: Golden, case: str) -> PromptLayout:
    n_prompt = g.cases["cases"][case].get("context_length")
    return prompt_layout(g.array(case, "input_ids", "tokens").tolist()[:n_prompt], g.config, g.special_ids)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits(golden: dict[str, Golden], name: str, case: str) -> None:
    g = golden[name]
    if f"{case}.logits" not in g.arrays:
        pytest.skip(f"the golden set {name} has no case {case}")
    masked = f"{case}.masked" in g.arrays
    visible = ~self_visible(g, case) if masked else None
    ours = run_with_mask(g.model, g.batch(case), visible)
    torch.testing.assert_close(ours, g.array(case, "logits"), rtol=0, atol=2e-4)


def self_visible(g: Golden, case: str) -> torch.Tensor:
    return g.array(case, "masked")


@pytest.mark.parametrize(
    ("name", "case"),
    [("glm-130b", "gmask"), ("glm-130b", "mask"), ("glm-130b", "smask"), ("chatglm-6b", "gmask"),
     ("chatglm-6b", "mask_multi"), ("chatglm-6b", "mask_and_gmask"), ("chatglm-6b", "mid_target"),
     ("chatglm2-6b", "prompt"), ("glm-4-9b", "prompt")],
)  # fmt: skip
def test_layout_rule_gives_the_original_positions_and_mask(golden: dict[str, Golden], name: str, case: str) -> None:
    g = golden[name]
    layout = layout_of(g, case)
    ids = g.array(case, "input_ids", "tokens")
    positions = g.array(case, "position_ids").view(g.config.rope.axes, -1)
    assert torch.equal(layout.positions(0, len(ids)), positions.long())
    if f"{case}.masked" in g.arrays:
        n = len(ids)
        seen = torch.ones(n, n, dtype=torch.bool).tril() | layout.context(n)[None]
        assert torch.equal(~seen, g.array(case, "masked"))


@pytest.mark.parametrize(("name", "case"), [("glm-130b", "gmask"), ("glm-130b", "mask"), ("chatglm-6b", "gmask"),
                                            ("chatglm-6b", "mask_multi"), ("chatglm2-6b", "prompt"),
                                            ("glm-4-9b", "prompt")])  # fmt: skip
def test_greedy_continuation_with_cache(golden: dict[str, Golden], name: str, case: str) -> None:
    g = golden[name]
    facts = g.cases["cases"][case]
    n_prompt = facts["context_length"]
    prompt = g.array(case, "input_ids", "tokens").long()[:n_prompt]
    layout = layout_of(g, case)
    cache = KVCache(g.config, 1, n_prompt + len(facts["greedy"]))
    context = layout.context(n_prompt)[None] if layout.n_context else None
    batch = ForwardBatch(prompt[None], layout.positions(0, n_prompt)[:, None], context=context)
    got = []
    for i in range(len(facts["greedy"])):
        token = int(g.model.logits(g.model(batch, cache))[0, -1].argmax())
        got.append(token)
        at = n_prompt + i
        batch = ForwardBatch(torch.tensor([[token]]), layout.positions(at, at + 1)[:, None])
    assert got == facts["greedy"]


def test_left_padded_batch_equals_the_original(golden: dict[str, Golden]) -> None:
    g = golden["chatglm-6b"]
    ids = g.array("batch_left_pad", "input_ids").long()
    positions = g.array("batch_left_pad", "position_ids").long().transpose(0, 1)
    n_pad = torch.tensor([ids.shape[1] - len(row) for row in g.cases["cases"]["batch_left_pad"]["rows"]])
    index = torch.arange(ids.shape[1])
    segments = (index >= n_pad[:, None]).long() - 1
    sop = (ids == g.special_ids["<sop>"]).long().argmax(1)
    batch = ForwardBatch(ids, positions, segments, index < sop[:, None])
    ours = g.model.logits(g.model(batch))
    theirs = g.array("batch_left_pad", "logits")
    torch.testing.assert_close(ours[segments == 0], theirs[segments == 0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", list(SETS))
def test_weight_table_out_and_back_is_exact(golden: dict[str, Golden], name: str) -> None:
    g = golden[name]
    state = dict(import_weights(g.family, g.config, g.tensors.__getitem__))
    for theirs, tensor in export_weights(g.family, g.config, state):
        assert torch.equal(tensor, g.tensors[theirs]), theirs
