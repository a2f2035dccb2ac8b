"""A scripted OpenAI-compatible server on loopback: real HTTP, answers as the test says, requests kept."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Reply", "Scripted", "chunk", "scripted_server", "sse"]


@dataclass(frozen=True)
class Reply:
    """status, headers and body; pieces of the body go out one by one, pause_s apart. drop: no proper end."""

    status: int = 200
    pieces: Iterable[bytes] = ()
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "text/event-stream"})
    pause_s: float = 0.0
    drop: bool = False

    @classmethod
    def json(cls, status: int, value: object, **headers: str) -> Reply:
        kinds = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        return cls(status, [json.dumps(value).encode()], kinds)


def chunk(delta: Mapping[str, Any] | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choices = [] if delta is None else [{"index": 0, "delta": dict(delta), "finish_reason": finish}]
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m", "choices": choices, **more}


def sse(*values: Mapping[str, Any], done: bool = True) -> list[bytes]:
    events = [b"data: " + json.dumps(v, ensure_ascii=False).encode() + b"\n\n" for v in values]
    return events + ([b"data: [DONE]\n\n"] if done else [])


@dataclass
class Scripted:
    """answer: called with a request's body (None for GET /models) and its headers. left: connections clients closed."""

    answer: Callable[[dict[str, Any] | None, Mapping[str, str]], Reply]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    left: int = 0


@contextmanager
def scripted_server(answer: Callable[[dict[str, Any] | None, Mapping[str, str]], Reply]) -> Iterator[Scripted]:
    script = Scripted(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            script.requests.append(body)
            self._reply(body)

        def _reply(self, body: dict[str, Any] | None) -> None:
            script.paths.append(self.path)
            reply = script.answer(body, dict(self.headers))
            try:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for piece in reply.pieces:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    self.wfile.flush()
                    time.sleep(reply.pause_s)
                if not reply.drop:
                    self.wfile.write(b"0\r\n\r\n")
                self.close_connection = True
            except OSError:
                script.left += 1
                self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
