"""Builds the native library from csrc/ with the system's C++ compiler. Imports nothing of the package.

    python -m openglm.ops.build       # again, after a change of csrc/ or when a compiler came later

The package's own build runs the same (hatch_build.py). Each instruction set is one file with flags of its own; one that
the compiler does not know is left out. CXX names another compiler; OPENGLM_NATIVE=0 builds nothing, =require fails
where nothing can be built.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["LIBRARY", "build"]

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = Path(__file__).parent / ("_native.dll" if sys.platform == "win32" else "_native.so")

# -ffp-contract=off: a product and a sum become one rounding only where the code says so, whatever is inlined.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
COMMON = ["forward", "pack", "threads"]
X86 = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx2vnni": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))],
}
ARM = {"neon": ["-march=armv8.2-a+dotprod+fp16"]}


def build(say: bool = True) -> Path | None:
    """Compile and link; returns the library, or None where there is no compiler or it fails. `say`: tell on stderr."""
    wanted = os.environ.get("OPENGLM_NATIVE", "1")
    if wanted == "0":
        return None
    compiler = shlex.split(os.environ.get("CXX", "")) or _compiler()
    problem = "no C++ compiler found"
    if compiler:
        try:
            return _compiled(compiler, say)
        except subprocess.CalledProcessError as error:
            problem = f"{compiler[0]} failed: {error.stderr.strip()[-500:]}"
        except OSError as error:
            problem = f"{compiler[0]}: {error.strerror}"
    if wanted == "require":
        raise SystemExit(f"openglm: {problem}")
    if say:
        print(f"openglm: {problem}; PyTorch's operators will be used instead", file=sys.stderr)
    return None


def _compiler() -> list[str]:
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return [found] if found else []


def _compiled(compiler: list[str], say: bool) -> Path:
    machine = platform.machine().lower()
    sets = X86 if machine in ("x86_64", "amd64") else ARM if machine in ("arm64", "aarch64") else {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile(name: str, *flags: str) -> str:
            out = os.path.join(folder, f"{name}.o")
            command = [*compiler, *FLAGS, *flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", out]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return out

        tasks = {name: pool.submit(compile, f"isa_{name}", *flags) for name, flags in sets.items()}
        objects = list(pool.map(compile, ["isa_plain", *COMMON]))
        built = []
        for name, task in tasks.items():
            try:
                objects.append(task.result())
                built.append(name)
            except subprocess.CalledProcessError:
                pass  # an older compiler, which does not know this instruction set
        objects.append(compile("dispatch", *(f"-DOG_{name.upper()}" for name in built)))
        made = LIBRARY.with_name(f"{LIBRARY.name}.{os.getpid()}.tmp")
        subprocess.run([*compiler, "-shared", "-pthread", *objects, "-o", str(made)], check=True, capture_output=True,
                       text=True)  # fmt: skip
    made.replace(LIBRARY)  # processes that run keep the file they have open
    if say:
        print(f"openglm: built {LIBRARY.name} (plain, {', '.join(built) or 'nothing else'})", file=sys.stderr)
    return LIBRARY


if __name__ == "__main__":
    sys.exit(build() is None)
