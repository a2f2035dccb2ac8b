"""Checkpoints of a run: a snapshot is taken between steps, a thread writes it, a rename makes it exist.

    run_dir/checkpoints/step-00001000/
        model/               an ordinary checkpoint folder: `openglm fill run_dir/checkpoints/step-00001000/model`
        trainer.safetensors  optimizer state and random-generator states
        trainer.json         step, tokens, data cursor, loss scale, running medians, what the run is
        manifest.json        size and sha256 of the two files above

A folder without the final name was never finished and is ignored. Loading verifies every sum and falls back from a
damaged newest checkpoint to the one before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openglm.config import GLMConfig
from openglm.model.checkpoint import CheckpointMeta, save_checkpoint
from openglm.model.load import load_checkpoint

__all__ = ["CheckpointStore", "Loaded", "Snapshot", "WriteResult", "cpu_copy", "rng_state", "set_rng_state"]

VERSION = 1


@dataclass(frozen=True)
class Snapshot:
    """Everything a run continues from, on the CPU. `tensors`: optimizer and generators; `values`: JSON-able."""

    step: int
    model: dict[str, Tensor]
    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint."""

    path: Path
    config: GLMConfig
    snapshot: Snapshot


@dataclass(frozen=True)
class WriteResult:
    """What became of one background write; `error` is None when it succeeded."""

    step: int
    path: Path
    seconds: float
    n_bytes: int
    error: OSError | None


def cpu_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that later steps do not touch."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def rng_state() -> dict[str, Tensor]:
    """States of torch's generators."""
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng.cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])


class CheckpointStore:
    """The `checkpoints` folder of one run. One write at a time; `save` waits for the previous one."""

    def __init__(
        self, folder: Path, config: GLMConfig, meta: CheckpointMeta, tokenizer_files: Mapping[str, bytes], keep: int
    ) -> None:
        self.folder, self.config, self.meta, self.keep = folder, config, meta, keep
        self.tokenizer_files = dict(tokenizer_files)
        self._thread: threading.Thread | None = None
        self._results: list[WriteResult] = []
        self._crash: BaseException | None = None

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def complete(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit())

    def save(self, snapshot: Snapshot) -> None:
        """Write in the background. The outcome comes from `finished` later."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint-writer", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Until the write in progress, if any, is over."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finished(self) -> list[WriteResult]:
        """Outcomes since the last call. A failure that is not the disk's is a bug of ours and raised here."""
        if self._crash is not None:
            raise self._crash
        results, self._results = self._results, []
        return results

    def _run(self, snapshot: Snapshot) -> None:
        from safetensors import SafetensorError

        start, error, n_bytes = time.perf_counter(), None, 0
        try:
            n_bytes = self._write(snapshot)
        except OSError as caught:
            error = caught
        except SafetensorError as caught:  # how safetensors reports a full disk
            error = OSError(str(caught))
        except BaseException as caught:  # noqa: BLE001 - handed to the training thread by `finished`
            self._crash = caught
            return
        seconds = time.perf_counter() - start
        self._results.append(WriteResult(snapshot.step, self.path(snapshot.step), seconds, n_bytes, error))

    def _write(self, snapshot: Snapshot) -> int:
        from safetensors.torch import save_file

        final = self.path(snapshot.step)
        temporary = self.folder / f".writing-{final.name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_checkpoint(temporary / "model", snapshot.model, self.config, self.meta, self.tokenizer_files)
            save_file(snapshot.tensors, temporary / "trainer.safetensors")
            text = json.dumps({"version": VERSION, "step": snapshot.step, **snapshot.values})
            (temporary / "trainer.json").write_text(text, encoding="utf-8")
            files = {name: _fsync_and_sum(temporary / name) for name in ("trainer.safetensors", "trainer.json")}
            (temporary / "manifest.json").write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
            _fsync(temporary / "manifest.json")
            _fsync(temporary)
            before_publishing(temporary)
            if final.exists():  # the same step again, after an interrupted run that resumed from it
                shutil.rmtree(final)
            os.rename(temporary, final)
            _fsync(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in self.complete()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return sum(f.stat().st_size for f in final.rglob("*") if f.is_file())

    def latest(self) -> Loaded | None:
        """The newest checkpoint that is whole, or None when there is none at all; damaged ones give a warning line.

        Raises ValueError when there are checkpoints and all of them are damaged.
        """
        paths = self.complete()
        for path in reversed(paths):
            try:
                return read(path)
            except ValueError as error:
                print(f"warning: skipped a damaged checkpoint: {error}", file=sys.stderr)
        if paths:
            raise ValueError(f"no checkpoint in {self.folder} is whole; start over with --resume never")
        return None


def before_publishing(folder: Path) -> None:
    """The moment between the last byte and the rename; tests put a delay here and kill the process."""


def read(path: Path) -> Loaded:
    """Load and verify one checkpoint folder; raises ValueError with one line."""
    from safetensors.torch import load_file

    manifest = _json(path / "manifest.json")
    for name, expected in manifest.get("files", {}).items():
        file = path / name
        if not file.is_file() or file.stat().st_size != expected["bytes"]:
            raise ValueError(f"{file} is missing or cut short")
        if _sum(file) != expected["sha256"]:
            raise ValueError(f"{file} does not match its sha256: the file was changed or damaged")
    values = _json(path / "trainer.json")
    if values.get("version") != VERSION:
        raise ValueError(f"{path} was written by another version of the trainer")
    model, _ = load_checkpoint(path / "model")
    tensors = load_file(path / "trainer.safetensors")
    state = {name: t.detach() for name, t in model.state_dict().items()}
    return Loaded(path, model.config, Snapshot(int(values["step"]), state, tensors, values))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_and_sum(path: Path) -> dict[str, Any]:
    _fsync(path)
    return {"bytes": path.stat().st_size, "sha256": _sum(path)}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
