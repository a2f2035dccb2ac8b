"""Where an interrupted `prepare` stands: the committed state, kept in progress.json of the folder until the end."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openglm.data.shards import Shard, disk_error, read_json, shards_from_json, shards_to_json

PROGRESS = "progress.json"
DIGESTS = "digests.bin"  # 16 bytes for each document so far, to find duplicates after a restart
MALFORMED_LISTED = 20  # per source, in the manifest


@dataclass
class Counts:
    """What became of the rows of one source. listed: [line, reason] of the first malformed ones."""

    rows: int = 0
    documents: int = 0
    duplicates: int = 0
    empty: int = 0
    malformed: int = 0
    listed: list[list[Any]] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        for name in ("rows", "documents", "duplicates", "empty", "malformed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.listed = (self.listed + other.listed)[:MALFORMED_LISTED]


@dataclass
class Progress:
    """The committed state: everything that the finished shards hold, and where reading goes on."""

    counts: list[Counts]
    shards: list[Shard] = field(default_factory=list)
    n_digests: int = 0
    source: int = 0
    row: int = 0

    def to_json(self, settings: dict[str, Any]) -> bytes:
        state = asdict(self) | {"shards": shards_to_json(self.shards), "settings": settings}
        return json.dumps(state, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Progress:
        return cls(
            counts=[Counts(**c) for c in state["counts"]],
            shards=shards_from_json(state["shards"]),
            n_digests=state["n_digests"],
            source=state["source"],
            row=state["row"],
        )


def open_progress(out: Path, settings: dict[str, Any], n_sources: int) -> Progress:
    """The committed state in the folder, or the state of a new run."""
    if (out / PROGRESS).exists():
        state = read_json(out / PROGRESS)
        check_same(settings, state["settings"], out)
        progress = Progress.from_json(state)
        print(f"continuing in {out} after {len(progress.shards)} finished shards", file=sys.stderr)
        return progress
    if any(p.suffix != ".tmp" for p in out.iterdir()):
        raise ValueError(f"{out} holds other files; choose a new folder for --out")
    return Progress([Counts() for _ in range(n_sources)])


def check_same(settings: dict[str, Any], earlier: dict[str, Any], out: Path) -> None:
    """ValueError unless the folder was made with the same tokenizer, sources and options."""

    def names(s: dict[str, Any]) -> list[tuple[str, str]]:
        return [(x["path"] if x["kind"] == "hub" else Path(x["path"]).name, x["digest"]) for x in s["sources"]]

    for key, what in (
        ("version", "another version of OpenGLM"),
        ("tokenizer_fingerprint", "another tokenizer"),
        ("field", f"--field {earlier.get('field')}"),
        ("shard_tokens", f"shards of {earlier.get('shard_tokens')} tokens"),
        ("batch_bytes", "another batch size"),
    ):
        if settings[key] != earlier.get(key):
            raise ValueError(f"{out} was prepared with {what}; remove it or choose a new folder for --out")
    if names(settings) != names(earlier):
        raise ValueError(f"{out} was prepared from other sources; remove it or choose a new folder for --out")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the folder and hold it, so that two runs cannot write into it at once."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise disk_error(out, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is preparing {out}; wait for it or choose a new folder") from error
        yield
    finally:
        os.close(handle)
