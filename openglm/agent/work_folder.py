"""The files of a sandbox, on this side: a folder that only we write to, a copy of what the code inside has.

Code never sees this folder, so no link it makes leads out of it; names from inside are checked before use.
"""

from __future__ import annotations

import mimetypes
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from openglm.agent.channel import ProtocolError
from openglm.agent.sandbox_config import SandboxConfig
from openglm.types import ToolFile

__all__ = ["WorkFolder", "safe_name"]

MAX_DEPTH, MAX_NAME_BYTES = 8, 200


def safe_name(name: str) -> str:
    """The relative name of a file, if it is one and nothing else; ValueError otherwise."""
    parts = name.split("/")
    bad = not name.isprintable() or "\\" in name or len(parts) > MAX_DEPTH
    if bad or any(not part or part.startswith(".") or len(part.encode()) > MAX_NAME_BYTES for part in parts):
        raise ValueError(f"{name[:80]!r} is not the name of a file in the work folder, such as 'data/table.csv'")
    return name


class WorkFolder:
    """At most disk_bytes in n_files. `folder` is made if it is absent; what is in it already is given to the code."""

    def __init__(self, folder: Path, config: SandboxConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.config = folder.resolve(), config
        self.sizes: dict[str, int] = {}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                name = path.relative_to(self.folder).as_posix()
                if not any(part.startswith(".") for part in PurePosixPath(name).parts):
                    self.sizes[safe_name(name)] = path.stat().st_size
        self._check_room("", max(self.sizes.values(), default=0), 0)
        self._open: tuple[str, BinaryIO, int] | None = None  # a file that is being received: name, file, bytes so far

    def names(self) -> list[str]:
        return sorted(self.sizes)

    def path(self, name: str) -> Path:
        return self.folder / safe_name(name)

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        path = self.path(name)
        self._check_room(name, len(content), len(content))
        self._make_room(name)
        temporary = self._temporary()
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self.sizes[name] = len(content)

    def _temporary(self) -> Path:
        return self.folder / ".part"

    def _check_room(self, name: str, largest: int, more: int) -> None:
        if largest > self.config.file_bytes:
            raise ValueError(f"a file may have {self.config.file_bytes} bytes, and {name or 'one'} has {largest}")
        total = sum(self.sizes.values()) - self.sizes.get(name, 0) + more
        if total > self.config.disk_bytes or len({*self.sizes, name}) > self.config.n_files:
            raise ValueError(
                f"the work folder may hold {self.config.disk_bytes} bytes in {self.config.n_files} files: "
                f"{name or 'what is there'} is too much"
            )

    def _make_room(self, name: str) -> None:
        """Folders above a name; what was a file there, or a folder of that name, makes way as it did inside."""
        for parent in reversed(PurePosixPath(name).parents[:-1] if len(PurePosixPath(name).parts) > 1 else []):
            if (self.folder / parent).is_file():
                (self.folder / parent).unlink()
                self.sizes.pop(parent.as_posix(), None)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
            self.sizes = {known: size for known, size in self.sizes.items() if not known.startswith(f"{name}/")}

    def abandon(self) -> None:
        """Forget a file that was being received when the kernel ended."""
        if self._open is not None:
            self._open[1].close()
            self._open = None
        self._temporary().unlink(missing_ok=True)

    def receive(self, name: str, data: bytes, is_last: bool, changed: list[str]) -> None:
        """A piece of a file from inside; ProtocolError for more than fits. Files with odd names stay inside."""
        try:
            safe_name(name)
        except ValueError:
            return
        if self._open is None:
            self._open = (name, open(self._temporary(), "wb"), 0)
        known, file, size = self._open
        size += len(data)
        if known != name or size > self.config.disk_bytes:
            file.close()
            self._open = None
            raise ProtocolError("a file in the wrong order, or without end")
        file.write(data)
        self._open = (name, file, size)
        if not is_last:
            return
        file.close()
        self._open = None
        self._make_room(name)
        os.replace(self._temporary(), self.path(name))
        self.sizes[name] = size
        changed.append(name)
        if len(self.sizes) > 2 * self.config.n_files or sum(self.sizes.values()) > 2 * self.config.disk_bytes:
            raise ProtocolError("more files than fit inside")  # deleted ones are not told of until the end

    def keep_only(self, names: Any) -> None:
        """Names that are no longer inside are deleted here."""
        if not isinstance(names, dict):
            raise ProtocolError("a list of files that is none")
        for name in set(self.sizes) - set(names):
            self.path(name).unlink(missing_ok=True)
            del self.sizes[name]

    def as_files(self, names: list[str]) -> tuple[ToolFile, ...]:
        return tuple(
            ToolFile(name, mimetypes.guess_type(name)[0] or "application/octet-stream", path=self.path(name))
            for name in sorted(set(names))
            if name in self.sizes
        )

    def check_integrity(self) -> None:
        for name, size in self.sizes.items():
            path = self.path(name)
            assert path.is_file() and not path.is_symlink() and path.stat().st_size == size, name
