"""Token-shard folders of a run, opened and checked against its tokenizer and model."""

from __future__ import annotations

from collections.abc import Sequence

from openglm.config import GLMConfig
from openglm.data.shards import TokenDataset
from openglm.tokenizer import Tokenizer
from openglm.train.objectives.base import Split

__all__ = ["check_fit", "check_numbers", "open_corpora", "padding_id"]


def open_corpora(
    folders: Sequence[str], split: Split, config: GLMConfig, tokenizer: Tokenizer
) -> list[TokenDataset]:  # fmt: skip
    """The data sets of one split; ValueError when there is none, or one was made with another tokenizer."""
    if not folders:
        raise ValueError(f"data.{split} names no token shards; list folders that `openglm data prepare` wrote")
    check_fit(config, tokenizer)
    datasets = []
    for folder in folders:
        dataset = TokenDataset(folder)
        if dataset.tokenizer_fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"{folder} was prepared with another tokenizer than this run's (vocabulary of {dataset.vocab_size} and "
                f"{tokenizer.vocab_size} ids): prepare the data again, or use that tokenizer"
            )
        datasets.append(dataset)
    return datasets


def check_fit(config: GLMConfig, tokenizer: Tokenizer) -> None:
    """ValueError when the tokenizer makes ids that the model has no row for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary {config.vocab_size}: "
            f"set model.vocab_size to at least {tokenizer.vocab_size}"
        )


def check_numbers(weights: Sequence[float], folders: Sequence[str], share: float) -> None:
    """Weights of the corpora and the share of instruction data."""
    if weights and (len(weights) != len(folders) or min(weights) <= 0):
        raise ValueError(f"data.weights needs one positive number for each of the {len(folders)} folders of data.train")
    if not 0.0 <= share < 1.0:
        raise ValueError(f"data.instruction_share must be in [0, 1), not {share}")


def padding_id(tokenizer: Tokenizer) -> int:
    """Id that fills rows: <|endoftext|> where the tokenizer has it; padding carries no loss and is seen by no token."""
    return tokenizer.special_ids.get("<|endoftext|>", 0)
