"""Blank infilling, GLM's pre-training objective: [MASK], [sMASK] and [gMASK] in a mix, with a share of instructions.

    objective: infill
    data: {train: [shards/en, shards/zh], val: [shards/val-en, shards/val-zh], mix: {gmask: 0.7, mask: 0.3}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from openglm.config import GLMConfig
from openglm.data.infill import InfillParams
from openglm.data.stream import InfillSource, PackedStream, RowStream, Source, check_mix
from openglm.tokenizer import Tokenizer
from openglm.train.objectives.base import Split
from openglm.train.objectives.corpora import check_numbers, open_corpora, padding_id
from openglm.train.objectives.sft import SFTData, chat_source

__all__ = ["InfillData", "build_stream"]


@dataclass(frozen=True, kw_only=True)
class InfillData:
    """The `data:` section.

    train, val: folders of token shards. weights: share of the tokens of each train folder, default by size.
    mix: share of the text by kind, of gmask, mask, smask and lm (lm: gmask with nothing visible).
    mask_window: tokens of a [MASK] or [sMASK] window, default row_len // 4 as in GLM-130B.
    mask_ratio, mean_span, min_gmask_ratio: see data/infill.py.
    instructions: chat files (as for sft) mixed in so that instruction_share of the tokens comes from them;
    format: chat format that renders them.
    """

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    mix: Mapping[str, float] = field(default_factory=lambda: {"gmask": 0.7, "mask": 0.3})
    mask_window: int | None = None
    mask_ratio: float = 0.15
    mean_span: float = 3.0
    min_gmask_ratio: float = 0.2
    instructions: tuple[str, ...] = ()
    instruction_share: float = 0.0
    format: str = "glm-4"

    def __post_init__(self) -> None:
        check_numbers(self.weights, self.train, self.instruction_share)
        check_mix(self.mix)
        self.params("2d")
        if bool(self.instructions) != (self.instruction_share > 0.0):
            raise ValueError("data.instructions and data.instruction_share go together: give both or neither")

    def params(self, positions: Literal["2d", "1d"]) -> InfillParams:
        return InfillParams(
            mask_ratio=self.mask_ratio, mean_span=self.mean_span, min_gmask_ratio=self.min_gmask_ratio,
            positions=positions,
        )  # fmt: skip


def build_stream(
    data: InfillData, config: GLMConfig, tokenizer: Tokenizer, row_len: int, seed: int, split: Split
) -> RowStream:
    """Rows of one split. Instructions go to training only: their loss would blur the validation of text."""
    if config.mask != "prefix":
        raise ValueError("objective infill needs a model with mask: prefix; train causal models with objective: lm")
    folders = data.train if split == "train" else data.val
    datasets = open_corpora(folders, split, config, tokenizer)
    params = data.params("2d" if config.n_axes == 2 else "1d")
    sources: list[Source] = [
        InfillSource(
            dataset, row_len, tokenizer.special_ids, vocab_size=tokenizer.vocab_size, mix=data.mix, params=params,
            mask_window=data.mask_window, seed=seed, tag=tag,
        )
        for tag, dataset in enumerate(datasets)
    ]  # fmt: skip
    shares = list(data.weights) if data.weights and split == "train" else [float(d.n_tokens) for d in datasets]
    if data.instruction_share and split == "train":
        chat = SFTData(train=data.instructions, format=data.format)
        sources.append(chat_source(chat, config, tokenizer, row_len, split))
        shares.append(sum(shares) * data.instruction_share / (1.0 - data.instruction_share))
    return PackedStream(sources, row_len, padding_id(tokenizer), shares=shares, seed=seed)
