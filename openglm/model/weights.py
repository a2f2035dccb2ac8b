"""One table a checkpoint family, read in both directions: their tensor names and row orders against ours.

Ours: `qkv` rows are [Q | K | V], each head's rotated rows in half-split order (row i turns with row i + r/2); a gated
MLP's `up` rows are [gate | up]. Every transform here permutes or joins rows, so import and export are exact inverses.
Facts: the fact sheets of the releases (row orders found by running the original code, see tests/parity).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, overload

import torch
from torch import Tensor

from openglm.config import GLMConfig
from openglm.ops.quant import QuantParts, QuantTensor, Weight

__all__ = [
    "FAMILIES", "Family", "export_weights", "head_order", "import_parts", "import_weight", "import_weights", "names_of",
    "part_orders",
]  # fmt: skip

Rotary = Literal["half", "adjacent", "half_per_axis"]


@dataclass(frozen=True)
class Family:
    """Names and orders of one checkpoint family.

    prefix, layer: where global and per-layer tensors live. names: ours -> theirs; several of theirs are joined along
    rows. qkv: "blocks" [Q | K | V] or "heads", each head's [q | k | v] in turn. rotary: which rows turn together.
    up: "gate_first", or "gate_last" as in GLM-130B, whose second half goes through the GELU.
    """

    layer: str
    top: Mapping[str, str]
    names: Mapping[str, tuple[str, ...]]
    qkv: Literal["blocks", "heads"] = "blocks"
    rotary: Rotary = "half"
    up: Literal["gate_first", "gate_last"] = "gate_first"


_THUDM_6B = {
    "norm1": ("input_layernorm",), "attn.qkv": ("attention.query_key_value",), "attn.out": ("attention.dense",),
    "norm2": ("post_attention_layernorm",), "mlp.up": ("mlp.dense_h_to_4h",), "mlp.down": ("mlp.dense_4h_to_h",),
}  # fmt: skip
_THUDM_2 = _THUDM_6B | {"attn.qkv": ("self_attention.query_key_value",), "attn.out": ("self_attention.dense",)}
_HF_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_HF_LLAMA = {
    "norm1": ("input_layernorm",), "attn.qkv": _HF_QKV, "attn.out": ("self_attn.o_proj",),
    "norm2": ("post_attention_layernorm",), "mlp.up": ("mlp.gate_proj", "mlp.up_proj"), "mlp.down": ("mlp.down_proj",),
}  # fmt: skip
_HF_GLM = _HF_LLAMA | {"mlp.up": ("mlp.gate_up_proj",)}
_HF_GLM4 = _HF_GLM | {"post_norm1": ("post_self_attn_layernorm",), "post_norm2": ("post_mlp_layernorm",)}
_HF_TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_GLM_10B_TOP = {
    "embed": "word_embeddings", "embed_position": "transformer.position_embeddings",
    "embed_block": "transformer.block_position_embeddings", "norm": "transformer.final_layernorm", "head": "lm_head",
}  # fmt: skip
_SAT_TOP = {"embed": "transformer.word_embeddings", "norm": "transformer.final_layernorm", "head": "lm_head"}

FAMILIES: dict[str, Family] = {
    "glm-130b": Family("transformer.layers", _SAT_TOP, _THUDM_6B, qkv="heads", up="gate_last"),
    "glm-10b": Family("transformer.layers", _GLM_10B_TOP, _THUDM_6B),
    "chatglm-6b": Family("transformer.layers", _SAT_TOP, _THUDM_6B, qkv="heads", rotary="half_per_axis"),
    "chatglm2": Family(
        "transformer.encoder.layers",
        {
            "embed": "transformer.embedding.word_embeddings",
            "norm": "transformer.encoder.final_layernorm",
            "head": "transformer.output_layer",
        },
        _THUDM_2,
        rotary="adjacent",
    ),
    "hf-glm": Family("model.layers", _HF_TOP, _HF_GLM, rotary="adjacent"),
    "hf-glm4": Family("model.layers", _HF_TOP, _HF_GLM4, rotary="adjacent"),
    "hf-llama": Family("model.layers", _HF_TOP, _HF_LLAMA),
}


def import_weights(
    family: Family, config: GLMConfig, get: Callable[[str], Weight]
) -> Iterator[tuple[str, Weight]]:
    """(our name, weight in our order) for every tensor of the model, one at a time; `get` reads theirs by name.

    Quantised parts of one form are joined as they are; parts of different forms are dequantised to bfloat16.
    """
    for ours, theirs in _pairs(family, config):
        yield ours, import_weight(family, config, ours, [get(name) for name in theirs])


def import_weight(family: Family, config: GLMConfig, ours: str, parts: list[Weight]) -> Weight:
    """Our tensor `ours` from the parts of theirs that `names_of` lists. ValueError for a wrong number of rows."""
    weight = import_parts(family, config, ours, parts)
    return weight.dequantise(torch.bfloat16) if isinstance(weight, QuantParts) else weight


def import_parts(family: Family, config: GLMConfig, ours: str, parts: list[Weight]) -> Weight | QuantParts:
    """`import_weight` that leaves quantised parts of different forms as they are."""
    order = _row_order(family, config, ours)
    weight = _joined(parts)
    if order is not None and len(order) != weight.shape[0]:  # fewer would be taken without a word
        raise ValueError(
            f"{ours} has {weight.shape[0]} rows, which does not fit the config's {len(order)}: they belong apart"
        )
    return weight if order is None else _take_rows(weight, order)


def export_weights(
    family: Family, config: GLMConfig, state: Iterable[tuple[str, Weight]] | Mapping[str, Weight]
) -> Iterator[tuple[str, Weight]]:
    """(their name, weight in their order): the inverse of `import_weights`, for weights in any order."""
    table = dict(_pairs(family, config))
    for ours, weight in state.items() if isinstance(state, Mapping) else state:
        theirs, order = table[ours], _row_order(family, config, ours)
        weight = weight if order is None else _take_rows(weight, order.argsort())
        if len(theirs) == 1:
            yield theirs[0], weight
            continue
        first = 0
        for name, n_rows in zip(theirs, _part_rows(config, ours), strict=True):
            yield name, _take_rows(weight, slice(first, first + n_rows))
            first += n_rows


def names_of(family: Family, config: GLMConfig) -> dict[str, tuple[str, ...]]:
    """Our tensor names with theirs, in the model's order."""
    return dict(_pairs(family, config))


def part_orders(family: Family, config: GLMConfig, ours: str, n_rows: Sequence[int]) -> list[Tensor | None]:
    """For each part of theirs, of that many rows, the order that its own rows take in ours; None: as they lie.

    Raises ValueError if they are not as many as the config says.
    """
    order = _row_order(family, config, ours)
    if order is None:
        return [None] * len(n_rows)
    if len(order) != sum(n_rows):
        raise ValueError(
            f"{ours} has {sum(n_rows)} rows, which does not fit the config's {len(order)}: they belong apart"
        )
    orders: list[Tensor | None] = []
    for n, last in zip(n_rows, accumulate(n_rows), strict=True):
        part = order[last - n : last] - (last - n)
        assert int(part.min()) >= 0 and int(part.max()) < n, "rows cross from part to part"
        orders.append(None if torch.equal(part, torch.arange(n)) else part)
    return orders


def _joined(parts: list[Weight]) -> Weight | QuantParts:
    if len(parts) == 1:
        return parts[0]
    quantised = tuple(p for p in parts if isinstance(p, QuantTensor))
    if len(quantised) == len(parts):
        return QuantTensor.cat(quantised) if QuantTensor.alike(parts) else QuantParts(quantised)
    return torch.cat([p.dequantise(torch.bfloat16) if isinstance(p, QuantTensor) else p for p in parts])


@overload
def _take_rows(weight: Weight, rows: Tensor | slice) -> Weight: ...
@overload
def _take_rows(weight: Weight | QuantParts, rows: Tensor) -> Weight | QuantParts: ...
def _take_rows(weight: Weight | QuantParts, rows: Any) -> Weight | QuantParts:
    return weight[rows] if isinstance(weight, Tensor) else weight.take_rows(rows)


def _pairs(family: Family, config: GLMConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our tensor names with theirs, in the model's order."""
    norm_parts = ("weight", "bias") if config.norm == "layer" else ("weight",)
    tables = ("embed", "embed_position", "embed_block") if config.positions == "learned" else ("embed",)
    for table in tables:
        yield f"{table}.weight", (f"{family.top[table]}.weight",)
    for i in range(config.n_layers):
        for ours, theirs in family.names.items():
            if "norm" in ours:
                parts = norm_parts
            else:
                bias = config.qkv_bias if ours == "attn.qkv" else config.linear_bias
                parts = ("weight", "bias") if bias else ("weight",)
            for part in parts:
                yield f"layers.{i}.{ours}.{part}", tuple(f"{family.layer}.{i}.{name}.{part}" for name in theirs)
    for part in norm_parts:
        yield f"norm.{part}", (f"{family.top['norm']}.{part}",)
    if not config.tie_embeddings:
        yield "head.weight", (f"{family.top['head']}.weight",)


def _part_rows(config: GLMConfig, ours: str) -> list[int]:
    if ".attn.qkv." in ours:
        return [config.n_heads * config.head_dim] + 2 * [config.n_kv_heads * config.head_dim]
    return [config.ffn_dim, config.ffn_dim]


def _row_order(family: Family, config: GLMConfig, ours: str) -> Tensor | None:
    """Row indices with ours = theirs[order], or None where the orders agree."""
    if ".mlp.up." in ours and config.mlp != "gelu" and family.up == "gate_last":
        return torch.arange(2 * config.ffn_dim).roll(config.ffn_dim)
    if ".attn.qkv." not in ours:
        return None
    n_rows = torch.arange(config.qkv_dim)
    if family.qkv == "heads":  # (heads, 3, head_dim) -> (3, heads, head_dim)
        assert config.n_heads == config.n_kv_heads, "per-head interleaved rows go with equal query and key heads"
        n_rows = n_rows.view(config.n_heads, 3, config.head_dim).transpose(0, 1).reshape(-1)
    elif family.rotary == "half":
        return None
    n_qk = (config.n_heads + config.n_kv_heads) * config.head_dim
    head = head_order(family.rotary, config)
    turned = n_rows[:n_qk].view(-1, config.head_dim)[:, head].reshape(-1)
    return torch.cat([turned, n_rows[n_qk:]])


def head_order(rotary: Rotary, config: GLMConfig) -> Tensor:
    """Within one head: our half-split order drawn from theirs; rows that are not rotated stay behind."""
    r = config.rotary_dim
    index = torch.arange(config.head_dim)
    if rotary == "adjacent":  # pairs (2i, 2i + 1)
        index[:r] = torch.arange(r).view(-1, 2).T.reshape(-1)
    elif rotary == "half_per_axis":  # each axis half-split on its own: (axis, half, r/4) -> (half, axis, r/4)
        index[:r] = torch.arange(r).view(config.rope.axes, 2, -1).transpose(0, 1).reshape(-1)
    return index
