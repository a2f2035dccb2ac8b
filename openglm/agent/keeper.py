"""One thread that starts the processes of sandboxes and watches them, for as long as this process lives.

Linux ties "die with your parent" to the thread that started a process; threads of a pool come and go, this one stays.
It also sums up what the processes of a sandbox use together, which limits of single processes do not bound.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["Keeper", "Usage", "usage_of"]

log = logging.getLogger(__name__)
T = TypeVar("T")
TICK_S = 0.1


@dataclass(frozen=True)
class Usage:
    """Of a process and all its descendants: processes, memory that is theirs alone or shared between them, CPU time."""

    n_processes: int = 0
    memory_bytes: int = 0
    cpu_s: float = 0.0


def descendants(pid: int) -> list[int]:
    """The process and everything below it, by what Linux says of each thread's children."""
    found, frontier = [], [pid]
    while frontier:
        current = frontier.pop()
        found.append(current)
        try:
            for task in os.listdir(f"/proc/{current}/task"):
                frontier += map(int, Path(f"/proc/{current}/task/{task}/children").read_text().split())
        except OSError:
            continue  # it ended meanwhile
    return found


def usage_of(pid: int, exact_above_bytes: int) -> Usage:
    """What a tree of processes uses now. Pages shared by forks are counted once, by asking the kernel in detail, where
    the quick sum, which counts them for each process, is above `exact_above_bytes`.
    """
    pids = descendants(pid)
    memory = sum(_resident_bytes(p) for p in pids)
    if memory > exact_above_bytes:
        memory = sum(_share_bytes(p) for p in pids)
    return Usage(len(pids), memory, sum(_cpu_s(p) for p in pids))


def _fields_bytes(path: str, names: tuple[str, ...]) -> int | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(names))


def _resident_bytes(pid: int) -> int:
    return _fields_bytes(f"/proc/{pid}/status", ("RssAnon:", "RssShmem:")) or 0


def _share_bytes(pid: int) -> int:
    exact = _fields_bytes(f"/proc/{pid}/smaps_rollup", ("Pss_Anon:", "Pss_Shmem:"))
    return _resident_bytes(pid) if exact is None else exact


def _cpu_s(pid: int) -> float:
    """Of the process and the children it has waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


class Keeper:
    """Runs calls in its thread, and every watch, one after the other, several times a second."""

    _instance: Keeper | None = None
    _guard = threading.Lock()

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._calls: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue()
        self._watches: set[Callable[[], None]] = set()
        self._thread = threading.Thread(target=self._loop, name="sandbox-keeper", daemon=True)
        self._thread.start()

    @classmethod
    def get(cls) -> Keeper:
        """The one of this process: a fork does not inherit threads."""
        with cls._guard:
            if cls._instance is None or cls._instance.pid != os.getpid():
                cls._instance = cls()
            return cls._instance

    def call(self, function: Callable[[], T]) -> T:
        """Run it in the keeper's thread; its result or exception is ours."""
        future: Future[T] = Future()
        self._calls.put((function, future))
        return future.result()

    def watch(self, function: Callable[[], None]) -> None:
        self._watches.add(function)
        self._calls.put((lambda: None, Future()))  # wakes the thread

    def unwatch(self, function: Callable[[], None]) -> None:
        self._watches.discard(function)

    def _loop(self) -> None:
        following = time.monotonic()
        while True:
            wait = max(0.0, following - time.monotonic()) if self._watches else None
            try:
                function, future = self._calls.get(timeout=wait)
            except queue.Empty:
                for watch in tuple(self._watches):
                    try:
                        watch()
                    except Exception:
                        log.exception("a watch of sandboxes failed")
                following = time.monotonic() + TICK_S
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
