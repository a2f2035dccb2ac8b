"""One trace as HTML: what was asked, said, called and observed. Escapes everything; pictures become data: URLs.

transcript("out/traces/maths-large-en-01.with.jsonl")
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openglm.agent.trace import read_trace
from openglm.types import Message, ToolCall, ToolFile

__all__ = ["transcript"]

PICTURES = ("image/png", "image/jpeg", "image/webp", "image/gif")  # svg may hold scripts
MAX_CHARACTERS = 6000  # of one result


def transcript(path: str | Path) -> str:
    """A sentence for a trace that is not there or was not written whole."""
    try:
        trace = read_trace(path)
    except ValueError as error:
        return f"<p>{html.escape(f'No trace: {error}')}</p>"
    outcome = trace.outcome
    if outcome is None:
        return "<p>This run did not come to its end.</p>"
    records = {record.call.id: record for record in outcome.calls}
    parts = []
    for message in outcome.messages:
        if message.role == "tool":
            record = records.get(message.tool_call_id)
            failed = record is not None and record.status != "done"
            status = "" if record is None else f", {record.status}, {record.seconds:.2f} s"
            files = () if record is None else record.observation.files
            parts.append(_result(message, status, failed, files))
        else:
            parts.append(_message(message))
    return "".join(parts)


def _turn(kind: str, name: str, body: str) -> str:
    return f'<div class="turn {kind}"><b>{html.escape(name)}</b>{body}</div>'


def _message(message: Message) -> str:
    parts = []
    if message.reasoning:
        parts.append(_turn("thought", "thought", _text(message.reasoning)))
    if message.content:
        parts.append(_turn(message.role, message.role, _text(message.content)))
    return "".join(parts) + "".join(
        _turn("call", f"calls {call.name}", _arguments(call)) for call in message.tool_calls
    )


def _arguments(call: ToolCall) -> str:
    """Code as code, other arguments as JSON."""
    try:
        value: Any = json.loads(call.arguments)
    except ValueError:
        value = None
    if isinstance(value, Mapping) and list(value) == ["code"] and isinstance(value["code"], str):
        return f"<pre>{html.escape(value['code'])}</pre>"
    shown = call.arguments if value is None else json.dumps(value, ensure_ascii=False, indent=1)
    return f"<pre>{html.escape(shown)}</pre>"


def _result(message: Message, status: str, failed: bool, files: tuple[ToolFile, ...]) -> str:
    text = message.content
    cut = f"\n[{len(text) - MAX_CHARACTERS} more characters]" if len(text) > MAX_CHARACTERS else ""
    body = f"<pre>{html.escape(text[:MAX_CHARACTERS] + cut)}</pre>" + "".join(map(_picture, files))
    return _turn("failed" if failed else "result", f"{message.name or 'tool'}{status}", body)


def _picture(file: ToolFile) -> str:
    if file.mime not in PICTURES:
        return ""
    data = base64.b64encode(file.read()).decode()
    return f'<img src="data:{file.mime};base64,{data}" alt="{html.escape(file.description or file.name)}">'


def _text(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"
