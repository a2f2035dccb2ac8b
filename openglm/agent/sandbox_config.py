"""How code of a model is run: limits, and what it may see. One frozen description."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

__all__ = ["SandboxConfig"]

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    """Limits of one sandbox.

    timeout_s: of one call, when the caller gives none; grace_s: how long a call may take to stop when it is told to.
    start_timeout_s: until the kernel answers. cpu_s: of all processes together, from the start of the kernel on.
    memory_bytes: private memory of all processes together, and of each. n_processes: processes and threads.
    disk_bytes, n_files: of the work folder, all it can hold; scratch_bytes: of the temporary folder with the home.
    file_bytes: of one file. output_bytes: of each stream that a result keeps; a call that prints more than flood_bytes
    is stopped. n_images: pictures kept of one call. n_threads: of numerical libraries.
    read_only: folders of the host, seen under /inputs. host_uid: who runs it outside, when the caller is root.
    isolation: "bubblewrap", "container", or the first that works. container_image: see docs/TOOLS.md.
    unsafe_python: no isolation at all, with the rights of the caller.
    n_live: kernels of a pool that run at once; idle_s: after which it stops one (its files are kept).
    """

    timeout_s: float = 60.0
    grace_s: float = 3.0
    start_timeout_s: float = 60.0
    cpu_s: float = 600.0
    memory_bytes: int = 1024 * MIB
    n_processes: int = 64
    disk_bytes: int = 256 * MIB
    scratch_bytes: int = 64 * MIB
    file_bytes: int = 128 * MIB
    n_files: int = 4096
    output_bytes: int = 20_000
    flood_bytes: int = 16 * MIB
    n_images: int = 16
    n_threads: int = 1
    read_only: tuple[Path, ...] = ()
    host_uid: int = 65534
    isolation: Literal["auto", "bubblewrap", "container"] = "auto"
    container_image: str = "openglm-sandbox"
    unsafe_python: bool = False
    n_live: int = 8
    idle_s: float = 1800.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "float") and not value > 0:
                raise ValueError(f"{field.name} must be above 0, not {value}")
        if self.memory_bytes < 256 * MIB:
            raise ValueError(f"memory_bytes must be at least {256 * MIB} (the kernel itself), not {self.memory_bytes}")
        if self.n_processes < 24:
            raise ValueError(f"n_processes must be at least 24 (the kernel has threads), not {self.n_processes}")
        if self.isolation not in ("auto", "bubblewrap", "container"):
            raise ValueError(f"isolation must be auto, bubblewrap or container, not {self.isolation!r}")
        object.__setattr__(self, "read_only", tuple(Path(folder) for folder in self.read_only))
        names = [folder.name for folder in self.read_only]
        if len(set(names)) != len(names) or not all(folder.is_dir() for folder in self.read_only):
            raise ValueError("read_only must be folders with different names")
