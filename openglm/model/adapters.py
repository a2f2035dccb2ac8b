"""Adapters on top of an opened checkpoint: LoRA in PEFT's layout, and P-Tuning v2 prefixes.

    python -m openglm generate BASE --adapter ADAPTER --prompt "..."

A LoRA is added to each weight as it is read (W + alpha / r * B A), so loading merges it and `convert` writes the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openglm.config import GLMConfig
from openglm.model.export import hf_architecture
from openglm.model.opened import OpenedModel
from openglm.model.released import read_json
from openglm.model.sources import FileSource, open_files
from openglm.model.weights import FAMILIES, Family, head_order, import_weight, names_of
from openglm.ops.quant import QuantTensor, Weight

__all__ = ["ADAPTER_CONFIG", "ENCODER", "apply_adapter", "is_adapter", "with_prefix"]

ADAPTER_CONFIG = "adapter_config.json"
ENCODER = "transformer.prefix_encoder."
PEFT = "base_model.model."


def apply_adapter(opened: OpenedModel, folder: str | Path) -> OpenedModel:
    """The model with a LoRA (adapter_config.json) or a P-Tuning v2 prefix (prefix_encoder tensors) applied.

    Raises ValueError for an adapter of another base or of a kind that is not known.
    """
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return _with_lora(opened, folder)
    if (folder / "config.json").is_file():
        return with_prefix(opened, folder)
    raise ValueError(f"{folder} is no adapter: it has neither adapter_config.json (LoRA) nor config.json (P-Tuning v2)")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model: a LoRA, or prefix_encoder tensors alone."""
    if not (folder / "config.json").is_file():
        return (folder / ADAPTER_CONFIG).is_file()
    if not read_json(folder / "config.json").get("pre_seq_len"):
        return False
    return all(name.startswith(ENCODER) for name in open_files(folder).names())


# -------------------------------------------------------------------- P-Tuning v2


def with_prefix(opened: OpenedModel, folder: Path) -> OpenedModel:
    """Keys and values from the prefix encoder of `folder`: its table, or the table through its two layers.

    The table's rows are (2 * n_layers, n_kv_heads, head_dim): key and value of each layer in turn. Keys are not
    rotated but their dimensions are put in our rotary order, as the queries' are.
    """
    tensors = {n: i for n, i in open_files(folder).tensors.items() if n.startswith(ENCODER)}
    if not tensors:
        raise ValueError(f"{folder} holds no {ENCODER}* tensors: it is no P-Tuning v2 prefix")
    read = {name.removeprefix(ENCODER): info.read().float() for name, info in tensors.items()}
    table = read["embedding.weight"]
    if "trans.0.weight" in read:
        hidden = torch.tanh(table @ read["trans.0.weight"].T + read["trans.0.bias"])
        table = hidden @ read["trans.2.weight"].T + read["trans.2.bias"]
    c = opened.config
    width = 2 * c.n_layers * c.n_kv_heads * c.head_dim
    if table.shape[1] != width:
        raise ValueError(
            f"{folder}: the prefix has {table.shape[1]} values a token, this model needs {width}: "
            "it was trained for another base"
        )
    prefix = table.view(-1, c.n_layers, 2, c.n_kv_heads, c.head_dim).permute(2, 1, 3, 0, 4)
    if opened.family == "openglm":
        raise ValueError("a P-Tuning v2 prefix goes on the released checkpoint, not on a converted one")
    assert opened.table is not None
    keys = prefix[0][..., head_order(opened.table.rotary, c)]
    return replace(opened, kv_prefix=torch.stack([keys, prefix[1]]).contiguous())


# -------------------------------------------------------------------- LoRA


def _with_lora(opened: OpenedModel, folder: Path) -> OpenedModel:
    settings = read_json(folder / ADAPTER_CONFIG)
    _check_settings(settings, folder)
    files = open_files(folder)
    pairs = _pairs(files, folder)
    family = _family_of(opened, frozenset(pairs), folder)
    by_ours = {
        ours: theirs for ours, theirs in names_of(family, opened.config).items()
        if any(name in pairs for name in theirs)
    }  # fmt: skip
    rank_scale = _scales(settings, folder)

    def change(name: str, weight: Weight) -> Weight:
        if opened.change is not None:
            weight = opened.change(name, weight)
        if name not in by_ours:
            return weight
        base = weight.dequantise(torch.float32) if isinstance(weight, QuantTensor) else weight
        rows = _rows_of(family, opened, name, by_ours[name])
        parts: list[Weight] = []
        for part, n_rows in zip(by_ours[name], rows, strict=True):
            if part in pairs:
                a, b = (files.tensors[n].read().float() for n in pairs[part])
                if (n_rows, base.shape[1]) != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
                    raise ValueError(
                        f"{folder}: {part} changes a ({b.shape[0]}, {a.shape[1]}) matrix, the model's is "
                        f"({n_rows}, {base.shape[1]}): the adapter was trained for another base"
                    )
                parts.append(b @ a * rank_scale(part, a.shape[0]))
            else:
                parts.append(torch.zeros(n_rows, base.shape[1]))
        delta = import_weight(family, opened.config, name, parts)
        assert isinstance(delta, Tensor)
        kind = torch.bfloat16 if isinstance(weight, QuantTensor) else weight.dtype
        return (base.float() + delta).to(kind)

    return replace(opened, change=change, adapters=(*opened.adapters, folder))


def _check_settings(settings: Mapping[str, Any], folder: Path) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder}: adapters of type {kind!r} are not supported: LORA, or a P-Tuning v2 checkpoint")
    for field in ("use_dora", "modules_to_save", "fan_in_fan_out", "layer_replication"):
        if settings.get(field):
            raise ValueError(f"{folder}: a LoRA with {field} is not supported")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{folder}: a LoRA with trained biases ({settings['bias']}) is not supported")


def _scales(settings: Mapping[str, Any], folder: Path) -> Any:
    """(tensor name, rank) -> alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA, with PEFT's patterns."""
    import re

    def pattern(table: Mapping[str, Any], name: str, default: Any) -> Any:
        module = name.removesuffix(".weight")
        return next((v for k, v in table.items() if re.match(rf"(.*\.)?({k})$", module)), default)

    def scale(name: str, rank: int) -> float:
        alpha, said = (
            float(pattern(settings.get(table) or {}, name, settings.get(field, 8)))  # which is PEFT's default
            for field, table in (("lora_alpha", "alpha_pattern"), ("r", "rank_pattern"))
        )
        if said != rank:
            raise ValueError(f"{folder}: {name} has rank {rank}, but {ADAPTER_CONFIG} says {said:g}: they belong apart")
        if not math.isfinite(alpha):
            raise ValueError(f"{folder}: lora_alpha must be a number, not {alpha}")
        return alpha / (rank**0.5 if settings.get("use_rslora") else rank)

    return scale


def _pairs(files: FileSource, folder: Path) -> dict[str, tuple[str, str]]:
    """Base tensor name -> names of A and B."""
    pairs: dict[str, tuple[str, str]] = {}
    for name in files.names():
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            if other not in files.tensors:
                raise ValueError(f"{folder} holds {name} without its lora_B: fetch it again")
            base = name.removeprefix(PEFT).replace(".lora_A.default.", ".").replace(".lora_A.", ".")
            pairs[base] = (name, other)
        elif ".lora_B." not in name:
            raise ValueError(f"{folder} holds {name}, which is no LoRA matrix: this kind of adapter is not supported")
    if not pairs:
        raise ValueError(f"{folder} holds no lora_A and lora_B matrices")
    return pairs


def _family_of(opened: OpenedModel, targets: frozenset[str], folder: Path) -> Family:
    """The family whose names the adapter uses: the opened one's own, or another layout of the same model."""
    for family in [*([opened.table] if opened.table else []), *_layouts(opened.config)]:
        if targets <= {name for theirs in names_of(family, opened.config).values() for name in theirs}:
            return family
    known = {name for theirs in opened.names().values() for name in theirs}
    odd = sorted(targets - known)[0]
    raise ValueError(f"{folder} changes {odd}, which this model lacks: the adapter was trained for another base")


def _layouts(config: GLMConfig) -> list[Family]:
    """The layouts that a model of this config is released in."""
    if config.mask == "prefix":
        original = "glm-10b" if config.positions == "learned" else "chatglm-6b" if config.n_axes == 2 else "glm-130b"
        return [FAMILIES[original]]
    layouts = [FAMILIES[hf_architecture(config)[1]]]
    return [*layouts, FAMILIES["chatglm2"]] if config.rope.fraction < 1.0 and not config.sandwich else layouts


def _rows_of(family: Family, opened: OpenedModel, name: str, theirs: tuple[str, ...]) -> list[int]:
    c = opened.config
    if ".attn.qkv." in name:
        sizes = [c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim]
        return sizes if len(theirs) == 3 else [sum(sizes)]
    if ".mlp.up." in name:
        n_up = 1 if c.mlp == "gelu" else 2
        return [c.ffn_dim] * 2 if len(theirs) == 2 else [n_up * c.ffn_dim]
    if ".attn.out." in name or ".mlp.down." in name:
        return [c.dim]
    return [c.vocab_size]
