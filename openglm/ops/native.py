"""The native library: C++ kernels for CPUs (csrc/), called through ctypes on the memory of tensors.

    python -c "from openglm.ops.native import describe; print(describe())"

Weights are packed once (`pack`); then `forward` runs a whole pass of a decoder in one call. Activations are rounded to
INT8, 32 columns to a scale, where a matrix is quantised; plain matrices are multiplied in float32. Everything here has
a slower twin on PyTorch's operators, which is used where the library is not there. OPENGLM_NATIVE=0 switches it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int64, c_void_p
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from openglm.ops.build import LIBRARY
from openglm.ops.quant import QuantTensor
from openglm.ops.structs import (
    Batch,
    BurstStruct,
    ChunkStruct,
    GgufMatrixStruct,
    LayerStruct,
    LinearStruct,
    MatrixStruct,
    ModelStruct,
    NormStruct,
    PoolStruct,
    SamplingStruct,
    StreamStruct,
)

__all__ = [
    "Batch", "BurstStruct", "ChunkStruct", "GgufMatrix", "LayerStruct", "LinearStruct", "MatrixStruct", "ModelStruct",
    "NormStruct", "PackedMatrix", "PoolStruct", "SamplingStruct", "StreamStruct", "available", "describe", "library",
    "matrix_of", "pack", "pack_gguf", "packable", "pick", "set_threads", "sum_exp", "unpack_gguf", "use_isa",
]  # fmt: skip

INT4, INT6, INT8, F32, F16, BF16 = range(6)
KINDS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16, torch.int8: INT8}
THREADS = torch.get_num_threads()  # seen at import: readers of weights turn theirs down to one for a while
TILE_ROWS = 96  # query heads that may share keys: OG_TILE_ROWS of openglm.h
MLPS = {"gelu": 0, "geglu": 1, "swiglu": 2}


# ---------------------------------------------------------------- the library


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where it was not built or is switched off."""
    if os.environ.get("OPENGLM_NATIVE") == "0" or not LIBRARY.is_file():
        return None
    try:
        lib = ctypes.CDLL(str(LIBRARY))
    except OSError:  # built for another machine
        return None
    if not _fits(lib):
        print("openglm: the native library is older than this code and is not used: python -m openglm.ops.build",
              file=sys.stderr)  # fmt: skip
        return None
    lib.og_isa.restype = lib.og_isa_in_use.restype = ctypes.c_char_p
    lib.og_workspace_new.restype = c_void_p
    lib.og_workspace_free.argtypes = [c_void_p]
    lib.og_forward.argtypes = [c_void_p] * 4
    lib.og_decode.argtypes, lib.og_decode.restype = [c_void_p] * 4, c_int64
    lib.og_pick.argtypes, lib.og_pick.restype = [c_void_p, c_int64, c_void_p, c_void_p], c_int64
    lib.og_sum_exp.argtypes, lib.og_sum_exp.restype = [c_void_p, c_int64, c_float], ctypes.c_double
    lib.og_pack.argtypes = [c_void_p] * 4
    lib.og_pack_gguf.argtypes = [c_void_p, c_int64]
    lib.og_fits_int6.argtypes = [c_void_p, c_int64]
    lib.og_rows.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_void_p]
    lib.og_unpack_gguf.argtypes = [ctypes.c_char_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p]
    if (wanted := os.environ.get("OPENGLM_ISA")) and not lib.og_use_isa(wanted.encode()):
        names = ", ".join(_isas(lib))
        raise ValueError(f"OPENGLM_ISA={wanted} does not run here: {names} do")
    lib.og_set_threads(THREADS)
    return lib


def _fits(lib: ctypes.CDLL) -> bool:
    """Whether the library was built for the structures of this file."""
    if not hasattr(lib, "og_layout"):
        return False
    lib.og_layout.restype = c_int64
    layout = 0
    for struct in (ModelStruct, LayerStruct, PoolStruct, Batch, StreamStruct, BurstStruct):
        layout = layout * 1024 + ctypes.sizeof(struct)
    return bool(lib.og_layout() == layout)


def available() -> bool:
    return library() is not None


def _isas(lib: ctypes.CDLL) -> list[str]:
    names: list[str] = []
    while name := lib.og_isa(len(names)):
        names.append(name.decode())
    return names


def describe() -> dict[str, Any]:
    """For `openglm doctor`: whether the library is there, the instruction set in use and those that run, threads."""
    lib = library()
    if lib is None:
        return {"available": False}
    isas = _isas(lib)
    return {"available": True, "isa": lib.og_isa_in_use().decode(), "isas": isas, "threads": int(lib.og_threads())}


def use_isa(name: str) -> None:
    """Run that instruction set from now on. What is packed for another number of lanes must be packed again."""
    lib = library()
    assert lib is not None and lib.og_use_isa(name.encode()), f"{name} does not run here"


def set_threads(n: int) -> None:
    """Threads of every later call; PyTorch's number at the start."""
    if n < 1:
        raise ValueError(f"threads must be at least 1, not {n}")
    lib = library()
    if lib is not None:
        lib.og_set_threads(n)


# ---------------------------------------------------------------- matrices


@dataclass(frozen=True)
class PackedMatrix:
    """A quantised matrix (rows, columns) in the order that the kernels read; see csrc/pack.cpp.

    data: (n,) uint8. scale: (row blocks, groups, lanes) float16. minimum: like scale, or None.
    """

    kind: int
    rows: int
    columns: int
    group: int
    data: Tensor
    scale: Tensor
    minimum: Tensor | None

    def struct(self) -> MatrixStruct:
        """Pointers into the tensors, valid as long as those live."""
        minimum = None if self.minimum is None else self.minimum.data_ptr()
        return MatrixStruct(
            self.kind, self.group, self.rows, self.columns, self.data.data_ptr(), self.scale.data_ptr(), minimum
        )

    def dequantise(self, first: int = 0, n: int | None = None) -> Tensor:
        """Rows first .. first + n as (n, columns) float32."""
        return self._rows(None, first, self.rows - first if n is None else n)

    def take(self, index: Tensor) -> Tensor:
        """The rows of that index (n,) int64, as (n, columns) float32. Raises IndexError for one outside."""
        if len(index) and not (0 <= int(index.min()) and int(index.max()) < self.rows):
            raise IndexError(f"a row outside of {self.rows}")
        return self._rows(index.contiguous(), 0, len(index))

    def _rows(self, index: Tensor | None, first: int, n: int) -> Tensor:
        lib = library()
        assert lib is not None
        out = torch.empty(n, self.columns)
        pointer = None if index is None else index.data_ptr()
        lib.og_rows(ctypes.byref(self.struct()), pointer, first, n, out.data_ptr())
        return out


def packable(weight: QuantTensor) -> bool:
    """Whether the kernels know this form: groups of 16 (without a minimum), a multiple of 32 or whole rows; float16."""
    if not available() or weight.q.device.type != "cpu" or (weight.bits == 8 and weight.minimum is not None):
        return False
    group = weight.group_size
    fits = group == weight.columns or group % 32 == 0 or (group == 16 and weight.bits == 8)
    exact = weight.scale.dtype == torch.float16 or bool((weight.scale.half().float() == weight.scale.float()).all())
    return fits and exact


def pack(weight: QuantTensor) -> PackedMatrix:
    """A matrix that is `packable`, in memory of its own. INT8 that only uses -32 to 31 takes six bits."""
    lib = library()
    assert lib is not None and packable(weight)
    q = weight.q.contiguous()
    kind = INT4 if weight.bits == 4 else INT6 if lib.og_fits_int6(q.data_ptr(), q.numel()) else INT8
    scale, minimum = weight.scale.half().contiguous(), None
    packed = _empty(kind, *weight.shape, weight.group_size, weight.minimum is not None)
    if weight.minimum is not None:
        minimum = weight.minimum.half().contiguous()
    pointer = None if minimum is None else minimum.data_ptr()
    lib.og_pack(ctypes.byref(packed.struct()), q.data_ptr(), scale.data_ptr(), pointer)
    return packed


def _empty(kind: int, rows: int, columns: int, group: int, has_minimum: bool) -> PackedMatrix:
    """A packed matrix to be filled."""
    lib = library()
    assert lib is not None
    lanes, n_groups = lib.og_lanes(), columns // group
    # A group that is a whole row is as wide as the padded row: the kernels count groups in blocks of 32.
    group = group if group != columns else -(-columns // 32) * 32
    n_blocks = -(-rows // lanes)
    n_bytes = {INT4: 16, INT6: 24, INT8: 32}[kind] * lanes * n_blocks * -(-columns // 32)
    shape, n_scales = (n_blocks, n_groups, lanes), n_blocks * n_groups * lanes
    data = _memory(n_bytes)
    scale = _memory(2 * n_scales).view(torch.float16).view(shape)
    minimum = _memory(2 * n_scales).view(torch.float16).view(shape) if has_minimum else None
    return PackedMatrix(kind, rows, columns, group, data, scale, minimum)


class _Arena:
    """Where packed matrices lie: large mappings, filled one after another, on huge pages where the system gives them.
    A pass reads all weights once; on pages of 4 KiB it would look up most of them anew every time."""

    def __init__(self) -> None:
        self.memory: mmap.mmap | None = None
        self.used = self.size = 0

    def take(self, n_bytes: int) -> Tensor:
        if self.memory is None or self.used + n_bytes > self.size:
            self.size, self.used = max(64 << 20, -(-n_bytes // (2 << 20)) * (2 << 20)), 0
            self.memory = mmap.mmap(-1, self.size)
            with contextlib.suppress(AttributeError, OSError):  # another system, or a kernel without them
                self.memory.madvise(mmap.MADV_HUGEPAGE)
        taken = torch.frombuffer(self.memory, dtype=torch.uint8, count=n_bytes, offset=self.used)
        self.used += -(-n_bytes // 64) * 64
        return taken


_ARENA = _Arena()


def _memory(n_bytes: int) -> Tensor:
    return _ARENA.take(n_bytes)


@dataclass(frozen=True)
class GgufMatrix:
    """A matrix (rows, columns) as it lies in a GGUF file, in a type that `unpack_gguf` knows.

    group: columns of a scale in our form. data: (n,) uint8, the blocks, which stay where they are. order: (rows,)
    int64, row r comes from row order[r] of the file; None: as they lie. mapped: data is a file's memory, whose pages
    may be given back when they are read.
    """

    type: str
    shape: tuple[int, int]
    group: int
    has_minimum: bool
    data: Tensor
    order: Tensor | None = None
    mapped: bool = False

    def take_rows(self, first: int, last: int) -> GgufMatrix:
        """Rows first .. last, of a matrix whose rows are as they lie."""
        assert self.order is None
        n_bytes = self.data.numel() // self.shape[0]
        data = self.data[first * n_bytes : last * n_bytes]
        return replace(self, shape=(last - first, self.shape[1]), data=data)

    def empty(self) -> PackedMatrix:
        """What it will be packed into: Q5_0 and Q6_K take six bits."""
        kind = INT4 if self.type.startswith("Q4") else INT8 if self.type == "Q8_0" else INT6
        return _empty(kind, *self.shape, self.group, self.has_minimum)


def pack_gguf(jobs: Sequence[tuple[GgufMatrix, PackedMatrix]]) -> None:
    """Fill packed matrices that `empty` made, in one call which leaves the interpreter to others meanwhile."""
    if not jobs:  # without the library there are none
        return
    lib = library()
    assert lib is not None
    structs = (GgufMatrixStruct * len(jobs))()
    for struct, (matrix, packed) in zip(structs, jobs, strict=True):
        assert matrix.data.is_contiguous() and (matrix.order is None or matrix.order.is_contiguous())
        order = None if matrix.order is None else matrix.order.data_ptr()
        struct.to, struct.type, struct.blocks = packed.struct(), matrix.type.encode(), matrix.data.data_ptr()
        struct.order, struct.n_mapped = order, matrix.data.numel() if matrix.mapped else 0
    lib.og_pack_gguf(structs, len(jobs))


def matrix_of(weight: Tensor) -> MatrixStruct:
    """A plain matrix (rows, columns), contiguous float32, float16 or bfloat16."""
    assert weight.dim() == 2 and weight.is_contiguous() and weight.dtype in KINDS
    return MatrixStruct(KINDS[weight.dtype], 0, weight.shape[0], weight.shape[1], weight.data_ptr(), None, None)


# ---------------------------------------------------------------- smaller services


def sum_exp(row: Tensor, peak: float) -> float | None:
    """Sum of exp(row - peak), float32, peak being the row's largest value; None without the library."""
    lib = library()
    if lib is None or not row.is_contiguous():
        return None
    assert row.dtype == torch.float32 and row.device.type == "cpu"
    return float(lib.og_sum_exp(row.data_ptr(), row.numel(), peak))


def pick(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int | None:
    """`ops.sampling.pick`; None without the library."""
    lib = library()
    if lib is None or not row.is_contiguous():
        return None
    assert row.dtype == torch.float32 and row.device.type == "cpu"
    sampling = SamplingStruct(temperature, top_p, min_p, top_k)
    found = int(lib.og_pick(row.data_ptr(), row.numel(), ctypes.byref(sampling), ctypes.byref(c_double(u))))
    if found == -2:
        raise MemoryError(f"no memory to draw from {row.numel()} tokens")
    assert found >= 0, "no token is possible"
    return found


def unpack_gguf(kind: str, blocks: Tensor, q: Tensor, scale: Tensor, minimum: Tensor | None) -> bool:
    """Blocks of a GGUF tensor (n, bytes) uint8 into our form; False for a type that the library does not know."""
    lib = library()
    if lib is None:
        return False
    assert blocks.is_contiguous() and q.is_contiguous() and scale.is_contiguous()
    pointer = None if minimum is None else minimum.data_ptr()
    done = lib.og_unpack_gguf(
        kind.encode(), blocks.data_ptr(), len(blocks), q.data_ptr(), scale.data_ptr(), pointer
    )  # fmt: skip
    return bool(done)
