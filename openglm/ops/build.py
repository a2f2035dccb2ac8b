"""Builds the native library from csrc/ with the system's C++ compiler. Imports nothing of the package.

    python -m openglm.ops.build       # again, after a change of csrc/ or when a compiler came later

The package's own build runs the same (hatch_build.py). Each instruction set is one file with flags of its own; one that
the compiler does not know is left out. CXX names another compiler; OPENGLM_NATIVE=0 builds nothing, =require fails
where nothing can be built.
"""

from __future__ import annotations

import os
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
COMMON = ["forward", "decode", "draw", "pack", "threads", "workspace"]
PLAIN: dict[str, list[str]] = {"plain": []}
X86 = PLAIN | {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx2vnni": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))],
}
ARM = {  # every one has NEON
    "neon": [],
    "neon_dot": ["-march=armv8.2-a+dotprod"],
    "neon_i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
}


def build(say: bool = True, library: Path = LIBRARY) -> Path | None:
    """Compile and link; returns the library, or None where there is no compiler or it fails. `say`: tell on stderr.

    It is for the machine that the compiler compiles for, which may be another one."""
    wanted = os.environ.get("OPENGLM_NATIVE", "1")
    if wanted == "0":
        return None
    compiler = shlex.split(os.environ.get("CXX", "")) or _compiler()
    problem = "no C++ compiler found"
    if compiler:
        try:
            return _compiled(compiler, say, library)
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


def _instruction_sets(compiler: list[str]) -> dict[str, list[str]]:
    """Those of the machine that it compiles for, with their flags."""
    command = [*compiler, "-dumpmachine"]  # x86_64-linux-gnu, arm64-apple-darwin24.1.0
    machine = subprocess.run(command, check=True, capture_output=True, text=True).stdout.lower()
    if machine.startswith(("x86_64", "amd64")):
        return X86
    return ARM if machine.startswith(("arm64", "aarch64")) else PLAIN


def _compiled(compiler: list[str], say: bool, library: Path) -> Path:
    sets = _instruction_sets(compiler)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile(name: str, *flags: str) -> str:
            out = os.path.join(folder, f"{name}.o")
            command = [*compiler, *FLAGS, *flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", out]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return out

        tasks = {name: pool.submit(compile, f"isa_{name}", *flags) for name, flags in sets.items()}
        objects = list(pool.map(compile, COMMON))
        built = []
        for name, task in tasks.items():
            try:
                objects.append(task.result())
                built.append(name)
            except subprocess.CalledProcessError:  # an older compiler, which does not know this instruction set
                if not built:  # the first one, which every compiler knows
                    raise
        objects.append(compile("dispatch", *(f"-DOG_{name.upper()}" for name in built)))
        made = library.with_name(f"{library.name}.{os.getpid()}.tmp")
        subprocess.run([*compiler, "-shared", "-pthread", *objects, "-o", str(made)], check=True, capture_output=True,
                       text=True)  # fmt: skip
    made.replace(library)  # processes that run keep the file they have open
    if say:
        print(f"openglm: built {library.name} ({', '.join(built)})", file=sys.stderr)
    return library


if __name__ == "__main__":
    sys.exit(build() is None)
