"""openglm.quality: its figures against float64, a conversion that loses nothing, and the page.

    python -m pytest -q tests/test_quality.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openglm.cli import main
from openglm.quality.measure import Divergence, divergence

TEXTS = {"en.txt": "The quick brown fox jumps over the lazy dog. " * 30, "zh.txt": "北京是中国的首都，人口很多。" * 40}


def test_divergence_is_the_definition() -> None:
    generator = np.random.default_rng(1)
    p, q = generator.normal(size=(2, 50, 30)) * 3
    targets = generator.integers(30, size=50)
    source, other = (torch.tensor(x, dtype=torch.float32) for x in (p, q))
    found = divergence(source, other, torch.tensor(targets))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    rows = np.arange(50)
    assert found.n == 50 and found.same == (p.argmax(-1) == q.argmax(-1)).sum()
    assert found.source_nll == pytest.approx(-log_p[rows, targets].sum(), rel=1e-5)
    assert found.nll == pytest.approx(-log_q[rows, targets].sum(), rel=1e-5)
    assert found.kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(), rel=1e-4)
    assert found + Divergence(1, 2.0, 3.0, 4.0, 5) == Divergence(
        51, found.source_nll + 2, found.nll + 3, found.kl + 4, found.same + 5
    )


def converted(checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    files = [str(folder / name) for name in TEXTS]
    arguments = ["--format", "openglm", "--report", str(folder / "q.html"), "--text", *files, "--json", *options]
    assert main(["convert", str(checkpoint), str(folder / "out"), *arguments]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return value


def test_a_copy_loses_nothing(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = converted(tiny_checkpoint, tmp_path, capsys)["report"]
    assert [t["name"] for t in report["texts"]] == list(TEXTS)
    for text in report["texts"]:
        assert text["kl_divergence"] == pytest.approx(0.0, abs=1e-6) and text["top1_agreement"] == 1.0
        assert text["perplexity"] == text["source_perplexity"] > 1.0
    assert not any(report["hidden_error"]) and not any(map(sum, report["weight_error"].values()))


def test_int4_is_measured_and_shown(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--quantize", "int4", "--group", "16")
    report = converted(tiny_checkpoint, tmp_path, capsys, *options)["report"]
    for text in report["texts"]:
        assert text["kl_divergence"] > 0.0 and text["perplexity"] != text["source_perplexity"]
    assert report["n_bytes"] < report["source_bytes"]
    errors = [e for by_block in report["weight_error"].values() for e in by_block]
    assert all(0.005 < e < 0.2 for e in errors) and all(e > 0 for e in report["hidden_error"])
    page = (tmp_path / "q.html").read_text(encoding="utf-8")
    shown = f"{report['texts'][0]['kl_divergence']:.5f}"
    assert shown in page and "zh.txt" in page and page.count("<svg") >= 4
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is loaded from outside


def test_a_report_needs_text(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = ["convert", str(tiny_checkpoint), str(tmp_path / "out"), "--format", "openglm"]
    assert main([*target, "--report", str(tmp_path / "q.html")]) == 2
    assert "--text FILE go together" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text(" \n")
    assert main([*target, "--report", str(tmp_path / "q.html"), "--text", str(tmp_path / "empty.txt")]) == 2
    assert "is empty" in capsys.readouterr().err and not (tmp_path / "out").exists()
