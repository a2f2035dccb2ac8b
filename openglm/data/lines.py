"""Byte streams behind the sources: plain, gzip and zstandard files as lines, with truncation noticed."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from typing import IO, Any

MAX_LINE_BYTES = 1 << 26  # a longer line is cut here, so that a file without newlines cannot fill the memory
CHUNK_BYTES = 1 << 18


class _Decompressed(io.RawIOBase):
    """The content of a compressed file. The readers of the libraries end quietly where a file was cut short."""

    def __init__(self, raw: IO[bytes], path: str) -> None:
        self._raw = raw
        self._path = path
        self._start = _start_zstd if path.lower().endswith(".zst") else _start_gzip
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input and not (data := self._raw.read(CHUNK_BYTES)):
                if self._frame is not None:
                    raise ValueError(f"{self._path}: the file is cut short; fetch or compress it again")
                return 0
            elif not self._input:
                self._input = data
            self._output = memoryview(self._decompress())
        n = min(len(buffer), len(self._output))
        buffer[:n] = self._output[:n]
        self._output = self._output[n:]
        return n

    def _decompress(self) -> bytes:
        if self._frame is None:
            self._frame = self._start()
        try:
            output: bytes = self._frame.decompress(self._input)
        except Exception as error:  # zlib.error, zstandard.ZstdError
            raise ValueError(f"{self._path}: damaged compressed file ({error}); fetch it again") from error
        self._input = b""
        if self._frame.eof:  # several frames may follow one another
            self._input = self._frame.unused_data
            self._frame = None
        return output


def _start_zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def _start_gzip() -> Any:
    return zlib.decompressobj(wbits=31)


def open_lines(raw: IO[bytes], path: str) -> IO[bytes]:
    """The uncompressed bytes of an open file, by the end of its name."""
    if path.lower().endswith((".zst", ".gz")):
        return io.BufferedReader(_Decompressed(raw, path), CHUNK_BYTES)
    return raw


def read_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines with their newline; of a line longer than MAX_LINE_BYTES only that many bytes."""
    while line := stream.readline(MAX_LINE_BYTES):
        yield line
        while not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES:
            line = stream.readline(MAX_LINE_BYTES)
