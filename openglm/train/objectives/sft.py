"""Supervised fine-tuning on chat messages: loss on the answers and their stop tokens only.

    objective: sft
    data: {train: [chat.jsonl.zst], val_share: 0.01, format: glm-4}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from openglm.config import GLMConfig
from openglm.data.chat import ChatOptions, load_chat
from openglm.data.stream import ExampleSource, PackedStream, RowStream
from openglm.formats import get_format
from openglm.tokenizer import Tokenizer
from openglm.train.objectives.base import Split
from openglm.train.objectives.corpora import check_fit, padding_id

__all__ = ["SFTData", "build_stream", "chat_source"]


@dataclass(frozen=True, kw_only=True)
class SFTData:
    """The `data:` section.

    train, val: chat files, folders or globs. val_share: without val files, this share of train is held out by hash.
    format: name in openglm.formats. overlong, loss_weighting: see data/chat.py ChatOptions.
    """

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    val_share: float = 0.0
    format: str = "glm-4"
    overlong: Literal["split", "newest"] = "split"
    loss_weighting: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        if not 0.0 <= self.val_share < 1.0:
            raise ValueError(f"data.val_share must be in [0, 1), not {self.val_share}")
        if self.val and self.val_share:
            raise ValueError("data.val and data.val_share exclude each other: give files or a share")
        for name, known in (("overlong", ("split", "newest")), ("loss_weighting", ("token", "sequence"))):
            if getattr(self, name) not in known:
                raise ValueError(f"data.{name} must be {' or '.join(known)}, not {getattr(self, name)!r}")


def chat_source(data: SFTData, config: GLMConfig, tokenizer: Tokenizer, row_len: int, split: Split) -> ExampleSource:
    """The examples of one split."""
    check_fit(config, tokenizer)
    files = data.val if split == "val" and data.val else data.train
    if not files:
        raise ValueError("data.train names no chat files; list jsonl files with a field 'messages'")
    if split == "val" and not data.val and not data.val_share:
        raise ValueError("there is no validation data: set data.val or data.val_share, or eval_every=0")
    prefix = config.mask == "prefix"
    options = ChatOptions(
        row_len=row_len, prefix=prefix, frozen=prefix and config.n_axes == 2, overlong=data.overlong,
        loss_weighting=data.loss_weighting,
    )  # fmt: skip
    examples = load_chat(
        files, tokenizer, get_format(data.format, tokenizer), options, held_out=data.val_share,
        take_held_out=split == "val",
    )  # fmt: skip
    return ExampleSource(examples)


def build_stream(
    data: SFTData, config: GLMConfig, tokenizer: Tokenizer, row_len: int, seed: int, split: Split
) -> RowStream:
    """Rows of one split."""
    source = chat_source(data, config, tokenizer, row_len, split)
    return PackedStream([source], row_len, padding_id(tokenizer), seed=seed)
