"""What a function returned, as an observation: texts as they are, values as JSON, pictures and bytes as files."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from openglm.types import Observation, ToolFile

__all__ = ["as_file", "as_observation", "mime_of"]

# First bytes of a file -> its kind and the usual end of its name.
KINDS = (
    (b"\x89PNG\r\n\x1a\n", "image/png", "png"), (b"\xff\xd8\xff", "image/jpeg", "jpg"), (b"GIF8", "image/gif", "gif"),
    (b"%PDF-", "application/pdf", "pdf"), (b"PK\x03\x04", "application/zip", "zip"), (b"OggS", "audio/ogg", "ogg"),
)  # fmt: skip


def mime_of(content: bytes) -> tuple[str, str]:
    """(MIME type, end of the name) from the first bytes."""
    if content[:4] == b"RIFF" and content[8:12] in (b"WEBP", b"WAVE"):
        return ("image/webp", "webp") if content[8:12] == b"WEBP" else ("audio/wav", "wav")
    return next(((mime, end) for start, mime, end in KINDS if content.startswith(start)),
                ("application/octet-stream", "bin"))  # fmt: skip


def as_observation(value: Any, name: str) -> Observation:
    """name: of the tool, for names of files. Lists may hold files among other values."""
    if isinstance(value, Observation):
        return value
    items = list(value) if isinstance(value, list | tuple) else [value]
    files: list[ToolFile] = []
    rest: list[Any] = []
    for item in items:
        file = as_file(item, f"{name}-{len(files) + 1}" if len(items) > 1 else name)
        if file is None:
            rest.append(item)
        else:
            files.append(file)
    if not files:
        return _as_text(value)
    texts = [_as_text(item).content for item in rest]
    return Observation("\n".join([*texts, *(_told(file) for file in files)]), tuple(files))


def as_file(value: Any, name: str) -> ToolFile | None:
    """Bytes, a PIL image or a matplotlib figure as a file; None for anything else."""
    if isinstance(value, ToolFile):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        content = bytes(value)
        mime, end = mime_of(content)
        return ToolFile(f"{name}.{end}", mime, content, description=f"{mime}, {len(content)} bytes")
    package = type(value).__module__.partition(".")[0]
    buffer = io.BytesIO()
    if package == "PIL" and hasattr(value, "save"):
        value.save(buffer, format="PNG")
        about = f"picture of {value.width} x {value.height} pixels"
    elif package == "matplotlib" and hasattr(value, "savefig"):
        value.savefig(buffer, format="png")
        titles = [axes.get_title() for axes in value.axes if axes.get_title()]
        about = "plot" + (f" {', '.join(titles)!r}" if titles else "")
    else:
        return None
    return ToolFile(f"{name}.png", "image/png", buffer.getvalue(), description=about)


def _told(file: ToolFile) -> str:
    return f"[{file.name}: {file.description or file.mime}]"


def _as_text(value: Any) -> Observation:
    if value is None:
        return Observation("(done)")
    if isinstance(value, str):
        return Observation(value)
    from pydantic import ConfigDict, TypeAdapter

    adapter: TypeAdapter[Any] = TypeAdapter(Any, config=ConfigDict(ser_json_inf_nan="strings"))
    text = adapter.dump_json(value, fallback=_plain, by_alias=True).decode()
    plain = json.loads(text)
    if isinstance(plain, str):  # dates, enums, and objects that only str() can show
        return Observation(plain, data={"result": plain})
    return Observation(text, data=plain if isinstance(plain, Mapping) else {"result": plain})


def _plain(value: Any) -> Any:
    """Of a type that pydantic does not know: numpy's numbers and arrays as such, all others as text."""
    return value.tolist() if hasattr(value, "tolist") and type(value).__module__.startswith("numpy") else str(value)
