"""A small web site of two invented towns, served on loopback: for the evaluation of the agent, and for tests.

    python -m openglm.agent.browser.site          # serves it until interrupted

    with SiteServer() as site:
        config = BrowserConfig(folders=(Folder(SITE, url=site.url, live=True),), allow=(site.host,))

What its pages say is invented, so that no model can know it beforehand.
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

__all__ = ["SITE", "SiteHandler", "SiteServer"]

SITE = Path(__file__).parents[2] / "assets" / "all_tools_site"
TYPES = {".html": "text/html; charset=utf-8", ".txt": "text/plain; charset=utf-8", ".pdf": "application/pdf"}


class SiteHandler(BaseHTTPRequestHandler):
    """Serves the files of SITE; index.html for folders."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "site", ""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        file = SITE / path.lstrip("/")
        if path.endswith("/"):
            file /= "index.html"
        if ".." in path or not file.is_file() or file.suffix not in TYPES:
            self.answer(404, "text/html; charset=utf-8", b"<title>Not found</title><p>There is no such page.</p>")
            return
        self.answer(200, TYPES[file.suffix], file.read_bytes())

    def answer(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""


class SiteServer:
    """The site on a free port of loopback, from entering to leaving the context. handler: of the requests."""

    def __init__(self, handler: type[SiteHandler] = SiteHandler, port: int = 0) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> SiteServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


if __name__ == "__main__":
    with SiteServer() as server:
        print(server.url, flush=True)
        threading.Event().wait()
