"""The format of GLM-130B, which was not tuned for chat: text with blanks, filled from the left.

    get_format("glm-130b", tokenizer).render_fill("The capital of France is [MASK].").ids

    {text with [MASK], [sMASK] or [gMASK]}</s><sop>{filling}<eop>

A text without a blank gets a [gMASK] at its end. The </s> stands before <sop> unless the text ends in a blank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from openglm.formats.base import BaseFormat, Part, Rendered
from openglm.formats.parser import Syntax
from openglm.tokenizer import Tokenizer
from openglm.types import Message, ToolSpec

__all__ = ["MASKS", "Glm130bFormat"]

MASKS = ("[MASK]", "[sMASK]", "[gMASK]")


class Glm130bFormat(BaseFormat):
    """ChatFormat "glm-130b". A conversation is the texts of its messages, line by line; the model goes on from there.

    The three blanks' names are the format's marks: in a message that is not the assistant's they are blanks. All
    other specials' names are text.
    """

    name = "glm-130b"
    needed = ("[gMASK]", "<sop>", "<eop>")

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        end = next((name for name in ("</s>", "<|endoftext|>") if name in self._id), None)
        if end is None:
            raise ValueError(f"chat format {self.name} needs the token </s>, which this tokenizer lacks")
        self._end = self._id[end]
        self.stop_ids = (self._id["<eop>"], self._end)
        names = [name for name in MASKS if name in self._id]
        self._marks = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    def render_fill(self, text: str) -> Rendered:
        """The prompt of one text whose first blank is to be filled; no token is a target."""
        parts = self._fill([(text, True)])
        return self.encoded(parts)

    def parts(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = True
    ) -> list[Part]:
        self._refuse_tools(messages, tools)
        answer = None
        if messages and messages[-1].role == "assistant" and not add_generation_prompt:
            messages, answer = messages[:-1], messages[-1].content
        parts = self._fill([("\n" * (i > 0) + m.content, m.role != "assistant") for i, m in enumerate(messages)])
        if answer is not None:
            parts += [Part(answer, True)] if answer else []
            parts.append(Part(self._id["<eop>"], True))
        return parts

    def _fill(self, texts: Sequence[tuple[str, bool]]) -> list[Part]:
        """texts: each with whether the blanks' names in it are blanks."""
        parts: list[Part] = []
        plain = ""
        for text, has_blanks in texts:
            for i, piece in enumerate(self._marks.split(text) if has_blanks else [text]):
                if i % 2 == 0:
                    plain += piece
                    continue
                parts += [Part(plain)] if plain else []
                parts.append(Part(self._id[piece]))
                plain = ""
        parts += [Part(plain)] if plain else []
        blanks = {self._id[name] for name in MASKS if name in self._id}
        if not any(part.content in blanks for part in parts):
            parts.append(Part(self._id["[gMASK]"]))
        if parts[-1].content not in blanks:
            parts.append(Part(self._end))
        return [*parts, Part(self._id["<sop>"])]

    def syntax(self, tools: Sequence[ToolSpec]) -> Syntax:
        return Syntax()
