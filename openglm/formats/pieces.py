"""Calls that are told while they are written: the name once it is certain, then the arguments piece by piece.

    found = object_opener({"get_time"}, ("arguments",))('{"name": "get_time", "arguments": {"zone": "U')
    call, start = found                          # None while it is not certain that this is a call
    piece = call.feed('{"zone": "U')             # what may be told of the arguments

A call that is open cannot be taken back. Where its body departs from the format, the rest of the body therefore comes
as the model wrote it: the arguments are no JSON then, and whoever reads them notices.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from openglm.types import safe_json

__all__ = ["Opener", "Pieces", "headed_opener", "object_opener", "python_opener"]


class Pieces(Protocol):
    """One call. name: of its tool. inside_string: whether what was fed ends in a string, where a mark is text."""

    name: str

    @property
    def inside_string(self) -> bool: ...

    def feed(self, text: str) -> str:
        """What this much more of the body adds to the arguments; the first piece that is not empty opens the call."""

    def finish(self) -> str:
        """What the end of the body adds."""


# The body of a call so far, to its Pieces and the place in the body from which on they are fed.
Opener = Callable[[str], tuple[Pieces, int] | None]

# -------------------------------------------------------------------- JSON


class _Headed:
    """Everything behind a header, without the white space around it."""

    inside_string = False

    def __init__(self, name: str) -> None:
        self.name, self._held = name, ""

    def feed(self, text: str) -> str:
        text = self._held + text
        told = text.rstrip()
        self._held = text[len(told) :]
        return told

    def finish(self) -> str:
        return ""


def headed_opener(name: str) -> Opener:
    """Of a body that is the arguments alone."""

    def opened(body: str) -> tuple[Pieces, int] | None:
        begun = body.lstrip()
        return (_Headed(name), len(body) - len(begun)) if begun.startswith("{") else None

    return opened


class _Object:
    """The value of "arguments" in an object: up to its last bracket; behind it stands the end of the object."""

    def __init__(self, name: str, keys: Sequence[str]) -> None:
        self.name, self._keys = name, {"name", *keys}
        self._depth, self._closed, self._rest = 0, False, ""
        self.inside_string = self._escaped = False

    def feed(self, text: str) -> str:
        if self._closed:
            self._rest += text
            return ""
        for i, c in enumerate(text):
            if self.inside_string:
                if self._escaped:
                    self._escaped = False
                elif c == "\\":
                    self._escaped = True
                elif c == '"':
                    self.inside_string = False
            elif c == '"':
                self.inside_string = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._closed, self._rest = True, text[i + 1 :]
                    return text[: i + 1]
        return text

    def finish(self) -> str:
        if not self._closed or self._rest.strip() in ("", "}"):
            return ""
        try:
            others = json.loads('{"": 0' + self._rest)
        except (ValueError, RecursionError):
            return self._rest
        return self._rest if self._keys & set(others) else ""


def object_opener(names: Collection[str], keys: Sequence[str], prefixes: Sequence[str] = ()) -> Opener:
    """Of {"name": ..., "arguments": {...}} in this order, for one of the names; keys: what the arguments are called."""

    def either(values: Collection[str]) -> str:
        return "|".join(re.escape(value) for value in values)

    pattern = re.compile(
        rf'\s*(?:{either(prefixes)})\s*\{{\s*"name"\s*:\s*"({either(names)})"\s*,\s*"(?:{either(keys)})"\s*:\s*(?=\{{)'
    )

    def opened(body: str) -> tuple[Pieces, int] | None:
        found = pattern.match(body)
        return (_Object(found[1], keys), found.end()) if found else None

    return opened


# -------------------------------------------------------------------- Python


class _Keywords:
    """Keyword arguments in Python's notation as JSON, one by one: each when the comma or bracket behind it is there."""

    inside_string = False

    def __init__(self, name: str) -> None:
        self.name = name
        self._held, self._at = "", 0  # from the current argument on, and how far it was looked at
        self._depth, self._quote = 0, ""
        self._before = "{"  # what comes in front of the next argument
        self._state = "open"  # closed: behind the last bracket. strange: no longer to be read

    def feed(self, text: str) -> str:
        return self._take(text, end=False)

    def finish(self) -> str:
        told = self._take("", end=True)
        rest, self._held = self._held, ""
        if self._state == "closed" and re.fullmatch(r"\s*(```\s*)?", rest):
            return told
        return told + self._as_written(rest)

    def _take(self, text: str, end: bool) -> str:
        self._held += text
        if self._state == "strange":
            text, self._held = self._held, ""
            return self._as_written(text)
        told = ""
        while self._state == "open" and (place := self._delimiter(end)) is not None:
            argument, mark = self._held[:place], self._held[place]
            value = self._value(argument, mark)
            if value is None:
                self._state = "strange"
                text, self._held = self._held, ""
                return told + self._as_written(text)
            told += value
            self._held, self._at = self._held[place + 1 :], 0
        return told

    def _as_written(self, text: str) -> str:
        """Nothing, where the call has not been opened: then it is none."""
        if self._before == "{" or not text:
            return ""
        before, self._before = self._before, ""
        return (before if self._state != "closed" else "") + text

    def _delimiter(self, end: bool) -> int | None:
        """The place of the comma or bracket that ends the current argument; None: it is not there yet."""
        held = self._held
        while self._at < len(held):
            at, c = self._at, held[self._at]
            if self._quote:
                if held.startswith(self._quote, at):
                    self._at += len(self._quote)
                    self._quote = ""
                elif not end and len(held) - at < len(self._quote) and self._quote.startswith(held[at:]):
                    return None
                else:
                    self._at += 2 if c == "\\" and self._quote != "\n" else 1
                continue
            if c in "'\"":
                if len(held) - at < 3 and not end:
                    return None  # one quote, or three
                self._quote = c * 3 if held.startswith(c * 3, at) else c
            elif c == "#":
                self._quote = "\n"
            elif self._depth == 0 and c in ",)]}":
                return at
            elif c in "([{":
                self._depth += 1
            elif c in ")]}":
                self._depth -= 1
            self._at += len(self._quote) if c in "'\"" else 1
        return None

    def _value(self, argument: str, mark: str) -> str | None:
        """An argument as JSON, with what stands around it; None for what is none."""
        last = mark == ")"
        if mark not in ",)" or not (argument.strip() or last):
            return None
        try:
            call = ast.parse(f"f({argument}\n)", mode="eval").body
            if not isinstance(call, ast.Call) or call.args or len(call.keywords) > 1:
                return None
            values: dict[str, object] = {}
            for item in call.keywords:
                value = ast.literal_eval(item.value)
                values |= value if item.arg is None else {item.arg: value}
            told = safe_json(values)[1:-1]
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return None
        if told:
            told, self._before = self._before + told, ", "
        if last:
            self._state = "closed"
            told += "}" if told or self._before != "{" else "{}"
            self._before = ""
        return told


def python_opener(name: str) -> Opener:
    """Of a `tool_call(...)`, fenced or not."""
    pattern = re.compile(r"\s*(?:```[^\n]*\n)?\s*tool_call\(")

    def opened(body: str) -> tuple[Pieces, int] | None:
        found = pattern.match(body)
        return (_Keywords(name), found.end()) if found else None

    return opened
