"""JSON schemas as EBNF, in the notation of xgrammar: what is accepted is held to, all else is refused by name.

    python -m pytest -q tests/test_grammar.py

The grammar may allow less than the schema, never more: properties come in the schema's order, an object with
`properties` has no others unless `additionalProperties` says so, `prefixItems` are all there unless `minItems` is
smaller, a `pattern` describes the whole string, and in it, in names beside `properties` and in strings of limited
length above 64, no quote, backslash or line break can stand unless the pattern names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from keyword import iskeyword
from typing import Any, Literal

from openglm.engine.json_grammar import BASE, CHARS, FORMATS, PLAIN, spelled, spelled_char, spelled_python, type_of
from openglm.engine.number_grammar import Bound, integer_between, number_between
from openglm.engine.regex_grammar import Ranges, char_class, literal, regex_to_ebnf, without

__all__ = ["Dialect", "schema_rules", "schema_to_ebnf"]

Dialect = Literal["json", "python"]  # how values are spelled; python: as keyword arguments of a call, at the top

NOTES = frozenset(
    ["title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id", "$comment",
     "$defs", "definitions", "$anchor"]
)  # fmt: skip
KEYWORDS: dict[str, frozenset[str]] = {
    "object": frozenset(["properties", "required", "additionalProperties"]),
    "array": frozenset(["items", "prefixItems", "minItems", "maxItems"]),
    "string": frozenset(["minLength", "maxLength", "pattern", "format"]),
    "number": frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]),
    "integer": frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]),
    "boolean": frozenset(),
    "null": frozenset(),
}
ELSEWHERE = frozenset(["type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"])
KNOWN = NOTES.union(ELSEWHERE, *KEYWORDS.values())
_LONG = 64  # characters; in longer strings of limited length no escapes are allowed

def schema_to_ebnf(schema: Any) -> str:
    """The grammar of a schema, a parsed JSON value. Raises ValueError naming the keyword that cannot be held to."""
    rules: dict[str, str] = {}
    body = schema_rules(schema, rules)
    return "\n".join([f"root ::= {body}", *(f"{name} ::= {rule}" for name, rule in rules.items()), BASE])


def schema_rules(schema: Any, rules: dict[str, str], dialect: Dialect = "json", where: str = "the schema") -> str:
    """The expression of a schema; what it refers to is added to `rules`, which several schemas may share, and is in
    `BASE` (`PYTHON_BASE`). Raises ValueError as `schema_to_ebnf`.
    """
    converter = _Converter(schema, rules, dialect)
    return converter.node(schema, where) if dialect == "json" else converter.keywords(schema, where)


class _Converter:
    def __init__(self, root: Any, rules: dict[str, str], dialect: Dialect) -> None:
        self.root, self.rules = root, rules
        self._spelled = spelled if dialect == "json" else spelled_python
        self._references: dict[str, str] = {}
        self._open: list[str] = []  # references being followed without a token between them
        self._needed: list[str] = []  # references being followed without a choice between them

    def _rule(self, body: str, kind: str) -> str:
        name = f"{kind}{len(self.rules)}"
        self.rules[name] = body
        return name

    def keywords(self, schema: Any, where: str) -> str:
        """An object as keyword arguments, name=value; where a name is no identifier, or any may come, as **{...}."""
        object_ = schema if isinstance(schema, Mapping) else {}
        properties = object_.get("properties", {})
        plain = isinstance(properties, Mapping) and all(
            n.isascii() and n.isidentifier() and not iskeyword(n) for n in properties
        )
        if not plain or object_.get("type") != "object" or self._is_open(object_):
            return f'"**" {self.node(schema, where)}'
        return self._object(schema, where, lambda name: literal(f"{name}="), ("", ""))

    @staticmethod
    def _is_open(schema: Mapping[str, Any]) -> bool:
        """Whether an object may have members that are not declared."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        more = schema.get("additionalProperties", not properties)
        return more is not False or any(name not in properties for name in required)

    # ---------------------------------------------------------------- any node

    def optional(self, schema: Any, where: str, needed: bool = False) -> str:
        """`node` of what may be left out."""
        outer, self._needed = self._needed, self._needed if needed else []
        body = self.node(schema, where)
        self._needed = outer
        return body

    def node(self, schema: Any, where: str) -> str:
        """EBNF expression of one schema."""
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, Mapping):
            raise ValueError(f"{where} must be an object, not {json.dumps(schema, ensure_ascii=False)}")
        for keyword in schema:
            if keyword not in KNOWN and not keyword.startswith("x-"):
                raise ValueError(f"{where}: the keyword {keyword!r} is not supported")
        used = [k for k in schema if k not in NOTES and not k.startswith("x-")]
        for keyword in ("$ref", "anyOf", "oneOf", "allOf"):
            if keyword in used:
                for other in used:
                    if other != keyword:
                        raise ValueError(f"{where}: {other!r} beside {keyword!r} is not supported: put it inside")
                return self._combined(keyword, schema[keyword], where)
        if "enum" in used or "const" in used:
            return self._listed(schema, used, where)
        return self._typed(schema, used, where)

    def _combined(self, keyword: str, value: Any, where: str) -> str:
        if keyword == "$ref":
            return self._reference(value, where)
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise ValueError(f"{where}: {keyword!r} must be a list of schemas")
        if keyword == "allOf" and len(value) > 1:
            raise ValueError(f"{where}: 'allOf' of several schemas is not supported: merge them into one")
        if keyword == "oneOf" and not all(self._apart(a, b) for i, a in enumerate(value) for b in value[:i]):
            raise ValueError(
                f"{where}: 'oneOf' whose schemas may hold for one value is not supported: use 'anyOf', or tell them "
                "apart by 'type' or by a required property with a 'const'"
            )
        alone = len(value) == 1
        branches = [self.optional(schema, f"{where}.{keyword}[{i}]", alone) for i, schema in enumerate(value)]
        return branches[0] if len(branches) == 1 else "(" + " | ".join(branches) + ")"

    def _reference(self, pointer: Any, where: str) -> str:
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise ValueError(f"{where}: '$ref' {pointer!r} is not supported: it must be like #/$defs/x")
        if pointer in self._open or pointer in self._needed:
            raise ValueError(f"{where}: '$ref' {pointer!r} leads back to itself without an end")
        if pointer not in self._references:
            target = self._target(pointer, where)
            self._references[pointer] = name = self._rule("", "ref")
            outer = self._open, self._needed
            self._open, self._needed = [*self._open, pointer], [*self._needed, pointer]
            self.rules[name] = self.node(target, pointer)
            self._open, self._needed = outer
        return self._references[pointer]

    def _target(self, pointer: str, where: str) -> Any:
        target = self.root
        for part in pointer.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(part)] if isinstance(target, list) else target[part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise ValueError(f"{where}: '$ref' {pointer!r} points at nothing") from None
        return target

    def _apart(self, a: Any, b: Any) -> bool:
        """Whether it is plain that no value fits both: types differ, or the values of a property both require do."""
        a, b = self._followed(a), self._followed(b)
        if not isinstance(a, Mapping) or not isinstance(b, Mapping):
            return False
        types = [set(self._types(x)) for x in (a, b)]
        if not types[0] & types[1]:
            return not ("number" in types[0] | types[1] and "integer" in types[0] | types[1])
        listed = [x["enum"] if "enum" in x else [x["const"]] if "const" in x else None for x in (a, b)]
        if listed[0] is not None and listed[1] is not None:
            return not any(x == y for x in listed[0] for y in listed[1])
        return types[0] == types[1] == {"object"} and any(
            self._apart(a["properties"][name], b["properties"][name])
            for name in a.get("properties", {})
            if name in b.get("properties", {}) and name in a.get("required", ()) and name in b.get("required", ())
        )

    def _followed(self, schema: Any) -> Any:
        for _ in range(16):
            if isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str) and schema["$ref"].startswith("#"):
                schema = self._target(schema["$ref"], "the schema")
        return schema

    # ---------------------------------------------------------------- values and types

    def _types(self, schema: Mapping[str, Any]) -> list[str]:
        """Types a schema names or, where it names none, those its keywords are about; all of them if there are none."""
        named = schema.get("type")
        if named is not None:
            types = [named] if isinstance(named, str) else list(named) if isinstance(named, list) else []
            if not types or any(t not in KEYWORDS for t in types):
                raise ValueError(f"'type' must be of {', '.join(KEYWORDS)}, not {json.dumps(named)}")
            return types
        if "enum" in schema or "const" in schema:
            return sorted({type_of(v) for v in schema.get("enum", [schema.get("const")])})
        kinds = [t for t, words in KEYWORDS.items() if t != "integer" and words & schema.keys()]
        return kinds or [t for t in KEYWORDS if t != "integer"]

    def _listed(self, schema: Mapping[str, Any], used: list[str], where: str) -> str:
        for other in used:
            if other not in ("enum", "const", "type"):
                raise ValueError(f"{where}: {other!r} beside 'enum' or 'const' is not supported: leave it out")
        values = schema.get("enum", [schema.get("const")])
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}: 'enum' must be a list of values")
        if "const" in schema:
            values = [v for v in values if v == schema["const"] and type_of(v) == type_of(schema["const"])]
        types = set(self._types(schema))
        types |= {"integer"} if "number" in types else set()
        values = [v for v in values if type_of(v) in types]
        if not values:
            raise ValueError(f"{where}: no value of 'enum' or 'const' is of its 'type'")
        branches = list(dict.fromkeys(self._spelled(v) for v in values))
        return branches[0] if len(branches) == 1 else "(" + " | ".join(branches) + ")"

    def _typed(self, schema: Mapping[str, Any], used: list[str], where: str) -> str:
        try:
            types = self._types(schema)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for keyword in used:
            if keyword != "type" and not any(keyword in KEYWORDS[t] for t in types):
                raise ValueError(f"{where}: {keyword!r} says nothing about type {' or '.join(types)}")
        build = {"object": self._object, "array": self._array, "string": self._string}
        branches = []
        for kind in types:
            if kind in build:
                branches.append(build[kind](schema, where))
            elif kind in ("number", "integer"):
                branches.append(self._number(schema, kind, where))
            else:
                branches.append(kind)
        return branches[0] if len(branches) == 1 else "(" + " | ".join(branches) + ")"

    def _number(self, schema: Mapping[str, Any], kind: str, where: str) -> str:
        low = self._bound(schema, "minimum", "exclusiveMinimum", where)
        high = self._bound(schema, "maximum", "exclusiveMaximum", where)
        if low is None and high is None:
            return kind
        try:
            body = (integer_between if kind == "integer" else number_between)(low, high)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return self._rule(body, "bounded")

    def _bound(self, schema: Mapping[str, Any], plain: str, strict: str, where: str) -> Bound | None:
        """The tighter of the two bounds of one side."""
        found = []
        for keyword in (plain, strict):
            value = schema.get(keyword)
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise ValueError(f"{where}: {keyword!r} must be a number, not {json.dumps(value)}")
            if value is not None:
                found.append(Bound(Decimal(str(value)), keyword == strict))
        sign = 1 if plain == "minimum" else -1
        return max(found, key=lambda b: (sign * b.value, b.strict)) if found else None

    def _count(self, schema: Mapping[str, Any], keyword: str, default: int | None, where: str) -> int | None:
        value = schema.get(keyword, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError(f"{where}: {keyword!r} must be a whole number of 0 or more, not {json.dumps(value)}")
        return value

    def _span(
        self, schema: Mapping[str, Any], names: tuple[str, str], least: int, where: str
    ) -> tuple[int, int | None]:
        low, high = self._count(schema, names[0], least, where), self._count(schema, names[1], None, where)
        assert low is not None
        if high is not None and high < low:
            if names[0] in schema:
                raise ValueError(f"{where}: {names[0]!r} is above {names[1]!r}")
            low = high
        return low, high

    def _string(self, schema: Mapping[str, Any], where: str) -> str:
        limited = "minLength" in schema or "maxLength" in schema
        if limited + ("pattern" in schema) + ("format" in schema) > 1:
            raise ValueError(f"{where}: of 'pattern', 'format' and 'minLength' or 'maxLength' only one is supported")
        if "pattern" in schema or "format" in schema:
            pattern = schema["pattern"] if "pattern" in schema else FORMATS.get(schema["format"])
            if not isinstance(pattern, str):
                known = "'pattern' must be text" if "pattern" in schema else (
                    f"'format' {schema['format']!r} is not supported: known are {', '.join(FORMATS)}"
                )  # fmt: skip
                raise ValueError(f"{where}: {known}")
            try:
                return self._rule(f'"\\"" {regex_to_ebnf(pattern, spelled_char)} "\\""', "text")
            except ValueError as error:
                raise ValueError(f"{where}: 'pattern': {error}") from None
        if not limited:
            return "string"
        low, high = self._span(schema, ("minLength", "maxLength"), 0, where)
        return f'"\\"" {self._chars(low, high)}'

    def _chars(self, low: int, high: int | None) -> str:
        """low..high characters and the quote behind them: one rule for each place; of long ones without escapes."""
        if max(low, high or 0) > _LONG:
            return f'{char_class(PLAIN)}{{{low},{"" if high is None else high}}} "\\""'
        rule = '"\\""' if high is not None else f'({" | ".join(CHARS)})* "\\""'
        for place in reversed(range(low if high is None else high)):
            name = self._rule(rule, "chars")
            rule = " | ".join(f"{char} {name}" for char in CHARS) + (' | "\\""' if place >= low else "")
        return self._rule(rule, "chars")

    # ---------------------------------------------------------------- arrays and objects

    def _array(self, schema: Mapping[str, Any], where: str) -> str:
        outer, self._open = self._open, []
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise ValueError(f"{where}: 'prefixItems' must be a list of schemas")
        low, high = self._span(schema, ("minItems", "maxItems"), len(first), where)
        rest = schema.get("items", False if first and low <= len(first) else True)
        if rest is False:
            if low > len(first):
                raise ValueError(f"{where}: 'minItems' is above the number of items that there may be")
            high = len(first) if high is None else min(high, len(first))
        items = [self.optional(s, f"{where}.prefixItems[{i}]", i < low) for i, s in enumerate(first[:high])]
        tail = None
        if rest is not False and (high is None or high > len(items)):
            tail = self.optional(rest, f"{where}.items", low > len(items))
        self._open = outer
        last = ""
        if tail is not None:
            most = "" if high is None else high - max(len(items), 1)
            least = max(low - max(len(items), 1), 0)
            last = f"(comma {tail}){{{least},{most}}}" if most != 0 else ""
            if not items:
                last = f"({tail} {last} ws)" + ("?" if low == 0 else "")
        for i in reversed(range(len(items))):
            separator = "comma " if i else ""
            end = " ws" if not i else ""
            last = f"{separator}{items[i]} {last}{end}"
            if i >= low:
                last = f"({last})?"
        return self._rule(f'"[" ws {last} "]"', "array")

    def _object(
        self, schema: Mapping[str, Any], where: str, key: Callable[[str], str] | None = None,
        around: tuple[str, str] = ("{", "}"),
    ) -> str:  # fmt: skip
        """key: how the name of a member is written, with what stands between it and its value."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise ValueError(f"{where}: 'properties' must be an object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise ValueError(f"{where}: 'required' must be a list of names")
        more = schema.get("additionalProperties", not properties)
        undeclared = [name for name in dict.fromkeys(required) if name not in properties]
        if undeclared and more is False and "additionalProperties" in schema:
            raise ValueError(f"{where}: 'required' names {undeclared[0]!r}, which 'additionalProperties' forbids")
        wanted = {**properties, **dict.fromkeys(undeclared, more if isinstance(more, Mapping) else True)}
        outer, self._open = self._open, []
        pairs = []
        for name, value in wanted.items():
            needed = name in required
            if needed or value is not False:
                body = self.optional(value, f"{where}.properties.{name}", needed)
                pairs.append((f"{key(name) if key else spelled(name) + ' colon'} {body}", needed))
        extra = None
        if more is not False:
            name = self._rule(self._other_names(list(wanted)), "name") if wanted else "string"
            extra = f"{name} colon {self.optional(more, f'{where}.additionalProperties')}"
        self._open = outer
        return self._rule(f'"{around[0]}" ws {self._members(pairs, extra)} "{around[1]}"', "object")

    def _members(self, pairs: list[tuple[str, bool]], extra: str | None) -> str:
        """Members in order, where commas depend on whether one came before: a chain of rules from the last one on."""
        after = f"(comma {extra})* ws" if extra else "ws"
        alone = f"({extra} (comma {extra})* ws)?" if extra else '""'
        for pair, needed in reversed(pairs):
            tail = self._rule(after, "after")
            after = f"comma {pair} {tail}" + ("" if needed else f" | {tail}")
            alone = f"{pair} {tail}" + ("" if needed else f" | {self._rule(alone, 'alone')}")
        return f"({alone})"

    def _other_names(self, names: list[str]) -> str:
        """A string, spelled without escapes, that is none of these names."""
        free = self._rule(f'{char_class(PLAIN)}* "\\""', "free")
        return f'"\\"" {self._differs(names, free)}'

    def _differs(self, names: Iterable[str], free: str) -> str:
        """What is left of such a string, the quote with it; `free` is the rest of one that already differs."""
        names = list(names)
        heads = sorted({name[0] for name in names if name})
        taken: Ranges = tuple((ord(c), ord(c)) for c in heads)
        branches = [f"{char_class(without(PLAIN, taken))} {free}"]
        for head in heads:
            branches.append(f"{literal(head)} {self._differs((n[1:] for n in names if n and n[0] == head), free)}")
        if "" not in names:
            branches.append('"\\""')
        return self._rule(" | ".join(branches), "differs")
