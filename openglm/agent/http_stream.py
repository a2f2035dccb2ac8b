"""The answer of an OpenAI-compatible server, bytes in and events out: server-sent events, deltas, errors. No network.

    answer = HttpAnswer()
    for piece in pieces_of_the_response:
        for event in answer.feed(piece): ...
    for event in answer.finish(): ...

`http_backend.py` fetches the bytes. Servers differ: reasoning comes as `reasoning_content` or `reasoning`; tool calls
in pieces or whole, with an index, an id or neither; some answer in one JSON object though a stream was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from openglm.types import Event, ToolCall, Usage

__all__ = ["BackendError", "HttpAnswer", "said_by"]

MAX_LINE_BYTES = 1 << 24
MAX_ERROR_CHARACTERS = 300
REASONS: dict[str, Literal["stop", "length", "tool_calls"]] = {
    "length": "length", "max_tokens": "length", "tool_calls": "tool_calls", "function_call": "tool_calls",
}  # fmt: skip


class BackendError(ValueError):
    """A server that cannot be reached, refuses, or breaks off; one line. status: the HTTP status, where there was one.

    retry_after_s: how long the server asked to wait.
    """

    def __init__(self, text: str, status: int | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.status, self.retry_after_s = status, retry_after_s


def said_by(body: bytes | str | Mapping[str, Any]) -> str:
    """The words of an error, from any of the shapes servers give them, on one line without control characters."""
    value: Any = body
    if isinstance(body, bytes | str):
        try:
            value = json.loads(body)
        except ValueError:
            value = body.decode("utf-8", "replace") if isinstance(body, bytes) else body
    for key in ("error", "detail", "message"):
        if isinstance(value, Mapping) and value.get(key):
            value = value[key]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if "<html" in text[:500].lower():
        text = "a page of HTML"
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= MAX_ERROR_CHARACTERS else line[: MAX_ERROR_CHARACTERS - 1] + "…"


class _Call:
    """A tool call of which more may come."""

    def __init__(self, index: int | None) -> None:
        self.index, self.id, self.name = index, "", ""
        self.arguments: list[str] = []

    def ends_before(self, index: int | None, identity: str, name: str) -> bool:
        """Whether the next piece belongs to another call: by its index, else by its id, else by its name."""
        if index is not None and self.index is not None and index != self.index:
            return True
        if identity:
            return bool(self.id) and identity != self.id
        return index is None and bool(name) and bool(self.name)

    def whole(self) -> ToolCall:
        if not self.name:
            raise BackendError("the server sent a tool call without a name")
        return ToolCall(self.name, "".join(self.arguments).strip() or "{}", self.id or None)


class HttpAnswer:
    """One answer. done: the server said that it is complete, whatever else the connection may bring."""

    def __init__(self) -> None:
        self.done = False
        self._rest = b""
        self._data: list[bytes] = []
        self._lines: list[bytes] = []  # before the first event: perhaps no stream, but one JSON object
        self._streams = False
        self._call: _Call | None = None
        self._called = False
        self._reason: str | None = None
        self._usage: Usage | None = None

    def feed(self, piece: bytes) -> list[Event]:
        """Events of the next bytes, cut anywhere."""
        # Lines of the protocol end in CR, LF or both; text in JSON may hold other line ends, such as U+2028.
        self._rest += piece
        if len(self._rest) > MAX_LINE_BYTES:
            raise BackendError(f"the server sent a line of more than {MAX_LINE_BYTES >> 20} MiB")
        whole = self._rest.replace(b"\r\n", b"\n")
        held = whole.endswith(b"\r")  # half of a line end, it may be
        lines = whole[: -1 if held else None].replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop() + (b"\r" if held else b"")
        return [event for line in lines for event in self._line(line)]

    def finish(self) -> list[Event]:
        """What was held back and the last event. Raises BackendError for an answer that broke off."""
        events = self._line(self._rest.strip(b"\r")) if self._rest else []
        events += self._line(b"")  # ends an event that no empty line ended
        if not self._streams:
            events += self._whole(b"\n".join(self._lines))
        events += self._close_call()
        if self._reason is None and not self.done:
            raise BackendError("the server broke off in the middle of its answer")
        if self._reason == "content_filter":
            raise BackendError("the server withheld its answer (content_filter)")
        reason = REASONS.get(self._reason or "stop", "stop")
        reason = "tool_calls" if self._called and reason == "stop" else reason
        return [*events, Event(finish_reason=reason, usage=self._usage)]

    # ---------------------------------------------------------------- server-sent events

    def _line(self, line: bytes) -> list[Event]:
        if self.done:
            return []
        field, _, value = line.partition(b":")
        if field == b"data":
            self._streams = True
            self._data.append(value.removeprefix(b" "))
        elif line and not self._streams and field not in (b"", b"event", b"id", b"retry"):
            self._lines.append(line)
        elif not line and self._data:
            data, self._data = b"\n".join(self._data), []
            return self._event(data)
        return []

    def _event(self, data: bytes) -> list[Event]:
        if data.strip() == b"[DONE]":
            self.done = True
            return []
        return self._chunk(_parsed(data), "delta")

    def _whole(self, body: bytes) -> list[Event]:
        """The answer of a server that does not stream."""
        return self._chunk(_parsed(body), "message")

    # ---------------------------------------------------------------- chunks

    def _chunk(self, value: Mapping[str, Any], part: str) -> list[Event]:
        if value.get("error"):
            raise BackendError(f"the server failed in the middle of its answer: {said_by(value)}")
        usage = value.get("usage")
        if isinstance(usage, Mapping):
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
            if all(isinstance(count, int) for count in counts):
                self._usage = Usage(*counts)  # type: ignore[arg-type]
        choices = value.get("choices")
        if choices is None and "usage" not in value:
            raise BackendError(f"the server sent no chat completion: {said_by(value)}")
        for choice in choices or ():
            if not isinstance(choice, Mapping):
                raise BackendError(f"the server sent a choice that is no object: {said_by(str(choice))}")
            if choice.get("index", 0) == 0:
                found = self._delta(choice.get(part) or {})
                self._reason = choice.get("finish_reason") or self._reason
                return found
        return []

    def _delta(self, delta: Mapping[str, Any]) -> list[Event]:
        events = []
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(reasoning, str) and reasoning:
            events.append(Event(reasoning=reasoning))
        content = delta.get("content") or delta.get("refusal")
        if isinstance(content, list):  # parts
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
        if isinstance(content, str) and content:
            events.append(Event(content))
        for call in delta.get("tool_calls") or ():
            events += self._call_delta(call if isinstance(call, Mapping) else {})
        return events

    def _call_delta(self, delta: Mapping[str, Any]) -> list[Event]:
        """A piece of a tool call."""
        function = delta.get("function")
        function = function if isinstance(function, Mapping) else {}
        index, name, identity = delta.get("index"), function.get("name") or "", delta.get("id") or ""
        last, events = self._call, []
        if last is None or last.ends_before(index, str(identity), str(name)):
            events = self._close_call()
            last = self._call = _Call(index)
        last.id = last.id or str(identity)
        last.name = last.name or str(name)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            last.arguments.append(arguments)
        elif arguments is not None:  # an object, from servers that do not follow the letter
            last.arguments.append(json.dumps(arguments, ensure_ascii=False))
        return events

    def _close_call(self) -> list[Event]:
        if self._call is None:
            return []
        call, self._call, self._called = self._call.whole(), None, True
        return [Event(tool_call=call)]


def _parsed(data: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        raise BackendError(f"the server sent no JSON: {said_by(data) or 'nothing'}") from None
    if not isinstance(value, Mapping):
        raise BackendError(f"the server sent JSON that is no object: {said_by(data)}")
    return value
