"""What comes of running code: the result, gathered from the frames of a kernel that is not trusted."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from openglm.agent.channel import ProtocolError
from openglm.agent.sandbox_config import SandboxConfig
from openglm.agent.work_folder import WorkFolder
from openglm.types import ToolFile

__all__ = ["ExecutionResult", "RunState", "Tail"]

IMAGE_STARTS = {"image/png": b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff"}


@dataclass(frozen=True)
class ExecutionResult:
    """Of one call. stdout, stderr: cut in the middle where a stream is in `truncated`. result: the last expression.

    error: traceback, or why the call was stopped; error_name: the exception's, "Stopped", or "Died" (the
    kernel is gone; the next call has a fresh one). images: PNG or JPEG, described. files: new or changed ones.
    state_lost: why what earlier calls left was gone when this one began. n_images_dropped: pictures beyond the limit.
    """

    stdout: str = ""
    stderr: str = ""
    result: str = ""
    error: str = ""
    error_name: str = ""
    images: tuple[ToolFile, ...] = ()
    files: tuple[ToolFile, ...] = ()
    seconds: float = 0.0
    truncated: tuple[str, ...] = ()
    state_lost: str = ""
    n_images_dropped: int = 0


class Tail:
    """Text of any length of which the beginning and the end are kept."""

    def __init__(self, limit: int) -> None:
        self.head_limit, self.tail_limit = limit * 2 // 3, limit - limit * 2 // 3
        self.head, self.tail, self.length = "", "", 0

    def add(self, text: str) -> None:
        self.length += len(text)
        room = self.head_limit - len(self.head)
        self.head += text[:room]
        self.tail = (self.tail + text[room:])[-self.tail_limit :]

    @property
    def is_cut(self) -> bool:
        return self.length > self.head_limit + self.tail_limit

    def __str__(self) -> str:
        if not self.is_cut:
            return self.head + self.tail
        left_out = self.length - len(self.head) - len(self.tail)
        return f"{self.head}\n[... {left_out} characters left out ...]\n{self.tail}"


class RunState:
    """One call under way. stopped: why it was told to stop; died: why the kernel is gone."""

    def __init__(
        self, config: SandboxConfig, files: WorkFolder, on_output: Callable[[str, str], None], state_lost: str
    ) -> None:
        self.config, self.work, self.on_output, self.state_lost = config, files, on_output, state_lost
        self.started = time.monotonic()
        self.done = self.flooded = self.transferring = self.deadline_moved = False
        self.stopped = self.died = ""
        self.streams = {name: Tail(config.output_bytes) for name in ("stdout", "stderr", "result", "error")}
        self.error_name, self.error_line = "", ""
        self.images: list[ToolFile] = []
        self.n_dropped = self.n_printed = 0
        self.changed: list[str] = []

    def take(self, header: dict[str, Any], payload: bytes) -> None:
        """Raises ProtocolError for what our kernel does not send."""
        op = header["op"]
        if op == "output":
            self._output(header.get("stream"), _text(header, "text"))
        elif op == "result":
            self.streams["result"].add(_text(header, "text"))
        elif op == "error":
            self.error_name, self.error_line = _text(header, "name")[:100], _text(header, "value")[:1000]
            self.streams["error"].add(_text(header, "traceback"))
        elif op == "image":
            self._image(header, payload)
        elif op == "flood":
            self.flooded = True
        elif op in ("file", "files"):
            self.transferring = True
            if op == "file":
                self.work.receive(_text(header, "name"), payload, header.get("last") is True, self.changed)
            else:
                self.work.keep_only(header.get("names"))
        elif op == "done":
            self.done = True
        else:
            raise ProtocolError(f"a frame {op[:40]!r}")

    def _output(self, stream: Any, text: str) -> None:
        if stream not in ("stdout", "stderr"):
            raise ProtocolError("output of an unknown stream")
        self.n_printed += len(text)
        if self.n_printed > 2 * self.config.flood_bytes:  # our kernel stops at half of that
            raise ProtocolError("output without end")
        self.streams[stream].add(text)
        self.on_output(stream, text)

    def _image(self, header: dict[str, Any], payload: bytes) -> None:
        mime = header.get("mime")
        start = IMAGE_STARTS.get(mime) if isinstance(mime, str) else None
        if start is None or not payload.startswith(start):
            raise ProtocolError("an image that is none")
        if len(self.images) >= self.config.n_images:
            self.n_dropped += 1
            return
        number = len(self.images) + 1
        description = _text(header, "description")[:2000]
        if mime == "image/png" and len(payload) >= 24:
            width, height = struct.unpack(">II", payload[16:24])
            description = f"{width} x {height} pixels; {description}"
        name = f"image-{number}.{'png' if mime == 'image/png' else 'jpg'}"
        self.images.append(ToolFile(name, str(mime), payload, description=description))

    def result(self) -> ExecutionResult:
        error, name = str(self.streams["error"]), self.error_name
        if self.died:
            name = "Died"
            error = (
                f"The Python process is gone: {self.died}. The next call starts a new one: variables and imports are "
                f"lost; files that were in the work folder before this call are kept."
            )
        elif self.stopped and name:
            name = "Stopped"
            error = f"The code was stopped: {self.stopped}. Variables are kept. It was here:\n{error}"
        elif self.stopped:  # it ended by itself while it was told to, or it caught the interrupt
            name, error = "Stopped", f"The code was stopped: {self.stopped}. Variables are kept."
        return ExecutionResult(
            str(self.streams["stdout"]), str(self.streams["stderr"]), str(self.streams["result"]), error, name,
            tuple(self.images), self.work.as_files(self.changed), time.monotonic() - self.started,
            tuple(key for key, stream in self.streams.items() if stream.is_cut), self.state_lost, self.n_dropped,
        )  # fmt: skip


def _text(header: dict[str, Any], field: str) -> str:
    value = header.get(field)
    if not isinstance(value, str):
        raise ProtocolError(f"a field {field!r} that is not text")
    return value.encode("utf-8", "replace").decode("utf-8")  # halves of surrogate pairs would break later writers
