"""What an agent tells the model in words, in English and Chinese."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from openglm.types import Message, ToolSpec

__all__ = [
    "ANSWER_NOW", "CALL_REQUEST", "KNOWN", "LAST_CALL", "NEEDED", "NOT_YET", "PLAN_REQUEST", "PROGRAM_REQUEST",
    "REPAIR_REQUEST", "RESULTS", "TIME_IS_UP", "answer_text", "language_of", "system_text",
]  # fmt: skip

Language = Literal["en", "zh"]

OPENING = {
    "en": "You are a helpful assistant with tools. Decide yourself whether a question needs a tool; answer simple "
    "questions, translations and small talk without one.",
    "zh": "你是一个能使用工具的助手。请自行判断问题是否需要工具；简单的问题、翻译和闲聊直接回答。",
}
HINTS = {
    "python": {
        "en": "Calculate with python, not in your head; print the result.",
        "zh": "需要计算时用 python 算，不要心算，并用 print 输出结果。",
    },
    "search": {
        "en": "Facts about a place, person, organisation or event: call search first, then open_page, and cite the "
        "page as 【number†title】; never guess.",
        "zh": "地点、人物、机构、事件的具体情况：先调用 search，再用 open_page 打开网页，"
        "并以【编号†标题】注明来源，不要猜测。",
    },
    "simple_browser": {
        "en": "Facts about a place, person, organisation or event: search with simple_browser, open the page, and cite "
        "it as 【number†title】; never guess.",
        "zh": "地点、人物、机构、事件的具体情况：先用 simple_browser 搜索并打开网页，"
        "并以【编号†标题】注明来源，不要猜测。",
    },
    "cogview": {
        "en": "Draw with cogview only when a picture is asked for.",
        "zh": "只有用户要图片时才用 cogview 画图。",
    },
}
CLOSING = {
    "en": "The user does not see what tools return: write the result into your answer.",
    "zh": "用户看不到工具返回的内容：请把结果写在回答里。",
}
FROM_RESULTS = {
    "en": "You are a helpful assistant. Answer the user's question in a full sentence from what is known now, in the "
    "units and with the rounding that it asks for; the user does not see what is known, so do not speak of tools.",
    "zh": "你是一个乐于助人的助手。请根据现在已知的内容用完整的句子回答用户的问题，单位和小数位数按问题的要求；"
    "用户看不到这些内容，所以不要提到工具。",
}
CITE = {
    "en": "Cite the page that says so as 【number†title】.",
    "zh": "并以【编号†标题】注明出处。",
}
LAST_CALL = {
    "en": "(No more calls are possible. Answer now with what is known.)",
    "zh": "（不能再调用工具了。请根据已知的内容直接回答。）",
}
ANSWER_NOW = {
    "en": "(Answer the user's question now, with this result.)",
    "zh": "（现在请根据这个结果回答用户的问题。）",
}
KNOWN = {
    "en": "What tools gave for this:",
    "zh": "工具为此给出的结果：",
}
RESULTS = {"en": "Results:", "zh": "结果："}
# Of a call that is not made yet, among what was done so far.
NOT_YET = {
    "argument": "Not called: nothing says what {names} is. Get it first with another tool.",
    "number": "Not run: nothing says the number {value}. Get it first with another tool.",
    "failed": "Not called again: it failed. First get the right {names} from a tool that may know it.",
    "code": "Not run again: this failed. Write it in another way, or get what is missing with another tool.",
    "done": "Not called again: this was done already, with the result above.",
}
PROGRAM_REQUEST = (
    "Write a Python program that works out the answer, or does what is asked. Give each quantity a variable of its "
    "own, with a comment that says what it is and where it comes from; write numbers in full (2.5 thousand is 2500), "
    "go step by step, and print what is asked for at the end. Write only the program, in a ```python block. What runs "
    "it: {description}"
)
TIME_IS_UP = "The time was up before there was a result."
PLAN_REQUEST = {
    "en": "Before you begin: write a short plan for this task, one numbered line for each step, and say which of these "
    "tools each step needs, if any: {tools}. Write only the plan.",
    "zh": "开始之前，请为这个任务写一个简短的计划：每一步一行，带编号，"
    "并说明该步骤是否需要以下工具之一：{tools}。只写计划。",
}
CALL_REQUEST = {
    "en": "Call {name} now: {description} {need}Write its arguments for this request as one JSON object that fits this "
    "schema, and nothing else: {schema}",
    "zh": "现在调用 {name}：{description} {need}请针对以上请求写出参数，只写一个符合以下模式的 JSON 对象：{schema}",
}
NEEDED = {"en": "What is needed from it: {need}. ", "zh": "需要它给出：{need}。"}
REPAIR_REQUEST = {
    "en": "Your call of {name} with the arguments {arguments} was wrong: {problem}. Write its arguments again as one "
    "JSON object that fits this schema, and nothing else: {schema}",
    "zh": "你对 {name} 的调用参数 {arguments} 有误：{problem}。"
    "请重新写出参数，只写一个符合以下模式的 JSON 对象：{schema}",
}


def language_of(messages: Sequence[Message]) -> Language:
    """Of what the user said last: Chinese where it has a Chinese character among its first two hundred."""
    text = next((m.content for m in reversed(messages) if m.role == "user"), "")
    return "zh" if any("\u4e00" <= c <= "\u9fff" for c in text[:200]) else "en"


def system_text(tools: Sequence[ToolSpec], language: Language) -> str:
    """Instructions for the tools that are there; nothing without tools."""
    if not tools:
        return ""
    names = [tool.name for tool in tools]
    hints = [hint[language] for name, hint in HINTS.items() if name in names]
    return " ".join([OPENING[language], *hints, CLOSING[language]])


def answer_text(language: Language, cites: bool) -> str:
    """Instructions for an answer after calls, where no tool is left to be told of. cites: pages were read."""
    return " ".join([FROM_RESULTS[language], *([CITE[language]] if cites else [])])
