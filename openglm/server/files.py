"""Files in memory: what clients upload for the tools, and what the tools made. OpenAI's /v1/files.

    client.files.create(file=open("table.csv", "rb"), purpose="assistants").id
    client.files.content("file-...").read()

A file belongs to the caller that it came from or was made for; no other one sees it. The oldest go when the store is
full, and all with the server.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from openglm.server.errors import ApiError
from openglm.server.limits import read_bytes
from openglm.types import ToolFile

__all__ = ["FileStore", "StoredFile", "add_files"]

MAX_FILE_BYTES = 32 << 20
# What a browser may show in place; anything else it is told to save, so that no file can act as a page of ours.
SHOWN = ("image/png", "image/jpeg", "image/gif", "image/webp", "text/plain")


@dataclass(frozen=True)
class StoredFile:
    id: str
    client: str
    name: str
    mime: str
    content: bytes
    purpose: str
    created: int

    def as_object(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {
            "id": self.id, "object": "file", "bytes": len(self.content), "created_at": self.created,
            "filename": self.name, "purpose": self.purpose, "status": "processed",
        }  # fmt: skip


class FileStore:
    """max_bytes: of all files together; those of one caller fill a quarter of it at most."""

    def __init__(self, max_bytes: int = 256 << 20, clock: Callable[[], float] = time.time) -> None:
        self.max_bytes, self._clock = max_bytes, clock
        self._files: OrderedDict[str, StoredFile] = OrderedDict()

    def add(self, client: str, name: str, mime: str, content: bytes, purpose: str) -> StoredFile:
        """ApiError for a file that is too large. Older ones make room."""
        limit = min(MAX_FILE_BYTES, self.max_bytes // 4)
        if len(content) > limit:
            raise ApiError(f"file: it has {len(content)} bytes, and {limit} are the most", "file", 413)
        file = StoredFile(f"file-{secrets.token_hex(16)}", client, name, mime, content, purpose, int(self._clock()))
        self._files[file.id] = file
        self._make_room([f for f in self._files.values() if f.client == client], self.max_bytes // 4)
        self._make_room(list(self._files.values()), self.max_bytes)
        self.check_integrity()
        return file

    def _make_room(self, files: list[StoredFile], limit: int) -> None:
        total = sum(len(file.content) for file in files)
        for file in files[:-1]:
            if total <= limit:
                return
            total -= len(file.content)
            del self._files[file.id]

    def get(self, client: str, id: str, param: str | None = None) -> StoredFile:
        """ApiError 404 for one that is not there, or not this caller's."""
        file = self._files.get(id)
        if file is None or file.client != client:
            where = f"{param}: " if param else ""
            raise ApiError(f"{where}there is no file {id[:80]!r}", param, 404, "file_not_found")
        return file

    def of(self, client: str) -> list[StoredFile]:
        """A caller's, the newest first."""
        return [file for file in reversed(self._files.values()) if file.client == client]

    def drop(self, client: str, id: str) -> None:
        del self._files[self.get(client, id).id]

    def of_tool(self, client: str, file: ToolFile) -> dict[str, Any]:
        """Keeps what a tool made; as it stands in an observation. A file that is too large is named without an id."""
        told: dict[str, Any] = {"name": file.name, "mime": file.mime, "description": file.description}
        try:
            content = file.read()
            kept = self.add(client, PurePosixPath(file.name).name, file.mime, content, "assistants_output")
        except (OSError, ApiError):
            return told
        return {**told, "id": kept.id, "bytes": len(content), "url": f"/v1/files/{kept.id}/content"}

    def check_integrity(self) -> None:
        assert sum(len(file.content) for file in self._files.values()) <= self.max_bytes


def add_files(app: FastAPI, store: FileStore, identify: Callable[[Request], str], errors: dict[int | str, Any]) -> None:
    """The endpoints. identify: whose request it is, or ApiError."""

    upload = {"type": "object", "required": ["file"], "properties": {
        "file": {"type": "string", "format": "binary", "description": "The bytes, with a name."},
        "purpose": {"enum": ["assistants", "user_data"]}}}  # fmt: skip
    body = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": upload}}}}

    @app.post("/v1/files", summary="Upload a file for the tools", openapi_extra=body, responses=errors)
    async def create(request: Request) -> Response:
        client = identify(request)
        name, mime, content, purpose = await _upload(request)
        return JSONResponse(store.add(client, name, mime, content, purpose).as_object())

    @app.get("/v1/files", summary="The files of the caller", responses=errors)
    async def listed(request: Request) -> Response:
        files = [file.as_object() for file in store.of(identify(request))]
        ends = {"first_id": files[0]["id"], "last_id": files[-1]["id"]} if files else {}
        return JSONResponse({"object": "list", "data": files, "has_more": False, **ends})

    @app.get("/v1/files/{id}", summary="What a file is", responses=errors)
    async def retrieve(request: Request, id: str) -> Response:
        return JSONResponse(store.get(identify(request), id).as_object())

    @app.get("/v1/files/{id}/content", summary="A file's bytes", response_class=Response, responses=errors)
    async def content(request: Request, id: str) -> Response:
        file = store.get(identify(request), id)
        shown = file.mime in SHOWN
        headers = {
            "Content-Disposition": f"{'inline' if shown else 'attachment'}; filename*=UTF-8''{quote(file.name)}",
            "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'",
            "Cache-Control": "private, max-age=3600",
        }  # fmt: skip
        kind = file.mime if shown else "application/octet-stream"
        return Response(file.content, headers=headers, media_type=kind)

    @app.delete("/v1/files/{id}", summary="Forget a file", responses=errors)
    async def delete(request: Request, id: str) -> Response:
        store.drop(identify(request), id)
        return JSONResponse({"id": id, "object": "file", "deleted": True})


async def _upload(request: Request) -> tuple[str, str, bytes, str]:
    """(name, type, bytes, purpose) of a multipart form."""
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise ApiError("the body must be a form, Content-Type: multipart/form-data, with the field file", "file", 415)
    whole = await read_bytes(request, MAX_FILE_BYTES + (1 << 16))

    async def pieces():  # type: ignore[no-untyped-def]
        yield whole

    try:
        form = await MultiPartParser(request.headers, pieces(), max_files=1, max_fields=8).parse()
    except (MultiPartException, KeyError, ValueError, UnicodeDecodeError) as error:
        raise ApiError(f"the form cannot be read: {' '.join(str(error).split())[:200]}", "file") from None
    for name in form:
        if name not in ("file", "purpose"):
            raise ApiError(f"{name[:80]}: this field is unknown or not supported", name[:80])
    file, purpose = form.get("file"), form.get("purpose", "assistants")
    if not isinstance(file, UploadFile) or not file.filename:
        raise ApiError("file: this field is missing, or has no file name", "file", code="missing_required_parameter")
    if not isinstance(purpose, str) or purpose not in ("assistants", "user_data"):
        raise ApiError("purpose: must be assistants or user_data", "purpose")
    name = PurePosixPath(file.filename.replace("\\", "/")).name
    if not name or len(name) > 200 or not name.isprintable() or name.startswith("."):
        raise ApiError("file: its name must be printable, of at most 200 characters, and not begin with a dot", "file")
    return name, file.content_type or "application/octet-stream", await file.read(), purpose
