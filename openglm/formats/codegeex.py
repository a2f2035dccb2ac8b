"""The formats of CodeGeeX2 (completion) and CodeGeeX4 (chat, infilling, tools).

    CodeGeeX2   [gMASK]<sop># language: Python\\n# write a bubble sort function\\n
    CodeGeeX4   [gMASK]<sop><|system|>\\n{text}<|user|>\\n{question}<|assistant|>\\n{answer}<|user|>
                ...<|assistant|>\\n```json\\n{"name": ..., "arguments": {...}}\\n```<|observation|>\\n{result}

CodeGeeX4's newline after `<|assistant|>` belongs to the prompt. Its calls are fenced JSON blocks, as many as there
are calls; the built-in tool "python" is a fenced program that ends the turn, and its result is fenced too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from openglm.formats.base import BaseFormat, CallStyle, Part, Rendered
from openglm.formats.calls import builtin_names, dump, function_object, json_calls, loads, raw_body, raw_call
from openglm.formats.parser import Block, Syntax
from openglm.formats.roles import ASSISTANT, OBSERVATION, USER, RoleFormat, Turn
from openglm.tokenizer import Tokenizer
from openglm.types import Message, ToolSpec

__all__ = ["CodeGeex2Format", "CodeGeex4Format", "Reference"]

COMMENTS = {
    **dict.fromkeys(("python", "ruby", "shell", "bash", "perl", "r", "julia", "yaml", "makefile"), "#"),
    **dict.fromkeys(("lua", "sql", "haskell", "ada"), "--"),
    **dict.fromkeys(("lisp", "clojure", "scheme", "assembly"), ";"),
    **dict.fromkeys(("tex", "latex", "matlab", "erlang", "prolog"), "%"),
}
OTHER_COMMENT = "//"


class CodeGeex2Format(BaseFormat):
    """ChatFormat "codegeex2": questions as comments of the language, answers as code, the model goes on with code."""

    name = "codegeex2"
    needed = ("[gMASK]", "<sop>", "</s>")

    def __init__(self, tokenizer: Tokenizer, *, language: str = "Python") -> None:
        super().__init__(tokenizer)
        self.language = language
        self.stop_ids = self._ends("</s>")

    def render_completion(self, code: str) -> Rendered:
        """The prompt that continues code: the line with the language, then the code as it is."""
        parts = [*self._head(), Part(self._tag() + code)]
        return self.encoded(parts)

    def parts(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = True
    ) -> list[Part]:
        self._refuse_tools(messages, tools)
        answer = None
        if messages and messages[-1].role == "assistant" and not add_generation_prompt:
            messages, answer = messages[:-1], messages[-1].content
        text = self._tag()
        for message in messages:
            code = message.content.rstrip("\n") + "\n"
            text += code if message.role == "assistant" else self._comment(message.content)
        parts = [*self._head(), Part(text)]
        if answer is not None:
            parts += [Part(answer, True)] if answer else []
            parts.append(Part(self._id["</s>"], True))
        return parts

    def _head(self) -> list[Part]:
        return [Part(self._id["[gMASK]"]), Part(self._id["<sop>"])]

    def _sign(self) -> str:
        return COMMENTS.get(self.language.lower(), OTHER_COMMENT)

    def _tag(self) -> str:
        return f"{self._sign()} language: {self.language}\n"

    def _comment(self, text: str) -> str:
        """Every line as a comment; one that is a comment already stays as it is."""
        sign = self._sign()
        lines = text.split("\n")
        return "".join(f"{line}\n" if line.startswith(sign) else f"{sign} {line}\n" for line in lines)

    def syntax(self, tools: Sequence[ToolSpec]) -> Syntax:
        return Syntax()


# Our own wording: the released one was not to be had.
TOOLS_TEXT = "你是一位智能编程助手，你叫CodeGeeX。\n\n# 可用工具\n\n"
TOOLS_NOTE = (
    '\n\n需要调用工具时，每次调用输出一个 json 代码块，内容为 {"name": 工具名, "arguments": {参数}}；'
    "可以同时输出多个代码块。"
)
PYTHON_TEXT = "你可以编写 Python 代码并运行，结果会返回给你。文件保存在目录/mnt/data中，代码不能访问网络。"
CODE_PARTS = ("<|code_suffix|>", "<|code_prefix|>", "<|code_middle|>")


class Reference(NamedTuple):
    """A file shown beside the one that is to be completed."""

    path: str
    code: str


class CodeGeex4Format(RoleFormat):
    """ChatFormat "codegeex4"."""

    name = "codegeex4"
    call_style = CallStyle('```json\n{"name": "{name}", "arguments": ', "}\n```", between="\n", mark="```json")
    opening = "\n"

    def render_infill(
        self, prefix: str, suffix: str, *, path: str = "", language: str = "",
        mode: Literal["LINE", "BLOCK"] = "BLOCK", references: Sequence[Reference] = (),
    ) -> Rendered:  # fmt: skip
        """The prompt for the code between prefix and suffix; no token is a target.

        path, language: of the file; the language line is there even when empty. ValueError for another mode, or a
        tokenizer without the three tokens of infilling.
        """
        if mode not in ("LINE", "BLOCK"):
            raise ValueError(f"the mode of infilling is LINE or BLOCK, not {mode!r}")
        missing = [name for name in CODE_PARTS if name not in self._id]
        if missing:
            raise ValueError(f"infilling needs the token {missing[0]}, which this tokenizer lacks")
        head = "".join(f"###REFERENCE:\n###PATH:{r.path}\n{r.code}\n" for r in references)
        head += f"###PATH:{path}\n" if path else ""
        head += f"###LANGUAGE:{language}\n###MODE:{mode}\n"
        suffix_id, prefix_id, middle_id = (self._id[name] for name in CODE_PARTS)
        contents: list[int | str] = [
            self._id["[gMASK]"], self._id["<sop>"], self._id[USER], "\n" + head, suffix_id, suffix, prefix_id, prefix,
            middle_id, self._id[ASSISTANT], self.opening,
        ]  # fmt: skip
        parts = [Part(content) for content in contents if content != ""]
        return self.encoded(parts)

    def declarations(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[str]:
        functions = [function_object(t) for t in tools if not t.builtin or t.name != "python"]
        texts = [TOOLS_TEXT + dump({"function": functions}, indent=4) + TOOLS_NOTE] if functions else []
        return texts + ([PYTHON_TEXT] if "python" in builtin_names(tools) else [])

    def answer(self, message: Message, tools: Sequence[ToolSpec], last: bool, thinks: bool) -> list[Turn]:
        pieces = [message.content] if message.content else []
        for call in message.tool_calls:
            code = raw_body(call, tools) if call.name == "python" else None
            if code is not None:
                pieces.append(f"```python\n{code}\n```")
                continue
            arguments = loads(call.arguments)
            value = {"name": call.name, "arguments": call.arguments if arguments is None else arguments}
            pieces.append(f"```json\n{dump(value)}\n```")
        return [Turn("\n", "", "\n".join(pieces), call=bool(message.tool_calls))]

    def result_body(self, content: str, tool: str) -> str:
        return f"```result\n{content}\n```" if tool == "python" else content

    def syntax(self, tools: Sequence[ToolSpec]) -> Syntax:
        blocks: list[Block] = []
        names = [tool.name for tool in tools if not tool.builtin or tool.name != "python"]
        if names:
            blocks.append(Block(("\n```json\n", "```json\n"), "\n```", json_calls(names, ("arguments",))))
        if "python" in builtin_names(tools):
            stop = self._id[OBSERVATION]
            blocks.append(Block(("\n```python\n", "```python\n"), "\n```", raw_call("python"), stop))
        return Syntax(blocks=tuple(blocks), next_turn=self._id[ASSISTANT])
