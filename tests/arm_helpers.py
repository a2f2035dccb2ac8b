"""The native library of 64-bit ARM on another machine: cross-compiled, emulated, called as if it were here.

A call sends all memory that its arguments point to and brings it back (arm_server.cpp); `RemoteLibrary` knows how long
each piece is. Speed means nothing there, results do.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import struct
import subprocess
from ctypes import Structure
from pathlib import Path
from typing import Any
from unittest import mock

from openglm.model.gguf_types import TYPES
from openglm.ops import build, native

COMPILER, EMULATOR, SYSTEM = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
CPUS = {"neon": "cortex-a72", "neon-dotprod": "neoverse-n1", "neon-i8mm": "max"}  # each the best that its CPU has
SERVER = Path(__file__).with_name("arm_server.cpp")
FLOATS = {native.F32: 4, native.F16: 2, native.BF16: 2}


def missing() -> str | None:
    """Why the library of ARM cannot be tested here."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "this machine runs NEON itself"
    absent = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    if not Path(SYSTEM, "lib").is_dir():
        absent.append(SYSTEM)
    return f"needs {' and '.join(absent)} (Debian: g++-aarch64-linux-gnu, qemu-user)" if absent else None


def built(folder: Path) -> tuple[Path, Path]:
    """(library, server), compiled once for all processes and later runs, until a source changes."""
    sources = [Path(build.__file__), SERVER, *sorted(build.SOURCES.iterdir())]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    library, server = folder / f"native-{key}.so", folder / f"server-{key}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (library.exists() and server.exists()):
            for old in [*folder.glob("native-*"), *folder.glob("server-*")]:
                old.unlink()
            with mock.patch.dict(os.environ, {"CXX": COMPILER, "OPENGLM_NATIVE": "require"}):
                build.build(say=False, library=library)
            subprocess.run([COMPILER, "-O1", "-std=c++17", str(SERVER), "-o", str(server), "-ldl"], check=True)
    return library, server


Argument = int | bytes | tuple[int | None, int] | list[Any] | None


class Call:
    """One call on its way: blocks of memory and the pointers between them."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.blocks: list[bytes] = []
        self.addresses: list[int | None] = []  # where a block comes from and goes back to; None: it was a structure
        self.pointers: list[tuple[int, int, int]] = []
        self.model: Any = None
        self.page_size = self.n_steps = 1

    def add(self, content: bytes, address: int | None = None) -> int:
        self.blocks.append(content)
        self.addresses.append(address)
        return len(self.blocks) - 1

    def memory(self, address: int, n_bytes: int) -> int:
        return self.add(ctypes.string_at(address, n_bytes), address)

    def structures(self, *items: Structure) -> int:
        """Side by side, with all that they point to."""
        if isinstance(items[0], native.ModelStruct):
            self.model = items[0]
        if isinstance(items[0], native.PoolStruct):
            self.page_size = items[0].page_size
        if isinstance(items[0], native.BurstStruct):
            self.n_steps = items[0].n_steps
        block = self.add(b"".join(map(bytes, items)))
        for number, item in enumerate(items):
            self._follow(block, number * ctypes.sizeof(item), item)
        return block

    def _follow(self, block: int, base: int, item: Any) -> None:
        for name, kind in item._fields_:
            value, offset = getattr(item, name), base + getattr(type(item), name).offset
            if isinstance(value, Structure):
                self._follow(block, offset, value)
            elif isinstance(value, ctypes.Array):
                for i, part in enumerate(value):
                    self._follow(block, offset + i * ctypes.sizeof(part), part)
            elif isinstance(value, bytes):
                self.pointers.append((block, offset, self.add(value + b"\0")))
            elif isinstance(value, ctypes._Pointer):
                n = {"layers": "n_layers", "chunks": "n_chunks", "streams": "n_streams"}[name]
                self.pointers.append((block, offset, self.structures(*value[: getattr(item, n)])))
            elif kind is ctypes.c_void_p and value:
                self.pointers.append((block, offset, self.memory(value, self._bytes(item, name))))

    def _bytes(self, item: Any, name: str) -> int:
        """How much memory a pointer means."""
        model = self.model
        if isinstance(item, native.MatrixStruct):
            if item.kind in FLOATS:
                return int(item.rows * item.columns * FLOATS[item.kind])
            rows, blocks = -(-item.rows // self.lanes) * self.lanes, -(-item.columns // 32)
            width = {native.INT4: 16, native.INT6: 24, native.INT8: 32}[item.kind]
            return int(rows * (blocks * width if name == "data" else 2 * -(-item.columns // item.group)))
        if isinstance(item, native.GgufMatrixStruct):
            kind = TYPES[item.type.decode()]
            return int(item.to.rows * (8 if name == "order" else item.to.columns // kind.block * kind.n_bytes))
        if isinstance(item, native.LinearStruct):
            return 4 * sum(part.rows for part in item.parts[: item.n_parts])
        if isinstance(item, native.PoolStruct):
            size = 1 if item.kind == native.INT8 else FLOATS[item.kind]
            rows = model.n_layers * item.n_pages * model.n_kv_heads * item.page_size
            return int(rows * model.head_dim * size)
        if isinstance(item, native.ChunkStruct):
            return int(4 * -(-max(item.start + item.n_tokens, item.n_context) // self.page_size))
        if isinstance(item, native.StreamStruct):
            pages = -(-(item.start + self.n_steps) // self.page_size)
            positions = (item.axes - 1) * item.stride + self.n_steps
            return int({"pages": 4 * pages, "positions": 8 * positions, "stop_ids": 8 * item.n_stop_ids}[name])
        if isinstance(item, native.BurstStruct):
            return int({"wanted": 4, "seconds": 8 * item.n_steps}.get(name, 8 * item.n_steps * item.n_streams))
        sizes = {"ids": "n_tokens", "positions": "n_tokens", "outputs": "n_outputs", "logits": "n_outputs"}
        n = getattr(item, sizes[name]) if name in sizes else 1
        width = {
            "weight": 4 * model.dim, "bias": 4 * model.dim, "key_centre": 4 * model.n_kv_heads * model.head_dim,
            "inv_freq": 4 * model.n_frequencies, "ids": 8, "positions": 8 * model.axes, "outputs": 4,
            "logits": 4 * model.vocab_size,
        }[name]  # fmt: skip
        return int(n * width)


class RemoteLibrary:
    """Stands for the library that `native.library` loads."""

    def __init__(self, folder: Path, cpu: str) -> None:
        library, server = built(folder)
        command = [EMULATOR, "-L", SYSTEM, "-cpu", cpu, str(server), str(library)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._lanes = 0
        self._lanes = self.og_lanes()

    def close(self) -> None:
        self._process.communicate()

    def _call(self, name: str, *arguments: Argument) -> tuple[int, bytes]:
        """The result, and the text that it points to. Arguments: numbers, texts, memory as (address, bytes), structures
        side by side."""
        call, sent = Call(self._lanes), []
        for argument in arguments:
            if isinstance(argument, bytes):
                sent.append((call.add(argument + b"\0"), True))
            elif isinstance(argument, list):
                sent.append((call.structures(*argument), True))
            elif isinstance(argument, tuple) and argument[0]:
                sent.append((call.memory(argument[0], argument[1]), True))
            else:
                sent.append((argument if isinstance(argument, int) else 0, False))
        return self._send(name, call, sent)

    def _send(self, name: str, call: Call, arguments: list[tuple[int, bool]]) -> tuple[int, bytes]:
        to, back = self._process.stdin, self._process.stdout
        assert to is not None and back is not None

        def number(*values: int) -> None:
            to.write(struct.pack(f"<{len(values)}q", *values))

        number(len(name))
        to.write(name.encode())
        number(len(call.blocks))
        for content in call.blocks:
            number(len(content))
            to.write(content)
        for numbers in (call.pointers, arguments):
            number(len(numbers))
            for each in numbers:
                number(*each)
        to.flush()

        def read(n: int) -> bytes:
            content = back.read(n)
            assert len(content) == n, f"{name} ended the emulated process: {self._process.wait()}"
            return content

        result = struct.unpack("<q", read(8))[0]
        for before, address in zip(call.blocks, call.addresses, strict=True):
            content = read(len(before))
            if address is not None and content != before:
                ctypes.memmove(address, content, len(content))
        return result, read(struct.unpack("<q", read(8))[0])

    def og_lanes(self) -> int:
        return self._call("og_lanes")[0] & 0xFFFFFFFF

    def og_threads(self) -> int:
        return self._call("og_threads")[0] & 0xFFFFFFFF

    def og_set_threads(self, n: int) -> None:
        self._call("og_set_threads", n)

    def og_isa(self, i: int) -> bytes | None:
        return self._call("og_isa", i)[1] or None

    def og_isa_in_use(self) -> bytes:
        return self._call("og_isa_in_use")[1]

    def og_layout(self) -> int:
        return self._call("og_layout")[0]

    def og_workspace_new(self) -> int:
        return self._call("og_workspace_new")[0]

    def og_workspace_free(self, workspace: int) -> None:
        self._call("og_workspace_free", workspace)

    def og_forward(self, model: Any, pool: Any, batch: Any, workspace: int) -> int:
        return self._call("og_forward", [model._obj], [pool._obj], [batch._obj], workspace)[0] & 1

    def og_decode(self, model: Any, pool: Any, burst: Any, workspace: int) -> int:
        return self._call("og_decode", [model._obj], [pool._obj], [burst._obj], workspace)[0]

    def og_pick(self, row: int, n: int, sampling: Any, u: Any) -> int:
        return self._call("og_pick", (row, 4 * n), n, [sampling._obj], (ctypes.addressof(u._obj), 8))[0]

    def og_sum_exp(self, row: int, n: int, peak: float) -> float:
        bits = struct.unpack("<i", struct.pack("<f", peak))[0]
        return float(struct.unpack("<d", struct.pack("<q", self._call("og_sum_exp", (row, 4 * n), n, bits)[0]))[0])

    def og_pack(self, to: Any, q: int, scale: int, minimum: int | None) -> None:
        w = to._obj
        scales = 2 * w.rows * -(-w.columns // w.group)
        n_bytes = w.rows * (-(-w.columns // 2) if w.kind == native.INT4 else w.columns)
        self._call("og_pack", [w], (q, n_bytes), (scale, scales), (minimum, scales))

    def og_pack_gguf(self, matrices: Any, n: int) -> None:
        self._call("og_pack_gguf", list(matrices), n)

    def og_fits_int6(self, q: int, n: int) -> int:
        return self._call("og_fits_int6", (q, n), n)[0] & 1

    def og_rows(self, w: Any, rows: int | None, first: int, n: int, out: int) -> None:
        self._call("og_rows", [w._obj], (rows, 8 * n), first, n, (out, 4 * n * w._obj.columns))

    def og_unpack_gguf(self, type: bytes, blocks: int, n: int, q: int, scale: int, minimum: int | None) -> int:
        kind, shared = TYPES[type.decode()], 16 if type == b"Q6_K" else 32
        scales, n_bytes = 2 * n * kind.block // shared, n * kind.block // (2 if type.startswith(b"Q4") else 1)
        memory = (blocks, n * kind.n_bytes), n, (q, n_bytes), (scale, scales), (minimum, scales)
        return self._call("og_unpack_gguf", type, *memory)[0] & 1
