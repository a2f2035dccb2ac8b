"""How `openglm chat` shows an answer: plain text, or markdown that grows in place on a terminal.

RichView writes an answer once. What is finished is left alone; only lines of the last paragraph, list or code block
that have changed are written again, in one piece, so nothing flickers and the scrollback keeps the whole answer.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from openglm.types import ToolCall

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["PlainView", "RichView", "View", "clean_for_terminal", "make_view", "notice", "shortened"]

# A model may write any character; those that steer the terminal are left out.
CONTROL = {c: None for c in [*range(32), 127, *range(0x80, 0xA0)] if chr(c) not in "\n\t"}
PAINT_EVERY_S = 0.05
SYNC = ("\x1b[?2026h", "\x1b[?2026l")  # terminals that know it show what lies between at once, others ignore it


def clean_for_terminal(text: str) -> str:
    return text.translate(CONTROL)


def notice(text: str) -> None:
    print(f"openglm: {clean_for_terminal(text)}", file=sys.stderr, flush=True)


def shortened(text: str, limit: int = 16) -> str:
    """The first lines of a long text."""
    lines = text.splitlines()
    if len(lines) <= limit:
        return text
    return "\n".join([*lines[:limit], f"… {len(lines) - limit} more lines"])


class View(Protocol):
    """Pieces of one answer between `begin` and `end`. result: what a tool gave back; progress: how far it is."""

    def begin(self) -> None: ...
    def reasoning(self, piece: str) -> None: ...
    def text(self, piece: str) -> None: ...
    def call(self, call: ToolCall) -> None: ...
    def result(self, name: str, content: str) -> None: ...
    def progress(self, text: str) -> None: ...
    def end(self) -> None: ...


def make_view(terminal: bool) -> View:
    """Markdown and colours on a terminal that has them and where rich is installed, plain text elsewhere."""
    if terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown"):
        try:
            return RichView()
        except ImportError:
            pass
    return PlainView(terminal)


class PlainView:
    """terminal: with a prompt in front and reasoning; a pipe gets the answer alone."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal
        self._thinks = self._fresh = False

    def begin(self) -> None:
        self._thinks, self._fresh = False, True
        if self._terminal:
            self._write("glm> ")

    def reasoning(self, piece: str) -> None:
        if self._terminal:
            self._write(piece if self._thinks else f"(thinks) {piece.lstrip()}")
            self._thinks = True

    def text(self, piece: str) -> None:
        if self._thinks:
            self._write("\n(answers) ")
            self._thinks, piece = False, piece.lstrip()
        self._write(piece)

    def call(self, call: ToolCall) -> None:
        self._write(f"{'' if self._fresh else chr(10)}[call] {call.name} {call.arguments}")

    def result(self, name: str, content: str) -> None:
        print(f"{'' if self._fresh else chr(10)}[result] {clean_for_terminal(name)} {clean_for_terminal(content)}",
              flush=True)  # fmt: skip
        self._fresh = True

    def progress(self, text: str) -> None:
        if self._terminal:
            print(f"\r{clean_for_terminal(text)}\x1b[K", end="", flush=True)

    def end(self) -> None:
        print(flush=True)

    def _write(self, piece: str) -> None:
        print(clean_for_terminal(piece), end="", flush=True)
        self._fresh = self._fresh and not piece.strip()


class Painter:
    """The last lines on a terminal, written again from the first one that changed. The cursor stays below them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.lines: list[str] = []

    def paint(self, lines: list[str]) -> None:
        same = 0
        while same < min(len(lines), len(self.lines)) and lines[same] == self.lines[same]:
            same += 1
        # What has left the screen cannot be written again.
        first = max(same, len(self.lines) - (self._console.height - 1))
        if first < len(self.lines) or first < len(lines):
            up = len(self.lines) - first
            body = "".join(f"{line}\x1b[K\n" for line in lines[first:])
            self._write(f"{SYNC[0]}{f'{chr(27)}[{up}F' if up else ''}{body}\x1b[J{SYNC[1]}")
        self.lines = list(lines)

    def commit(self, n: int) -> None:
        """The first n lines are final."""
        del self.lines[:n]

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


class RichView:
    """Streamed markdown with highlighted code; reasoning dim; tool calls as panels. Raises ImportError without rich."""

    def __init__(self, console: Console | None = None) -> None:
        from markdown_it import MarkdownIt
        from rich.console import Console

        self._console = console or Console(highlight=False)
        # What a model writes in angle brackets is text to be seen, not HTML to be dropped.
        self._parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self._painter = Painter(self._console)
        self._kind: Literal["text", "reasoning"] | None = None
        self._timer: threading.Timer | None
        self._pending, self._painted_at = "", 0.0
        self._lock, self._timer = threading.RLock(), None

    def begin(self) -> None:
        self._quiet = _no_echo()
        self._quiet.__enter__()
        self._console.print()

    def reasoning(self, piece: str) -> None:
        self._feed("reasoning", piece)

    def text(self, piece: str) -> None:
        self._feed("text", piece)

    def call(self, call: ToolCall) -> None:
        self._finish()
        self._panel(f"call: {call.name}", self._arguments(call), "cyan")

    def result(self, name: str, content: str) -> None:
        from rich.text import Text

        self._finish()
        self._panel(f"result: {name}", Text(clean_for_terminal(content)), "green")

    def progress(self, text: str) -> None:
        self._finish()
        self._console.file.write(f"\r{clean_for_terminal(text)}\x1b[K\r")
        self._console.file.flush()

    def end(self) -> None:
        try:
            self._finish()
        finally:
            self._quiet.__exit__(None, None, None)

    def _feed(self, kind: Literal["text", "reasoning"], piece: str) -> None:
        if kind != self._kind:
            self._finish()
            self._kind = kind
        with self._lock:
            self._pending += clean_for_terminal(piece)
            wait = self._painted_at + PAINT_EVERY_S - time.monotonic()
            if wait <= 0:
                self._paint()
            elif self._timer is None:  # the next piece may be long in coming
                self._timer = threading.Timer(wait, self._late)
                self._timer.daemon = True
                self._timer.start()

    def _late(self) -> None:
        with self._lock:
            self._timer = None
            if self._pending:
                self._paint()

    def _finish(self) -> None:
        """Leave on the screen what is there, and an empty line."""
        with self._lock:
            if self._pending.strip():
                self._paint()
            if self._painter.lines:
                self._painter.paint([*self._painter.lines, ""])
            self._painter.commit(len(self._painter.lines))
            self._kind, self._pending = None, ""

    def _paint(self) -> None:
        done, rest = self._split(self._pending)
        lines = [*self._rendered(done), ""] if done.strip() else []
        final = len(lines)
        if rest.strip():
            lines += self._rendered(rest)
        self._painter.paint(lines)
        self._painter.commit(final)
        self._pending, self._painted_at = rest, time.monotonic()

    def _split(self, text: str) -> tuple[str, str]:
        """(what is finished, the last block of markdown, which may go on)."""
        lines = text.splitlines(keepends=True)
        if self._kind == "reasoning":
            start = max((i + 1 for i, line in enumerate(lines) if not line.strip()), default=0)
        else:
            blocks = [t.map[0] for t in self._parser.parse(text) if t.level == 0 and t.map and t.nesting >= 0]
            start = blocks[-1] if blocks else 0
        return "".join(lines[:start]), "".join(lines[start:])

    def _rendered(self, text: str) -> list[str]:
        """Lines of a text with their colours, without the empty ones around it."""
        from rich.markdown import Markdown
        from rich.text import Text

        shown: RenderableType
        if self._kind == "reasoning":
            shown = Text(text.strip("\n"), style="dim italic")
        else:
            # A link is shown with its address, so that its words cannot hide where it leads.
            shown = markdown = Markdown("", code_theme="ansi_dark", hyperlinks=False)
            markdown.parsed = self._parser.parse(text)
        with self._console.capture() as capture:
            self._console.print(shown)
        lines = [line.rstrip() for line in capture.get().split("\n")]
        while lines and not lines[-1]:
            lines.pop()
        while lines and not lines[0]:
            lines.pop(0)
        return lines

    def _panel(self, title: str, content: RenderableType, colour: str) -> None:
        from rich.panel import Panel
        from rich.text import Text

        self._console.print(Panel(content, title=Text(clean_for_terminal(title)), title_align="left", style=colour))

    def _arguments(self, call: ToolCall) -> RenderableType:
        """Indented JSON; the code of a call that is nothing but code, as code."""
        from rich.syntax import Syntax

        try:
            value: Any = json.loads(call.arguments)
        except ValueError:
            value = None
        if isinstance(value, dict) and list(value) == ["code"] and isinstance(value["code"], str):
            return Syntax(clean_for_terminal(value["code"]), "python", theme="ansi_dark", word_wrap=True)
        text = call.arguments if value is None else json.dumps(value, ensure_ascii=False, indent=2)
        return Syntax(clean_for_terminal(text), "json", theme="ansi_dark", word_wrap=True)


@contextmanager
def _no_echo() -> Iterator[None]:
    """Keys typed while an answer is written wait for the next prompt, unseen."""
    try:
        import termios

        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (ImportError, OSError, ValueError, io.UnsupportedOperation, termios.error):
        yield
        return
    try:
        quiet = termios.tcgetattr(number)
        quiet[3] &= ~termios.ECHO
        termios.tcsetattr(number, termios.TCSANOW, quiet)
        yield
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)
