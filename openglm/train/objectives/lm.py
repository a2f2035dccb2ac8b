"""Causal language modelling. For prefix models the whole window hides behind one [gMASK], which is the same thing.

    objective: lm
    data: {train: [shards/en, shards/zh], val: [shards/val-en]}
"""

from __future__ import annotations

from dataclasses import dataclass

from openglm.config import GLMConfig
from openglm.data.infill import InfillParams
from openglm.data.stream import InfillSource, LMSource, PackedStream, RowStream, Source
from openglm.tokenizer import Tokenizer
from openglm.train.objectives.base import Split
from openglm.train.objectives.corpora import check_numbers, open_corpora, padding_id

__all__ = ["LMData", "build_stream"]


@dataclass(frozen=True, kw_only=True)
class LMData:
    """The `data:` section. train, val: folders of token shards. weights: share of the tokens of each train folder,
    default by size.
    """

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_numbers(self.weights, self.train, 0.0)


def build_stream(
    data: LMData, config: GLMConfig, tokenizer: Tokenizer, row_len: int, seed: int, split: Split
) -> RowStream:
    """Rows of one split."""
    datasets = open_corpora(data.train if split == "train" else data.val, split, config, tokenizer)
    sources: list[Source]
    if config.mask == "causal":
        sources = [LMSource(dataset, row_len) for dataset in datasets]
    else:
        params = InfillParams(positions="2d" if config.n_axes == 2 else "1d")
        sources = [
            InfillSource(
                dataset, row_len, tokenizer.special_ids, vocab_size=tokenizer.vocab_size, mix={"lm": 1.0},
                params=params, seed=seed, tag=tag,
            )
            for tag, dataset in enumerate(datasets)
        ]  # fmt: skip
    shares = list(data.weights) if data.weights and split == "train" else [float(d.n_tokens) for d in datasets]
    return PackedStream(sources, row_len, padding_id(tokenizer), shares=shares, seed=seed)
