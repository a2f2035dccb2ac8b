"""Model-parallel shards (mp_rank_XX_model_states.pt) of GLM-130B and the original GLM, read as one and cut again.

    python -m openglm convert /path/to/glm-130b out --format sat --tp 4

Which dimension ranks share is a rule of the tensor's name (GLM-130B's tools, the original GLM's change_mp):
column-parallel matrices and embeddings lie below each other, row-parallel ones beside each other; each rank's part of
a gated MLP holds a piece of both halves; the original GLM cuts the thirds of QKV apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

from openglm.model.sources import TensorInfo, dtype_name, open_file, read_thudm_quant
from openglm.ops.quant import QuantTensor, Weight

__all__ = ["SatSource", "cut", "find_shards"]

MIXIN = "mixins.block_position_embedding.block_position_embeddings.weight"
EMBED = "word_embeddings.weight"
Rule = Literal["copy", "rows", "columns", "halves", "thirds"]


def rule_of(name: str, family: str) -> Rule:
    """How the ranks share a tensor. family: "glm-130b" or "glm-10b"."""
    if name.endswith("word_embeddings.weight"):
        return "rows"
    if ".attention.query_key_value." in name:
        return "rows" if family == "glm-130b" else "thirds"
    if ".mlp.dense_h_to_4h." in name:
        return "halves" if family == "glm-130b" else "rows"
    if name.endswith((".attention.dense.weight", ".mlp.dense_4h_to_h.weight")):
        return "columns"
    return "copy"


def find_shards(folder: Path) -> list[Path] | None:
    """The rank files of a folder, or of the iteration its `latest` names; None when it holds none.

    Raises ValueError for a missing rank.
    """
    inner = folder
    for pointer in ("latest", "latest_checkpointed_iteration.txt"):
        if (folder / pointer).is_file():
            iteration = (folder / pointer).read_text(encoding="utf-8").strip()
            inner = folder / iteration
            if not inner.is_dir():
                raise ValueError(f"{folder / pointer} names {iteration}, which is no folder here: fetch it")
            break
    found = {
        int(m.group(1)): p for p in inner.glob("mp_rank_*_model_states.pt")
        if (m := re.fullmatch(r"mp_rank_(\d+)_model_states\.pt", p.name))
    }  # fmt: skip
    if not found:
        return None
    missing = [rank for rank in range(max(found) + 1) if rank not in found]
    if missing:
        raise ValueError(f"{inner} lacks mp_rank_{missing[0]:02d}_model_states.pt: fetch it")
    return [found[rank] for rank in sorted(found)]


class SatSource:
    """The shards of all ranks as one Source; a tensor is joined when it is asked for."""

    def __init__(self, shards: Iterable[Path]) -> None:
        self.files = list(shards)
        self.ranks: list[dict[str, TensorInfo]] = [_usual_names(open_file(path)) for path in self.files]
        first = self.ranks[0]
        for path, rank in zip(self.files, self.ranks, strict=True):
            if rank.keys() != first.keys():
                odd = sorted(rank.keys() ^ first.keys())[0]
                raise ValueError(f"{path} and {self.files[0].name} do not hold the same tensors ({odd}): fetch again")
        self.family = "glm-10b" if "transformer.block_position_embeddings.weight" in first else "glm-130b"
        embed = next((info for name, info in first.items() if name.endswith("word_embeddings.weight")), None)
        if embed is None:
            raise ValueError(f"{self.files[0]} holds no word_embeddings.weight: this is not a GLM checkpoint")
        self.dim = embed.shape[1]

    def names(self) -> Iterable[str]:
        return [name for name in self.ranks[0] if not name.endswith("weight_scale")]

    def shape(self, name: str) -> tuple[int, ...]:
        shape, n = list(self.ranks[0][name].shape), len(self.ranks)
        rule = rule_of(name, self.family)
        if self._bits(name) == 4:
            shape[1] *= 2
        if rule == "columns":
            shape[1] *= n
        elif rule != "copy":
            shape[0] *= n
        return tuple(shape)

    def stored(self, name: str) -> list[tuple[str, int]]:
        found = [rank[part] for rank in self.ranks for part in (name, f"{name}_scale") if part in rank]
        bits = self._bits(name)
        return [(f"int{bits}" if bits else dtype_name(info.dtype), info.n_bytes) for info in found]

    def get(self, name: str) -> Weight:
        rule = rule_of(name, self.family)
        ranks = range(1 if rule == "copy" else len(self.ranks))
        return join([self._part(rank, name) for rank in ranks], rule)

    def _part(self, rank: int, name: str) -> Weight:
        tensors = self.ranks[rank]
        weight, bits = tensors[name].read(), self._bits(name)
        if not bits:
            return weight
        return read_thudm_quant(weight, tensors[f"{name}_scale"].read(), weight.shape[1] * (8 // bits))

    def _bits(self, name: str) -> int:
        """8 or 4 for a quantised matrix, told by the width of one whose columns no rank shares; 0 for others."""
        if f"{name}_scale" not in self.ranks[0]:
            return 0
        width = self.ranks[0]["transformer.layers.0.attention.query_key_value.weight"].shape[1]
        return 8 if width == self.dim else 4


def _usual_names(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The original GLM's Chinese 10B was trained in another program, whose names differ for two tensors."""
    if MIXIN not in tensors:
        return tensors
    names = {MIXIN: "transformer.block_position_embeddings.weight", "transformer.word_embeddings.weight": EMBED}
    return {names.get(name, name): info for name, info in tensors.items()}


def join(parts: list[Weight], rule: Rule) -> Weight:
    """One tensor from the parts of all ranks."""
    if rule == "copy" or len(parts) == 1:
        return parts[0]
    if rule in ("halves", "thirds"):
        n = 2 if rule == "halves" else 3
        size = parts[0].shape[0] // n
        pieces = [_rows(p, slice(i * size, (i + 1) * size)) for i in range(n) for p in parts]
        return _cat(pieces, 0)
    return _one_scale(_cat(parts, 1)) if rule == "columns" else _cat(parts, 0)


def _one_scale(weight: Weight) -> Weight:
    """One scale a row where all ranks have the same: they were cut from a matrix that was quantised whole."""
    if isinstance(weight, QuantTensor) and (weight.scale == weight.scale[:, :1]).all():
        return QuantTensor(weight.q, weight.scale[:, :1].contiguous())
    return weight


def cut(name: str, weight: Weight, family: str, n_ranks: int) -> list[Weight]:
    """The parts of all ranks: the inverse of `join`. ValueError when the ranks do not divide it."""
    rule = rule_of(name, family)
    if rule == "copy":
        return [weight] * n_ranks
    if rule == "columns":
        return _cut_columns(name, weight, n_ranks)
    n_blocks = {"rows": 1, "halves": 2, "thirds": 3}[rule]
    size, rest = divmod(weight.shape[0], n_blocks * n_ranks)
    if rest:
        raise ValueError(f"{name} has {weight.shape[0]} rows, which {n_ranks} ranks do not divide: choose another --tp")
    blocks = [
        [_rows(weight, slice((b * n_ranks + r) * size, (b * n_ranks + r + 1) * size)) for b in range(n_blocks)]
        for r in range(n_ranks)
    ]
    return [_cat(pieces, 0) if n_blocks > 1 else pieces[0] for pieces in blocks]


def _cut_columns(name: str, weight: Weight, n_ranks: int) -> list[Weight]:
    columns = weight.shape[1]
    if columns % n_ranks:
        raise ValueError(f"{name} has {columns} columns, which {n_ranks} ranks do not divide: choose another --tp")
    size = columns // n_ranks
    if not isinstance(weight, QuantTensor):
        return [part.contiguous() for part in weight.split(size, dim=1)]
    groups = weight.scale.shape[1]
    if groups % n_ranks and groups > 1:
        raise ValueError(f"{name} was quantised for {groups} ranks and cannot be cut for {n_ranks}: start from fp16")
    if weight.bits == 4 and size % 2:
        raise ValueError(f"{name}: {size} columns a rank do not fill INT4 bytes: choose another --tp")
    step = size * weight.bits // 8
    per_rank = max(1, groups // n_ranks)
    return [
        QuantTensor(
            weight.q[:, r * step : (r + 1) * step].contiguous(),
            (weight.scale[:, r * per_rank : (r + 1) * per_rank] if groups > 1 else weight.scale).contiguous(),
        )
        for r in range(n_ranks)
    ]


def _rows(weight: Weight, rows: slice) -> Weight:
    return weight.take_rows(rows) if isinstance(weight, QuantTensor) else weight[rows]


def _cat(parts: list[Weight], dim: int) -> Weight:
    if QuantTensor.alike(parts):
        return QuantTensor.cat([p for p in parts if isinstance(p, QuantTensor)], dim)
    return torch.cat([p for p in parts if not isinstance(p, QuantTensor)], dim)
