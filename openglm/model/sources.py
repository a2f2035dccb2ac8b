"""Tensors by name from checkpoint files, read one at a time: .safetensors, and .bin or .pt without running their code.

    source = open_files(folder); source.names(); source.get("model.norm.weight")

A file's header is read when it is opened, so a file cut short is found before anything is loaded. A tensor's bytes are
read into memory of its own: nothing stays mapped, and reading a checkpoint of any size holds one tensor.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from openglm.ops.quant import QuantTensor, Weight, pack_int4, unpack_int4

__all__ = [
    "FileSource", "Source", "TensorInfo", "Weight", "describe", "dtype_name", "open_files", "pack_thudm_quant",
    "read_thudm_quant",
]  # fmt: skip

LFS = b"version https://git-lfs"
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Source(Protocol):
    """Named weights of one checkpoint, in its own names and orders."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it. KeyError for a name that is not there."""
        ...

    def stored(self, name: str) -> list[tuple[str, int]]:
        """(type, bytes) of what is stored for a tensor, scales with their matrix; read from headers."""
        ...

    def get(self, name: str) -> Weight:
        """A tensor. KeyError for a name that is not there."""
        ...


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in one file: n_bytes from `offset` on, or, with strides (in elements), in a longer span.

    check: its name and the CRC-32 of its bytes, where the file has one.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    check: tuple[str, int] | None = None

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def span_bytes(self) -> int:
        """From the first element to the last."""
        if self.strides is None or not self.n_bytes:
            return self.n_bytes
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    def read(self) -> Tensor:
        if not self.n_bytes:
            return torch.empty(self.shape, dtype=self.dtype)
        data = bytearray(self.span_bytes)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            view, done = memoryview(data), 0
            while done < len(data):
                n = file.readinto(view[done:])
                if not n:
                    raise ValueError(f"{self.file} ends inside a tensor: it was cut short; fetch it again")
                done += n
            # The pages stay the kernel's to drop: a large checkpoint must not push everything else out of memory.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), self.offset, len(data), os.POSIX_FADV_DONTNEED)
        if self.check is not None and zlib.crc32(data) != self.check[1]:
            raise ValueError(f"{self.file} is damaged inside the tensor {self.check[0]}: fetch it again")
        flat = torch.frombuffer(data, dtype=self.dtype)
        return flat.view(self.shape) if self.strides is None else flat.as_strided(self.shape, self.strides).contiguous()


class FileSource:
    """The tensors of one or several files."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = dict(tensors)

    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def stored(self, name: str) -> list[tuple[str, int]]:
        return [(dtype_name(self.tensors[name].dtype), self.tensors[name].n_bytes)]

    def get(self, name: str) -> Weight:
        return self.tensors[name].read()


def read_thudm_quant(weight: Tensor, scale: Tensor, columns: int) -> QuantTensor:
    """The INT8 and INT4 form of GLM-130B and ChatGLM: scales of whole rows, the even column in the high half.

    weight: (rows, columns) int8, or (rows, columns / 2) with two's complement halves. scale: (rows,), or (rows, n)
    where n ranks scaled their columns apart.
    """
    scale = scale.view(weight.shape[0], -1)
    if weight.shape[1] == columns:
        return QuantTensor(weight, scale)
    if 2 * weight.shape[1] != columns:
        raise ValueError(f"a packed matrix has {weight.shape[1]} bytes a row, {columns} columns need {columns // 2}")
    data = weight.view(torch.uint8)
    high, low = (data >> 4) ^ 8, (data & 15) ^ 8  # two's complement -> 0..15 around 8
    return QuantTensor(pack_int4(torch.stack([high, low], -1).flatten(-2)), scale)


def pack_thudm_quant(weight: QuantTensor) -> tuple[Tensor, Tensor]:
    """(packed int8, scales): the inverse of `read_thudm_quant`. ValueError for a form that it cannot hold."""
    if weight.minimum is not None or weight.scale.shape[1] != 1:
        raise ValueError(
            "a quantised matrix whose rows have several scales (groups of columns, or ranks scaled apart) or a minimum "
            "has no form there: give --tp with the ranks that they were scaled for, or start from unquantised weights, "
            "with --quantize int4 --group row"
        )
    scale = weight.scale[:, 0].contiguous()
    if weight.bits == 8:
        return weight.q, scale
    values = unpack_int4(weight.q).view(weight.shape[0], -1, 2) ^ 8  # 0..15 around 8 -> two's complement
    return ((values[..., 0] << 4) | values[..., 1]).view(torch.int8), scale


# -------------------------------------------------------------------- opening


def open_files(folder: Path) -> FileSource:
    """All tensors of a folder: those that its index names, else all of its .safetensors, else of its .bin files.

    Raises ValueError in one line for a missing, damaged or cut-short file.
    """
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            return _indexed(folder, folder / index)
    for pattern in ("*.safetensors", "*.bin"):
        files = sorted(p for p in folder.glob(pattern) if p.name not in ("training_args.bin", "optimizer.bin"))
        if files:
            return FileSource(_merged((path, open_file(path)) for path in files))
    raise ValueError(f"{folder} holds no weights (*.safetensors or *.bin): fetch the checkpoint again")


def open_file(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, from its header."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: fetch it")
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull")
    return _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)


def _indexed(folder: Path, index: Path) -> FileSource:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{index} is damaged: it needs a weight_map; fetch it again") from None
    shards: dict[str, dict[str, TensorInfo]] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise ValueError(f"{folder / shard} is missing, {index.name} names it: fetch it")
        shards[shard] = open_file(folder / shard)
    tensors = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise ValueError(f"{folder / shard} lacks the tensor {name} that {index.name} places there: fetch it again")
        tensors[name] = shards[shard][name]
    return FileSource(tensors)


def _merged(files: Iterable[tuple[Path, dict[str, TensorInfo]]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for path, found in files:
        for name in found:
            if name in tensors:
                raise ValueError(f"{path} and {tensors[name].file.name} both hold {name}: remove the one not wanted")
        tensors |= found
    return tensors


def _safetensors(path: Path) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError
            header = json.loads(file.read(length))
    except (struct.error, ValueError):
        raise ValueError(f"{path} has a damaged header or was cut short: fetch it again") from None
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: {name} has type {entry['dtype']}, which is not supported")
        begin, end = entry["data_offsets"]
        info = TensorInfo(path, 8 + length + begin, SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]))
        if info.offset + info.n_bytes > size or info.n_bytes != end - begin:
            raise ValueError(f"{path} was cut short inside the tensor {name} ({size} bytes are there): fetch it again")
        tensors[name] = info
    return tensors


def _torch_file(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and offsets of a file that torch.save wrote; the tensors' bytes are not read, no code is run."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not zipfile.is_zipfile(path):
        cut = _cut_tensor(path)
        what = f"was cut short inside the tensor {cut}" if cut else "is cut short or no file of torch.save (zip form)"
        raise ValueError(f"{path} {what}: fetch it again")
    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {found[1]}" if found else "it is no plain pickle"
        raise ValueError(f"{path} holds more than tensors and is refused, nothing of it was run ({reason})") from None
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): fetch it again") from None
    for key in ("module", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not named tensors")
    size, sums, tensors = path.stat().st_size, _sums(path), {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        assert offset is not None, "this PyTorch does not tell offsets in checkpoint files"
        strides = None if tensor.is_contiguous() else tuple(tensor.stride())  # a part of a larger matrix, or turned
        start = offset + tensor.storage_offset() * tensor.element_size()
        info = TensorInfo(path, start, tensor.dtype, tuple(tensor.shape), strides)
        if (start, info.span_bytes) in sums:
            info = replace(info, check=(name, sums[start, info.span_bytes]))
        if info.offset + info.span_bytes > size:
            raise ValueError(f"{path} was cut short inside the tensor {name}: fetch it again")
        tensors[name] = info
    return tensors


def _sums(path: Path) -> dict[tuple[int, int], int]:
    """(offset, bytes) -> CRC-32 of the records of a zip; 0 in it says that none was computed."""
    found = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for record in archive.infolist():
            file.seek(record.header_offset + 26)
            name_size, extra_size = struct.unpack("<HH", file.read(4))
            if record.CRC and not record.compress_type:
                found[record.header_offset + 30 + name_size + extra_size, record.file_size] = record.CRC
    return found


def _cut_tensor(path: Path) -> str | None:
    """The tensor inside which a file of torch.save ends that has lost its table of contents; None: not to be told.

    Such a file is a zip: the pickle that names the tensors comes first, then each storage under its number.
    """
    with open(path, "rb") as file, contextlib.suppress(OSError, ValueError, IndexError, struct.error):
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            last = re.match(rb"[^/]+/data/(\d+)FB", data[data.rfind(b"PK\3\4") + 30 :][:99])
            if not data[:4] == b"PK\3\4" or last is None:
                return None
            name_size, extra_size = struct.unpack("<HH", data[26:30])
            if not data[30 : 30 + name_size].endswith(b"/data.pkl"):
                return None
        file.seek(30 + name_size + extra_size)
        return _names_of_storages(file).get(last[1].decode())
    return None


def _names_of_storages(file: BinaryIO) -> dict[str, str]:
    """Number of a storage -> first tensor in it, from a pickled state dict that is read as a list of instructions.

    A storage is a tuple ("storage", type, number, device, size) behind the name of its tensor.
    """
    found: dict[str, str] = {}
    texts: list[str] = []
    memo: dict[Any, str | None] = {}
    last: str | None = None
    for op, value, _ in pickletools.genops(file):
        if op.name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = last
            continue
        last = value if op.name == "BINUNICODE" else memo.get(value) if op.name in ("BINGET", "LONG_BINGET") else None
        if last is not None:
            texts.append(last)
        if op.name == "BINPERSID":
            found.setdefault(texts[-2], texts[-4])
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")


def describe(names: Sequence[str]) -> str:
    """The first name and how many more, for an error message."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
