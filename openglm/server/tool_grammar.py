"""Which grammar holds an answer, so that what was asked for is all that can come: a call, a schema, strict arguments.

    call_grammar(chat_format, tools, "required", parallel=False, strict=frozenset(), response=None)

The grammar speaks the format's own way of writing calls (`formats.CallStyle`), so its parser reads them as ever. Where
the prompt has opened the reasoning, that comes first, free but for a < that could be taken for its end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from openglm.engine.json_grammar import BASE, in_python
from openglm.engine.regex_grammar import literal
from openglm.engine.schema_grammar import schema_rules
from openglm.formats import CallStyle, ChatFormat
from openglm.formats.parser import THINK_END
from openglm.server.errors import ApiError
from openglm.types import Grammar, ToolSpec

__all__ = ["call_grammar"]

_THOUGHT = f'thought ::= ([^<] | "<" [^/<])* {literal(THINK_END)} "\\n"*'
_ANY = "any ::= [^\\x00]*"


def call_grammar(
    chat_format: ChatFormat, tools: Sequence[ToolSpec], choice: str, parallel: bool, strict: frozenset[str],
    response: Grammar | None,
) -> Grammar | None:  # fmt: skip
    """None where an answer is free. ApiError names what cannot be held to.

    response: what an answer that is no call must look like. strict: tools whose arguments follow their schema also in
    answers that are free to call or not.
    """
    must_call = choice not in ("none", "auto")
    if not must_call and not (tools and strict):
        return _text_grammar(chat_format, tools, response)
    style = chat_format.call_style
    if style is None:
        raise ApiError(f"chat format {chat_format.name} has no tools", "tools")
    wanted = [t for t in tools if choice in ("none", "auto", "required", f"name:{t.name}")]
    rules: dict[str, str] = {}
    calls = [_call(style, t, tools.index(t), rules, must_call or t.name in strict) for t in wanted]
    one = calls[0] if len(calls) == 1 else f"({' | '.join(calls)})"
    rules["call"] = one
    several = style.between is not None and parallel
    if must_call:
        root = f"call ({literal(style.between or '')} call)*" if several else "call"
    elif response is not None:
        rules["response"] = _response_root(response, rules)
        root = f"(response | call ({literal(style.between or '')} call)*)" if several else "(response | call)"
    else:
        root = _free(style, several)
        if style.text and chat_format.thinks_always:  # there the beginnings of text and call look alike
            root = f"({_no_header([style.before.replace('{name}', t.name) for t in tools])} | call)"
    return _assembled(chat_format, root, rules, style)


def _text_grammar(chat_format: ChatFormat, tools: Sequence[ToolSpec], response: Grammar | None) -> Grammar | None:
    """For answers whose text alone is held. With tools, calls stay possible beside it."""
    if response is None:
        return None
    rules: dict[str, str] = {}
    if tools and chat_format.call_style is not None:
        style = chat_format.call_style
        calls = [_call(style, tool, i, rules, False) for i, tool in enumerate(tools)]
        root = f"({_response_root(response, rules)} | {' | '.join(calls)})"
        return _assembled(chat_format, root, rules, style)
    root = _response_root(response, rules)
    if not chat_format.thinks_always:
        return response
    return _assembled(chat_format, root, rules, None)


def _response_root(response: Grammar, rules: dict[str, str]) -> str:
    assert response.kind == "json_schema"
    where = "response_format.json_schema.schema"
    try:
        return schema_rules(json.loads(response.text), rules, where=where)
    except ValueError as error:
        raise ApiError(str(error), where) from None


def _assembled(chat_format: ChatFormat, root: str, rules: dict[str, str], style: CallStyle | None) -> Grammar:
    python = style is not None and style.arguments == "python"
    lines = [f"{name} ::= {body}" for name, body in rules.items()] + [BASE, _ANY]
    if chat_format.thinks_always:
        root = f"thought {root}"
        lines.append(_THOUGHT)
    text = "\n".join([f"root ::= {root}", *lines])
    return Grammar("ebnf", in_python(text) if python else text)


def _call(style: CallStyle, tool: ToolSpec, index: int, rules: dict[str, str], held: bool) -> str:
    """One call of a tool. held: its arguments must follow the schema, else only where that can be said."""
    schema = _arguments_schema(tool.parameters)
    where = f"tools[{index}].function.parameters"
    known = set(rules)
    try:
        body = schema_rules(schema, rules, style.arguments, where)
    except (ValueError, RecursionError) as error:
        if held:
            cause = str(error) if isinstance(error, ValueError) else f"{where} is nested too deeply"
            raise ApiError(cause, where) from None
        for name in set(rules) - known:
            del rules[name]
        body = "object" if style.arguments == "json" else '"**" object'
    return f"{literal(style.before.replace('{name}', tool.name))} {body} {literal(style.after)}".rstrip()


def _arguments_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments are an object; a tool that declares no parameter has none."""
    schema = dict(parameters) or {"properties": {}}
    if "$ref" not in schema and not {"anyOf", "oneOf", "allOf"} & set(schema):
        schema.setdefault("type", "object")
        if not schema.get("properties"):
            schema.setdefault("additionalProperties", False)
    return schema


def _free(style: CallStyle, several: bool) -> str:
    """Text that holds no call but strict ones; or a call in the place of the text."""
    if style.text:
        return f"({literal(style.text)} any | call)"
    if len(style.mark) == 1:
        return f"([^{style.mark}\\x00] any | call)"
    # Text up to the place where it would become the mark: there a call begins.
    first = style.mark[0]
    branches = [f"[^{_escaped({first})}]"]
    for i, following in enumerate(style.mark[1:], 1):
        branches.append(f"{literal(style.mark[:i])} [^{_escaped({following, first})}]")
    free = f"({' | '.join(branches)})*"
    return f"{free} (call {free})*" if several else f"{free} (call)?"


def _no_header(headers: Sequence[str]) -> str:
    """A text that begins with none of these and with no line break."""
    begun = {header[:i] for header in headers for i in range(len(header))}
    branches = []
    for start in sorted(begun):
        following = {h[len(start)] for h in headers if h.startswith(start) and len(h) > len(start)}
        following |= set() if start else {"\n"}
        branches.append(f"{literal(start)} ([^{_escaped(following)}\\x00] any)?")
    return f"({' | '.join(branches)})"


def _escaped(characters: set[str]) -> str:
    return "".join("\\n" if c == "\n" else f"\\{c}" if c in "]\\^-" else c for c in sorted(characters))
