"""The family's silent errors, put in one by one: each is noticed. This half: models and checkpoints.

    python -m pytest -q tests/parity -k pitfalls

The numbers are those of the fact sheet's list of 26. Each test is of one shape: as it is, our result equals the
original's (a golden set, or transformers); with the error in, it differs by a clear margin. test_pitfalls_text.py has
text and chat (8 to 11, 21 to 23) and what is about rounding or refused (parts of 2, 5, 12, 13, 15 to 18, 24);
test_pitfalls_rows.py sampling, batches and training (8, 17, 21, 25, 26). Number 20, the image path of GLM-4V, comes
with its vision tower.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import openglm.engine.direct as engine_module
import openglm.model.sat as sat_module
import openglm.model.transformer as transformer_module
from openglm.engine import Engine
from openglm.model.batch import PromptLayout
from openglm.model.linear import QuantLinear
from openglm.model.load import build_transformer
from openglm.model.opened import OpenedModel
from openglm.model.transformer import Block, Transformer
from openglm.model.weights import FAMILIES
from openglm.ops.quant import QuantTensor, Weight
from tests.parity.test_golden import ATOL, Golden, engine_of

CLEAR = 5e-3  # what a mistake must move logits by, against ATOL = 2e-4 for being right


@dataclass
class Run:
    """One checkpoint on its way to logits; a mistake changes it, or patches a function."""

    opened: OpenedModel
    patch: pytest.MonkeyPatch
    built: list[Callable[[Transformer], None]] = field(default_factory=list)

    def logits(self, ids: list[int], special_ids: dict[str, int]) -> Tensor:
        model = build_transformer(self.opened, dtype=torch.float32)
        for change in self.built:
            change(model)
        return Engine(model, special_ids).logits(ids)


Mistake = Callable[[Run], None]


def config(**fields: Any) -> Mistake:
    def put(run: Run) -> None:
        run.opened = replace(run.opened, config=replace(run.opened.config, **fields))

    return put


def rope(**fields: Any) -> Mistake:
    return lambda run: config(rope=replace(run.opened.config.rope, **fields))(run)


def table(**fields: Any) -> Mistake:
    """Another row of weights.FAMILIES."""

    def put(run: Run) -> None:
        assert run.opened.table is not None
        run.opened = replace(run.opened, table=replace(run.opened.table, **fields))

    return put


def weights(part: str, change: Callable[[Any, Run, str], Weight]) -> Mistake:
    """Another value for the weights whose name has that part."""

    def put(run: Run) -> None:
        def changed(name: str, weight: Weight) -> Weight:
            return change(weight, run, name) if part in name else weight

        run.opened = replace(run.opened, change=changed)

    return put


def model(change: Callable[[Transformer], None]) -> Mistake:
    return lambda run: run.built.append(change)


def without(*paths: str) -> Mistake:
    """The modules at the end of these paths give back what they get."""

    def skip(built: Transformer) -> None:
        for path, module in built.named_modules():
            if path.endswith(paths):
                module.register_forward_hook(lambda module, args, out: args[0])

    return model(skip)


def function(where: object, name: str, wrong: Callable[[Any], Callable[..., Any]]) -> Mistake:
    """`wrong` makes the mistaken function from the right one."""
    return lambda run: run.patch.setattr(where, name, wrong(getattr(where, name)))


def layout(change: Callable[[PromptLayout, list[int], dict[str, int]], PromptLayout]) -> Mistake:
    """`change` gets the right layout, the prompt's ids and the special ids."""
    return function(
        engine_module, "prompt_layout", lambda right: lambda ids, c, names: change(right(ids, c, names), ids, names)
    )


def positions(change: Callable[[Tensor], Tensor]) -> Mistake:
    return function(PromptLayout, "positions", lambda right: lambda *a: change(right(*a)))


def context(extra: int) -> Mistake:
    return function(PromptLayout, "context", lambda right: lambda found, n: torch.arange(n) < found.n_context + extra)


# -------------------------------------------------------------------- the mistakes that need more than a line


def by_group(weight: Tensor, run: Run, name: str) -> Tensor:
    """Blocks [Q | K | V] read as Megatron's groups, each with its queries, key and value."""
    c = run.opened.config
    n = c.n_heads // c.n_kv_heads
    heads = torch.arange(c.n_heads + 2 * c.n_kv_heads).view(c.n_kv_heads, n + 2)
    order = torch.cat([heads[:, :n].reshape(-1), heads[:, n], heads[:, n + 1]])
    return weight.unflatten(0, (-1, c.head_dim))[order].flatten(0, 1)


def other_gelu(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Error function for tanh, and the reverse."""
    return lambda x, approximate="none": right(x, approximate="tanh" if approximate == "none" else "none")


def queries(factor: Callable[[int], float]) -> Mistake:
    """Queries of each layer, from 0 on, times a factor."""

    def scale(weight: Tensor, run: Run, name: str) -> Tensor:
        n = run.opened.config.n_heads * run.opened.config.head_dim
        rows = torch.ones(len(weight))
        rows[:n] = factor(int(name.split(".")[1]))
        return weight.float() * rows.view(-1, *[1] * (weight.dim() - 1))

    return weights("attn.qkv", scale)


def inverted(right: Callable[..., Tensor | None]) -> Callable[..., Tensor]:
    """True taken for masked; a token still sees itself, so that nothing becomes NaN."""

    def wrong(n_query: int, *rest: Any) -> Tensor:
        seen = right(n_query, *rest)
        assert seen is not None
        return ~seen | torch.eye(n_query, dtype=torch.bool)

    return wrong


def dealt_out(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Query head i with key head i mod G, instead of each key head with the H / G query heads in a row."""
    return lambda q, k, v, mask: right(q, *(x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v)), mask)


def norm_of_the_sum(block: Block, h: Tensor, *rest: Any) -> Tensor:
    """Sandwich norms taken for post-norms."""
    h = block.post_norm1(h + block.attn(block.norm1(h), *rest, block.layer))
    return block.post_norm2(h + block.mlp(block.norm2(h)))


def bias_scaled(built: Transformer) -> None:
    """The bias added before the product is scaled."""
    for module in built.modules():
        if isinstance(module, QuantLinear) and module.bias is not None:
            module.bias.data = module.bias * module.scale[:, 0]


def swapped_halves(weight: Weight, run: Run, name: str) -> Weight:
    if not isinstance(weight, QuantTensor):
        return weight
    return replace(weight, q=(weight.q << 4) | (weight.q >> 4))


def one_scale(weight: Weight, run: Run, name: str) -> Weight:
    """One scale for the matrix."""
    if not isinstance(weight, QuantTensor):
        return weight
    return replace(weight, scale=weight.scale.float().mean().expand_as(weight.scale))


def first_shard(weight: Weight, run: Run, name: str) -> Weight:
    """The scales of rank 0 for the columns of all ranks."""
    return replace(weight, scale=weight.scale[:, :1]) if isinstance(weight, QuantTensor) else weight


def rule(part: str, wrong: str) -> Mistake:
    """Another merge rule for the shards of the tensors whose name has that part."""
    return function(
        sat_module, "rule_of", lambda right: lambda name, family: wrong if part in name else right(name, family)
    )


def freezing(layout: PromptLayout, ids: list[int], special_ids: dict[str, int]) -> PromptLayout:
    """Positions run on where they should freeze, and the reverse."""
    return replace(layout, frozen=not layout.frozen)


def zeros(weight: Any, run: Run, name: str) -> Weight:
    return torch.zeros_like(weight)


def masked(value: float) -> Mistake:
    """Hidden scores get this instead of minus infinity."""
    return function(
        transformer_module, "attention", lambda right: lambda q, k, v, mask: right(q, k, v, mask.clamp(min=value))
    )


class Pitfall(NamedTuple):
    number: int
    what: str
    checkpoint: str  # folder of a golden set, or "hf/...", made with transformers
    case: str
    mistake: Mistake
    array: str = "logits"
    clear: float = CLEAR  # 0: float32 does not show it, so it must not be told from what is right
    atol: float = ATOL


A, B, C2, C3, G4 = "chatglm-6b", "glm-130b/mp1", "chatglm2-6b", "chatglm3-6b", "glm-4-9b"
T, EDGE, SANDWICH, SMALL = "glm-10b/mp1", "hf/glm-edge", "hf/glm-4-0414", "hf/glm-4-small"
whole_prompt = layout(lambda found, ids, names: replace(found, n_context=len(ids) // 2))
PITFALLS = [
    Pitfall(1, "heads as blocks", B, "gmask", table(qkv="blocks")),
    Pitfall(1, "heads as blocks", A, "gmask", table(qkv="blocks")),
    Pitfall(1, "blocks as heads", T, "gmask", table(qkv="heads")),
    Pitfall(1, "blocks as groups", C2, "prompt", weights("attn.qkv", by_group)),
    Pitfall(1, "blocks as groups", G4, "prompt", weights("attn.qkv", by_group)),
    Pitfall(2, "first half gated", B, "gmask", table(up="gate_first")),
    Pitfall(2, "second half gated", C2, "prompt", table(up="gate_last")),
    Pitfall(2, "second half gated", G4, "prompt", table(up="gate_last")),
    *[Pitfall(2, "other gelu", name, "gmask", function(F, "gelu", other_gelu), "logits", 1e-3) for name in (B, A, T)],
    Pitfall(2, "gelu for silu", C3, "prompt", config(mlp="geglu")),
    Pitfall(3, "adjacent pairs", B, "gmask", table(rotary="adjacent")),
    Pitfall(3, "half split", C2, "prompt", table(rotary="half")),
    Pitfall(3, "half split", G4, "prompt", table(rotary="half")),
    Pitfall(3, "half split", EDGE, "prompt", table(rotary="half")),
    Pitfall(3, "one half split over both axes", A, "gmask", table(rotary="half")),
    Pitfall(3, "whole head", C3, "prompt", rope(fraction=1.0)),
    Pitfall(3, "half of the head", B, "gmask", rope(fraction=0.5)),
    Pitfall(3, "half of the head", EDGE, "prompt", rope(fraction=0.5)),
    Pitfall(3, "streams exchanged", A, "gmask", positions(lambda p: p.flip(0))),
    *[Pitfall(4, "residual of x", name, "gmask",
              function(Block, "_residual", lambda right: lambda block, h, x: block.alpha * h)) for name in (A, B)],
    Pitfall(4, "no final norm", B, "gmask", without("norm")),
    Pitfall(4, "no alpha", B, "gmask", config(residual_alpha=1.0)),
    Pitfall(4, "alpha of this depth", A, "gmask",
            lambda run: config(residual_alpha=(2 * run.opened.config.n_layers) ** 0.5)(run)),
    Pitfall(4, "alpha of 28 layers", B, "gmask", config(residual_alpha=56**0.5)),
    *[Pitfall(5, "divided only", name, "gmask", queries(lambda i: 1 / (i + 1))) for name in (A, B)],
    *[Pitfall(5, "layers from 0", name, "gmask", queries(lambda i: (i + 1) / max(i, 1))) for name in (A, B)],
    # The original hides by -10000, before it multiplies by layer + 1; after it, or minus infinity, is the same here.
    *[Pitfall(5, f"mask {value:g}", name, "gmask", masked(value), "logits", clear) for name in (A, B)
      for value, clear in ((-1e4, 0), (-3e4, 0), (-5, CLEAR))],
    *[Pitfall(6, what, name, "gmask", mistake) for name in (A, B) for what, mistake in (
        ("inverted", function(transformer_module, "visible", inverted)), ("sop is context", context(1)),
        ("gMASK is no context", context(-1)), ("causal", context(-1000)))],
    *[Pitfall(6, "prefix seen both ways", name, "prompt", whole_prompt) for name in (C2, C3, G4)],
    Pitfall(7, "gMASK freezes", B, "gmask", layout(freezing)),
    Pitfall(7, "MASK runs on", B, "mask", layout(freezing)),
    Pitfall(7, "runs on", A, "gmask", layout(freezing)),
    Pitfall(7, "first mask", A, "mask_and_gmask",
            layout(lambda found, ids, names: replace(found, mask_index=ids.index(names["[MASK]"])))),
    Pitfall(7, "block from 0 at sop", A, "gmask", positions(lambda p: torch.stack([p[0], (p[1] - 1).clamp(min=0)]))),
    Pitfall(7, "no block", A, "gmask", positions(lambda p: p * torch.tensor([[1], [0]]))),
    Pitfall(7, "counted behind the prefix", C2, "prompt", positions(lambda p: (p - 2).clamp(min=0))),
    Pitfall(7, "counted behind the prefix", G4, "prompt", positions(lambda p: (p - 2).clamp(min=0))),
    Pitfall(7, "no block table", T, "two_masks", weights("embed_block", zeros)),
    Pitfall(7, "no position table", T, "two_masks", weights("embed_position", zeros)),
    Pitfall(7, "runs on", T, "mask", layout(freezing)),
    Pitfall(12, "frequencies not rounded", B, "gmask", rope(freq_dtype="float32")),
    Pitfall(12, "frequencies not rounded", A, "gmask", rope(freq_dtype="float32"), "logits", 4e-4),
    Pitfall(13, "eps 1e-5", SMALL, "prompt", config(norm_eps=1e-5)),
    # The activations of the golden sets are so large that a wrong eps stays below 2e-4.
    Pitfall(13, "eps 1e-5", G4, "prompt", config(norm_eps=1e-5), "logits", 5e-5, 2e-5),
    Pitfall(13, "eps of GLM-4", C3, "prompt", config(norm_eps=1.5625e-7), "logits", 5e-5, 2e-5),
    Pitfall(14, "base for positions", C2, "rope_ratio_4", rope(theta=4e4, position_scale=1.0)),
    Pitfall(14, "dropped", C2, "rope_ratio_4", rope(position_scale=1.0)),
    Pitfall(14, "positions for base", C3, "rope_ratio_50", rope(theta=1e4, position_scale=50.0)),
    Pitfall(14, "dropped", C3, "rope_ratio_50", rope(theta=1e4)),
    Pitfall(14, "dropped", G4, "prompt", rope(theta=1e4)),
    Pitfall(14, "of the chat model", G4, "rope_ratio_1", rope(theta=5e6)),
    *[Pitfall(15, "heads dealt out", name, case, function(transformer_module, "attention", dealt_out))
      for name, case in ((C2, "prompt"), (G4, "prompt"), (SANDWICH, "prompt"))],
    Pitfall(15, "no QKV bias", G4, "prompt", config(qkv_bias=False)),
    Pitfall(16, "norms left out", SANDWICH, "prompt", without("post_norm1", "post_norm2")),
    Pitfall(16, "norms of the sum", SANDWICH, "prompt", function(Block, "forward", lambda right: norm_of_the_sum)),
    Pitfall(16, "names misread", SANDWICH, "prompt",
            table(names={**FAMILIES["hf-glm4"].names, "norm2": ("post_self_attn_layernorm",),
                         "post_norm1": ("post_attention_layernorm",)})),
    *[Pitfall(17, "tied", name, "prompt", config(tie_embeddings=True)) for name in (C2, C3, G4)],
    Pitfall(17, "untied, which is the same", A, "gmask", config(tie_embeddings=False), "logits", 0),
    *[Pitfall(18, what, name, "gmask", mistake, "logits_int4") for name in ("glm-130b/mp1-int4", "chatglm-6b/int4")
      for what, mistake in (("low half first", weights("weight", swapped_halves)), ("bias scaled", model(bias_scaled)),
                            ("one scale", weights("weight", one_scale)))],
    Pitfall(18, "scales of one shard", "glm-130b/mp2-int4", "gmask", weights("weight", first_shard), "logits_mp2_int4"),
    Pitfall(19, "GLU as plain rows", "glm-130b/mp2", "gmask", rule("dense_h_to_4h", "rows")),
    Pitfall(19, "QKV in thirds", "glm-130b/mp2", "gmask", rule("query_key_value", "thirds")),
    Pitfall(19, "QKV as plain rows", "glm-10b/mp2", "gmask", rule("query_key_value", "rows")),
    Pitfall(24, "norms in half", A, "gmask", weights("norm", lambda w, run, name: w.half()), "logits", 4e-4),
]  # fmt: skip


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference; a NaN is one without end."""
    return float((ours - theirs).abs().nan_to_num(nan=torch.inf).max())


@pytest.fixture(scope="session")
def transformers_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as transformers saves them, of the shapes that have no golden set, with its logits."""
    transformers = pytest.importorskip("transformers", reason="needs the test extra: transformers")
    shape: dict[str, Any] = {
        "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "head_dim": 16,
        "num_key_value_heads": 2, "intermediate_size": 88, "max_position_embeddings": 128, "pad_token_id": None,
        "rms_norm_eps": 1.5625e-7, "attn_implementation": "eager",
    }  # fmt: skip
    root = tmp_path_factory.mktemp("pitfalls")
    for name, kind, fraction in (("glm-edge", "Glm", 1.0), ("glm-4-0414", "Glm4", 0.5), ("glm-4-small", "Glm", 0.5)):
        angles = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": fraction}
        settings = getattr(transformers, f"{kind}Config")(**shape, attention_bias=False, rope_parameters=angles)
        torch.manual_seed(0)
        reference = getattr(transformers, f"{kind}ForCausalLM")(settings).eval().requires_grad_(False)
        for parameter in reference.parameters():  # norms must not be trivial
            parameter.mul_(4).add_(torch.randn_like(parameter) * 0.1)
        if name == "glm-4-small":  # activations against which the norm's eps counts
            reference.model.embed_tokens.weight.mul_(1e-3)
        ids = torch.randint(0, 131, (40,))
        reference.save_pretrained(root / "hf" / name)
        arrays = {"prompt.input_ids": ids.numpy(), "prompt.logits": reference(ids[None]).logits[0].numpy()}
        np.savez(root / "hf" / name / "cases.npz", allow_pickle=False, **arrays)
        (root / "hf" / name / "cases.json").write_text('{"cases": {}}')
    return root


@pytest.fixture
def locate(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str, str], tuple[Golden, Path]]:
    """The set and the folder of a checkpoint; where the case has a rope_ratio of its own, a copy with that."""

    def find(checkpoint: str, case: str) -> tuple[Golden, Path]:
        if checkpoint.startswith("hf/"):
            folder = request.getfixturevalue("transformers_sets") / checkpoint
            return Golden(folder), folder
        root = request.getfixturevalue("shared_data") / "golden"
        golden, folder = Golden(root / checkpoint.split("/")[0]), root / checkpoint
        facts = golden.cases["cases"][case]
        if "rope_ratio" not in facts:
            return golden, folder
        for path in folder.iterdir():
            if path.name != "config.json":
                (tmp_path / path.name).symlink_to(path)
        values = json.loads((folder / "config.json").read_text()) | {"rope_ratio": facts["rope_ratio"]}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return golden, tmp_path

    return find


Locate = Callable[[str, str], tuple[Golden, Path]]


@pytest.mark.parametrize("pitfall", PITFALLS, ids=lambda p: f"{p.number}-{p.checkpoint}-{p.what}".replace(" ", "_"))
def test_a_mistake_moves_the_logits(pitfall: Pitfall, locate: Locate, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, folder = locate(pitfall.checkpoint, pitfall.case)
    ids, wanted = golden.ids(pitfall.case), golden.array(pitfall.case, pitfall.array)
    opened, engine = engine_of(folder)
    assert difference(engine.logits(ids), wanted) <= pitfall.atol
    run = Run(opened, monkeypatch)
    pitfall.mistake(run)
    wrong = difference(run.logits(ids, engine.special_ids), wanted)
    if pitfall.clear:
        assert wrong > pitfall.clear, f"{pitfall.what} moves the logits by {wrong:.2g} only"
    else:
        assert wrong <= pitfall.atol
