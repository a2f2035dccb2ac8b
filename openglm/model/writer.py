"""Writing weights one tensor at a time: .safetensors shards that a killed process continues, and torch's .pt files.

    python -m pytest -q tests/test_convert.py

Everything is written into a folder beside the target, which takes the target's name when it is complete. Shards that a
killed process had finished are kept, told by progress.json; the rest is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openglm.model.checkpoint import replace_folder
from openglm.model.sources import SAFETENSORS_DTYPES
from openglm.ops.quant import QuantTensor, Weight

__all__ = ["OutputFolder", "named_tensors", "write_torch_file"]

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
ENTRY_BYTES = 320  # of the header, kept free for each tensor
CHUNK_BYTES = 64 << 20
PROGRESS = "progress.json"


def named_tensors(name: str, weight: Weight) -> Iterator[tuple[str, Tensor]]:
    """What is stored for a weight of ours: itself, or NAME.q, NAME.scale and NAME.minimum."""
    if not isinstance(weight, QuantTensor):
        yield name, weight
        return
    yield f"{name}.q", weight.q
    yield f"{name}.scale", weight.scale
    if weight.minimum is not None:
        yield f"{name}.minimum", weight.minimum


class OutputFolder:
    """A folder that is written file by file and renamed at the end.

    identity: what is written from what and how; a folder that an earlier process left half-way is continued only when
    it was the same. sums: file name -> {"bytes", "sha256"} of everything finished.
    """

    def __init__(self, target: str | Path, identity: Mapping[str, Any]) -> None:
        self.target = Path(target)
        if self.target.exists() and not self.target.is_dir():
            raise ValueError(f"{self.target} is a file: give a folder that does not exist yet")
        if self.target.exists() and any(self.target.iterdir()):
            raise ValueError(f"{self.target} is not empty: give a folder that does not exist yet, or remove it")
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        self.identity = json.loads(json.dumps(dict(identity)))
        self.sums: dict[str, dict[str, Any]] = self._kept()
        self.continued = bool(self.sums)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._note()

    def _kept(self) -> dict[str, dict[str, Any]]:
        """Finished files of an earlier process that wrote the same; anything else there is removed."""
        try:
            noted = json.loads((self.folder / PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            noted = {}
        if not isinstance(noted, dict) or noted.get("identity") != self.identity:
            shutil.rmtree(self.folder, ignore_errors=True)
            return {}
        sums = {
            name: entry for name, entry in noted["files"].items()
            if (self.folder / name).is_file() and (self.folder / name).stat().st_size == entry["bytes"]
        }  # fmt: skip
        for path in self.folder.rglob("*"):
            if path.is_file() and path.relative_to(self.folder).as_posix() not in (*sums, PROGRESS):
                path.unlink()
        return sums

    def _note(self) -> None:
        temporary = self.folder / f"{PROGRESS}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"identity": self.identity, "files": self.sums}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / PROGRESS)

    def write_shard(self, name: str, weights: Iterable[tuple[str, Tensor]], n_tensors: int) -> list[str]:
        """Write a .safetensors file, one tensor in memory at a time; n_tensors: at most so many. Returns their names.

        A file that is finished already is left as it is.
        """
        path = self.folder / name
        if name in self.sums:
            return list(self.sums[name]["tensors"])
        temporary, room = path.with_name(f"{name}.tmp"), 8 + ENTRY_BYTES * (n_tensors + 1)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        with open(temporary, "wb") as file:
            file.seek(room)
            for tensor_name, tensor in weights:
                data = tensor.detach().to("cpu").contiguous()
                n_bytes = data.numel() * data.element_size()
                header[tensor_name] = {
                    "dtype": DTYPE_NAMES[data.dtype], "shape": list(data.shape),
                    "data_offsets": [offset, offset + n_bytes],
                }  # fmt: skip
                _write_bytes(file.write, data)
                _drop_cached(file.fileno())
                offset += n_bytes
            text = json.dumps(header, separators=(",", ":")).encode()
            assert len(text) <= room - 8, "the header outgrew the room kept for it"
            head = (room - 8).to_bytes(8, "little") + text.ljust(room - 8)
            file.seek(0)
            file.write(head)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        names = [n for n in header if n != "__metadata__"]
        self._finish(name, names, room + offset, _sha256(path))
        return names

    def write_bytes(self, name: str, content: bytes) -> None:
        path = self.folder / name
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._finish(name, [], len(content), hashlib.sha256(content).hexdigest())

    def write_torch(self, name: str, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
                    get: Callable[[str], Tensor]) -> None:  # fmt: skip
        """Write {"module": tensors} as torch.save does; a finished file is left as it is."""
        if name in self.sums:
            return
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        write_torch_file(temporary, tensors, get)
        temporary.replace(path)
        self._finish(name, list(tensors), path.stat().st_size, _sha256(path))

    def _finish(self, name: str, tensors: Sequence[str], n_bytes: int, sha256: str) -> None:
        self.sums[name] = {"bytes": n_bytes, "sha256": sha256, "tensors": list(tensors)}
        self._note()

    def manifest(self) -> bytes:
        """manifest.json of a checkpoint of ours."""
        sums = {name: {k: entry[k] for k in ("bytes", "sha256")} for name, entry in sorted(self.sums.items())}
        return (json.dumps(sums, indent=1) + "\n").encode()

    def discard_if_empty(self) -> None:
        """Leave nothing behind of a conversion that was refused before anything was finished."""
        if not self.sums:
            shutil.rmtree(self.folder, ignore_errors=True)

    def commit(self) -> None:
        """Give the folder its name."""
        (self.folder / PROGRESS).unlink()
        if self.target.exists():
            self.target.rmdir()
        replace_folder(self.folder, self.target)


def write_torch_file(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], get: Callable[[str], Tensor]
) -> None:
    """A file as torch.save writes {"module": {...}}, filled one tensor at a time.

    torch writes the frame with room for the data (skip_data), then every tensor's bytes go where they belong.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from openglm.model.sources import open_file

    with FakeTensorMode():
        state = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({"module": state}, path)
    except RuntimeError:  # which says nothing of a full disk, as a write of our own does
        with open(path, "ab") as file:
            file.write(bytes(1 << 20))
        raise
    places = open_file(path)
    with open(path, "r+b") as file:
        for name in tensors:
            data = get(name).detach().to("cpu").contiguous()
            assert (data.dtype, tuple(data.shape)) == tensors[name]
            file.seek(places[name].offset)
            _write_bytes(file.write, data)
        file.flush()
        os.fsync(file.fileno())


def _write_bytes(write: Callable[[memoryview], Any], tensor: Tensor) -> None:
    if not tensor.numel():
        return
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    for first in range(0, len(view), CHUNK_BYTES):
        write(view[first : first + CHUNK_BYTES])


def _drop_cached(descriptor: int) -> None:
    """What is written need not stay in the page cache: a large checkpoint must not push everything else out."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
        _drop_cached(file.fileno())
    return digest.hexdigest()
