"""How long one pass of decoding takes with native libraries of several builds, in turns in one process.

    python bench/passes.py [MODEL] --libraries before.so after.so [--context 64] [--requests 1]

On a shared machine two processes a minute apart differ by more than a change of a kernel makes. Here the same weights
and the same pages are run by one library and by the other in turns, so that the machine's moods meet both. Each tree
builds its own with `python -m openglm.ops.build` (openglm/ops/_native.so); default: the package's own alone.
Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # without an installation

import openglm
from openglm.engine.native_runner import NativeRunner
from openglm.engine.runner import Chunk
from openglm.loading import resolve
from openglm.ops import native
from openglm.ops.build import LIBRARY

ROUNDS, PASSES, WARM = 6, 30, 5  # turns of each library, its passes in a turn, those of them that are not counted


def opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path.resolve()))
    if not native._fits(library):
        raise SystemExit(f"{path} was built for other structures than this tree's: it cannot run beside it")
    library.og_workspace_new.restype = ctypes.c_void_p
    library.og_forward.argtypes = [ctypes.c_void_p] * 4
    library.og_set_threads(native.THREADS)
    return library


def measure(runner: NativeRunner, libraries: dict[str, Path], context: int, requests: int) -> dict[str, list[float]]:
    """Milliseconds of each pass, by library."""
    per = context // runner.page_size + 1
    axes = runner.config.rope.axes
    chunks = [
        Chunk([100 + k], context, torch.full((axes, 1), context), range(k * per, (k + 1) * per))
        for k in range(requests)
    ]  # fmt: skip
    sides = [(name, lib, lib.og_workspace_new()) for name, lib in ((n, opened(p)) for n, p in libraries.items())]
    times: dict[str, list[float]] = {name: [] for name in libraries}
    own = runner._library, runner._workspace
    for turn in range(ROUNDS):
        for name, library, workspace in sides if turn % 2 else sides[::-1]:
            runner._library, runner._workspace = library, workspace
            for i in range(PASSES):
                start = time.perf_counter()
                runner.run(chunks)
                if i >= WARM:
                    times[name].append(1000 * (time.perf_counter() - start))
    runner._library, runner._workspace = own
    return times


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", help="a checkpoint (default: the bundled model)")
    p.add_argument("--libraries", type=Path, nargs="+", default=[LIBRARY], metavar="FILE")
    p.add_argument("--context", type=int, default=64, help="tokens in front of the one that runs")
    p.add_argument("--requests", type=int, default=1, help="that decode together")
    o = p.parse_args()
    runner = openglm.load(resolve(o.model), device="cpu").engine.runner
    if not isinstance(runner, NativeRunner):
        raise SystemExit("this model does not run natively here: openglm doctor says why")
    if (pages := o.requests * (o.context // runner.page_size + 1)) > runner.n_pages:
        raise SystemExit(f"the pool has {runner.n_pages} pages, {pages} are wanted: lower --context or --requests")
    times = measure(runner, {str(path): path for path in o.libraries}, o.context, o.requests)
    print("| library | median, ms | a tenth is below | least |\n|---|---|---|---|")
    for name, values in times.items():
        tenth = statistics.quantiles(values, n=10)[0]
        print(f"| {name} | {statistics.median(values):.2f} | {tenth:.2f} | {min(values):.2f} |")
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(json.dumps({"context": o.context, "requests": o.requests, "threads": native.THREADS, "median_ms": medians}))


if __name__ == "__main__":
    main()
