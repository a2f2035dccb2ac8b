"""`openglm bench`: keys of the JSON, figures that fit each other, mistakes in one line. Nothing here judges speed.

python -m pytest -q tests/test_cli_bench.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import openglm
from openglm.cli import main
from openglm.engine import Engine, EngineOptions
from openglm.engine.measure import bytes_per_pass, measure_speed
from tests.test_random_model import TINY

SIZES = ["--device", "cpu", "--prompt-tokens", "24", "--new-tokens", "6"]


@pytest.fixture(autouse=True)
def small_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gibibyte takes a second to read; its size is no part of what is tested."""
    monkeypatch.setattr("openglm.engine.measure.BANDWIDTH_BYTES", 1 << 22)


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_generate_measures_the_engine(capsys: pytest.CaptureFixture[str], batch: int) -> None:
    model = f"{TINY}&quantize=int4"
    code, out, err = run(capsys, "bench", "generate", model, *SIZES, "--batch", batch, "--repeats", 2, "--json")
    value = json.loads(out.splitlines()[-1])
    assert code == 0 and out.count("\n") == 1, err
    for key in ("prefill_tok_s", "decode_tok_s", "ttft_s", "peak_rss_bytes", "weight_bytes", "bandwidth_fraction"):
        assert value[key] > 0 and math.isfinite(value[key]), key
    assert (value["batch"], value["prompt_tokens"], value["new_tokens"], value["repeats"]) == (batch, 24, 6, 2)
    assert value["weight_bytes"] == value["bytes_per_pass"], "the tied table is read whole, as the head"
    share = value["decode_tok_s"] / batch * value["bytes_per_pass"] / value["read_bandwidth_bytes_s"]
    assert value["bandwidth_fraction"] == pytest.approx(share)
    assert value["prefill_tok_s"] == pytest.approx(sum(r["prefill_tok_s"] for r in value["runs"]) / 2)
    if batch == 1:  # one request: its first token is the end of the prefill
        assert all(r["ttft_s"] * r["prefill_tok_s"] == pytest.approx(24) for r in value["runs"])


def test_generate_shows_a_table(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path) -> None:
    code, out, err = run(capsys, "bench", "generate", tiny_checkpoint, *SIZES, "--repeats", 1)
    assert code == 0 and "bench:" in err
    for word in ("1 request of 24 + 6 tokens", "prefill", "decode", "first token", "GB/s measured", "MB at most"):
        assert word in out


def test_the_table_of_an_untied_embedding_is_not_read() -> None:
    engine = openglm.load(f"{TINY}&tie_embeddings=0&quantize=int8&embeddings=none&head=none", device="cpu").engine
    blocks = 2 * sum(rows * columns * 34 // 32 for rows, columns in ((128, 64), (64, 64), (256, 64), (64, 128)))
    head, norms = 320 * 64 * 4, 5 * 64 * 4
    assert bytes_per_pass(engine) == blocks + head + norms


def test_prompts_are_read_and_every_token_is_counted() -> None:
    """Against the engine's own counters: nothing came from the prefix cache, nothing ran apart."""
    engine = openglm.load(TINY, device="cpu").engine
    seen: list[int] = []
    measure_speed(engine, prompt_tokens=40, new_tokens=8, batch=4, repeats=2, tick=seen.append)
    facts = engine.describe()
    assert sum(seen) == 2 * 4 * 8 and facts["n_requests"] == 3 * 4 and facts["n_drawn"] == sum(seen) + 4 * 2
    assert facts["n_reused"] == 0 and facts["n_running"] == facts["n_waiting"] == 0
    assert max(seen) == 4, "all four side by side"
    engine.check_integrity()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--new-tokens", "1"], "new_tokens must be at least 2"),
        (["--repeats", "0"], "repeats must be at least 1"),
        (["--batch", "-1"], "batch must be at least 1"),
        (["--prompt-tokens", "8190"], "the context holds 8192"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    code, out, err = run(capsys, "bench", "generate", TINY, *SIZES, *argv)
    assert code == 2 and words in err.splitlines()[-1] and out == ""


def test_sizes_that_give_no_figure_are_refused() -> None:
    model: Any = openglm.load(TINY, device="cpu").engine.model
    engine = Engine(model, {}, options=EngineOptions(n_parallel=4, step_tokens=16, pool_tokens=512))
    with pytest.raises(ValueError, match="over before the last of 4 prompts is read"):
        measure_speed(engine, 64, 3, batch=4)
    with pytest.raises(ValueError, match="above the 4 requests"):
        measure_speed(engine, 64, 3, batch=5)
    with pytest.raises(ValueError, match="the pool holds 512"):
        measure_speed(engine, 200, 3, batch=4)
