"""A program in a terminal whose screen can be read: a pseudo-terminal with pyte, an emulator, at the other end."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyte

__all__ = ["Terminal", "text_of", "terminal"]


def text_of(screen: pyte.HistoryScreen) -> list[str]:
    """Lines above the screen and on it, without blanks at their ends and empty ones at the end of all."""

    def line(cells: Any) -> str:
        # A wide character is followed by an empty cell.
        return "".join(cells[x].data for x in range(screen.columns)).rstrip()

    lines = [line(cells) for cells in screen.history.top] + [line(screen.buffer[y]) for y in range(screen.lines)]
    while lines and not lines[-1]:
        lines.pop()
    return lines


class Terminal:
    def __init__(self, process: subprocess.Popen[bytes], leader: int, columns: int, rows: int) -> None:
        self.process, self._leader = process, leader
        self.screen = pyte.HistoryScreen(columns, rows, history=5000, ratio=0.5)
        self.screen.write_process_input = lambda data: os.write(leader, data.encode())  # type: ignore[assignment, method-assign]
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""

    @property
    def text(self) -> str:
        return "\n".join(text_of(self.screen))

    def press(self, keys: str | bytes) -> None:
        os.write(self._leader, keys.encode() if isinstance(keys, str) else keys)

    def _read(self, seconds: float) -> bool:
        """Whether something came from the program within the time; nothing comes from one that ended."""
        if not select.select([self._leader], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._leader, 65536)
        except OSError:
            data = b""
        self.raw += data
        self._stream.feed(data)
        return bool(data)

    def wait(self, enough: str | Callable[[str], bool], seconds: float = 120.0) -> str:
        """Until the text is on the screen, or what is there is enough; returns it."""
        done = (lambda text: enough in text) if isinstance(enough, str) else enough
        until = time.monotonic() + seconds
        while not done(self.text):
            assert time.monotonic() < until, f"gave up waiting for {enough!r}; on the screen:\n{self.text}"
            if not self._read(0.2):
                assert self.process.poll() is None or self._read(0.2), f"the program ended; on the screen:\n{self.text}"
        return self.text

    def wait_prompt(self, n: int) -> str:
        """Until the n-th prompt has come."""
        return self.wait(lambda text: sum(line.startswith("you>") for line in text.splitlines()) >= n)

    def _at_prompt(self, text: str) -> bool:
        return self.screen.display[self.screen.cursor.y].startswith("you>")

    def leave(self) -> int:
        """Ctrl-D at the prompt: before it the terminal takes the key for the end of a line that nobody reads."""
        self.wait(self._at_prompt)
        until = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < until:
            self.press(b"\x04")
            again = time.monotonic() + 5
            while self.process.poll() is None and time.monotonic() < again:
                if not self._read(0.1):
                    time.sleep(0.02)
        return self.process.wait(timeout=60)


@contextmanager
def terminal(
    command: Sequence[str], environment: dict[str, str], columns: int = 80, rows: int = 24
) -> Iterator[Terminal]:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    hidden = ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR", "OPENAI_API_KEY")
    inherited = {k: v for k, v in os.environ.items() if k not in hidden}
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, preexec_fn=own_terminal,
        env={**inherited, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **environment},
    )  # fmt: skip
    os.close(follower)
    try:
        yield Terminal(process, leader, columns, rows)
    finally:
        process.kill()
        process.wait()
        os.close(leader)
