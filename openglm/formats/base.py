"""What every chat format is made of.

    python -m openglm inspect prompt MODEL messages.json

A format writes a conversation as a list of parts: special ids, and pieces of ordinary text. Text is encoded by
`Tokenizer.encode`, which cannot yield a special id, so nothing that a user types can open or close a turn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from openglm.tokenizer import Tokenizer
from openglm.types import Event, Message, ToolSpec

if TYPE_CHECKING:
    from openglm.formats.parser import AnswerParser, Syntax

__all__ = ["BaseFormat", "CallStyle", "ChatFormat", "Parser", "Part", "Rendered", "assemble", "render_many"]


class Part(NamedTuple):
    """A special id, or text to encode; `target`: its tokens are training targets."""

    content: int | str
    target: bool = False


@dataclass(frozen=True)
class Rendered:
    """ids of a conversation; loss_mask[i]: token i is a training target, i.e. to be predicted from those before it."""

    ids: list[int]
    loss_mask: list[bool]


class CallStyle(NamedTuple):
    """How calls are written, for grammars that hold an answer to them; in the texts {name} stands for the tool.

    before, after: what stands around the arguments. arguments: a JSON object, or Python keyword arguments. between:
    what joins two calls of one turn; None: a turn has one. text: the beginning of an answer that is no call, where it
    has a mark of its own. mark: the characters by which a call is told from text inside an answer.
    """

    before: str
    after: str = ""
    arguments: Literal["json", "python"] = "json"
    between: str | None = None
    text: str = ""
    mark: str = ""


class Parser(Protocol):
    """Reads an answer as it is generated, from the first id after the prompt on."""

    def feed(self, id: int) -> list[Event]:
        """What this id adds: text, reasoning, a finished tool call, or nothing yet. Ids after a stop id are ignored."""
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

    @property
    def call_style(self) -> CallStyle | None:
        """None: the format has no tools."""

    @property
    def builtin_tools(self) -> frozenset[str]:
        """Names of the tools of `types.BUILTIN_TOOLS` that models of this format were trained to use by name."""

    @property
    def thinks_always(self) -> bool:
        """Whether every answer begins with reasoning, which the prompt opens and </think> ends."""

    def parts(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = True
    ) -> list[Part]:
        """The conversation as parts, in order. A conversation that ends with an answer ends with its stop token,
        unless add_generation_prompt asks for the header of a further answer. ValueError for what the format cannot
        say, such as tools in one that has none.
        """
        ...

    def render(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = True
    ) -> Rendered: ...

    def parser(self, tools: Sequence[ToolSpec] = (), pieces: bool = False) -> Parser:
        """A fresh parser; answers are read as calls only of these tools. pieces: calls are told while they are written
        (`Event.call_delta`).
        """
        ...


class BaseFormat(ABC):
    """What formats share: ids by name, rendering, and a parser that follows `syntax`."""

    name = ""
    needed: tuple[str, ...] = ()  # special tokens without which the format cannot be written
    call_style: CallStyle | None = None
    builtin_tools: frozenset[str] = frozenset()
    thinks_always = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        missing = [name for name in self.needed if name not in tokenizer.special_ids]
        if missing:
            raise ValueError(f"chat format {self.name} needs the token {missing[0]}, which this tokenizer lacks")
        self.tokenizer = tokenizer
        self._id = tokenizer.special_ids
        self.stop_ids: tuple[int, ...] = ()

    @abstractmethod
    def parts(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = True
    ) -> list[Part]: ...

    @abstractmethod
    def syntax(self, tools: Sequence[ToolSpec]) -> Syntax:
        """How answers are written, to a model that was given these tools."""

    def render(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = True
    ) -> Rendered:
        return self.encoded(self.parts(messages, tools, add_generation_prompt))

    def encoded(self, parts: Sequence[Part]) -> Rendered:
        """Parts with their texts encoded one by one."""
        return assemble(parts, (self.tokenizer.encode(c) for c, _ in parts if isinstance(c, str)))

    def parser(self, tools: Sequence[ToolSpec] = (), pieces: bool = False) -> AnswerParser:
        from openglm.formats.parser import AnswerParser

        return AnswerParser(self.tokenizer, self.stop_ids, self.syntax(tools), pieces)

    def _ends(self, *names: str) -> tuple[int, ...]:
        """Ids of those of the names that the tokenizer has."""
        return tuple(self._id[name] for name in names if name in self._id)

    def _refuse_tools(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> None:
        if tools or any(m.role == "tool" or m.tool_calls for m in messages):
            raise ValueError(f"chat format {self.name} has no tools: leave tools and their messages out")


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
