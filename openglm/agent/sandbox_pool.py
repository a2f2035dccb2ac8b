"""Sandboxes of many conversations: a bounded number of kernels at once, idle ones stopped, none left behind."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from openglm.agent.keeper import Keeper
from openglm.agent.sandbox import Sandbox, SandboxConfig

__all__ = ["SandboxPool"]


class SandboxPool:
    """One sandbox for each conversation, made when it is first asked for. Thread-safe.

    folder: holds the work folder of each conversation, by its name, which stays after `close`; None: temporary ones.
    A kernel that is stopped to make room, or after idle_s, leaves its files; the next call of that conversation starts
    a new one, and its result says what became of the variables.
    """

    def __init__(self, config: SandboxConfig | None = None, folder: Path | None = None) -> None:
        self.config, self.folder = config or SandboxConfig(), folder
        self._sandboxes: dict[str, Sandbox] = {}
        self._starting: set[Sandbox] = set()
        self._guard = threading.Lock()
        self._closed = False
        self._last_look = time.monotonic()
        Keeper.get().watch(self._stop_idle)

    def get(self, conversation: str) -> Sandbox:
        """The sandbox of a conversation, with its kernel. ValueError: all kernels are in use, or the pool is closed."""
        with self._guard:
            if self._closed:
                raise ValueError("the pool of Python sandboxes is closed")
            if conversation not in self._sandboxes:
                self._sandboxes[conversation] = Sandbox(self.config, self._work_dir(conversation))
            sandbox = self._sandboxes[conversation]
            sandbox.last_used = time.monotonic()
            if sandbox.is_live or sandbox in self._starting:
                return sandbox
            self._make_room()
            self._starting.add(sandbox)
        try:
            sandbox.start()
        finally:
            self._starting.discard(sandbox)
        return sandbox

    def peek(self, conversation: str) -> Sandbox | None:
        """The sandbox of a conversation, if it has one."""
        return self._sandboxes.get(conversation)

    def _work_dir(self, conversation: str) -> Path | None:
        if self.folder is None:
            return None
        if not conversation.replace("-", "").replace("_", "").isalnum() or len(conversation) > 100:
            raise ValueError(f"a conversation's name is of letters, digits, - and _, not {conversation[:40]!r}")
        return self.folder / conversation

    def _make_room(self) -> None:
        live = [sandbox for sandbox in self._sandboxes.values() if sandbox.is_live or sandbox in self._starting]
        free = sorted((s for s in live if not s.is_busy and s not in self._starting), key=lambda s: s.last_used)
        for sandbox in free[: max(0, len(live) + 1 - self.config.n_live)]:
            sandbox.stop("it was stopped to make room for other conversations")
            live.remove(sandbox)
        if len(live) >= self.config.n_live:
            raise ValueError(f"all {self.config.n_live} Python sandboxes are at work: try again when one is done")

    def _stop_idle(self) -> None:
        """Called by the keeper."""
        if time.monotonic() - self._last_look < min(10.0, self.config.idle_s / 2):
            return
        self._last_look = time.monotonic()
        for sandbox in list(self._sandboxes.values()):
            sandbox.stop_idle(self.config.idle_s, f"it was stopped after {self.config.idle_s:g} s without use")

    def end(self, conversation: str) -> None:
        """Let go of a conversation. A call of it that still runs ends with its kernel."""
        with self._guard:
            sandbox = self._sandboxes.pop(conversation, None)
        if sandbox is not None:
            sandbox.close()

    def close(self) -> None:
        self._closed = True
        Keeper.get().unwatch(self._stop_idle)
        for conversation in list(self._sandboxes):
            self.end(conversation)

    def __enter__(self) -> SandboxPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_integrity(self) -> None:
        """What must hold between calls."""
        assert sum(sandbox.is_live for sandbox in self._sandboxes.values()) <= self.config.n_live
        assert not (self._closed and self._sandboxes)
        for sandbox in self._sandboxes.values():
            sandbox.check_integrity()
