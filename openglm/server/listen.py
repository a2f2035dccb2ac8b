"""The server's socket, opened before anything is loaded: the first request waits and is not refused."""

from __future__ import annotations

import socket

__all__ = ["listening"]


def listening(host: str, port: int) -> socket.socket:
    """ValueError where nobody can listen there."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port must be 0 to 65535, not {port}")
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
    except OSError as error:
        raise ValueError(f"--host {host}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; --port takes another") from None
    return listener
