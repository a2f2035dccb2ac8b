"""The Python kernel inside a sandbox: IPython, and a thread that carries requests and results over two pipes.

    python -I kernel.py '{"workdir": "...", "runtime": "...", "flood_bytes": 16000000, ...}'

Frames on standard input and output: 4 bytes with the length of a JSON object, the object, then as many bytes as its
"size" says. In: put (a file), run, interrupt. Out: ready, output, result, image, error, file, files, done.
It imports nothing of the package, which is absent inside. Nothing here is trusted by the other side.
"""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import sys
import threading
import time
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import zmq
from ipykernel.kernelapp import IPKernelApp
from IPython.core.formatters import BaseFormatter
from jupyter_client.session import Session

CHUNK = 1 << 20
FIGURE = "application/x-figure-description"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
PIECE = 32_768  # characters of output in one frame
MAX_TEXT = 200_000  # characters of one result or traceback
# Fonts with Chinese characters, where Linux systems keep them, and their names; of Noto's file matplotlib before 3.11
# reads the first face alone.
FONTS = (
    ("opentype/noto/NotoSansCJK-Regular.ttc", "Noto Sans CJK {}"),
    ("noto-cjk/NotoSansCJK-Regular.ttc", "Noto Sans CJK {}"),
    ("google-noto-sans-cjk-fonts/NotoSansCJK-Regular.ttc", "Noto Sans CJK {}"),
    ("truetype/wqy/wqy-zenhei.ttc", "WenQuanYi Zen Hei"), ("truetype/wqy/wqy-microhei.ttc", "WenQuanYi Micro Hei"),
)  # fmt: skip


class FigureFormatter(BaseFormatter):
    """Says in words what a matplotlib figure shows. By name: the inline back-end takes its class off all formatters."""

    format_type = FIGURE

    def __call__(self, shown: Any) -> str | None:
        kind = type(shown)
        if (kind.__module__, kind.__name__) != ("matplotlib.figure", "Figure"):
            return None
        try:
            return describe_figure(shown)
        except Exception as error:  # artists of other libraries may answer anything
            return f"a figure that cannot be described ({type(error).__name__})"


def describe_figure(figure: Any) -> str:
    """Axes with title, labels, limits and what is drawn in them."""
    parts = []
    for axes in figure.get_axes()[:8]:
        words = [repr(text) for text in (axes.get_title(),) if text]
        for name, label, limits in (
            ("x", axes.get_xlabel(), axes.get_xlim()),
            ("y", axes.get_ylabel(), axes.get_ylim()),
        ):
            words.append(f"{name}{f' {label!r}' if label else ''} from {limits[0]:.4g} to {limits[1]:.4g}")
        drawn = {"lines": axes.lines, "bars and patches": axes.patches, "point sets": axes.collections,
                 "images": axes.images}  # fmt: skip
        words += [f"{len(items)} {what}" for what, items in drawn.items() if len(items)]
        legend = axes.get_legend()
        if legend is not None:
            words.append("legend " + ", ".join(repr(text.get_text()) for text in legend.get_texts()[:10]))
        parts.append("; ".join(words))
    return " | ".join(parts)[:2000]


class Bridge:
    """Serves the pipes: one request after the other, except that an interrupt may come while code runs."""

    def __init__(self, app: Any, requests: int, replies: int, config: dict[str, Any]) -> None:
        self.app, self.requests, self.replies, self.config = app, requests, replies, config
        self.session = Session(key=app.session.key)
        context = zmq.Context()
        self.shell, self.iopub = context.socket(zmq.DEALER), context.socket(zmq.SUB)
        self.iopub.subscribe(b"")
        for socket, port in ((self.shell, app.shell_port), (self.iopub, app.iopub_port)):
            socket.linger = 0
            socket.connect(f"ipc://{app.ip}-{port}")
        self.poller = zmq.Poller()
        self.poller.register(self.iopub, zmq.POLLIN)
        self.poller.register(requests, zmq.POLLIN)
        self.known: dict[str, tuple[int, int, int]] = {}
        self.printed = 0

    def send(self, op: str, payload: bytes = b"", **fields: Any) -> None:
        header = json.dumps({"op": op, "size": len(payload), **fields}).encode()
        self.write(struct.pack(">I", len(header)) + header)
        self.write(payload)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.replies, view) :]

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = os.read(self.requests, min(size - len(data), CHUNK))
            if not piece:
                os._exit(0)  # nobody is left to work for
            data += piece
        return data

    def request(self) -> dict[str, Any]:
        header: dict[str, Any] = json.loads(self.read(struct.unpack(">I", self.read(4))[0]))
        return header

    def serve(self) -> None:
        try:
            self.wait_for_kernel()
            self.send("ready", pid=os.getpid())
            while True:
                request = self.request()
                if request["op"] == "put":
                    self.put(request["name"], request["size"])
                elif request["op"] == "run":
                    self.run(request["id"], request["code"])
        except OSError:
            os._exit(1)

    def wait_for_kernel(self) -> None:
        """Until the output channel carries what the kernel says: a subscription takes a moment to arrive."""
        while True:
            self.session.send(self.shell, "kernel_info_request", {})
            if self.iopub.poll(200):
                self.session.recv(self.iopub)
                return

    def put(self, name: str, size: int) -> None:
        path = os.path.join(self.config["workdir"], name)
        error = ""
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            file: Any = open(path, "wb")
        except OSError as problem:
            error, file = str(problem), open(os.devnull, "wb")
        with file:
            while size:
                data = self.read(min(size, CHUNK))
                size -= len(data)
                try:
                    if not error:
                        file.write(data)
                except OSError as problem:
                    error = str(problem)
        if not error:
            self.known[name] = self.stamp(os.stat(path))
        self.send("put", name=name, error=error)

    @staticmethod
    def stamp(status: os.stat_result) -> tuple[int, int, int]:
        return status.st_size, status.st_mtime_ns, status.st_ino

    def run(self, number: int, code: str) -> None:
        """Run a cell and pass on what it shows; then the files that it changed."""
        self.printed, started = 0, time.monotonic()
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        request: Any = self.session.send(self.shell, "execute_request", content)
        sent = request["header"]["msg_id"]
        idle = False
        while not idle:
            ready = dict(self.poller.poll())
            if self.requests in ready and self.request()["op"] == "interrupt":
                self.interrupt()
            if self.iopub in ready:
                idle = self.pass_on(sent)
        while self.iopub.poll(0):  # what a process begun by the cell wrote to the end
            self.pass_on(sent)
        while self.shell.poll(0):
            self.session.recv(self.shell)
        seconds = time.monotonic() - started
        self.send_files()
        self.send("done", id=number, seconds=seconds)

    def interrupt(self) -> None:
        """As interrupt_mode="message" does it, for the kernel and what it began."""
        os.kill(os.getpid(), signal.SIGINT)

    def pass_on(self, sent: str) -> bool:
        """One message of the kernel; whether the cell is over."""
        _, message = self.session.feed_identities(self.iopub.recv_multipart())
        parsed = self.session.deserialize(message, copy=True)
        kind, content, parent = parsed["msg_type"], parsed["content"], parsed["parent_header"].get("msg_id")
        if kind == "status":
            return bool(content["execution_state"] == "idle" and parent == sent)
        if kind == "stream":
            self.output(content["name"], content["text"])
        elif kind in ("execute_result", "display_data"):
            self.display(content["data"], kind == "execute_result")
        elif kind == "error":
            trace = ANSI.sub("", "\n".join(content["traceback"]))
            self.send("error", name=content["ename"], value=content["evalue"][:MAX_TEXT], traceback=clip(trace))
        return False

    def output(self, stream: str, text: str) -> None:
        """Pass text on; a cell that prints without end is stopped."""
        before, limit = self.printed, self.config["flood_bytes"]
        self.printed += len(text)
        text = text[: max(0, limit - before)]
        for start in range(0, len(text), PIECE):
            self.send("output", stream=stream, text=text[start : start + PIECE])
        if before <= limit < self.printed:
            self.send("flood")
            self.interrupt()

    def display(self, data: dict[str, Any], is_result: bool) -> None:
        import base64

        for mime in ("image/png", "image/jpeg"):
            if mime in data:
                image = base64.b64decode(data[mime])
                self.send("image", image, mime=mime, description=str(data.get(FIGURE) or data.get("text/plain", "")))
                return
        if "text/plain" in data:
            text = clip(data["text/plain"])
            if is_result:
                self.send("result", text=text)
            else:
                self.output("stdout", text + "\n")

    def send_files(self) -> None:
        """Files of the work folder that are new or changed, then the names and sizes of all."""
        found: dict[str, int] = {}
        root = self.config["workdir"]
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
            for name in names:
                path = os.path.join(folder, name)
                relative = os.path.relpath(path, root)
                try:
                    status = os.lstat(path)
                    if not 0o100000 <= status.st_mode < 0o120000 or name.startswith("."):  # regular files alone
                        continue
                    if self.known.get(relative) != self.stamp(status):
                        self.send_file(relative, path)
                        self.known[relative] = self.stamp(status)
                    found[relative] = status.st_size
                except (OSError, UnicodeEncodeError):
                    continue
        self.known = {name: stamp for name, stamp in self.known.items() if name in found}
        self.send("files", names=found)

    def send_file(self, name: str, path: str) -> None:
        """In chunks; the one that says `last` ends the file."""
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            while True:
                data = file.read(CHUNK)
                self.send("file", data, name=name, last=len(data) < CHUNK)
                if len(data) < CHUNK:
                    return


def clip(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT // 2]}\n[...]\n{text[-MAX_TEXT // 2 :]}"


def stop_cell() -> None:
    """What exit() and quit() do here: end the cell, not the kernel."""
    raise SystemExit


def write_plot_settings() -> None:
    """Plots write Chinese where a font for it is there: matplotlib looks for each character in one after the other."""
    found = [name for path, name in FONTS if os.path.exists(f"/usr/share/fonts/{path}")]
    if not found or "MPLCONFIGDIR" not in os.environ or find_spec("matplotlib") is None:
        return
    face = "SC" if tuple(map(int, version("matplotlib").split(".")[:2])) >= (3, 11) else "JP"
    os.makedirs(os.environ["MPLCONFIGDIR"], exist_ok=True)
    with open(os.path.join(os.environ["MPLCONFIGDIR"], "matplotlibrc"), "w") as file:
        file.write(f"font.family: DejaVu Sans, {found[0].format(face)}\n")


def make_app(config: dict[str, Any]) -> Any:
    """The kernel, listening on sockets in a folder of its own."""
    runtime = config["runtime"]
    app = IPKernelApp.instance(
        transport="ipc", ip=f"{runtime}/k", shell_port=1, iopub_port=2, stdin_port=3, control_port=4, hb_port=5,
        connection_file=f"{runtime}/connection.json", log_level="ERROR", copy_config_files=False,
    )  # fmt: skip
    app.config.HistoryManager.enabled = False
    app.config.InteractiveShell.ast_node_interactivity = "last_expr_or_assign"  # programs forget to print
    app.config.InteractiveShell.colors = "NoColor"
    app.config.InteractiveShell.xmode = "Plain"  # what every Python prints; quick for deep recursion as well
    app.config.IPCompleter.use_jedi = False
    app.initialize([])
    shell: Any = app.shell
    shell.system = shell.system_raw  # plain pipes: there is no terminal inside
    shell.ask_exit = stop_cell
    shell.display_formatter.formatters[FIGURE] = FigureFormatter(parent=shell.display_formatter)
    for name in ("CLICOLOR", "FORCE_COLOR", "CLICOLOR_FORCE"):  # set by ipykernel
        os.environ.pop(name, None)
    os.environ["TERM"] = "dumb"
    warnings.filterwarnings("ignore", message="To exit: use")
    return app


def main(config: dict[str, Any]) -> None:
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    write_plot_settings()
    app = make_app(config)
    for stream in (sys.stdout, sys.stderr):  # errors of the start were told there; nobody reads on
        os.dup2(nothing, getattr(stream, "_original_stdstream_copy", nothing))
    bridge = Bridge(app, requests, replies, config)
    threading.Thread(target=bridge.serve, daemon=True).start()
    app.start()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
