"""The parts of JSON as EBNF, in the notation of xgrammar: values, strings, the formats that strings may have.

    python -m pytest -q tests/test_grammar.py

Between tokens stands at most one blank, or a line break with indent: a model cannot go on with blanks for ever.

Rules are flat where many tokens may follow: xgrammar finds these once for each place of a rule, but anew in every step
where it depends on what comes behind the rule (25 ms instead of 30 microseconds for a vocabulary of 65,000).
"""

from __future__ import annotations

import json
from typing import Any

from openglm.engine.number_grammar import INTEGER, NUMBER
from openglm.engine.regex_grammar import Ranges, char_class, literal, without

__all__ = [
    "BASE", "CHARS", "FORMATS", "PLAIN", "in_python", "json_to_ebnf", "spelled", "spelled_char", "spelled_python",
    "type_of",
]  # fmt: skip

# Characters that stand in a JSON string as they are, and escapes; none of these is half of a surrogate pair.
PLAIN: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF))
_SHORT = {0x22: '"', 0x5C: "\\", 0x08: "b", 0x0C: "f", 0x0A: "n", 0x0D: "r", 0x09: "t"}
_HEX = "[0-9a-fA-F]"
CHARS = (
    char_class(PLAIN), '"\\\\" ["\\\\/bfnrt]', f'"\\\\u" [0-9abcefABCEF] {_HEX} {_HEX} {_HEX}',
    f'"\\\\u" [dD] [0-7] {_HEX} {_HEX}',
)  # fmt: skip
BASE = f"""\
ws ::= (" " | "\\n" [ \\t]{{0,32}})?
comma ::= ws "," ws
colon ::= ws ":" ws
string ::= "\\"" ({" | ".join(CHARS)})* "\\""
integer ::= {INTEGER}
number ::= {NUMBER}
boolean ::= "true" | "false"
null ::= "null"
value ::= object | array | string | number | boolean | null
object ::= "{{" ws (string colon value (comma string colon value)* ws)? "}}"
array ::= "[" ws (value (comma value)* ws)? "]"
"""
_DAYS = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])"
_DATE = f"([1-9][0-9]{{3}}-({_DAYS}))"
_TIME = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = "[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": f"({_BYTE}\\.){{3}}{_BYTE}",
    "hostname": f"({_LABEL}\\.){{0,4}}{_LABEL}",
    "email": f"[A-Za-z0-9_+-]{{1,32}}(\\.[A-Za-z0-9_+-]{{1,16}}){{0,2}}@({_LABEL}\\.){{1,3}}[a-z]{{2,6}}",
}


def json_to_ebnf() -> str:
    """The grammar of any JSON value."""
    return f"root ::= value\n{BASE}"


def spelled_char(ranges: Ranges) -> str:
    """One character of these ranges as it is spelled within a JSON string; by an escape only if all have to be."""
    if plain := without(ranges, ((0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C))):
        return char_class(plain)
    codes = [code for low, high in ranges for code in range(low, high + 1)]
    out = [literal(f"\\{_SHORT[code]}" if code in _SHORT else f"\\u{code:04x}") for code in codes]
    return out[0] if len(out) == 1 else "(" + " | ".join(out) + ")"


def spelled(value: Any) -> str:
    """One JSON value, as EBNF."""
    return literal(json.dumps(value, ensure_ascii=False))


def type_of(value: Any) -> str:
    """The name of a JSON value's type; of whole numbers "integer"."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if float(value).is_integer() else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def spelled_python(value: Any) -> str:
    """One value as a Python literal, as EBNF."""
    return literal(_python(value))


def _python(value: Any) -> str:
    """A literal in double quotes; JSON's escapes mean the same in Python, but for that of the slash."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_python, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_python(k)}: {_python(v)}' for k, v in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)


def in_python(rules: str) -> str:
    """Rules whose values are JSON, with the words and escapes that Python has in their place."""
    for there, here in (
        ('boolean ::= "true" | "false"', 'boolean ::= "True" | "False"'), ('null ::= "null"', 'null ::= "None"'),
        (CHARS[1], CHARS[1].replace("/", "")),
    ):  # fmt: skip
        rules = rules.replace(there, here)
    return rules
