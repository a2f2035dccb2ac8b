"""Whether the arguments of a call fit the JSON schema of its tool, said in few words that help to make a better call.

python -m openglm.agent.schema '{"type": "object", "properties": {"n": {"type": "integer"}}}' '{"m": 1}'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from openglm.config import nearest
from openglm.types import ToolSpec

__all__ = ["check_schema", "inline", "named", "place", "schema_error"]

MAX_PROBLEMS, MAX_WORDS = 3, 300
# Keywords that may bring properties from elsewhere: names cannot be judged by `properties` alone.
COMPOSED = ("$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "additionalProperties", "dependentSchemas",
            "unevaluatedProperties")  # fmt: skip
LIMITS = {
    "minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below",
    "multipleOf": "a multiple of",
}  # fmt: skip
LENGTHS = {"minLength": ("at least", "characters"), "maxLength": ("at most", "characters"),
           "minItems": ("at least", "items"), "maxItems": ("at most", "items")}  # fmt: skip
NAMES = {"object": "an object", "array": "a list", "string": "a text", "integer": "a whole number",
         "number": "a number", "boolean": "true or false", "null": "null"}  # fmt: skip

FORMATS = {"date": "a date such as 2026-05-17", "date-time": "a time such as 2026-05-17T08:30:00",
           "time": "a time such as 08:30:00", "uri": "a URL", "email": "an e-mail address"}  # fmt: skip


def schema_error(spec: ToolSpec, arguments: Any) -> str | None:
    """What is wrong with the arguments of a call, at most three things in one line; None where they fit.

    Names that the schema does not have are wrong too, unless it allows others. Needs `jsonschema` (the extra `agent`):
    ValueError without it.
    """
    if not isinstance(arguments, Mapping):
        return f"the arguments of {spec.name} must be an object with names and values, not {_shown(arguments)}"
    problems, validator = _unknown(spec.parameters, arguments), _validator(spec.parameters)
    try:
        errors = sorted(validator.iter_errors(dict(arguments)), key=lambda e: list(map(str, e.path)))
        problems += [_words(error) for error in errors]
    except Exception as error:  # unknown types, bad patterns, references to nowhere: the validator has no common class
        return f"the schema of {spec.name} is itself wrong ({_short(str(error))}), so it cannot be called"
    problems = list(dict.fromkeys(problems))
    more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
    return "; ".join(problems[:MAX_PROBLEMS]) + more if problems else None


def check_schema(spec: ToolSpec) -> None:
    """ValueError, in one line, for parameters that are no JSON schema of an object."""
    where = f"the parameters of the tool {spec.name!r}"
    if spec.parameters.get("type", "object") != "object":
        raise ValueError(f"{where} must be a schema of type object, not {spec.parameters['type']!r}")
    try:
        _validator(spec.parameters).check_schema(dict(spec.parameters))
    except _library().exceptions.SchemaError as error:
        raise ValueError(f"{where} are no JSON schema: {_short(error.message)}") from None


def inline(schema: Any, root: Mapping[str, Any]) -> Any:
    """A copy with each "$ref" into `root` replaced by what it names, which small models read better.

    References that lead back to themselves stay, with what they name under "$defs". ValueError for one that leads
    nowhere or out of the document.
    """
    kept: dict[str, Any] = {}
    value = _inlined(schema, root, (), kept)
    done: dict[str, Any] = {}
    while rest := [name for name in kept if name not in done]:
        for name in rest:
            done[name] = _inlined(named(kept[name], root), root, (kept[name],), kept)
    return {**value, "$defs": done} if done else value


def _inlined(value: Any, root: Mapping[str, Any], above: tuple[str, ...], kept: dict[str, Any]) -> Any:
    """above: the references that this value stands in."""
    if isinstance(value, list):
        return [_inlined(item, root, above, kept) for item in value]
    if not isinstance(value, Mapping):
        return value
    reference = value.get("$ref")
    rest = {k: _inlined(v, root, above, kept) for k, v in value.items() if k not in ("$ref", "$defs") or k == reference}
    if not isinstance(reference, str):
        return rest
    if reference in above:
        name = reference.rpartition("/")[2]
        kept[name] = reference
        return {"$ref": f"#/$defs/{name}", **rest}
    return {**_inlined(named(reference, root), root, (*above, reference), kept), **rest}


def named(reference: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a "$ref" into `root` names. ValueError for one that leads nowhere or out of the document."""
    if not reference.startswith("#"):
        raise ValueError(f"the reference {reference} leads out of the document: put what it names into it")
    found: Any = root
    for part in filter(None, reference[1:].split("/")):
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping):
        raise ValueError(f"the reference {reference} leads nowhere")
    return found


def _library() -> Any:
    try:
        import jsonschema
    except ModuleNotFoundError:
        raise ValueError("checking calls needs jsonschema: pip install 'openglm[agent]'") from None
    return jsonschema


def _validator(schema: Mapping[str, Any]) -> Any:
    validators, plain = _library().validators, dict(schema)
    from referencing import Registry

    kind = validators.validator_for(plain, validators.Draft202012Validator)
    return kind(plain, registry=Registry())  # an empty one: nothing is fetched


def _unknown(schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    if "properties" not in schema or any(word in schema for word in COMPOSED if word != "additionalProperties"):
        return []
    if schema.get("additionalProperties", False) is not False:
        return []
    known = list(schema["properties"])
    there = f"there are: {', '.join(known)}" if known else "it takes none"
    return [
        f"there is no argument {name!r}{nearest(name, known) or f' ({there})'}"
        for name in arguments
        if name not in known
    ]


# -------------------------------------------------------------------- words


def _words(error: Any) -> str:
    """One error of jsonschema's, in ours."""
    keyword, value, limit = error.validator, error.instance, error.validator_value
    name = place(error.absolute_path)
    if keyword == "required":
        missing = next(
            (n for n in limit if isinstance(value, Mapping) and n not in value and repr(n) in error.message), ""
        )
        inner = (error.schema.get("properties") or {}).get(missing, {})
        return f"{_quoted(place([*error.absolute_path, missing]))} is missing{_meaning(inner)}"
    if keyword == "additionalProperties" and limit is False:
        known = list(error.schema.get("properties") or {})
        extra = [n for n in value if n not in known]
        if not error.absolute_path:
            return _unknown({"properties": dict.fromkeys(known)}, {extra[0]: None})[0]
        return f"{_quoted(name)} has no {extra[0]!r}{nearest(extra[0], known)}"
    if keyword == "type":
        types = [limit] if isinstance(limit, str) else list(limit)
        return f"{_quoted(name)} must be {_either(NAMES.get(t, t) for t in types)}, not {_shown(value)}"
    if keyword in ("enum", "const"):
        choices = limit if keyword == "enum" else [limit]
        return f"{_quoted(name)} must be {_either(_json(c) for c in choices[:20])}, not {_shown(value)}"
    if keyword in LIMITS:
        return f"{_quoted(name)} must be {LIMITS[keyword]} {_json(limit).removesuffix('.0')}, not {_shown(value)}"
    if keyword in LENGTHS:
        return f"{_quoted(name)} must have {LENGTHS[keyword][0]} {limit} {LENGTHS[keyword][1]}, not {len(value)}"
    if keyword == "pattern":
        return f"{_quoted(name)} must match {limit}, which {_shown(value)} does not"
    if keyword in ("anyOf", "oneOf") and error.context:
        return _nearest_branch(error, name)
    return f"{_quoted(name)}: {_short(error.message)}"


def _nearest_branch(error: Any, name: str) -> str:
    """Of several schemas none fits: what the types would be, or the error of the branch that got furthest."""
    types = [str(branch.get("type", "")) for branch in error.validator_value if isinstance(branch, Mapping)]
    if all(e.validator == "type" and len(e.absolute_path) == len(error.absolute_path) for e in error.context):
        return f"{_quoted(name)} must be {_either(NAMES.get(t, t) for t in types if t)}, not {_shown(error.instance)}"
    best = _library().exceptions.best_match([error])
    return _words(best) if best is not error else f"{_quoted(name)}: {_short(error.message)}"


def place(path: Iterable[Any]) -> str:
    """items[0].price"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _quoted(name: str) -> str:
    return f"'{name}'" if name else "the arguments"


def _meaning(schema: Any) -> str:
    """What a missing argument would be."""
    if not isinstance(schema, Mapping):
        return ""
    kind = FORMATS.get(str(schema.get("format")), NAMES.get(str(schema.get("type")), ""))
    if schema.get("enum"):
        kind = _either(_json(choice) for choice in schema["enum"][:20])
    about = _short(str(schema.get("description") or ""), 80)
    return f" ({': '.join(filter(None, (kind, about)))})" if kind or about else ""


def _either(names: Iterable[str]) -> str:
    found = list(dict.fromkeys(names))
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _shown(value: Any) -> str:
    return _short(_json(value), 60)


def _short(text: str, limit: int = MAX_WORDS) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


if __name__ == "__main__":
    print(schema_error(ToolSpec("tool", "", json.loads(sys.argv[1])), json.loads(sys.argv[2])) or "fits")
