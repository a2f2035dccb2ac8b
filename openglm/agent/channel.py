"""Frames between us and the kernel in a sandbox, over its standard input and output. The other side is not trusted.

A frame is 4 bytes with the length of a JSON object, the object, then as many bytes as its "size" says.
"""

from __future__ import annotations

import json
import os
import select
import struct
import threading
import time
from typing import Any

__all__ = ["Channel", "ChannelClosed", "ProtocolError"]

MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, READ_BYTES = 8 << 20, 32 << 20, 1 << 18


class ChannelClosed(Exception):
    """The other side is gone."""


class ProtocolError(Exception):
    """The other side sent what our kernel never sends."""


class Channel:
    """Both directions with time limits: a side that neither reads nor writes holds nobody up."""

    def __init__(self, write_fd: int, read_fd: int) -> None:
        self._write_fd, self._read_fd = write_fd, read_fd
        self._buffer = bytearray()
        self._sending = threading.Lock()
        for fd in (write_fd, read_fd):
            os.set_blocking(fd, False)

    def send(self, op: str, payload: bytes = b"", timeout_s: float = 10.0, **fields: Any) -> None:
        """Raises ChannelClosed when nobody reads, or not fast enough."""
        header = json.dumps({"op": op, "size": len(payload), **fields}).encode()
        deadline = time.monotonic() + timeout_s
        with self._sending:
            view = memoryview(struct.pack(">I", len(header)) + header + payload)
            while view:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not _ready(self._write_fd, select.POLLOUT, remaining):
                    raise ChannelClosed("it does not read what it is sent")
                try:
                    view = view[os.write(self._write_fd, view) :]
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise ChannelClosed(str(error)) from None

    def receive(self, timeout_s: float) -> tuple[dict[str, Any], bytes] | None:
        """The next frame, or None when it has not come in whole within the time."""
        deadline = time.monotonic() + timeout_s
        while (frame := self._take()) is None:
            remaining = deadline - time.monotonic()
            if not _ready(self._read_fd, select.POLLIN, max(0.0, remaining)):
                return None
            try:
                data = os.read(self._read_fd, READ_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                raise ChannelClosed(str(error)) from None
            if not data:
                raise ChannelClosed("end of its output")
            self._buffer += data
        return frame

    def _take(self) -> tuple[dict[str, Any], bytes] | None:
        """A frame off the front of the buffer, if a whole one is there."""
        if len(self._buffer) < 4:
            return None
        (n_header,) = struct.unpack_from(">I", self._buffer)
        if n_header > MAX_HEADER_BYTES:
            raise ProtocolError(f"a header of {n_header} bytes")
        if len(self._buffer) < 4 + n_header:
            return None
        try:
            header = json.loads(self._buffer[4 : 4 + n_header])
        except (ValueError, RecursionError):
            raise ProtocolError("a header that is not JSON") from None
        if not isinstance(header, dict) or not isinstance(header.get("op"), str):
            raise ProtocolError("a header without 'op'")
        size = header.get("size")
        if type(size) is not int or not 0 <= size <= MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"a payload of {str(size)[:40]} bytes")
        end = 4 + n_header + size
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[4 + n_header : end])
        del self._buffer[:end]
        return header, payload


def _ready(fd: int, event: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(timeout_s * 1000))
