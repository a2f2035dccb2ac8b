"""The chat formats of GLM-4-9B-chat (also the bundled model's), of GLM-4-0414 and of GLM-Z1.

    [gMASK]<sop><|system|>\\n{text}<|user|>\\n{text}<|assistant|>\\n{answer}<|user|>
    ...<|assistant|>{tool name}\\n{arguments as JSON}<|observation|>\\n{result}<|assistant|>\\n{answer}<|user|>

The answer's header `<|assistant|>` is given, the newline or tool name after it is generated, and so is the stop
token: `<|user|>` after an answer, `<|observation|>` after a call. Several calls join with `<|assistant|>`.

Built-in tools (python, simple_browser, cogview) are called with a raw body; in a ToolCall it is the one JSON argument
that `types.BUILTIN_TOOLS` names. Z1 answers begin with reasoning, which the prompt opens with `<think>`.
"""

from __future__ import annotations

from collections.abc import Sequence

from openglm.formats.base import CallStyle
from openglm.formats.calls import dump, function_object, headed_call, raw_body, raw_call
from openglm.formats.parser import THINK, THINK_END, Reader, Syntax
from openglm.formats.roles import ASSISTANT, RoleFormat, Turn
from openglm.tokenizer import Tokenizer
from openglm.types import Message, ToolSpec

__all__ = ["Glm4Format", "Glm0414Format", "GlmZ1Format"]

# The wording that the released models were trained on.
INTRODUCTION = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
)
TOOLS_HEADING = "# 可用工具"
TOOL_NOTE = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
# Our own wording of what the released declarations say.
BUILTIN_TEXTS = {
    "python": (
        "发送给 `python` 的代码会在一个保持状态的 Jupyter 内核中运行，每次运行最长 60 秒，结果会返回给你。"
        "目录/mnt/data中的文件会一直保留。运行环境没有互联网，代码不能访问网络。"
    ),
    "simple_browser": (
        "`simple_browser` 可以上网查找资料，支持以下调用：\n"
        "`search(query: str, recency_days: int)`：用搜索引擎查询，可以只要最近若干天的结果。\n"
        "`mclick(ids: list[int])`：按编号同时打开 3 到 10 条搜索结果。\n"
        "`open_url(url: str)`：打开一个网址。\n\n"
        "通常先 `search`，再 `mclick`，然后根据页面内容回答。引用来源时写作 `【{引用编号}†{引用文本}】`。"
    ),
    "cogview": (
        "`cogview` 根据描述生成图片。请用约 100 个词的英文写出完整的描述，保留用户的全部意图；"
        "用户没有说明时，场景默认在中国。"
    ),
}
# The header of a built-in tool's result. A message may also be named as the header itself, "quote_result [0†source]".
RESULT_HEADERS = {"simple_browser": "browser_result", "cogview": "cogview_result"}
OWN_HEADERS = ("browser_result", "cogview_result", "quote_result")


class Glm4Format(RoleFormat):
    """ChatFormat "glm-4". date: shown to a model that has tools, e.g. "2024-06-05"."""

    name = "glm-4"
    call_style = CallStyle("{name}\n", text="\n")
    builtin_tools = frozenset(BUILTIN_TEXTS)
    introduction = INTRODUCTION

    def __init__(self, tokenizer: Tokenizer, *, date: str = "") -> None:
        super().__init__(tokenizer)
        self.date = date

    def declarations(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[str]:
        sections = [self.introduction] if self.introduction else []
        sections += [f"当前日期: {self.date}"] if self.date else []
        sections.append(TOOLS_HEADING)
        sections += [f"## {tool.name}\n\n{BUILTIN_TEXTS[tool.name]}" for tool in tools if tool.builtin]
        functions = [tool for tool in tools if not tool.builtin]
        sections += [f"## {f.name}\n\n{dump(function_object(f), indent=4)}{TOOL_NOTE}" for f in functions]
        return ["\n\n".join(sections)]

    def answer(self, message: Message, tools: Sequence[ToolSpec], last: bool, thinks: bool) -> list[Turn]:
        turns = [Turn("", "\n", message.content)] if message.content or not message.tool_calls else []
        return turns + self._calls(message, tools)

    def _calls(self, message: Message, tools: Sequence[ToolSpec]) -> list[Turn]:
        bodies = [(call, raw_body(call, tools)) for call in message.tool_calls]
        return [Turn("", f"{c.name}\n", c.arguments if raw is None else raw, call=True) for c, raw in bodies]

    def result_header(self, tool: str) -> str:
        return tool if tool.startswith(OWN_HEADERS) else RESULT_HEADERS.get(tool, "")

    def syntax(self, tools: Sequence[ToolSpec]) -> Syntax:
        headers: dict[str, Reader] = {
            f"{tool.name}\n": raw_call(tool.name) if tool.builtin else headed_call(tool.name) for tool in tools
        }
        return Syntax(lead=("\n",), headers=headers, next_turn=self._id[ASSISTANT])


class Glm0414Format(Glm4Format):
    """ChatFormat "glm-4-0414": as "glm-4", but the declaration has no introduction, and all tools are functions."""

    name = "glm-4-0414"
    builtin_tools = frozenset()
    introduction = ""


class GlmZ1Format(Glm0414Format):
    """ChatFormat "glm-z1": as "glm-4-0414", with reasoning at the beginning of every answer.

    The prompt opens the reasoning. That of earlier exchanges is left out of the history; that since the last user
    message stays, so that a model goes on with its plan when a tool's result comes back.
    """

    name = "glm-z1"
    thinks_always = True
    opening = f"\n{THINK}\n"

    def answer(self, message: Message, tools: Sequence[ToolSpec], last: bool, thinks: bool) -> list[Turn]:
        if not (last or (thinks and message.reasoning)):
            return super().answer(message, tools, last, thinks)
        thought = f"{message.reasoning}\n{THINK_END}\n\n"
        calls = self._calls(message, tools)
        if calls and not message.content:
            first = calls[0]
            return [Turn(self.opening, thought, first.header + first.body, call=True), *calls[1:]]
        return [Turn(self.opening, thought, message.content), *calls]

    def syntax(self, tools: Sequence[ToolSpec]) -> Syntax:
        syntax = super().syntax(tools)
        spelled = (THINK, THINK_END)
        return Syntax(
            lead=syntax.lead, headers=syntax.headers, next_turn=syntax.next_turn, thinks="always", spelled=spelled
        )
