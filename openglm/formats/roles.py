"""The base of the formats in which a special token opens each turn: ChatGLM3, GLM-4, GLM-4-0414, Z1, CodeGeeX4.

    [gMASK]<sop><|system|>{header}\\n{text}<|user|>{header}\\n{text}<|assistant|>{header}\\n{answer}<|user|>

The header is a tool's name or nothing. A turn ends where the next role token stands, so that token is what the model
has to write to stop: `<|user|>` after an answer, `<|observation|>` after a call.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from openglm.formats.base import BaseFormat, Part
from openglm.formats.calls import result_names
from openglm.tokenizer import Tokenizer
from openglm.types import Message, ToolSpec

__all__ = ["ASSISTANT", "OBSERVATION", "ROLE_TOKENS", "SYSTEM", "USER", "RoleFormat", "Turn"]

SYSTEM, USER, ASSISTANT, OBSERVATION = "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"
ROLE_TOKENS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": OBSERVATION}


class Turn(NamedTuple):
    """What follows one role token. given: text that the prompt has already, so no target even in an answer.

    call: the turn ends with a call, so the model stops with <|observation|>.
    """

    given: str
    header: str
    body: str
    call: bool = False


class RoleFormat(BaseFormat):
    """opening: text after the <|assistant|> of the prompt. ends: names of further tokens that end an answer."""

    needed = ("[gMASK]", "<sop>", *ROLE_TOKENS.values())
    opening = ""
    ends: tuple[str, ...] = ("<|endoftext|>",)

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.stop_ids = self._ends(*self.ends, USER, OBSERVATION)

    # -------------------------------------------------------------------- what formats say for themselves

    @abstractmethod
    def declarations(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[str]:
        """Texts of the system turns that declare the tools, in front of the conversation."""

    @abstractmethod
    def answer(self, message: Message, tools: Sequence[ToolSpec], last: bool, thinks: bool) -> list[Turn]:
        """Turns of an assistant message. last: it is what the model is to learn. thinks: its reasoning is kept."""

    def result_header(self, tool: str) -> str:
        """The header of a tool's result."""
        return ""

    def result_body(self, content: str, tool: str) -> str:
        return content

    # -------------------------------------------------------------------- the walk

    def parts(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = True
    ) -> list[Part]:
        parts = [Part(self._id["[gMASK]"]), Part(self._id["<sop>"])]
        declared = self.declarations(messages, tools) if tools else []
        if messages and messages[0].role == "system" and _begins_one(messages[0].content, declared):
            messages = messages[1:]
        for text in declared:
            parts += [Part(self._id[SYSTEM]), Part("\n"), Part(text)]
        newest = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
        results = result_names(messages)
        # Role tokens that may follow the last turn; such a one is what a model has to write to end its answer.
        closers: tuple[str, ...] = ()
        for i, message in enumerate(messages):
            answer = message.role == "assistant"
            if answer:
                last = i == len(messages) - 1 and not add_generation_prompt
                turns = self.answer(message, tools, last, i > newest)
            else:
                result = message.role == "tool"
                header = self.result_header(results[i]) if result else ""
                body = self.result_body(message.content, results[i]) if result else message.content
                turns = [Turn("", f"{header}\n", body)]
            for turn in turns:
                parts.append(Part(self._id[ROLE_TOKENS[message.role]], ROLE_TOKENS[message.role] in closers))
                # Header line and body are encoded apart, as the released tokenizers do.
                parts += [Part(turn.given)] if turn.given else []
                parts += [Part(text, answer) for text in (turn.header, turn.body) if text]
                closers = ()
                if answer:
                    closers = (OBSERVATION if turn.call else USER, ASSISTANT)
        if add_generation_prompt:
            parts.append(Part(self._id[ASSISTANT], ASSISTANT in closers))
            parts += [Part(self.opening)] if self.opening else []
        elif closers:
            parts.append(Part(self._id[closers[0]], True))
        return parts


def _begins_one(content: str, declared: Sequence[str]) -> bool:
    """Whether a conversation brings the text of a declaration along, so that it must not stand there twice."""
    return bool(content) and any(text == content or text.startswith(content + "\n") for text in declared)
