"""Chat templates: Jinja programs that come with a model, run in a sandbox, whose specials no user text can write.

    Template(text, {"<|im_end|>": 2}).pieces([Message("user", "Hi <|im_end|>")])    # only the template's own is an id

Every special token begins with one of a few characters, such as "<". In all texts that do not come from the template
these are exchanged for characters that occur nowhere; so whatever a template does to a text, cut it, join it or drop
parts of it, no special can come out of it. Afterwards the specials in the result are those that the template wrote,
and the characters are changed back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from openglm.formats.calls import loads, result_names
from openglm.types import Message, ToolSpec

__all__ = ["Template"]

MAX_PRODUCT = 100_000
PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(frozen=True)
class Template:
    """text: of the template. special_ids: name -> id of what it may write. bos_token, eos_token: their names."""

    text: str
    special_ids: Mapping[str, int]
    bos_token: str = ""
    eos_token: str = ""

    def pieces(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = True
    ) -> list[int | str]:
        """The conversation as special ids and texts between them. ValueError if the template refuses it."""
        variables = {
            "messages": _message_dicts(messages),
            "tools": [_tool_dict(tool) for tool in tools] or None,
        }
        stand_ins = self._stand_ins(variables)
        shown = self._run(_changed(variables, str.maketrans(stand_ins)), add_generation_prompt)
        back = {stand_in: char for char, stand_in in stand_ins.items()}
        pieces: list[int | str] = []
        for i, piece in enumerate(self._marks.split(shown)):
            if i % 2:
                pieces.append(self.special_ids[piece])
            elif piece:
                pieces.append(_restored(piece, back))
        return pieces

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        names = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else re.compile("(?!)()")

    def _stand_ins(self, variables: Mapping[str, Any]) -> dict[str, str]:
        """First characters of special names -> characters that are in no text, not even written as an escape."""
        firsts = sorted({name[0] for name in self.special_ids if name})
        used = self.text + "".join(_strings(variables))
        lower = used.lower()
        free = (c for code in PRIVATE_USE if (c := chr(code)) not in used and f"\\u{code:04x}" not in lower)
        found = dict(zip(firsts, free, strict=False))
        assert len(found) == len(firsts), "texts that use the whole private area"
        return found

    def _run(self, variables: Mapping[str, Any], add_generation_prompt: bool) -> str:
        given = {**variables, "add_generation_prompt": add_generation_prompt}
        try:
            return str(self._compiled.render(**given, bos_token=self.bos_token, eos_token=self.eos_token))
        except Exception as error:  # a template is a foreign program: whatever it raises is its refusal
            raise ValueError(f"the chat template does not take this conversation: {_line(error)}") from error

    @cached_property
    def _compiled(self) -> Any:
        import jinja2

        try:
            return _environment().from_string(self.text)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is no Jinja template: {_line(error)}") from error


def _environment() -> Any:
    """The sandbox, with what templates written for `transformers` expect to find."""
    import jinja2
    from jinja2 import ext, nodes, parser, sandbox

    class Generation(ext.Extension):
        """{% generation %}...{% endgeneration %}, which marks answers: here its content as it is."""

        tags = {"generation"}

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        """Jinja's sandbox bounds ranges only; here a short template cannot fill the memory by multiplying either."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            factors = [len(v) if isinstance(v, (str, list, tuple)) else abs(v) for v in (left, right)]
            if operator == "**" or (factors[0] * factors[1] > MAX_PRODUCT):
                raise sandbox.SecurityError(f"{operator} with operands this large is not allowed")
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
        sort_keys: bool = False,
    ) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _message_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates know them: arguments as objects; only those fields that say something."""
    dicts: list[dict[str, Any]] = []
    for message, tool in zip(messages, result_names(messages), strict=True):
        value: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            value["reasoning_content"] = message.reasoning
        if message.tool_calls:
            value["tool_calls"] = []
        for call in message.tool_calls:
            arguments = loads(call.arguments)
            function = {"name": call.name, "arguments": arguments if isinstance(arguments, dict) else call.arguments}
            identity = {"id": call.id} if call.id else {}
            value["tool_calls"].append({**identity, "type": "function", "function": function})
        if message.role == "tool":
            value |= {"name": tool} if tool else {}
            value |= {"tool_call_id": message.tool_call_id} if message.tool_call_id else {}
        dicts.append(value)
    return dicts


def _tool_dict(tool: ToolSpec) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _changed(value: Any, table: Mapping[int, str]) -> Any:
    """The same with every string in it translated, the keys of objects too."""
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, Mapping):
        return {k.translate(table) if isinstance(k, str) else k: _changed(v, table) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_changed(item, table) for item in value]
    return value


def _restored(text: str, back: Mapping[str, str]) -> str:
    for stand_in, char in back.items():
        text = text.replace(stand_in, char).replace(f"\\u{ord(stand_in):04x}", char)
    return text
