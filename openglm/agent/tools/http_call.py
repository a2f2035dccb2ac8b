"""One HTTP request of a tool: built from arguments, sent with bounds, and its answer as an observation.

Redirects are followed to the same host alone: the user named that one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from openglm.agent.tools.result import mime_of
from openglm.types import Observation, ToolFile

__all__ = ["FORM", "JSON", "PARTS", "Place", "Request", "fetch_text", "send"]

JSON, FORM, PARTS = "application/json", "application/x-www-form-urlencoded", "multipart/form-data"

TIMEOUT_S, MAX_REDIRECTS = 30.0, 5
MAX_BYTES, MAX_CHARACTERS, MAX_ERROR = 4 << 20, 20_000, 1000


@dataclass(frozen=True)
class Place:
    """Where an argument goes: "path", "query", "header", "cookie" or "body"; style and explode as OpenAPI defines."""

    where: str
    style: str = ""
    explode: bool = True
    as_json: bool = False


@dataclass
class Request:
    """What is sent. url: with {names} of path arguments, which `put` fills in."""

    method: str
    url: str
    query: list[tuple[str, str]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    json: Any = None
    form: Mapping[str, Any] | None = None
    parts: list[tuple[str, tuple[str | None, str, str]]] | None = None  # name; file name, text, type

    def fill(self, body: Mapping[str, Any], encoding: str, files: frozenset[str]) -> None:
        """The fields of a body. files: those that a server takes for files, in PARTS."""
        if encoding == JSON:
            self.json = body
        elif encoding == FORM:
            self.form = {k: v if isinstance(v, str | list) else _scalar(v) for k, v in body.items()}
        else:
            each = [(k, item) for k, v in body.items() for item in (v if isinstance(v, list) else [v])]
            self.parts = [(k, _part(k, item, k in files)) for k, item in each]

    def put(self, place: Place, name: str, value: Any) -> None:
        """ValueError for a value that cannot stand there."""
        if place.where == "query":
            self.query += _query(place, name, value)
            return
        text = _plain(place, value)
        if place.where == "path":
            if text in ("", ".", ".."):
                raise ValueError(f"'{name}' is a part of the URL: it cannot be {text!r}")
            self.url = self.url.replace("{" + name + "}", quote(text, safe=","))
            return
        if not text.isprintable() or not text.isascii():
            raise ValueError(f"'{name}' goes into the header of the request: printable ASCII only")
        if place.where == "cookie":
            self.headers["Cookie"] = "; ".join(filter(None, (self.headers.get("Cookie"), f"{name}={quote(text)}")))
        else:
            self.headers[name] = text


def _query(place: Place, name: str, value: Any) -> list[tuple[str, str]]:
    if place.as_json:
        return [(name, json.dumps(value, ensure_ascii=False))]
    if isinstance(value, Mapping):
        if place.style == "deepObject":
            return [(f"{name}[{key}]", _scalar(inner)) for key, inner in value.items()]
        if place.explode:
            return [(str(key), _scalar(inner)) for key, inner in value.items()]
    if isinstance(value, list) and place.explode:
        return [(name, _scalar(item)) for item in value]
    joint = {"spaceDelimited": " ", "pipeDelimited": "|"}.get(place.style, ",")
    return [(name, _plain(place, value, joint))]


def _plain(place: Place, value: Any, joint: str = ",") -> str:
    if place.as_json:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        pairs = [f"{k}={_scalar(v)}" if place.explode else f"{k},{_scalar(v)}" for k, v in value.items()]
        return joint.join(pairs)
    return joint.join(map(_scalar, value)) if isinstance(value, list) else _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)  # true, 3, 0.5, nested values


def _part(name: str, value: Any, is_file: bool) -> tuple[str | None, str, str]:
    """(file name, text, type), with the types that OpenAPI gives to parts of which a document says nothing."""
    if is_file:
        return f"{name}.txt", _scalar(value), "application/octet-stream"
    return None, _scalar(value), JSON if isinstance(value, Mapping | list) else "text/plain"


# -------------------------------------------------------------------- sending


def _library() -> Any:
    try:
        import httpx
    except ModuleNotFoundError:
        raise ValueError("calling servers needs httpx: pip install 'openglm[agent]'") from None
    return httpx


async def send(request: Request, timeout_s: float | None, name: str) -> Observation:
    """The answer, cut to what a model can read. name: of the tool, for files. timeout_s: of all together."""
    httpx, limit = _library(), timeout_s or TIMEOUT_S
    host = urlsplit(request.url).netloc
    try:
        async with asyncio.timeout(limit), httpx.AsyncClient(timeout=limit, follow_redirects=False) as client:
            return await _exchange(client, request, name)
    except TimeoutError:
        return Observation(f"{host} did not answer within {limit:g} s.", error=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return Observation(f"The request to {host} failed: {reason}", error=True)


async def _exchange(client: Any, request: Request, name: str) -> Observation:
    options: dict[str, Any] = {"params": request.query or None, "headers": request.headers}
    if request.form is not None:
        options["data"] = request.form
    elif request.parts is not None:
        options["files"] = request.parts
    elif request.json is not None:
        options["json"] = request.json
    method, url = request.method, request.url
    for _ in range(MAX_REDIRECTS + 1):
        async with client.stream(method, url, **options) as answer:
            if not answer.has_redirect_location:
                return _observed(answer, *await _body(answer), name)
            target = urljoin(str(answer.url), answer.headers["location"])
            if not same_host(str(answer.url), target):
                host = urlsplit(target).netloc
                return Observation(f"The server redirects to another host ({host}), which is not followed.", error=True)
        options.pop("params", None)
        if answer.status_code == 303 or (answer.status_code in (301, 302) and method == "POST"):
            method = "GET"
            options = {"headers": options["headers"]}
        url = target
    return Observation(f"The server redirects more than {MAX_REDIRECTS} times.", error=True)


def same_host(first: str, second: str) -> bool:
    """Same host and port; from http to https is allowed between their usual ports."""
    a, b = urlsplit(first), urlsplit(second)
    ports = {"http": 80, "https": 443}
    if a.hostname != b.hostname or b.scheme not in ports or (a.scheme, b.scheme) == ("https", "http"):
        return False
    pa, pb = a.port or ports[a.scheme], b.port or ports[b.scheme]
    return pa == pb or (pa, pb) == (80, 443)


async def _body(answer: Any) -> tuple[bytes, bool]:
    """(content, whether there was more)."""
    content = bytearray()
    async for piece in answer.aiter_bytes():
        content += piece
        if len(content) > MAX_BYTES:
            return bytes(content[:MAX_BYTES]), True
    return bytes(content), False


def _observed(answer: Any, content: bytes, is_cut: bool, name: str) -> Observation:
    status, mime = answer.status_code, answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    data: dict[str, Any] = {"status": status}
    if status >= 400:
        text = " ".join(content.decode(answer.charset_encoding or "utf-8", "replace").split())
        reason = f"HTTP {status} {answer.reason_phrase}".rstrip()
        return Observation(f"{reason}: {text[:MAX_ERROR]}" if text else reason, data=data, error=True)
    if not content:
        return Observation(f"(done: HTTP {status})", data=data)
    if mime.startswith(("image/", "audio/", "video/")) or mime in ("application/pdf", "application/octet-stream"):
        if is_cut:
            return Observation(f"The file is larger than {MAX_BYTES >> 20} MiB.", data=data, error=True)
        file = ToolFile(f"{name}.{mime_of(content)[1]}", mime, content, description=f"{mime}, {len(content)} bytes")
        return Observation(f"[{file.name}: {file.description}]", (file,), data)
    text = content.decode(answer.charset_encoding or "utf-8", "replace")
    if mime.endswith(("/json", "+json")) and not is_cut:
        try:
            data["json"] = json.loads(text)
            text = json.dumps(data["json"], ensure_ascii=False)
        except (ValueError, RecursionError):
            pass  # it is shown as it came
    if len(text) > MAX_CHARACTERS:
        text = f"{text[:MAX_CHARACTERS]}\n[cut: the answer has {'more than ' if is_cut else ''}{len(text)} characters]"
    return Observation(text, data=data)


def fetch_text(url: str) -> str:
    """A document that the user named. ValueError where it cannot be had."""
    httpx = _library()
    try:
        with httpx.Client(timeout=TIMEOUT_S, follow_redirects=False) as client:
            for _ in range(MAX_REDIRECTS + 1):
                answer = client.get(url)
                if not answer.has_redirect_location:
                    break
                target = urljoin(url, answer.headers["location"])
                if not same_host(url, target):
                    raise ValueError(f"{url} redirects to another host: give {target} itself")
                url = target
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{url} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if answer.status_code != 200:
        raise ValueError(f"{url} cannot be read: HTTP {answer.status_code}")
    return str(answer.text)
