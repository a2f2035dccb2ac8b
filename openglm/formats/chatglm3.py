"""The chat format of ChatGLM3-6B: role tokens, Python calls, code interpreter.

    [gMASK]<sop><|system|>\\n{sentence}\\n{tools as JSON}<|user|>\\n{text}<|assistant|>{tool}\\n ```python
    tool_call(city='北京')
    ```<|observation|>\\n{result}<|assistant|>\\n{answer}<|user|>

Header and content are encoded apart, so each begins with the vocabulary's dummy space. The built-in tool "python" is
the code interpreter: header `interpreter` and a fenced program.
"""

from __future__ import annotations

from collections.abc import Sequence

from openglm.formats.base import CallStyle
from openglm.formats.calls import dump, function_object, python_call, raw_body, unfenced, write_python
from openglm.formats.matcher import ReplyText
from openglm.formats.parser import Reader, Syntax
from openglm.formats.roles import ASSISTANT, RoleFormat, Turn
from openglm.types import BUILTIN_TOOLS, Message, ToolCall, ToolSpec

__all__ = ["ChatGlm3Format"]

# The wording that the released model was trained on.
TOOLS_SENTENCE = "Answer the following questions as best as you can. You have access to the following tools:"
INTERPRETER_TEXT = (
    "你是一位智能AI助手，你叫ChatGLM，你连接着一台电脑，但请注意不能联网。在使用Python解决任务时，"
    "你可以运行代码并得到结果，如果运行结果有错误，你需要尽可能对代码进行改进。"
    "你可以处理用户上传到电脑上的文件，文件默认存储路径是/mnt/data/。"
)
INTERPRETER = "interpreter"


class ChatGlm3Format(RoleFormat):
    """ChatFormat "chatglm3"."""

    name = "chatglm3"
    call_style = CallStyle("{name}\n ```python\ntool_call(", ")\n```", "python", text="\n")
    builtin_tools = frozenset({"python"})
    ends = ("</s>", "<|endoftext|>")

    def declarations(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[str]:
        functions = [function_object(tool) for tool in tools if not _interprets(tool)]
        texts = [f"{TOOLS_SENTENCE}\n{dump(functions, indent=4)}"] if functions else []
        return texts + ([INTERPRETER_TEXT] if any(map(_interprets, tools)) else [])

    def answer(self, message: Message, tools: Sequence[ToolSpec], last: bool, thinks: bool) -> list[Turn]:
        turns = [Turn("", "\n", message.content)] if message.content or not message.tool_calls else []
        for call in message.tool_calls:
            code = raw_body(call, tools) if call.name == "python" else None
            if code is not None:
                turns.append(Turn("", f"{INTERPRETER}\n", f"```python\n{code}\n```", call=True))
            else:
                # The space is in the released client's history: it keeps the dummy space of what the model wrote.
                turns.append(Turn("", f"{call.name}\n", " " + write_python(call.arguments), call=True))
        return turns

    def syntax(self, tools: Sequence[ToolSpec]) -> Syntax:
        headers: dict[str, Reader] = {}
        for tool in tools:
            if _interprets(tool):
                headers[f"{INTERPRETER}\n"] = Reader(_read_program)
            else:
                headers[f"{tool.name}\n"] = python_call(tool.name)
        return Syntax(lead=("\n",), headers=headers, next_turn=self._id[ASSISTANT], reply=ReplyText)


def _interprets(tool: ToolSpec) -> bool:
    return tool.builtin and tool.name == "python"


def _read_program(body: str, complete: bool) -> list[ToolCall]:
    code = unfenced(body)
    return [] if code is None else [ToolCall("python", dump({BUILTIN_TOOLS["python"]: code}))]
