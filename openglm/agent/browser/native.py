"""The call forms of GLM-4's `simple_browser`, read but never run: search("..."), mclick([0, 3]), open_url("...").

read_calls('search("天气", recency_days=7)')      # [Call("search", {"query": "天气", "recency_days": 7})]
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Call", "FORMS", "read_calls"]

# Names of the arguments in their order; other names that models give to a function.
FORMS: dict[str, tuple[str, ...]] = {
    "search": ("query", "recency_days"),
    "mclick": ("ids",),
    "open_url": ("url",),
    "click": ("link",),
    "find": ("text",),
    "scroll": ("lines",),
    "back": (),
    "quote": ("source", "text"),
}
OTHER_NAMES = {
    "msearch": "search", "web_search": "search", "open": "open_url", "open_page": "open_url", "goto": "open_url",
    "visit": "open_url", "find_in_page": "find",
}  # fmt: skip
OTHER_ARGUMENTS = {"q": "query", "queries": "query", "recency": "recency_days", "id": "ids", "id_list": "ids",
                   "link_id": "link", "url_or_id": "url", "pattern": "text"}  # fmt: skip
MAX_CALLS = 5
MAX_BODY = 8000
CURLY = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "（": "(", "）": ")", "，": ",", "［": "[", "］": "]"})
HELP = 'write search("words"), mclick([1, 2]) or open_url("https://...")'


@dataclass(frozen=True)
class Call:
    """One call: a name of FORMS, and its arguments by name."""

    name: str
    arguments: Mapping[str, Any]


def read_calls(body: str) -> list[Call]:
    """The calls of a body, one a line or one after another. ValueError, with the forms, for anything else."""
    text = _bare(body)
    if not text or len(text) > MAX_BODY:
        raise ValueError(f"the call is {'empty' if not text else 'too long'}: {HELP}")
    if text.startswith("{") and (call := _from_json(text)) is not None:
        return [call]
    for candidate in (text, text.translate(CURLY)):
        try:
            tree = ast.parse(candidate)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        calls = [call for statement in tree.body for call in _calls(statement)]
        if not calls:
            raise ValueError(f"there is no call in it: {HELP}")
        return calls[:MAX_CALLS]
    if (call := _loose(text)) is not None:
        return [call]
    raise ValueError(f"the call cannot be read: {HELP}")


def _bare(body: str) -> str:
    """Without the fence or the tool's name in front."""
    text = body.strip()
    fence = re.fullmatch(r"```[\w ]*\n(.*?)\n?```", text, re.DOTALL)
    text = (fence.group(1) if fence else text).strip()
    return re.sub(r"^simple_browser\s*\n", "", text).strip()


def _from_json(text: str) -> Call | None:
    """{"query": ...}, {"ids": ...} or {"url": ...}: the arguments say which call it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    for name, arguments in FORMS.items():
        if arguments and arguments[0] in value and set(value) <= set(arguments):
            return Call(name, value)
    return None


def _calls(statement: ast.stmt) -> list[Call]:
    value = getattr(statement, "value", None)
    if not isinstance(statement, ast.Expr | ast.Assign | ast.AnnAssign) or value is None:
        raise ValueError(f"only calls can be made here, no other code: {HELP}")
    return [_call(value)]


def _call(node: ast.expr) -> Call:
    if isinstance(node, ast.Await):
        return _call(node.value)
    if not isinstance(node, ast.Call):
        raise ValueError(f"only calls can be made here, no other code: {HELP}")
    name = getattr(node.func, "attr", "") or getattr(node.func, "id", "")  # browser.search(...) or search(...)
    if name == "print" and len(node.args) == 1:
        return _call(node.args[0])
    name = OTHER_NAMES.get(name, name)
    if name not in FORMS:
        raise ValueError(f"the browser has no {name or 'such call'}: {HELP}")
    given: dict[str, Any] = {}
    names = FORMS[name]
    if len(node.args) > len(names):
        if name != "mclick":
            raise ValueError(f"{name} takes {', '.join(names) or 'nothing'}: {HELP}")
        given["ids"] = [_literal(argument) for argument in node.args]  # mclick(0, 3)
    else:
        given.update({key: _literal(argument) for key, argument in zip(names, node.args, strict=False)})
    for keyword in node.keywords:
        key = OTHER_ARGUMENTS.get(keyword.arg or "", keyword.arg or "")
        if key not in names:
            raise ValueError(f"{name} has no argument {key!r}; it takes {', '.join(names) or 'nothing'}")
        given[key] = _literal(keyword.value)
    return Call(name, given)


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"arguments must be plain texts, numbers and lists: {HELP}") from None


def _loose(text: str) -> Call | None:
    """One call whose text has quotation marks inside: search("the "best" tea")."""
    match = re.fullmatch(r"(\w+)\s*[(（]\s*(?:\w+\s*=\s*)?[\"'“‘](.*)[\"'”’]\s*[)）]", text, re.DOTALL)
    name = OTHER_NAMES.get(match.group(1), match.group(1)) if match else ""
    if match is None or name not in ("search", "open_url", "find"):
        return None
    return Call(name, {FORMS[name][0]: match.group(2).strip()})
