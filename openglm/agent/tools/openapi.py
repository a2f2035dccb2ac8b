"""OpenAPI documents as tools: one for each operation, called over HTTP.

    openglm tools --tools https://host/openapi.json
    openglm tools --tools 'api.yaml#server=http://127.0.0.1:8000&key=PETS_KEY&only=list_pets,add_pet'

After # may stand: server, in place of the document's own; key, the environment variable that holds the key or token;
only, the operations to take. A document is no secret channel: its server is contacted because the user named it, and
no other host is, whatever it redirects to.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urljoin, urlsplit

from openglm.agent.schema import check_schema, inline, named, schema_error
from openglm.agent.tools.http_call import FORM, JSON, PARTS, Place, Request, fetch_text, send
from openglm.config import nearest
from openglm.types import Observation, ToolContext, ToolSpec

__all__ = ["Operation", "OpenAPISource", "OperationTool", "load_openapi"]

log = logging.getLogger(__name__)
METHODS = ("get", "put", "post", "delete", "patch", "head", "options")
PLACES = ("path", "query", "header", "cookie")
MAX_DESCRIPTION = 1000
NOISE = ("xml", "externalDocs", "discriminator", "example", "examples", "title", "nullable", "readOnly", "writeOnly",
         "deprecated", "contentEncoding", "contentMediaType")  # fmt: skip


@dataclass(frozen=True)
class OpenAPISource:
    """Where a document is, and how its server is called; see the top of this file."""

    document: str
    server: str = ""
    key: str = ""
    only: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> OpenAPISource:
        """FILE-OR-URL#server=URL&key=VARIABLE&only=NAME,NAME. ValueError for other settings."""
        document, _, settings = text.partition("#")
        values = {name: value[-1] for name, value in parse_qs(settings, keep_blank_values=True).items()}
        for name in values:
            if name not in ("server", "key", "only"):
                raise ValueError(f"{document}: no setting {name!r} after #: there are server, key and only")
        only = tuple(filter(None, values.pop("only", "").split(",")))
        return cls(document, only=only, **values)

    @property
    def secret(self) -> str:
        if not self.key:
            return ""
        if not (value := os.environ.get(self.key, "").strip()):
            raise ValueError(f"{self.document}: the environment variable {self.key} is not set: it must hold the key")
        return value


@dataclass(frozen=True)
class Operation:
    """arguments: name -> (where it goes, its name there). body: "" (none), "fields" (of an object), "whole"; encoding:
    JSON, FORM or PARTS. files: fields of PARTS that are files; the argument is the text in one.
    """

    name: str
    method: str
    url: str
    source: str
    spec: ToolSpec
    arguments: Mapping[str, tuple[Place, str]]
    body: str
    encoding: str
    files: frozenset[str]
    body_required: bool
    auth: tuple[tuple[str, str, str], ...]  # (header, query or cookie; name; value)


class OperationTool:
    """A Tool that sends one kind of request."""

    def __init__(self, operation: Operation) -> None:
        self.operation, self.spec, self.source = operation, operation.spec, operation.source

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> Observation:
        """What the server answered; an Observation with error for 4xx and 5xx, and where it cannot be reached."""
        if problem := schema_error(self.spec, arguments):
            raise ValueError(problem)
        request = Request(self.operation.method, self.operation.url)
        body: dict[str, Any] = {}
        for name, value in arguments.items():
            place, there = self.operation.arguments[name]
            if place.where != "body":
                request.put(place, there, value)
            elif self.operation.body == "whole":
                request.json = value
            else:
                body[there] = value
        if self.operation.body == "fields" and (body or self.operation.body_required):
            request.fill(body, self.operation.encoding, self.operation.files)
        for where, name, value in self.operation.auth:
            request.put(Place(where), name, value)
        return await send(request, context.timeout_s, self.spec.name)


def load_openapi(text: str) -> list[OperationTool]:
    """The tools of a document, as `OpenAPISource.parse` reads it. ValueError for what cannot be called."""
    source = OpenAPISource.parse(text)
    if source.document.startswith(("http://", "https://")):
        content = fetch_text(source.document)
    else:
        content = Path(source.document).expanduser().read_text(encoding="utf-8")
    return operations(_read(content, source.document), source)


def _read(text: str, where: str) -> Any:
    """JSON or YAML. ValueError saying where it breaks."""
    import yaml

    try:
        value = json.loads(text) if text.lstrip()[:1] in ("{", "[") else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{where} is neither JSON nor YAML: {' '.join(str(error).split())[:200]}") from None
    if isinstance(value, Mapping) and "mcpServers" in value:
        raise ValueError(f"{where} names MCP servers: give it with --mcp")
    return value


def operations(document: Any, source: OpenAPISource) -> list[OperationTool]:
    where = source.document
    if not isinstance(document, Mapping) or not str(document.get("openapi", "")).startswith("3."):
        kind = "Swagger 2" if isinstance(document, Mapping) and "swagger" in document else "no OpenAPI document"
        raise ValueError(f"{where} is {kind}: version 3 is needed")
    tools, names = [], []
    for path, item in (document.get("paths") or {}).items():
        item = _entry(item, document, where)
        for method in METHODS:
            if method not in item:
                continue
            name = _name(item[method].get("operationId") or f"{method}{path}")
            names.append(name)
            if source.only and name not in source.only:
                continue
            try:
                tools.append(OperationTool(_operation(document, source, path, item, method, name)))
            except Unsupported as reason:
                log.warning("%s: %s %s is left out: %s", where, method.upper(), path, reason)
    for wanted in source.only:
        if wanted not in names:
            raise ValueError(f"{where} has no operation {wanted!r}{nearest(wanted, names)}")
    if not tools:
        raise ValueError(f"{where} has no operation that can be called")
    return tools


class Unsupported(Exception):
    """Why one operation of a document is no tool."""


def _name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_")[:64] or "operation"


def _entry(value: Any, document: Mapping[str, Any], where: str) -> Any:
    """A part of the document that may stand elsewhere in it."""
    try:
        while isinstance(value, Mapping) and "$ref" in value:
            value = {**named(value["$ref"], document), **{k: v for k, v in value.items() if k != "$ref"}}
        return value
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _operation(
    document: Mapping[str, Any], source: OpenAPISource, path: str, item: Mapping[str, Any], method: str, name: str
) -> Operation:
    given, where = item[method], source.document
    listed = [_entry(p, document, where) for p in (*(item.get("parameters") or ()), *(given.get("parameters") or ()))]
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}  # of what refers to itself
    required: list[str] = []
    arguments: dict[str, tuple[Place, str]] = {}

    def add(there: str, place: Place, schema: Any, needed: bool, about: str) -> None:
        name = there if there not in properties else f"{there}_{place.where}"
        properties[name] = {**schema, "description": about} if about and "description" not in schema else schema
        arguments[name] = (place, there)
        if needed:
            required.append(name)

    def plain(schema: Any) -> Any:
        try:
            found = inline(schema, document)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        definitions.update(_schema(found.pop("$defs", {}), names=True))
        return _schema(found)

    for (there, kind), p in {(p["name"], p["in"]): p for p in listed}.items():
        if kind not in PLACES:
            raise Unsupported(f"a parameter in {kind!r}")
        if kind == "header" and there.lower() in ("accept", "content-type", "authorization"):
            continue  # the standard says so
        content = next(iter((p.get("content") or {}).values()), None)
        style, explode = p.get("style", ""), p.get("explode", p.get("style", "form") == "form")
        place = Place(kind, style, bool(explode), as_json=content is not None)
        schema = plain(content.get("schema", {}) if content else p.get("schema", {}))
        add(there, place, schema, bool(p.get("required")) or kind == "path", str(p.get("description") or ""))
    body, encoding, files, body_required = _body(_entry(given.get("requestBody"), document, where), plain, add)
    merged: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    text = "\n".join(filter(None, (given.get("summary"), given.get("description")))) or f"{method.upper()} {path}"
    more = {"required": required, "$defs": definitions}
    spec = ToolSpec(name, text[:MAX_DESCRIPTION], merged | {key: value for key, value in more.items() if value})
    check_schema(spec)
    url = _server(document, source, item, given).rstrip("/") + path
    origin = f"{method.upper()} {path} in {source.document}"
    auth = _auth(document, source, given)
    return Operation(name, method.upper(), url, origin, spec, arguments, body, encoding, files, body_required, auth)


def _body(request: Mapping[str, Any] | None, plain: Any, add: Any) -> tuple[str, str, frozenset[str], bool]:
    """(kind, encoding, files, required): the fields of an object become arguments beside others, anything else one."""
    none: frozenset[str] = frozenset()
    if not request:
        return "", JSON, none, False
    content, needed = request.get("content") or {}, bool(request.get("required"))
    kinds = {k.split(";")[0].strip().lower(): k for k in content}
    form = next((k for k in (FORM, PARTS) if k in kinds), JSON)
    encoding = JSON if any(k.endswith(("/json", "+json")) for k in kinds) else form
    kind = next((whole for k, whole in kinds.items() if k == encoding or k.endswith(("/json", "+json"))), None)
    if kind is None:
        if needed:
            raise Unsupported(
                f"its body is {' or '.join(content) or 'of no kind'}, and only JSON and forms can be sent"
            )
        return "", JSON, none, False
    schema = plain(content[kind].get("schema") or {})
    if schema.get("properties") and not any(word in schema for word in ("allOf", "anyOf", "oneOf")):
        files = frozenset(name for name, inner in schema["properties"].items() if encoding == PARTS and _is_file(inner))
        for name, inner in schema["properties"].items():
            if name in files:
                inner = {**inner, "description": f"{inner.get('description', '')} (the text in the file)".strip()}
            add(name, Place("body"), inner, needed and name in schema.get("required", ()), "")
        return "fields", encoding, files, needed
    if encoding != JSON:
        raise Unsupported("a form without fields")
    add("body", Place("body"), schema, needed, str(request.get("description") or ""))
    return "whole", JSON, none, needed


def _schema(value: Any, names: bool = False) -> Any:
    """A schema of OpenAPI 3.0 or 3.1 as plain JSON schema, without what a caller does not need. names: the keys of this
    object are names, not keywords.
    """
    if isinstance(value, list):
        return [_schema(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if names:
        return {name: _schema(inner) for name, inner in value.items() if not _is_read_only(inner)}
    found = {
        key: inner if key in ("enum", "default", "const", "required") else _schema(inner, key == "properties")
        for key, inner in _united(value).items()
        if key not in NOISE and not key.startswith("x-")
    }
    if isinstance(found.get("required"), list) and "properties" in found:
        found["required"] = [name for name in found["required"] if name in found["properties"]]
    for key, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(found.get(key), bool):  # 3.0
            if found.pop(key) and bound in found:
                found[key] = found.pop(bound)
    if "contentMediaType" in value and "contentEncoding" not in value:
        found.setdefault("format", "binary")  # as 3.1 writes what 3.0 calls binary
    return _nullable(found) if value.get("nullable") is True else found


def _united(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """allOf of plain objects, as documents write inheritance, as one object."""
    parts = schema.get("allOf")
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        return schema
    rest = {key: value for key, value in schema.items() if key != "allOf"}
    if len(parts) == 1 and "properties" not in rest:
        return {**_united(parts[0]), **rest}
    parts = [*map(_united, parts), rest]
    if any(set(part) - {"type", "properties", "required", "description", *NOISE} for part in parts):
        return schema
    properties = {name: inner for part in parts for name, inner in (part.get("properties") or {}).items()}
    required = [name for part in parts for name in part.get("required") or ()]
    return {**rest, "type": "object", "properties": properties, "required": list(dict.fromkeys(required))}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(schema.get("type"), str):
        return {"anyOf": [schema, {"type": "null"}]}
    more = {"enum": [*schema["enum"], None]} if "enum" in schema and None not in schema["enum"] else {}
    return {**schema, "type": [schema["type"], "null"], **more}


def _is_file(schema: Any) -> bool:
    """One file, or a list of them."""
    if not isinstance(schema, Mapping):
        return False
    return schema.get("format") == "binary" or _is_file(schema.get("items"))


def _is_read_only(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("readOnly") is True


def _server(document: Mapping[str, Any], source: OpenAPISource, item: Any, given: Any) -> str:
    servers = given.get("servers") or item.get("servers") or document.get("servers") or [{"url": "/"}]
    url = source.server or str(servers[0].get("url", "/"))
    for name, variable in (servers[0].get("variables") or {}).items():
        url = url.replace("{" + name + "}", str(variable.get("default", "")))
    if source.document.startswith(("http://", "https://")):
        url = urljoin(source.document, url)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{source.document} names no server ({url!r}): add #server=http://...")
    return url


def _auth(document: Mapping[str, Any], source: OpenAPISource, given: Any) -> tuple[tuple[str, str, str], ...]:
    """How the key is sent, if this operation asks for one: as the first of its schemes says that one key can serve. A
    document without any scheme gets it as a bearer token.
    """
    secret = source.secret
    schemes = (document.get("components") or {}).get("securitySchemes") or {}
    wanted = given.get("security", document.get("security")) or []
    if not secret or (schemes and not wanted):
        return ()
    names = [name for choice in wanted for name in choice]
    for scheme in (_entry(schemes[name], document, source.document) for name in names if name in schemes):
        if scheme.get("type") == "apiKey" and scheme.get("in") in ("header", "query", "cookie"):
            return ((scheme["in"], scheme["name"], secret),)
        if scheme.get("type") == "http" and str(scheme.get("scheme")).lower() == "basic":
            from base64 import b64encode

            return (("header", "Authorization", f"Basic {b64encode(secret.encode()).decode()}"),)
    return (("header", "Authorization", f"Bearer {secret}"),)
