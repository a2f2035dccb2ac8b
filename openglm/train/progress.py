"""The record and the face of a run: log.jsonl, one progress line, the measured matmul peak, memory in use."""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["ProgressLine", "RunLog", "matmul_peak", "peak_rss_bytes", "rss_bytes"]


class RunLog:
    """run_dir/log.jsonl: one JSON object a line, flushed at once; mirrored to TensorBoard when asked.

    Every object has "event": "step", "eval", "sample", "skip", "checkpoint", "resume", "start" or "end".
    """

    def __init__(self, run_dir: Path, tensorboard: bool = False) -> None:
        self.path = run_dir / "log.jsonl"
        self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("tensorboard: true needs its package: pip install tensorboard") from None
            self._board = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"event": event, **values}, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._board is not None and event in ("step", "eval"):
            for key, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
                    self._board.add_scalar(f"{event}/{key}", value, values["step"])
                elif isinstance(value, Mapping):
                    self._board.add_scalars(f"{event}/{key}", dict(value), values["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def rewind_log(path: Path, step: int) -> None:
    """Drop what was logged after `step`, and a line cut short by a kill, so that a resumed run logs each step once."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("step", 0) <= step:
            kept.append(line + "\n")
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class ProgressLine:
    """One line on stderr: redrawn in place on a terminal, printed anew every `every` steps elsewhere."""

    def __init__(self, steps: int, every: int) -> None:
        self.steps, self.every = steps, every
        self._terminal = sys.stderr.isatty()
        self._width = 0
        self._last = 0.0

    def update(self, entry: Mapping[str, Any], seconds_left: float) -> None:
        step, now = entry["step"], time.monotonic()
        due = now - self._last > 0.5 if self._terminal else step % self.every == 0
        if not due and step != self.steps:
            return
        self._last = now
        mfu = f"  mfu {100 * entry['mfu']:.0f}%" if entry.get("mfu") is not None else ""
        skipped = "  SKIPPED" if entry["skipped"] else ""
        text = (
            f"step {step}/{self.steps}  loss {entry['loss']:.4f}  grad {entry['grad_norm']:.3f}  "
            f"{entry['tokens_per_s']:,.0f} tok/s{mfu}  left {_duration(seconds_left)}{skipped}"
        )
        if self._terminal:
            sys.stderr.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def note(self, text: str) -> None:
        """A line of its own, above the progress line."""
        lead = "\r" + " " * self._width + "\r" if self._terminal and self._width else ""
        sys.stderr.write(f"{lead}{text}\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self._terminal and self._width:
            sys.stderr.write("\n")


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


@functools.cache
def matmul_peak(device: str, precision: str, threads: int) -> float:
    """FLOP/s of a large square matmul in the run's precision, the best of about one second of them."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device == "cpu" and dtype == torch.float16:  # most CPUs have no half arithmetic and emulate it far below peak
        dtype = torch.float32
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, deadline, runs = float("inf"), time.perf_counter() + 1.0, 0
    while runs < 3 or time.perf_counter() < deadline:
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # reading a value waits for the device
        best = min(best, time.perf_counter() - start)
        runs += 1
    return 2.0 * n**3 / best


def rss_bytes() -> int:
    """Resident memory of this process now."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak is the best there is
        return peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far.

    Linux hands the peak that getrusage gives down to child processes; the one under /proc is the process's own.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
