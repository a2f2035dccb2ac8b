"""The chat formats without role tokens: ChatGLM-6B and ChatGLM2-6B, which number the rounds in plain text.

    ChatGLM-6B    [Round 0]\\n问：{question}\\n答：{answer}\\n[Round 1]\\n问：{question}\\n答：[gMASK]<sop>{answer}<eop>
    ChatGLM2-6B   [gMASK]<sop>[Round 1]\\n\\n问：{question}\\n\\n答：{answer}\\n\\n[Round 2]\\n\\n问：...答：...</s>

ChatGLM-6B's first question stands alone, without round and marks. The whole prompt is encoded as one text, so only
the last answer can be a training target. There is no system role: system text goes in front of the last question, as
the released server puts it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from openglm.formats.base import BaseFormat, Part
from openglm.formats.matcher import ReplyText
from openglm.formats.parser import Syntax
from openglm.tokenizer import Tokenizer
from openglm.types import Message, ToolSpec

__all__ = ["ChatGlm2Format", "ChatGlm6bFormat"]


class RoundsFormat(BaseFormat):
    needed = ("[gMASK]", "<sop>")
    first_round = 0
    gap = "\n"
    end = "<eop>"
    other_ends: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        if self.end not in self._id:
            raise ValueError(f"chat format {self.name} needs the token {self.end}, which this tokenizer lacks")
        self.stop_ids = self._ends(self.end, *self.other_ends)

    def parts(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = True
    ) -> list[Part]:
        self._refuse_tools(messages, tools)
        rounds, answer = self._rounds(messages)
        if add_generation_prompt and (answer is not None or not rounds):
            raise ValueError(f"chat format {self.name} answers a question: the last message must be the user's")
        parts = self._around(Part(self._prompt(rounds)) if rounds else None)
        if answer is not None:
            parts += [Part(answer, True)] if answer else []
            parts.append(Part(self._id[self.end], True))
        return parts

    def _rounds(self, messages: Sequence[Message]) -> tuple[list[tuple[str, str]], str | None]:
        """(question, answer) of each round, and the last answer: None if a question is the last message."""
        system = "".join(m.content for m in messages if m.role == "system")
        rounds: list[tuple[str, str]] = []
        before = None
        for message in (m for m in messages if m.role != "system"):
            if message.role == "user" and before == "user":
                rounds[-1] = (f"{rounds[-1][0]}\n{message.content}", "")
            elif message.role == "user":
                rounds.append((message.content, ""))
            else:
                rounds = rounds or [("", "")]
                said = rounds[-1][1]
                rounds[-1] = (rounds[-1][0], f"{said}\n{message.content}" if before == "assistant" else message.content)
            before = message.role
        if system and rounds:
            rounds[-1] = (system + rounds[-1][0], rounds[-1][1])
        return rounds, rounds[-1][1] if before == "assistant" else None

    def _prompt(self, rounds: Sequence[tuple[str, str]]) -> str:
        gap, text = self.gap, ""
        for i, (question, answer) in enumerate(rounds, self.first_round):
            text += f"[Round {i}]{gap}问：{question}{gap}答："
            text += "" if i == len(rounds) - 1 + self.first_round else f"{answer}{gap}"
        return text

    @abstractmethod
    def _around(self, prompt: Part | None) -> list[Part]:
        """The prompt's text, None for an empty conversation, with the two tokens where the generation has them."""


class ChatGlm6bFormat(RoundsFormat):
    """ChatFormat "chatglm-6b"."""

    name = "chatglm-6b"
    other_ends = ("</s>",)

    def _prompt(self, rounds: Sequence[tuple[str, str]]) -> str:
        return rounds[0][0] if len(rounds) == 1 else super()._prompt(rounds)

    def _around(self, prompt: Part | None) -> list[Part]:
        head = [] if prompt is None else [prompt]
        return [*head, Part(self._id["[gMASK]"]), Part(self._id["<sop>"])]

    def syntax(self, tools: Sequence[ToolSpec]) -> Syntax:
        return Syntax(reply=lambda: ReplyText(full_width=True))


class ChatGlm2Format(RoundsFormat):
    """ChatFormat "chatglm2"."""

    name = "chatglm2"
    first_round = 1
    gap = "\n\n"
    end = "</s>"

    def _around(self, prompt: Part | None) -> list[Part]:
        head = [Part(self._id["[gMASK]"]), Part(self._id["<sop>"])]
        return head if prompt is None else [*head, prompt]

    def syntax(self, tools: Sequence[ToolSpec]) -> Syntax:
        return Syntax(reply=ReplyText)
