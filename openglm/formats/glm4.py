"""The chat format of GLM-4-9B-chat; also that of the bundled model.

    [gMASK]<sop><|system|>\\n{text}<|user|>\\n{text}<|assistant|>\\n{answer}<|user|>
    ...<|assistant|>{tool name}\\n{arguments as JSON}<|observation|>\\n{result}<|assistant|>\\n{answer}<|user|>

The answer's header `<|assistant|>` is given, the newline or tool name after it is generated, and so is the stop
token: `<|user|>` after an answer, `<|observation|>` after a call. Several calls join with `<|assistant|>`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from openglm.formats.base import Part, Rendered, assemble
from openglm.tokenizer import Detokenizer, Tokenizer
from openglm.types import Event, Message, ToolCall, ToolSpec

__all__ = ["Glm4Format", "Glm4Parser"]

# The wording that the released models were trained on.
TOOLS_INTRODUCTION = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
TOOL_NOTE = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>", "tool": "<|observation|>"}
NEEDED = ("<|endoftext|>", "[gMASK]", "<sop>", *ROLE_TOKENS.values())


class Glm4Format:
    """ChatFormat "glm-4"."""

    name = "glm-4"

    def __init__(self, tokenizer: Tokenizer) -> None:
        missing = [name for name in NEEDED if name not in tokenizer.special_ids]
        if missing:
            raise ValueError(f"chat format {self.name} needs the token {missing[0]}, which this tokenizer lacks")
        self.tokenizer = tokenizer
        self._id = tokenizer.special_ids
        self.stop_ids = tuple(self._id[name] for name in ("<|endoftext|>", "<|user|>", "<|observation|>"))

    def parts(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = True
    ) -> list[Part]:
        parts = [Part(self._id["[gMASK]"]), Part(self._id["<sop>"])]
        if tools:
            parts += [Part(self._id["<|system|>"]), Part("\n"), Part(tools_text(tools))]
        # Role tokens that may follow the last turn; such a one is what a model has to write to end its answer.
        closers: tuple[str, ...] = ()
        for message in messages:
            turns = [("", message.content)] if message.content or not message.tool_calls else []
            turns += [(call.name, call.arguments) for call in message.tool_calls]
            for name, body in turns:
                role = ROLE_TOKENS[message.role]
                answer = message.role == "assistant"
                parts.append(Part(self._id[role], role in closers))
                # Header line and body are encoded apart, as the released tokenizers do.
                parts += [Part(f"{name}\n", answer)] + ([Part(body, answer)] if body else [])
                closers = ()
                if answer:
                    closers = ("<|observation|>" if name else "<|user|>", "<|assistant|>")
        if add_generation_prompt:
            parts.append(Part(self._id["<|assistant|>"], "<|assistant|>" in closers))
        elif closers:
            parts.append(Part(self._id[closers[0]], True))
        return parts

    def render(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = True
    ) -> Rendered:
        parts = self.parts(messages, tools, add_generation_prompt)
        return assemble(parts, (self.tokenizer.encode(c) for c, _ in parts if isinstance(c, str)))

    def parser(self, tools: Sequence[ToolSpec] = ()) -> Glm4Parser:
        return Glm4Parser(self.tokenizer, self.stop_ids, [tool.name for tool in tools])


def tools_text(tools: Sequence[ToolSpec]) -> str:
    """The system block that declares the tools."""
    text = TOOLS_INTRODUCTION
    for tool in tools:
        function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
        text += f"\n\n## {tool.name}\n\n{json.dumps(function, indent=4, ensure_ascii=False)}{TOOL_NOTE}"
    return text


class Glm4Parser:
    """Parser of "glm-4". A turn whose first line is exactly the name of a given tool is a call; any other is text.

    Text is passed on as it comes; only a beginning that may yet become a tool's name is held back. One newline after
    the header belongs to the format and is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], tools: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_ids = frozenset(stop_ids)
        self._next_turn = tokenizer.special_ids["<|assistant|>"]
        self._headers = [f"{name}\n" for name in tools]
        self._text: list[str] = []
        self._calls: list[ToolCall] = []
        self._mode = "start"  # then "text" or "call"
        self._held = ""  # of a turn that is not yet told apart, or the arguments of a call
        self._call_name = ""
        self._waiting: list[int] = []  # ids not yet attached to an event
        self._stopped = False

    @property
    def message(self) -> Message:
        return Message("assistant", "".join(self._text), tuple(self._calls))

    def feed(self, id: int) -> list[Event]:
        if self._stopped:
            return []
        if id in self._stop_ids:
            self._stopped = True
            return self._end_turn(complete=True)
        self._waiting.append(id)
        if id == self._next_turn:
            return self._end_turn(complete=True)
        return self._add(self._detokenizer.feed(id))

    def finish(self) -> list[Event]:
        if self._stopped:
            return []
        self._stopped = True
        return self._end_turn(complete=False)

    def _add(self, text: str) -> list[Event]:
        if not text:
            return []
        if self._mode == "text":
            return self._emit(text)
        self._held += text
        if self._mode == "call":
            return []
        for header in self._headers:
            if self._held.startswith(header):
                self._mode, self._call_name, self._held = "call", header[:-1], self._held[len(header) :]
                return []
        if any(header.startswith(self._held) for header in self._headers):
            return []
        return self._flush()

    def _flush(self) -> list[Event]:
        """The turn is text: pass on what was held back."""
        text, self._held, self._mode = self._held, "", "text"
        # A second text turn keeps its newline, which then parts it from the first.
        return self._emit(text if self._text else text.removeprefix("\n"))

    def _emit(self, text: str) -> list[Event]:
        if not text:
            return []
        self._text.append(text)
        ids, self._waiting = tuple(self._waiting), []
        return [Event(text=text, token_ids=ids)]

    def _end_turn(self, complete: bool) -> list[Event]:
        """complete: the model ended the turn itself. Arguments cut off in the middle are no call: they become text."""
        events = self._add(self._detokenizer.finish())
        if self._mode == "call" and (complete or _is_json(self._held)):
            call = ToolCall(self._call_name, self._held.strip())
            self._calls.append(call)
            ids, self._waiting = tuple(self._waiting), []
            events.append(Event(token_ids=ids, tool_call=call))
        elif self._mode == "call":
            events += self._emit(f"{self._call_name}\n{self._held}")
        elif self._mode == "start" and self._held:
            events += self._flush()
        self._mode, self._held, self._call_name = "start", "", ""
        return events


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
