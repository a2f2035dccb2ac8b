"""ChatML with Hermes tool calls: Qwen, SmolLM and many others.

    <|im_start|>system\\n{text}<|im_end|>\\n<|im_start|>user\\n{text}<|im_end|>\\n<|im_start|>assistant\\n
    {answer}\\n<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call><|im_end|>\\n
    <|im_start|>user\\n<tool_response>\\n{result}\\n</tool_response><|im_end|>\\n

A conversation without system text gets the model's default, where it has one. Answers that begin with <think> are
taken apart; earlier reasoning is left out of the history.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from openglm.formats.base import BaseFormat, CallStyle, Part
from openglm.formats.calls import dump, function_object, json_calls, loads
from openglm.formats.parser import THINK, THINK_END, Block, Syntax
from openglm.tokenizer import Tokenizer
from openglm.types import Message, ToolSpec

__all__ = ["HERMES", "ChatMlFormat", "hermes_block"]

START, END = "<|im_start|>", "<|im_end|>"
# The wording that the released models were trained on.
TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
HERMES = CallStyle(
    '<tool_call>\n{"name": "{name}", "arguments": ', "}\n</tool_call>", between="\n", mark="<tool_call>"
)


def hermes_block(names: Collection[str]) -> Block:
    return Block(("\n<tool_call>", "<tool_call>"), "</tool_call>", json_calls(names))


class ChatMlFormat(BaseFormat):
    """ChatFormat "chatml". default_system: system text of a conversation that has none; None: no system turn."""

    name = "chatml"
    call_style = HERMES
    needed = (START, END)

    def __init__(self, tokenizer: Tokenizer, *, default_system: str | None = None) -> None:
        super().__init__(tokenizer)
        self.default_system = default_system
        self.stop_ids = self._ends(END, "<|endoftext|>")

    def parts(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = True
    ) -> list[Part]:
        system, rest = self.default_system, list(messages)
        if rest and rest[0].role == "system":
            system = rest.pop(0).content
        parts: list[Part] = []
        if tools:
            declared = "".join("\n" + dump({"type": "function", "function": function_object(t)}) for t in tools)
            before = "" if system is None else f"{system}\n\n"
            parts += self._turn("system", f"{before}{TOOLS_BEFORE}{declared}{TOOLS_AFTER}")
        elif system is not None:
            parts += self._turn("system", system)
        newest = max((i for i, m in enumerate(rest) if m.role == "user"), default=-1)
        results: list[str] = []
        for i, message in enumerate(rest):
            if message.role == "tool":
                results.append(f"<tool_response>\n{message.content}\n</tool_response>")
                if i + 1 == len(rest) or rest[i + 1].role != "tool":
                    parts += self._turn("user", "\n".join(results))
                    results = []
            elif message.role == "assistant":
                parts += self._turn("assistant", self._answer(message, i > newest), target=True)
            else:
                parts += self._turn(message.role, message.content)
        if add_generation_prompt:
            parts += [Part(self._id[START]), Part("assistant\n")]
        elif parts and rest and rest[-1].role == "assistant":
            parts.pop()  # the newline after the stop token
        return parts

    def _turn(self, role: str, text: str, target: bool = False) -> list[Part]:
        if target:
            body = [Part(f"{role}\n")] + ([Part(text, True)] if text else [])
        else:
            body = [Part(f"{role}\n{text}")]
        return [Part(self._id[START]), *body, Part(self._id[END], target), Part("\n")]

    def _answer(self, message: Message, thinks: bool) -> str:
        thought = f"{THINK}\n{message.reasoning}\n{THINK_END}\n\n" if thinks and message.reasoning else ""
        pieces = [message.content] if message.content else []
        for call in message.tool_calls:
            arguments = loads(call.arguments)
            value = {"name": call.name, "arguments": call.arguments if arguments is None else arguments}
            pieces.append(f"<tool_call>\n{dump(value)}\n</tool_call>")
        return thought + "\n".join(pieces)

    def syntax(self, tools: Sequence[ToolSpec]) -> Syntax:
        names = [tool.name for tool in tools]
        spelled = (THINK, THINK_END, "<tool_call>", "</tool_call>")
        return Syntax(blocks=(hermes_block(names),) if names else (), thinks="maybe", spelled=spelled)
