"""A Python that keeps its state between calls, cut off from the machine: one kernel for each conversation.

    with Sandbox() as sandbox:
        print(sandbox.run("x = 6 * 7; x").result)      # 42

What isolates it is in isolation.py, what runs inside in inside/. Everything that comes back is checked here: the kernel
may have been taken over by the code it ran.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from openglm.agent.channel import Channel, ChannelClosed, ProtocolError
from openglm.agent.isolation import Isolation, find_isolation
from openglm.agent.keeper import Keeper, usage_of
from openglm.agent.run_state import ExecutionResult, RunState
from openglm.agent.sandbox_config import SandboxConfig
from openglm.agent.work_folder import WorkFolder
from openglm.types import no_output

__all__ = ["ExecutionResult", "Sandbox", "SandboxConfig"]

POLL_S = 0.2
TRANSFER_S = 60.0
CHUNK = 1 << 20


@dataclass
class Kernel:
    """A running process. ended_because: set by whoever ends it."""

    process: subprocess.Popen[bytes]
    channel: Channel
    ended_because: str = ""


class Sandbox:
    """Runs code of one conversation. Thread-safe; one call at a time.

    work_dir: the files that code wrote and was given, a copy of the work folder inside after each call. Kept on close;
    None makes a temporary one. What code deletes inside is deleted here as well, so let it be a folder of its own.
    """

    def __init__(self, config: SandboxConfig | None = None, work_dir: Path | None = None) -> None:
        self.config = config or SandboxConfig()
        self.isolation: Isolation = find_isolation(self.config)
        self._temporary = Path(tempfile.mkdtemp(prefix="openglm-files-")) if work_dir is None else None
        self.files = WorkFolder(self._temporary or Path(work_dir or ""), self.config)
        self._kernel: Kernel | None = None
        self._busy, self._changing = threading.RLock(), threading.RLock()
        self._interrupted = threading.Event()
        self._lost = ""  # why the state that an earlier call left is gone
        self._number = 0
        self._closed = False
        self.last_used = time.monotonic()
        _OPEN.add(self)

    # -- life

    @property
    def is_live(self) -> bool:
        kernel = self._kernel
        return kernel is not None and kernel.process.poll() is None

    @property
    def is_busy(self) -> bool:
        if self._busy.acquire(blocking=False):
            self._busy.release()
            return False
        return True

    def start(self) -> None:
        """Start the kernel if none runs, with the files of the work folder. RuntimeError if it does not come up."""
        with self._busy:
            if self._closed:
                raise ValueError("this sandbox is closed")
            if self.is_live:
                return
            if (dead := self._kernel) is not None:  # it ended between calls
                self._end(dead)
                self._lost = dead.ended_because
            process = Keeper.get().call(lambda: self.isolation.start(self.config))
            assert process.stdin is not None and process.stdout is not None
            kernel = Kernel(process, Channel(process.stdin.fileno(), process.stdout.fileno()))
            with self._changing:
                self._kernel = kernel
            try:
                self._expect(kernel, "ready", self.config.start_timeout_s)
                for name in self.files.names():
                    self._put(kernel, name)
            except ValueError:  # a file that does not fit: a kernel without it would have it deleted here
                self._end(kernel)
                raise
            except (ChannelClosed, ProtocolError) as error:
                self._end(kernel)
                raise RuntimeError(f"the Python sandbox did not start: {kernel.ended_because or error}") from None
            if self.isolation.watchable:
                Keeper.get().watch(self._watch)

    def stop(self, because: str) -> None:
        """End the kernel; the next call starts a new one, and its result says why. Files are kept."""
        kernel = self._kernel
        if kernel is not None:
            self._lost = because
            kernel.ended_because = because
            self._end(kernel)

    def stop_idle(self, idle_s: float, because: str) -> None:
        """End the kernel if no call has used it for so long. Never waits for a call: the keeper may ask."""
        if not self._busy.acquire(blocking=False):
            return
        try:
            if self.is_live and time.monotonic() - self.last_used > idle_s:
                self.stop(because)
        finally:
            self._busy.release()

    def restart(self) -> None:
        """A new kernel, without what the old one knew; the files are kept."""
        self.stop("it was restarted")
        self.start()

    def close(self) -> None:
        """End the kernel, and remove the work folder if it is a temporary one."""
        self._closed = True
        self.stop("its sandbox was closed")
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        _OPEN.discard(self)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _end(self, kernel: Kernel | None) -> None:
        """Kill it with everything it began, and note why if nobody has."""
        with self._changing:
            if kernel is None or kernel is not self._kernel:
                return
            self._kernel = None
            Keeper.get().unwatch(self._watch)
            if not kernel.ended_because:
                kernel.ended_because = _reason(_wait(kernel.process), kernel.process, self.config)
            self.isolation.kill(kernel.process)
        with self._busy:  # a call that runs in another thread has seen the end, and reads no more
            for stream in (kernel.process.stdin, kernel.process.stdout, kernel.process.stderr):
                if stream is not None:
                    stream.close()

    def _watch(self) -> None:
        """Called by the keeper: ends a kernel whose processes use more than they may together."""
        kernel = self._kernel
        if kernel is None or kernel.ended_because:
            return
        usage, config = usage_of(kernel.process.pid, self.config.memory_bytes), self.config
        reason = ""
        if usage.memory_bytes > config.memory_bytes:
            reason = f"it used more than its {config.memory_bytes >> 20} MiB of memory"
        elif usage.cpu_s > config.cpu_s:
            reason = f"it used up its {config.cpu_s:g} s of processor time"
        elif usage.n_processes > config.n_processes:
            reason = f"it started more than {config.n_processes} processes"
        if reason:
            kernel.ended_because = reason
            self.isolation.kill(kernel.process)

    # -- calls

    def put(self, name: str, content: bytes) -> None:
        """Give code a file, by a relative name. ValueError for other names, or when the work folder is full."""
        with self._busy:
            self.files.write(name, content)
            if self.is_live and self._kernel is not None:
                self._put(self._kernel, name)

    def run(
        self, code: str, timeout_s: float | None = None, on_output: Callable[[str, str], None] = no_output
    ) -> ExecutionResult:
        """Run code in the state that earlier calls left. What code does wrong is in the result, never an exception.

        on_output(stream, text): told of what is printed, as it comes. RuntimeError when no kernel can be started.
        """
        with self._busy:
            self._interrupted.clear()
            self.start()
            lost, self._lost = self._lost, ""
            kernel_now = self._kernel
            assert kernel_now is not None
            self._number += 1
            state = RunState(self.config, self.files, on_output, lost)
            self.files.abandon()
            try:
                self._drive(kernel_now, code, self.config.timeout_s if timeout_s is None else timeout_s, state)
            except BaseException:  # of on_output: what the kernel still has to say belongs to no later call
                self.stop("the call before was given up")
                raise
            self.last_used = time.monotonic()
            return state.result()

    def interrupt(self) -> None:
        """Stop the call that runs, from another thread; what it has computed so far stays."""
        self._interrupted.set()

    def _drive(self, kernel: Kernel, code: str, timeout_s: float, state: RunState) -> None:
        """One call: send it, take frames until it is done, tell it to stop when it is time, end it if it does not."""
        deadline = state.started + timeout_s
        try:
            kernel.channel.send("run", id=self._number, code=code)
            while not state.done:
                now = time.monotonic()
                frame = kernel.channel.receive(min(POLL_S, max(0.0, deadline - now)))
                if frame is not None:
                    state.take(*frame)
                    if state.transferring and not state.deadline_moved:
                        state.deadline_moved, deadline = True, time.monotonic() + TRANSFER_S
                stop = self._why_stop(state, deadline, timeout_s)
                if stop:
                    state.stopped = stop
                    kernel.channel.send("interrupt")
                    deadline = time.monotonic() + self.config.grace_s
                elif time.monotonic() > deadline:
                    why = state.stopped or "handing over its files took too long"
                    kernel.ended_because = f"{why}, and it did not stop"
                    raise ChannelClosed
        except (ChannelClosed, ProtocolError) as error:
            if isinstance(error, ProtocolError):
                kernel.ended_because = f"it sent what no kernel sends ({error})"
            self._end(kernel)
            state.died = kernel.ended_because
            self._lost = kernel.ended_because

    def _why_stop(self, state: RunState, deadline: float, timeout_s: float) -> str:
        """The reason to interrupt it now, once."""
        if state.stopped or state.transferring:
            return ""
        if self._interrupted.is_set():
            return "it was interrupted"
        if state.flooded:
            return f"it printed more than {self.config.flood_bytes >> 20} MiB"
        return f"it ran longer than {timeout_s:g} s" if time.monotonic() > deadline else ""

    def _put(self, kernel: Kernel, name: str) -> None:
        kernel.channel.send("put", self.files.read(name), timeout_s=TRANSFER_S, name=name)
        answer = self._expect(kernel, "put", TRANSFER_S)
        if answer.get("error"):
            raise ValueError(f"the file {name} does not fit into the sandbox: {str(answer['error'])[:200]}")

    def _expect(self, kernel: Kernel, op: str, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while (frame := kernel.channel.receive(max(0.0, deadline - time.monotonic()))) is not None:
            if frame[0]["op"] == op:
                return frame[0]
        raise ChannelClosed(f"no answer within {timeout_s:g} s")

    def check_integrity(self) -> None:
        """What must hold between calls."""
        assert self._closed is False or self._kernel is None, "closed, and a kernel is there"
        self.files.check_integrity()


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """The exit status of a process that is about to end by itself, or None."""
    try:
        return process.wait(0.2)
    except subprocess.TimeoutExpired:
        return None


def _reason(code: int | None, process: subprocess.Popen[bytes], config: SandboxConfig) -> str:
    """Why it ended, from its exit status (of a shell's kind: 128 + signal) and what it said at the start."""
    if code is None:
        return "it was stopped"
    number = -code if code < 0 else code - 128
    if number == signal.SIGXCPU:
        return f"it used up its {config.cpu_s:g} s of processor time"
    if 0 < number < 65:
        return f"it was killed by {signal.Signals(number).name if number in set(signal.Signals) else number}"
    said = b""
    if process.stderr is not None:
        os.set_blocking(process.stderr.fileno(), False)
        said = process.stderr.read(4000) or b""
    last = said.decode(errors="replace").strip().splitlines()[-1:]
    return f"it ended with exit code {code}" + (f": {last[0][:300]}" if last else "")


_OPEN: weakref.WeakSet[Sandbox] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for sandbox in list(_OPEN):
        sandbox.close()
