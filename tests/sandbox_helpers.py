"""What the tests of the sandbox share: canaries on the host, and code that tries things inside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PRELUDE = '''
import ctypes, errno, os, resource, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)

def attempt(call, *arguments, **named):
    """"refused" for an exception, "done" otherwise."""
    try:
        call(*arguments, **named)
    except (OSError, ValueError, MemoryError, RuntimeError, LookupError) as error:
        return "refused"
    return "done"

def native(name, *arguments):
    """A function of libc: the name of its error, or "done"."""
    ctypes.set_errno(0)
    result = getattr(libc, name)(*arguments)
    return errno.errorcode.get(ctypes.get_errno(), "?") if result == -1 else "done"

def sees(path):
    return os.path.lexists(path)

def reads(path):
    try:
        with open(path, "rb") as file:
            return file.read(100)
    except OSError as error:
        return errno.errorcode[error.errno]

def connects(family, address):
    with socket.socket(family) as client:
        client.settimeout(2)
        return attempt(client.connect, address)
'''


class Host:
    """Things of this machine that code in a sandbox must neither see nor touch."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.file = folder / "canary.txt"
        self.file.write_text("canary")
        self.home_file = Path.home() / f".sandbox-canary-{os.getpid()}"
        self.home_file.write_text("canary")
        stack.callback(self.home_file.unlink, missing_ok=True)
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        self.tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port = int(self.tcp.getsockname()[1])
        self.unix_path = folder / "canary.sock"
        self.unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        self.unix.bind(str(self.unix_path))
        self.abstract_name = f"\0sandbox-canary-{os.getpid()}"
        self.abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        self.abstract.bind(self.abstract_name)
        self.listeners = (self.tcp, self.unix, self.abstract)
        for listener in self.listeners:
            listener.listen()
            listener.settimeout(0)
        self.n_threads = threading.active_count()

    def check(self) -> None:
        """Untouched: files, the process, and nobody at the sockets."""
        assert self.file.read_text() == self.home_file.read_text() == "canary"
        assert self.process.poll() is None
        for listener in self.listeners:
            try:
                listener.accept()
            except BlockingIOError:
                continue
            raise AssertionError("code in a sandbox has reached a socket of the host")


@contextmanager
def host_with_canaries(folder: Path) -> Iterator[Host]:
    with ExitStack() as stack:
        yield Host(folder, stack)


def processes_that_say(marker: str) -> list[int]:
    """Processes of this machine with the marker in their command line."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if marker.encode() in Path(f"/proc/{entry}/cmdline").read_bytes():
                found.append(int(entry))
        except OSError:
            continue
    return found


def gone(marker: str, seconds: float = 20) -> bool:
    """Whether the marker's processes end by themselves: a kill is done when the kernel has come round to it."""
    deadline = time.monotonic() + seconds
    while processes_that_say(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes_that_say(marker)
