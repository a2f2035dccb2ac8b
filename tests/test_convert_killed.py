"""Conversions into folders, killed on the way and given again: every format ends with the bytes of one that was not.

(The formats of one file, and what is read again, are in test_convert.py.)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from openglm.cli import main
from openglm.config import GLMConfig, RopeConfig
from openglm.convert import convert
from openglm.convert import plan as plan_module
from openglm.loading import Reference
from openglm.model.checkpoint import CheckpointMeta, save_checkpoint
from openglm.model.init import init_weights
from openglm.model.opened import open_model
from openglm.model.transformer import Transformer
from openglm.model.writer import OutputFolder

SHARD_BYTES = 4096
SHAPE: dict[str, Any] = {
    "vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 4, "head_dim": 8, "ffn_dim": 64, "max_seq_len": 64,
}  # fmt: skip
CONFIGS = {
    "hf": GLMConfig(**SHAPE, n_kv_heads=2, rope=RopeConfig(fraction=0.5)),
    "sat": GLMConfig(
        **SHAPE, n_kv_heads=4, norm="layer", residual="normed", residual_alpha=2.0, mlp="geglu", linear_bias=True,
        rope=RopeConfig(freq_dtype="float16"), mask="prefix", tie_embeddings=True,
    ),
}  # fmt: skip
CONFIGS["openglm"] = CONFIGS["sat"]


def run(source: str, target: str, format: Any) -> bool:
    """Whether an earlier conversion was gone on with."""
    return convert(Reference(open_model(source), None, None), target, format, tp=4 if format == "sat" else 1).continued


def die(source: str, target: str, format: str) -> None:
    """Convert; SIGKILL when the third file is written but not noted, with a piece of another one beside it."""
    plan_module.SHARD_BYTES = SHARD_BYTES
    real = OutputFolder._finish

    def counted(self: OutputFolder, name: str, *rest: Any) -> None:
        if len(self.sums) == 2:
            (self.folder / f"{name}.tmp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, name, *rest)

    OutputFolder._finish = counted  # type: ignore[assignment, method-assign]
    run(source, target, format)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format", CONFIGS)
def test_a_killed_conversion_ends_with_the_same_bytes(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = init_weights(Transformer(CONFIGS[format]), seed=1)
    save_checkpoint(tmp_path / "model", model, CONFIGS[format], CheckpointMeta(stop_ids=(5,)), dtype=torch.float16)
    arguments = (str(tmp_path / "model"), str(tmp_path / "out"), format)
    process = multiprocessing.get_context("spawn").Process(target=die, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "out").exists()
    monkeypatch.setattr(plan_module, "SHARD_BYTES", SHARD_BYTES)
    assert run(*arguments), "two files were finished"
    assert not run(arguments[0], str(tmp_path / "whole"), format)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "whole"]


@pytest.mark.parametrize("format", ["openglm", "hf", "gguf", "sat"])
def test_a_full_disk_is_said_and_continued_after(format: str, shared_data: Path, tmp_path: Path) -> None:
    """In a process that may write files of 200 kB at most, which writes then fail like on a full disk."""
    source = shared_data / "golden" / ("glm-130b/mp1" if format == "sat" else "glm-4-9b")
    target = tmp_path / ("m.gguf" if format == "gguf" else "m")
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); " \
        "from openglm.cli import main; sys.exit(main(sys.argv[1:]))"  # fmt: skip
    arguments = ["convert", str(source), str(target), "--format", format]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"openglm: error: disk full while writing {target}: free some")
    assert not target.exists()
    assert main(arguments) == 0
    assert open_model(target).names()
