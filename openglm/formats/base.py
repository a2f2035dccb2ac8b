"""What every chat format is made of.

A format writes a conversation as a list of parts: special ids, and pieces of ordinary text. Text is encoded by
`Tokenizer.encode`, which cannot yield a special id, so nothing that a user types can open or close a turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from openglm.tokenizer import Tokenizer
from openglm.types import Event, Message, ToolSpec

__all__ = ["ChatFormat", "Parser", "Part", "Rendered", "assemble", "render_many"]


class Part(NamedTuple):
    """A special id, or text to encode; `target`: its tokens are training targets."""

    content: int | str
    target: bool = False


@dataclass(frozen=True)
class Rendered:
    """ids of a conversation; loss_mask[i]: token i is a training target, i.e. to be predicted from those before it."""

    ids: list[int]
    loss_mask: list[bool]


class Parser(Protocol):
    """Reads an answer as it is generated, from the first id after the prompt on."""

    def feed(self, id: int) -> list[Event]:
        """What this id adds: text, a finished tool call, or nothing yet. Ids after a stop id are ignored."""
        ...

    def finish(self) -> list[Event]:
        """What was held back, when no more ids come."""
        ...

    @property
    def message(self) -> Message:
        """The assistant message read so far; complete after `finish`."""
        ...


class ChatFormat(Protocol):
    name: str
    stop_ids: tuple[int, ...]

    def parts(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = True
    ) -> list[Part]:
        """The conversation as parts, in order. A conversation that ends with an answer ends with its stop token,
        unless add_generation_prompt asks for the header of a further answer.
        """
        ...

    def render(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = True
    ) -> Rendered: ...

    def parser(self, tools: Sequence[ToolSpec] = ()) -> Parser:
        """A fresh parser; answers are read as calls only of these tools."""
        ...


def assemble(parts: Iterable[Part], encoded: Iterable[list[int]]) -> Rendered:
    """Rendered conversation from parts; `encoded` gives the ids of each text part in order."""
    ids: list[int] = []
    mask: list[bool] = []
    texts = iter(encoded)
    for content, target in parts:
        piece = [content] if isinstance(content, int) else next(texts)
        ids += piece
        mask += [target] * len(piece)
    return Rendered(ids, mask)


def render_many(tokenizer: Tokenizer, conversations: Sequence[Sequence[Part]]) -> list[Rendered]:
    """Conversations given as parts, with all their texts encoded in one batch on all cores; each text only once."""
    unique = dict.fromkeys(c for parts in conversations for c, _ in parts if isinstance(c, str))
    table = dict(zip(unique, tokenizer.encode_batch(list(unique)), strict=True))
    return [assemble(parts, (table[c] for c, _ in parts if isinstance(c, str))) for parts in conversations]
