"""A small server with the protocol of `openglm serve` and scripted answers, for the tests of the page.

    python -m tests.page_server 8100      # look at the page without a model

What the last user message begins with chooses the answer: see SCRIPTS. Everything that was asked is kept in `requests`.
"""

from __future__ import annotations

import json
import mimetypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WEB = Path(__file__).resolve().parent.parent / "openglm" / "server" / "web"
MODEL = {
    "id": "glm-test", "object": "model", "context_length": 4096, "chat_format": "glm-4", "fills": True, "thinks": True,
    "all_tools": True,
}  # fmt: skip
PLOT = (
    "data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 560 260' width='560' height='260'>"
    "<rect width='560' height='260' fill='white'/><path d='M40 220H530M40 220V20' stroke='%23999' fill='none'/>"
    "<path d='M40 210C120 205 160 60 240 52S330 190 400 176 480 60 530 36' stroke='%231d6b5f' stroke-width='3' "
    "fill='none'/></svg>"
)
Delta = dict[str, Any]
Script = Callable[["Scene"], Iterator[Delta | float]]  # deltas, and pauses in seconds


@dataclass
class Scene:
    """The request that a script answers. text: of the last user message. n_answered: answers before it."""

    body: dict[str, Any]
    text: str
    n_answered: int
    n_asked: int  # requests so far, this one included
    page: Page


@dataclass
class Page:
    """State of one mock server. answers: markdown by the message that asks for it. key: what it wants, if anything."""

    answers: dict[str, str] = field(default_factory=dict)
    fillings: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)  # "GET /path" of every request
    stopped: int = 0  # streams that the client left
    key: str | None = None
    late_s: float = 0.0  # from the last word to the figures
    model: dict[str, Any] = field(default_factory=lambda: dict(MODEL))
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # path -> (mime, content)
    uploads: list[bytes] = field(default_factory=list)  # bodies of the forms
    decisions: dict[str, str] = field(default_factory=dict)  # call -> allow or deny
    observations: list[Delta] = field(default_factory=list)  # what the script `observed` streams


def words(text: str, size: int = 3) -> Iterator[Delta]:
    for at in range(0, len(text), size):
        yield {"content": text[at : at + size]}


def echo(scene: Scene) -> Iterator[Delta | float]:
    yield from words(f"You said: {scene.text}")


def slow(scene: Scene) -> Iterator[Delta | float]:
    for number in range(1, 400):
        yield {"content": f"{number} "}
        yield 0.02


def think(scene: Scene) -> Iterator[Delta | float]:
    for piece in ("The user wants ", "a number. ", "I take **42**."):
        yield {"reasoning_content": piece}
        yield 0.02
    yield from words("The answer is 42.")


def tool(scene: Scene) -> Iterator[Delta | float]:
    """Text, two calls with arguments in pieces, their results, text."""
    yield from words("I will compute it.\n\n")
    code = "import math\nvalues = [math.sin(x / 8) for x in range(50)]\nprint(f'{max(values):.4f}')"
    arguments = json.dumps({"code": code})
    yield {"tool_calls": [{"index": 0, "id": "call_a", "type": "function", "function": {"name": "python"}}]}
    for at in range(0, len(arguments), 9):
        yield {"tool_calls": [{"index": 0, "function": {"arguments": arguments[at : at + 9]}}]}
    call = {"name": "simple_browser", "arguments": '{"query": "GLM-4 all tools"}'}
    yield {"tool_calls": [{"index": 1, "id": "call_b", "type": "function", "function": call}]}
    yield {"observations": [{"id": "call_a", "name": "python", "status": "running", "content": "0.9"}]}
    yield 0.1
    plot = {"name": "sine.svg", "mime": "image/svg+xml", "url": PLOT}
    yield {"observations": [{"id": "call_a", "name": "python", "status": "ok", "content": "0.9996\nsecond line",
                             "seconds": 0.42, "files": [plot]}]}  # fmt: skip
    yield {"observations": [{"id": "call_b", "name": "simple_browser", "status": "error", "seconds": 1.5,
                             "content": "Traceback\nTimeoutError: no answer in 10 s"}]}  # fmt: skip
    yield from words("The largest value is **0.9996**.")


def seen(id: str, name: str, status: str, **more: Any) -> Delta:
    return {"observations": [{"id": id, "name": name, "status": status, **more}]}


def agent(scene: Scene) -> Iterator[Delta | float]:
    """The server runs the tools: one waits for the user, one reads pages, one draws."""
    yield from words("I look it up and compute.\n\n")
    yield seen("call_1", "python", "approval", arguments=json.dumps({"code": "for i in range(3):\n    print(i * 1.5)"}))
    while "call_1" not in scene.page.decisions:
        yield {}  # a client that has gone away is noticed
        yield 0.02
    if scene.page.decisions["call_1"] == "deny":
        yield seen("call_1", "python", "denied", content="The user did not allow this call.")
        yield from words("Then I will not.")
        return
    for number in range(3):
        yield seen("call_1", "python", "running", output=f"{number * 1.5}\n")
        yield 0.05
    while "hold" in scene.text:
        yield seen("call_1", "python", "running", output="still at it\n")
        yield 0.02
    table = {"id": "file-1", "name": "table.csv", "mime": "text/csv", "url": "/v1/files/file-1/content", "bytes": 9}
    yield seen("call_1", "python", "ok", content="0.0\n1.5\n3.0", seconds=0.31, files=[table])
    sources = [
        {"number": 2, "url": "https://example.org/glm?a=1&b=2", "title": "The GLM <models>"},
        {"number": 3, "url": "https://www.example.com/kites", "title": "风筝的历史"},
    ]
    yield seen("call_2", "simple_browser", "running", arguments='{"code": "search(\\"GLM\\")"}')
    yield seen("call_2", "simple_browser", "ok", content="[2] The GLM models\n[3] 风筝的历史", seconds=0.8,
               data={"sources": sources})  # fmt: skip
    yield seen("call_3", "cogview", "running", arguments='{"prompt": "a red kite over the sea"}')
    yield seen("call_3", "cogview", "running", output="step 10 of 30\n")
    picture = {"id": "file-2", "name": "picture-1.svg", "mime": "image/svg+xml", "url": PLOT, "bytes": 400}
    yield seen("call_3", "cogview", "ok", content="[picture-1.svg]", seconds=2.5, files=[picture])
    yield from words("GLM is a family of models【2†The GLM models】 and kites are old【3†风筝】; see also【9†none】.")


def observed(scene: Scene) -> Iterator[Delta | float]:
    yield from scene.page.observations


def error(scene: Scene) -> Iterator[Delta | float]:
    yield from words("Half an ans")
    yield {"error": {"message": "the engine stumbled", "code": 500}}


def broken(scene: Scene) -> Iterator[Delta | float]:
    yield from words("Cut o")
    yield {"broken": True}


def version(scene: Scene) -> Iterator[Delta | float]:
    yield from words(f"Version {scene.n_asked}")


SCRIPTS: dict[str, Script] = {
    "slow": slow, "think": think, "tool": tool, "agent": agent, "observed": observed,
    "error": error, "broken": broken, "version": version,
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """Static files of the page and the four endpoints that it uses."""

    page: Page
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes, mime: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", mime)
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def reply_json(self, status: int, value: Any, **headers: str) -> None:
        self.reply(status, json.dumps(value).encode(), **headers)

    def allowed(self) -> bool:
        if self.page.key is None or self.headers.get("Authorization") == f"Bearer {self.page.key}":
            return True
        self.reply_json(401, {"error": {"message": "wrong key", "type": "authentication_error"}})
        return False

    def do_GET(self) -> None:
        self.page.seen.append(f"GET {self.path}")
        path = self.path.split("?")[0]
        if path == "/v1/models":
            if self.allowed():
                self.reply_json(200, {"object": "list", "data": [self.page.model]})
            return
        if path in self.page.files:
            mime, content = self.page.files[path]
            self.reply(200, content, mime)
            return
        file = (WEB / (path.lstrip("/") or "index.html")).resolve()
        if WEB not in file.parents or not file.is_file():
            self.reply_json(404, {"error": {"message": "not found"}})
            return
        mime = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        self.reply(200, file.read_bytes(), "text/javascript" if file.suffix == ".js" else mime)

    def do_POST(self) -> None:
        self.page.seen.append(f"POST {self.path}")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.allowed():
            return
        if self.path == "/v1/files":
            self.upload(content)
            return
        body = json.loads(content)
        self.page.requests.append({"path": self.path, **body})
        if self.path == "/fill":
            if "[MASK]" not in body["text"]:
                self.reply_json(400, {"error": {"message": "the text has no blank"}})
            else:
                self.reply_json(200, {"fillings": self.page.fillings[: body["n"]]})
        elif self.path == "/v1/chat/completions":
            self.chat(body)
        elif self.path == "/v1/agent/approvals":
            self.page.decisions[body["id"]] = body["decision"]
            self.reply_json(200, body)
        else:
            self.reply_json(404, {"error": {"message": "not found"}})

    def upload(self, content: bytes) -> None:
        if b"refuse-me" in content:
            self.reply_json(413, {"error": {"message": "the file is too large"}})
            return
        self.page.uploads.append(content)
        self.reply_json(200, {"id": f"file-up{len(self.page.uploads)}", "object": "file", "bytes": len(content)})

    def chat(self, body: dict[str, Any]) -> None:
        text = next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user")
        if text.startswith("busy"):
            self.reply_json(429, {"error": {"message": "queue full"}}, Retry_After="3")
            return
        n_answered = sum(m["role"] == "assistant" for m in body["messages"])
        n_asked = sum(r["path"] == self.path for r in self.page.requests)
        scene = Scene(body, text, n_answered, n_asked, self.page)
        script = SCRIPTS.get(text.split()[0] if text.split() else "", echo)
        deltas = words(self.page.answers[text], 5) if text in self.page.answers else script(scene)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")  # the stream ends when the connection does
        self.end_headers()
        try:
            self.stream(deltas)
        except (BrokenPipeError, ConnectionResetError):
            self.page.stopped += 1

    def stream(self, deltas: Iterator[Delta | float]) -> None:
        def send(value: Any) -> None:
            data = value if isinstance(value, str) else json.dumps(value)
            self.wfile.write(f"data: {data}\r\n\r\n".encode())

        self.wfile.write(b": hello\n\n")
        n = 0
        for delta in deltas:
            if isinstance(delta, float):
                time.sleep(delta)
            elif "error" in delta:
                send(delta)
                return
            elif "broken" in delta:
                return
            else:
                n += 1
                send({"model": MODEL["id"], "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        send({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        time.sleep(self.page.late_s)
        usage = {"prompt_tokens": 20, "completion_tokens": n, "total_tokens": 20 + n}
        timings = {"prefill_s": 0.05, "decode_tok_s": 38.4, "context_used": 20 + n}
        send({"choices": [], "usage": usage, "timings": timings})
        send("[DONE]")


def start(port: int = 0) -> tuple[Page, ThreadingHTTPServer, str]:
    """A running mock: its state, the server (shut it down when done) and its address."""
    page = Page()
    handler = type("BoundHandler", (Handler,), {"page": page})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return page, server, f"http://127.0.0.1:{server.server_address[1]}/"


if __name__ == "__main__":
    state, _, address = start(int(sys.argv[1]) if len(sys.argv) > 1 else 8100)
    state.fillings = [{"text": "", "blanks": ["Paris", "key"], "probability": 0.61}]
    print(address, flush=True)
    threading.Event().wait()
