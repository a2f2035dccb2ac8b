"""Calls that a model wrote otherwise than its format says: in a fence, bare, or between tags that are not closed.

    filter = CallFilter(tools)
    for piece in pieces: show(filter.feed(piece))
    show(filter.finish()); filter.calls

Small models often wrap a call in a ```json fence. A piece of an answer becomes a call only if it is nothing but JSON
objects that each name a tool and give it an object of arguments, or if the answer begins with such objects. Text that
may yet become one is held back. A tool that there is not is called as well, for the model to be told so.

They also write a ```python fence that prints what was asked for, and leave it to somebody to run it.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from openglm.types import ToolCall, ToolSpec

__all__ = ["CallFilter", "asks_for_code", "final_program", "read_calls"]

NAME_KEYS = ("name", "function", "tool", "tool_name", "function_name", "action")
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input", "action_input")
NAME = re.compile(r"[A-Za-z_]\w+")
TAGS = re.compile(r"</?tool_calls?>|<\|/?tool_calls?\|>")
# What a call may begin with: a fence at the beginning of a line, a tag, a brace where the answer begins.
FENCE = re.compile(r"(?:^|(?<=\n))[ \t]*```")
OPENS = ("<tool_call>", "<tool_calls>")
DECODER = json.JSONDecoder(strict=False)  # models write line breaks inside strings
TRIPLE = re.compile(r'"""(.*?)"""', re.DOTALL)  # a Python text where JSON wants its own
PROGRAM = re.compile(
    r"^[ \t]*```(?:python3?|py)[ \t]*\n(.*?)\n[ \t]*```[ \t]*$", re.DOTALL | re.IGNORECASE | re.MULTILINE
)
CODE_WORDS = re.compile(
    r"\b(?:code|scripts?|functions?|programs?|snippets?|examples?|class|how (?:do|can|to|would)|implement\w*)\b"
    r"|代码|函数|程序|脚本|示例|例子|实现|编写|怎么|怎样|如何",
    re.IGNORECASE,
)
FENCED_AS = ("", "json", "tool_call", "tool", "tool_code", "jsonc", "javascript")


def read_calls(text: str, tools: Sequence[ToolSpec]) -> list[ToolCall]:
    """The calls that the text consists of; none if there is anything else in it."""
    calls, rest = leading_calls(text, tools)
    return [] if rest else calls


def leading_calls(text: str, tools: Sequence[ToolSpec]) -> tuple[list[ToolCall], str]:
    """The calls that the text begins with, and what is behind them."""
    names = {tool.name for tool in tools}
    rest = TAGS.sub(" ", text).strip()
    calls: list[ToolCall] = []
    while rest:
        value, behind = _value(rest)
        found = [_call(item, names) for item in (value if isinstance(value, list) else [value])]
        known = [call for call in found if call is not None]
        if not known or len(known) < len(found):
            break
        calls += known
        rest = behind.lstrip().removeprefix(",").lstrip()
        rest = rest if rest.strip("]} \n") else ""  # brackets that were closed once too often
    return calls, rest


def _value(text: str) -> tuple[Any, str]:
    """The JSON that a text begins with, and what is behind it; (None, text) for what is none.

    Mended are texts of Python in it, and braces that are doubled, as templates have them.
    """
    for plain in dict.fromkeys((text, TRIPLE.sub(_as_json, text))):
        for doubled in (False, True):
            if doubled and not plain.startswith("{{"):
                continue
            try:
                value, end = DECODER.raw_decode(plain[doubled:])
            except (ValueError, RecursionError):
                continue
            behind = plain[doubled + end :]
            return value, behind.lstrip().removeprefix("}") if doubled else behind
    return None, text


def _as_json(found: re.Match[str]) -> str:
    return json.dumps(textwrap.dedent(found.group(1)).strip("\n").rstrip(), ensure_ascii=False)


def _call(value: Any, names: set[str]) -> ToolCall | None:
    if not isinstance(value, Mapping):
        return None
    inner = value.get("function")
    if isinstance(inner, Mapping):  # OpenAI's shape
        value = inner
    name = next((value[key] for key in NAME_KEYS if isinstance(value.get(key), str)), None)
    if name is None or (name not in names and not _is_stranger(value)):
        return None
    arguments: Any = next((value[key] for key in ARGUMENT_KEYS if key in value), {})
    if isinstance(arguments, str):
        try:
            arguments = DECODER.decode(arguments)
        except (ValueError, RecursionError):
            return None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _is_stranger(value: Mapping[str, Any]) -> bool:
    """A call of a tool that there is not, which the model is to be told: nothing but a name and some arguments."""
    if set(value) not in ({"name", "arguments"}, {"name", "parameters"}) or NAME.fullmatch(value["name"]) is None:
        return False
    arguments = value.get("arguments", value.get("parameters"))
    return isinstance(arguments, Mapping) and bool(arguments)


def asks_for_code(question: str) -> bool:
    """Whether a user's words may ask for a program to read, rather than for what it gives."""
    return CODE_WORDS.search(question) is not None


def final_program(text: str) -> tuple[str, str] | None:
    """(what stands before it, the Python in an answer that prints something): its only fence of Python, or the one that
    it ends with.
    """
    found = list(PROGRAM.finditer(text))
    if not found or (len(found) > 1 and text[found[-1].end() :].strip()):
        return None
    code = found[-1].group(1)
    return (text[: found[-1].start()], code) if re.search(r"\bprint\(", code) else None


class CallFilter:
    """Splits a stream of text into what is said and what is a call. tools: those that may be called; none: all is said.

    calls: those found so far.
    """

    def __init__(self, tools: Sequence[ToolSpec]) -> None:
        self._tools = list(tools)
        self._held = ""
        self._closed_at = re.compile(r"\n[ \t]*```")
        self._said = False  # something other than white space was said
        self._line_begins = True
        self._after_call = False  # line breaks behind a call belong to it
        self.calls: list[ToolCall] = []

    def feed(self, text: str) -> str:
        """What can be shown of the text so far."""
        if not self._tools:
            return text
        self._held = self._trimmed(self._held + text)
        out = ""
        while (step := self._step()) is not None:
            out += step
        return out

    def finish(self) -> str:
        """What was held back and is no call."""
        rest, self._held = self._held, ""
        found, _ = leading_calls(_unfenced(rest), self._tools) if rest.strip() else ([], rest)
        self.calls += found  # behind them stands what the model imagines to come of them
        return "" if found else rest

    def _step(self) -> str | None:
        """One piece decided on; None when more has to come first."""
        start = self._start()
        if start:
            return self._take(start)
        if not self._held or not self._opened():
            return None
        fence = FENCE.match(self._held)
        if fence is None:
            return None  # a tag, or a bare object: it is what it is when the answer ends
        body = self._held[fence.end() :]
        line, newline, code = body.partition("\n")
        if not newline and len(line) < 20:
            return None
        if line.strip().lower() not in FENCED_AS or (code.strip() and code.lstrip()[0] not in "{[<"):
            return self._take(fence.end())
        close = self._closed_at.search(body)
        if close is None:
            return None
        end = fence.end() + close.end()
        found = read_calls(body[len(line) + 1 : close.start()], self._tools)
        if not found:
            return self._take(end)
        self.calls += found
        self._after_call, self._line_begins = True, True
        self._held = self._trimmed(self._held[end:])
        return ""

    def _trimmed(self, text: str) -> str:
        if self._after_call:
            text = text.lstrip("\n")
            self._after_call = not text
        return text

    def _opened(self) -> bool:
        """Whether what is held begins as a call does."""
        return bool(FENCE.match(self._held) and self._line_begins) or self._held.startswith(OPENS) or (
            not self._said and self._held.lstrip().startswith(("{", "["))
        )  # fmt: skip

    def _start(self) -> int:
        """Characters before the place where a call may begin."""
        held = self._held
        if self._opened():
            return 0
        if not self._said and not held.strip():
            return 0  # white space in front of what may be an object
        places = [held.find(mark) for mark in OPENS if mark in held]
        places += [m.start() for m in [FENCE.search(held, 1)] if m is not None]
        if places:
            return min(places)
        for length in range(min(len(held), 16), 0, -1):  # the end may yet become a mark
            tail = held[-length:]
            line_begins = length == len(held) and self._line_begins
            fence = re.fullmatch(r"\n?[ \t]*`{0,2}" if line_begins else r"\n[ \t]*`{0,2}", tail)
            if fence or any(mark.startswith(tail) for mark in OPENS):
                return len(held) - length
        return len(held)

    def _take(self, n: int) -> str:
        taken, self._held = self._held[:n], self._held[n:]
        self._said = self._said or bool(taken.strip())
        self._line_begins = taken.endswith("\n") if taken else self._line_begins
        return taken


def _unfenced(text: str) -> str:
    """Without a fence around it, closed or not."""
    fence = FENCE.match(text.lstrip("\n"))
    if fence is None:
        return text
    body = text.lstrip("\n")[fence.end() :].partition("\n")[2]
    return body.rstrip().removesuffix("```")
