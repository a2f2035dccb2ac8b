"""Results of MCP tools as observations, and observations as results: texts, pictures, sounds, resources, links."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from openglm.agent.tools.result import mime_of
from openglm.types import Observation, ToolFile

__all__ = ["observe", "result_of"]

MAX_CHARACTERS, MAX_FILE_BYTES = 200_000, 16 << 20
ENDS = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif", "image/webp": "webp", "image/svg+xml": "svg",
        "audio/wav": "wav", "audio/mpeg": "mp3", "audio/ogg": "ogg"}  # fmt: skip


def observe(result: Any, name: str) -> Observation:
    """Of an mcp.types.CallToolResult. name: of the tool, for names of files."""
    texts: list[str] = []
    files: list[ToolFile] = []
    for block in result.content:
        if block.type == "text":
            texts.append(block.text)
        elif block.type in ("image", "audio"):
            _add_file(block.data, block.mime_type, f"{name}-{len(files) + 1}", texts, files)
        elif block.type == "resource_link":
            about = f": {block.description}" if block.description else ""
            texts.append(f"[link {block.name} {block.uri}{about}]")
        elif block.type == "resource":
            _add_resource(block.resource, f"{name}-{len(files) + 1}", texts, files)
    structured = result.structured_content
    if structured is not None and not result.content:
        texts.append(json.dumps(structured, ensure_ascii=False))
    text = "\n".join(texts) or "(done)"
    if len(text) > MAX_CHARACTERS:
        text = f"{text[:MAX_CHARACTERS]}\n[cut: the answer has {len(text)} characters]"
    data = structured if isinstance(structured, Mapping) or structured is None else {"result": structured}
    return Observation(text, tuple(files), data, error=bool(result.is_error))


def _add_resource(resource: Any, name: str, texts: list[str], files: list[ToolFile]) -> None:
    if hasattr(resource, "text"):
        texts.append(f"[{resource.uri}]\n{resource.text}")
        return
    last = PurePosixPath(unquote(urlsplit(str(resource.uri)).path)).name
    is_safe = last.isprintable() and not last.startswith(".")
    mime = resource.mime_type or "application/octet-stream"
    _add_file(resource.blob, mime, last if last and is_safe else name, texts, files)


def _add_file(data: str, mime: str, name: str, texts: list[str], files: list[ToolFile]) -> None:
    try:
        content = base64.b64decode(data, validate=True)
    except binascii.Error:
        texts.append(f"[a file of kind {mime} that cannot be decoded]")
        return
    if "." not in name:
        name = f"{name}.{ENDS.get(mime) or mime_of(content)[1]}"
    file = ToolFile(name, mime, content, description=f"{mime}, {len(content)} bytes")
    files.append(file)
    texts.append(f"[{file.name}: {file.description}]")


def result_of(observation: Observation) -> Any:
    """An mcp.types.CallToolResult. Files that are too large for a message are named in the text alone."""
    from mcp import types

    blocks: list[Any] = [types.TextContent(type="text", text=observation.content)]
    for file in observation.files:
        content = file.read()
        if len(content) > MAX_FILE_BYTES:
            blocks.append(types.TextContent(type="text", text=f"[{file.name} has {len(content)} bytes: not sent]"))
            continue
        data = base64.b64encode(content).decode()
        kind = file.mime.partition("/")[0]
        if kind == "image":
            blocks.append(types.ImageContent(type="image", data=data, mime_type=file.mime))
        elif kind == "audio":
            blocks.append(types.AudioContent(type="audio", data=data, mime_type=file.mime))
        else:
            resource = types.BlobResourceContents(uri=f"file:///{file.name}", mime_type=file.mime, blob=data)
            blocks.append(types.EmbeddedResource(type="resource", resource=resource))
    return types.CallToolResult(content=blocks, is_error=observation.error)
