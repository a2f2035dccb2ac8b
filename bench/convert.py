"""Converting a large checkpoint to INT4: peak memory, time, and what a kill in the middle costs.

    python bench/convert.py --gb 20 --folder /tmp/convert

Writes a synthetic checkpoint of GLM-4-9B's shapes in the Hugging Face layout (bfloat16, 5 GB shards, as many layers as
make up the size), converts it to our INT4 in a process of its own, and again with a SIGKILL half-way. The original's
own way to quantised shards, for GLM-130B, is documented to need "more than 260 GB of CPU memory": the whole model.

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python bench/convert.py` without an installation

from openglm.config import GLMConfig
from openglm.model.checkpoint import CheckpointMeta
from openglm.model.cost import n_parameters
from openglm.model.export import hf_config
from openglm.model.weights import FAMILIES, names_of
from openglm.model.writer import OutputFolder
from openglm.presets import preset

SHARD_BYTES = 5_000_000_000


def shape_of(n_gb: float) -> GLMConfig:
    """GLM-4-9B with as many layers as make about n_gb of bfloat16."""
    one, two = (n_parameters(preset("glm-4-9b", n_layers=n)) for n in (1, 2))
    return preset("glm-4-9b", n_layers=max(1, round((n_gb * 5e8 - one) / (two - one)) + 1))


def write_source(folder: Path, config: GLMConfig) -> int:
    """A released folder with random weights; returns the bytes of its tensors."""
    shapes = _shapes(config)
    noise = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    out = OutputFolder(folder, {"layers": config.n_layers})
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        n_bytes = 2 * torch.Size(shape).numel()
        if groups[-1] and size + n_bytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += n_bytes
    weight_map: dict[str, str] = {}
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"

        def tensors(group: list[str] = group) -> Any:
            for name in group:
                n = torch.Size(shapes[name]).numel()
                yield name, noise.repeat(-(-n // len(noise)))[:n].view(shapes[name])

        weight_map |= dict.fromkeys(out.write_shard(file, tensors(), len(group)), file)
    out.write_bytes("model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())
    out.write_bytes("config.json", json.dumps(hf_config(config, CheckpointMeta(), "glm", "bfloat16")).encode())
    out.commit()
    return 2 * sum(torch.Size(s).numel() for s in shapes.values())


def _shapes(config: GLMConfig) -> dict[str, tuple[int, ...]]:
    """Their tensor names with shapes."""
    from openglm.model.transformer import Transformer
    from openglm.model.weights import export_weights

    state = Transformer(config, device="meta").state_dict()
    family = FAMILIES["hf-glm"]
    assert state.keys() == names_of(family, config).keys()
    return {name: tuple(w.shape) for name, w in export_weights(family, config, state)}


def convert(source: Path, target: Path, kill_after_s: float | None = None) -> dict[str, float]:
    """Run `openglm convert`; seconds and peak resident bytes (own memory, without the page cache's mapped files)."""
    command = [sys.executable, "-m", "openglm", "convert", str(source), str(target), "--format", "openglm",
               "--quantize", "int4", "--json"]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[1])
    peak = Peak(process.pid)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    seconds, peak_bytes = time.perf_counter() - start, peak.stop()
    if kill_after_s is None:
        if process.returncode:
            raise SystemExit(f"openglm convert failed with {process.returncode}")
        report = json.loads(output.splitlines()[-1])
        return {"seconds": seconds, "peak_rss_bytes": peak_bytes, "weight_bytes": report["weight_bytes"],
                "continued": float(report["continued"])}  # fmt: skip
    return {"seconds": seconds, "peak_rss_bytes": peak_bytes}


class Peak:
    """Highest resident size of a process: the kernel's own high-water mark, read while it lives."""

    def __init__(self, pid: int) -> None:
        self.status = Path(f"/proc/{pid}/status")
        self.peak, self.done = 0, False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        while not self.done:
            try:
                for line in self.status.read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        self.peak = max(self.peak, int(line.split()[1]) * 1024)
            except (OSError, ValueError):
                return
            time.sleep(0.05)

    def stop(self) -> int:
        self.done = True
        self.thread.join()
        return self.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=20.0, help="size of the source (default: 20)")
    parser.add_argument("--folder", type=Path, required=True, help="where to write; needs 1.6 times --gb of disk")
    args = parser.parse_args()
    needed = 1.6e9 * args.gb
    args.folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(args.folder).free < needed:
        raise SystemExit(f"{args.folder} has less than {needed / 1e9:.0f} GB free: give a smaller --gb")
    source, whole, killed = (args.folder / name for name in ("source", "int4", "int4-killed"))
    config = shape_of(args.gb)
    n_bytes = write_source(source, config)
    plain = convert(source, whole)
    same = {p.name: p.stat().st_size for p in whole.iterdir()}
    sums = (whole / "manifest.json").read_text()
    shutil.rmtree(whole)
    broken = convert(source, killed, plain["seconds"] * 0.6)
    rest = convert(source, killed)
    assert {p.name: p.stat().st_size for p in killed.iterdir()} == same
    assert (killed / "manifest.json").read_text() == sums
    for path in (source, killed):
        shutil.rmtree(path)
    rows = [("whole", plain), ("killed at 60 %", broken), ("continued", rest)]
    to = f"INT4 ({plain['weight_bytes'] / 1e9:.1f} GB)"
    print(f"{n_bytes / 1e9:.1f} GB of bfloat16 to {to}, {os.cpu_count()} cores\n")
    print("| run | seconds | MB/s read | peak memory, MiB |\n|---|---|---|---|")
    for name, row in rows:
        speed = f"{n_bytes / row['seconds'] / 1e6:,.0f}" if name == "whole" else ""
        print(f"| {name} | {row['seconds']:.1f} | {speed} | {row['peak_rss_bytes'] / 2**20:,.0f} |")
    print(json.dumps({"source_bytes": n_bytes, "layers": config.n_layers, "whole": plain, "killed": broken,
                      "continued": rest, "bit_identical": True}))  # fmt: skip


if __name__ == "__main__":
    main()
