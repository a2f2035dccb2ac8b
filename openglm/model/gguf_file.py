"""The GGUF container: typed key-value fields, a table of tensors, then their bytes. Reading, memory-mapped.

    python -c "from openglm.model.gguf_file import GgufFile; print(list(GgufFile('model.gguf').tensors)[:5])"

The header is parsed here and not by the `gguf` library: a vocabulary of 150,000 tokens takes its reader ten seconds.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openglm.model.gguf_types import TYPES, type_name
from openglm.model.sources import LFS

__all__ = ["ARRAY", "SCALARS", "STRING", "GgufFile", "GgufTensor"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Value types by number; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
RUN, RUN_BYTES = 4096, 64  # strings that are read in one pass, and bytes looked at for each


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place: its type's name, its shape as PyTorch has it (rows, columns), its bytes from `offset` on."""

    type: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class GgufFile:
    """Fields and tensors of one file, checked against its size.

    fields: metadata by key as plain Python values. tensors: by name.
    Raises ValueError in one line for what is no GGUF, cut short, damaged, or has a tensor type that is not read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._size = self.path.stat().st_size
            with open(self.path, "rb") as file:
                if (start := file.read(len(LFS)))[:4] != MAGIC:
                    if start == LFS:
                        raise ValueError(f"{self.path} is a pointer of Git LFS, not the file itself: run git lfs pull")
                    raise ValueError(f"{self.path} is not a GGUF file (it does not begin with GGUF): check the path")
                # Private, so that PyTorch may view it as writable memory; nothing writes to it.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read ({error.strerror}): check the path") from None
        self._at = 4
        try:
            version, n_tensors, n_fields = self._unpack("<IQQ")
            if version not in VERSIONS:
                swapped = version & 0xFFFF == 0
                what = "big-endian" if swapped else f"of version {version}"
                raise ValueError(f"{self.path} is a GGUF file {what}, versions 2 and 3 little-endian are read")
            self.fields: dict[str, Any] = {}
            for _ in range(n_fields):
                key = self._string()
                self.fields[key] = self._value(self._unpack("<I")[0])
            entries = [self._entry() for _ in range(n_tensors)]
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError):
            raise ValueError(
                f"{self.path} has a damaged header or was cut short in it (at byte {self._at}): fetch it again"
            ) from None
        self.tensors = self._placed(entries)

    def bytes_of(self, name: str) -> Tensor:
        """(n_bytes,) uint8 view of a tensor's bytes in the map. KeyError for a name that is not there."""
        tensor = self.tensors[name]
        if not tensor.n_bytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=tensor.n_bytes, offset=tensor.offset)

    def release(self, name: str) -> None:
        """Give a tensor's pages back to the kernel; they are read again when needed."""
        if hasattr(self._map, "madvise"):
            tensor = self.tensors[name]
            first = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
            if tensor.n_bytes:
                self._map.madvise(mmap.MADV_DONTNEED, first, tensor.offset + tensor.n_bytes - first)

    # ---------------------------------------------------------------- header

    def _unpack(self, format: str) -> tuple[Any, ...]:
        values = struct.unpack_from(format, self._map, self._at)
        self._at += struct.calcsize(format)
        return values

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, n: int) -> list[str]:
        strings: list[str] = []
        while (left := n - len(strings)) > 0:
            found = self._short_strings(min(left, RUN)) if left >= RUN // 8 else None
            strings += self._walk(min(left, RUN)) if found is None else found
        return strings

    def _walk(self, n: int) -> list[str]:
        """The next n strings, one after another."""
        data, at, size, strings = self._map, self._at, self._size, []
        unpack: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        for _ in range(n):
            (length,) = unpack(data, at)
            at += 8 + length
            if at > size:
                raise struct.error
            strings.append(data[at - length : at].decode())
        self._at = at
        return strings

    def _short_strings(self, n: int) -> list[str] | None:
        """The next n strings in one pass, if each has 1 to 255 bytes without a NUL or newline; else None.

        A length is one byte and seven zeros then. Cutting at the zeros leaves that byte at the end of the piece before
        the string; by induction from the first, the cuts are right if every piece is as long as the byte before says.
        """
        data = bytearray(self._map[self._at : self._at + RUN_BYTES * n])
        pieces = data.split(bytes(7), n)
        if len(pieces) != n + 1:
            return None
        places = np.cumsum(np.fromiter(map(len, pieces[:n]), np.int64, n) + 7) - 8  # of the lengths
        view = np.frombuffer(data, np.uint8)
        lengths = view[places].astype(np.int64)
        end = int(places[-1] + 8 + lengths[-1])
        if places[0] or (np.diff(places) != lengths[:-1] + 8).any() or end > len(data):
            return None
        view[places] = ord("\n")
        text = data[:end].translate(None, b"\0")
        strings = text.decode().split("\n")
        if len(text) != n + lengths.sum() or len(strings) != n + 1:
            return None
        self._at += end
        return strings[1:]

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._unpack("<" + SCALARS[kind])[0]
        item, n = self._unpack("<IQ")
        if n > self._size:
            raise struct.error
        if item == STRING:
            return self._strings(n)
        return list(self._unpack(f"<{n}{SCALARS[item]}"))

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (n_dims,) = self._unpack("<I")
        if n_dims > 8:
            raise struct.error
        sizes = self._unpack(f"<{n_dims}Q")
        type_id, offset = self._unpack("<IQ")
        return name, sizes[::-1], type_id, offset  # GGUF counts dimensions from the innermost on

    def _placed(self, entries: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, GgufTensor]:
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{self.path} is damaged (general.alignment is {alignment!r}): fetch it again")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, type_id, offset in entries:
            kind = type_name(type_id)
            if kind not in TYPES:
                raise ValueError(
                    f"{self.path}: tensor {name} has type {kind}, which is not supported; take a file in one of "
                    f"{', '.join(TYPES)}"
                )
            block, block_bytes = TYPES[kind].block, TYPES[kind].n_bytes
            if not shape or shape[-1] % block or name in tensors:
                raise ValueError(f"{self.path} is damaged (tensor {name}, shape {shape}, type {kind}): fetch it again")
            n_bytes = math.prod(shape) // block * block_bytes
            if start + offset + n_bytes > self._size:
                raise ValueError(
                    f"{self.path} was cut short inside the tensor {name} ({self._size} bytes are there): fetch it again"
                )
            tensors[name] = GgufTensor(kind, shape, start + offset, n_bytes)
        return tensors
