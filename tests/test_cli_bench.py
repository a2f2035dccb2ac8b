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
    engine = openglm.load(f"{TINY}&tie_embeddings=false&quantize=int8&embeddings=none&head=none", device="cpu").engine
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
    assert max(seen) >= 4 and not any(n % 4 for n in seen), "all four side by side"
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


# -------------------------------------------------------------------- bench train

SMALL = ["model.dim=32", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=1", "model.head_dim=16",
         "model.ffn_dim=48", "model.vocab_size=61", "model.qkv_bias=false", "row_len=24", "micro_batch_rows=2",
         "batch_rows=4", "precision=fp32", "threads=1", "device=cpu"]  # fmt: skip


def test_train_measures_a_preset_on_random_tokens(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "bench", "train", "glm-nano", *SMALL, "--steps", 1, "--json")
    value = json.loads(out.splitlines()[-1])
    assert code == 0 and "memory of a step" in err and not list(tmp_path.iterdir())
    assert (value["steps"], value["batch_tokens"], value["device"], value["skipped"]) == (1, 96, "cpu", 0)
    assert value["tokens_per_s"] == pytest.approx(96 / value["step_s"])
    matrices = 2 * ((2 + 2) * 16 * 32 + 2 * 16 * 32 + 3 * 32 * 48) + 61 * 32  # blocks, and the head
    attention = 2 * 2 * 2 * 16 * 24  # scores and sums of 2 layers, 2 heads of 16, over 24 keys
    assert value["flop_s"] * value["step_s"] == pytest.approx(96 * 6 * (matrices + attention))
    assert value["mfu"] == pytest.approx(value["flop_s"] / value["matmul_flop_s"])
    assert value["loss"] == pytest.approx(math.log(61), abs=0.1), "random tokens cannot be predicted"


def test_train_measures_a_run_with_its_data(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openglm.data.prepare import prepare

    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n\n".join(f"The quick fox saw {i} lazy dogs." for i in range(200)), encoding="utf-8")
    prepare(["text.txt"], tiny_checkpoint, "shards")
    Path("run.yaml").write_text(
        f"objective: infill\ninit_from: {tiny_checkpoint}\ndata: {{train: [shards]}}\nrun_dir: out\nsteps: 3\n"
        "row_len: 64\nmicro_batch_rows: 2\nbatch_rows: 2\neval_every: 1\ncheckpoint_every: 1\nprecision: fp32\n"
    )
    code, out, err = run(capsys, "bench", "train", "run.yaml", "threads=1", "device=cpu", "--steps", 2)
    assert code == 0 and "medians of 2 steps" in out and "tokens/s" in out and "0 of 2 steps skipped" in out, err
    assert not Path("out").exists(), "nothing is written"


def test_mistakes_in_training_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in (
        (["glm-nan"], "glm-nan: no such run config"),
        (["glm-nano", *SMALL, "--steps", 0], "steps must be at least 1"),
        (["glm-nano", *SMALL, "row_len=4096"], "over the model's max_seq_len"),
        (["glm-nano", "steps_=1"], "did you mean 'steps'"),
    ):
        code, out, err = run(capsys, "bench", "train", *argv)
        assert code == 2 and words in err.splitlines()[-1] and out == ""


def test_random_rows_continue_from_their_state() -> None:
    from openglm.train.measure import RandomRows

    stream, other = RandomRows(50, 8), RandomRows(50, 8)
    stream.next_rows(2)
    other.load_state_dict(stream.state_dict())
    rows = stream.next_rows(3)
    assert (rows.ids == other.next_rows(3).ids).all() and rows.ids.shape == (3, 8)
    assert (rows.ids[:, 1:] == rows.targets[:, :-1]).all() and rows.n_tokens == 24


# -------------------------------------------------------------------- bench/generate.py


def test_the_comparison_takes_the_best_of_each_peer_setting_and_survives_one_that_fails() -> None:
    from argparse import Namespace

    from bench.generate import compared, in_turns

    def ours() -> dict[str, Any]:
        return {
            "prefill": [90.0, 110.0],
            "decode": [20.0, 20.0],
            "bytes_per_pass": 50,
            "read_bandwidth_bytes_s": 2000.0,
        }

    def broken() -> dict[str, Any]:
        raise SystemExit("no such kernel")

    peers = {"a": lambda: {"prefill": [50.0], "decode": [5.0]}, "b": lambda: {"prefill": [40.0], "decode": [10.0]}}
    found = in_turns(Namespace(rounds=2), "model", {"openglm": ours, "c": broken, **peers})
    assert list(found) == ["openglm", "a", "b"] and all(len(runs) == 2 for runs in found.values())
    result = compared(found)
    assert result["peer_best"] == {"prefill_tok_s": 50.0, "decode_tok_s": 10.0}
    assert (result["prefill_ratio"], result["decode_ratio"], result["bandwidth_fraction"]) == (2.0, 2.0, 0.5)
    for sides in ({"openglm": broken, **peers}, {"openglm": ours, "c": broken}):
        with pytest.raises(SystemExit, match="no such kernel"):
            in_turns(Namespace(rounds=1), "model", sides)
