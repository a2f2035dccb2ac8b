"""How a tool call is written and read: JSON arguments, Hermes objects, Python calls, raw bodies of built-in tools.

    read_python("```python\\ntool_call(city='北京')\\n```")      # '{"city": "北京"}'

Nothing that a model writes is ever evaluated: Python is parsed with `ast`, and only literals are accepted.
"""

from __future__ import annotations

import ast
import json
import keyword
import unicodedata
from collections.abc import Collection, Iterable, Sequence

from openglm.formats.parser import Reader
from openglm.formats.pieces import headed_opener, object_opener, python_opener
from openglm.types import BUILTIN_TOOLS, Message, ToolCall, ToolSpec, safe_json

__all__ = [
    "builtin_names", "dump", "function_object", "headed_call", "json_calls", "loads", "named_call", "python_call",
    "raw_body", "raw_call", "read_python", "result_names", "unfenced", "write_python",
]  # fmt: skip


def dump(value: object, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False)


def loads(text: str) -> object:
    """The JSON value; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def function_object(tool: ToolSpec) -> dict[str, object]:
    return {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}


def builtin_names(tools: Sequence[ToolSpec]) -> list[str]:
    return [tool.name for tool in tools if tool.builtin]


# -------------------------------------------------------------------- built-in tools: a raw body


def raw_body(call: ToolCall, tools: Sequence[ToolSpec]) -> str | None:
    """The raw body of a call of a built-in tool; None for any other call."""
    if call.name not in BUILTIN_TOOLS or any(t.name == call.name and not t.builtin for t in tools):
        return None
    arguments, key = loads(call.arguments), BUILTIN_TOOLS[call.name]
    if isinstance(arguments, dict) and set(arguments) == {key} and isinstance(arguments[key], str):
        return str(arguments[key])
    return None


def raw_call(name: str) -> Reader:
    """Reader of a built-in tool's raw body. A body that was cut off is no call: half a program must not run."""

    def read(body: str, complete: bool) -> list[ToolCall]:
        return [ToolCall(name, dump({BUILTIN_TOOLS[name]: body}))] if complete else []

    return Reader(read)


# -------------------------------------------------------------------- JSON


def headed_call(name: str) -> Reader:
    """Reader of arguments whose tool the header names. Broken ones are a call all the same, for its caller to refuse;
    but arguments that were cut off are none. Nothing at all is a call without arguments.
    """

    def read(body: str, complete: bool) -> list[ToolCall]:
        return [ToolCall(name, body.strip() or "{}")] if complete or loads(body) is not None else []

    return Reader(read, headed_opener(name))


def json_calls(
    names: Collection[str], keys: Sequence[str] = ("arguments", "parameters"), prefixes: Sequence[str] = ()
) -> Reader:
    """Reader of {"name": ..., "arguments": {...}}, or a list of such. A call of no given tool makes it text.

    prefixes: what may stand in front of it.
    """

    def read(body: str, complete: bool) -> list[ToolCall]:
        body = body.strip()
        for prefix in prefixes:
            body = body.removeprefix(prefix)
        value = loads(body)
        objects = value if isinstance(value, list) else [value]
        calls = [named_call(o, names, keys) for o in objects]
        return [call for call in calls if call is not None] if None not in calls else []

    return Reader(read, object_opener(names, keys, prefixes))


def named_call(value: object, names: Collection[str], keys: Sequence[str]) -> ToolCall | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments: object = next((value[key] for key in keys if key in value), {})
    if isinstance(arguments, str):
        arguments = loads(arguments)
    return ToolCall(str(value["name"]), safe_json(arguments)) if isinstance(arguments, dict) else None


# -------------------------------------------------------------------- Python


def unfenced(body: str) -> str | None:
    """What is between the fences of a body that is one fenced block; None if it is not."""
    lines = body.strip().split("\n")
    if len(lines) < 2 or not lines[0].startswith("```") or lines[-1].strip() != "```":
        return None
    return "\n".join(lines[1:-1])


def read_python(body: str) -> str | None:
    """The arguments, as JSON, of a fenced `tool_call(...)` with literal keyword arguments; None for anything else."""
    code = unfenced(body)
    try:
        tree = ast.parse((code if code is not None else body).strip(), mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.func.id != "tool_call":
            return None
        if tree.args:
            return None
        arguments: dict[str, object] = {}
        for item in tree.keywords:
            value = ast.literal_eval(item.value)
            arguments.update(value if item.arg is None else {item.arg: value})
        return safe_json(arguments)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def python_call(name: str) -> Reader:
    def read(body: str, complete: bool) -> list[ToolCall]:
        arguments = read_python(body)
        return [] if arguments is None else [ToolCall(name, arguments)]

    return Reader(read, python_opener(name))


def write_python(arguments: str) -> str:
    """The fenced `tool_call(...)` of JSON arguments. ValueError if they are no JSON object."""
    values = loads(arguments)
    if not isinstance(values, dict):
        raise ValueError(f"the arguments of a tool call must be a JSON object, not {arguments[:40]!r}")
    pieces = [f"{key}={value!r}" if _is_name(key) else f"**{({key: value})!r}" for key, value in values.items()]
    return f"```python\ntool_call({', '.join(pieces)})\n```"


def _is_name(key: str) -> bool:
    """Whether Python reads `key=` as this key: names are normalised when they are parsed."""
    return key.isidentifier() and not keyword.iskeyword(key) and unicodedata.normalize("NFKC", key) == key


# -------------------------------------------------------------------- results


def result_names(messages: Iterable[Message]) -> list[str]:
    """For each message: of a tool's result, the tool; by its name, its call's id, or the order of the calls."""
    names: list[str] = []
    ids: dict[str, str] = {}
    pending: list[str] = []
    for message in messages:
        ids |= {call.id: call.name for call in message.tool_calls if call.id}
        if message.role == "tool":
            by_order = pending.pop(0) if pending else ""
            names.append(message.name or ids.get(message.tool_call_id or "", "") or by_order)
        else:
            pending = [call.name for call in message.tool_calls]
            names.append("")
    return names
