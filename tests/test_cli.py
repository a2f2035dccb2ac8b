"""The command line: verbs and options frozen, exit codes and one-line errors, JSON keys."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import openglm
from openglm.cli import COMMANDS, main
from openglm.cli_options import Parser

SAMPLING = "--max-new-tokens --temperature --top-k --top-p --min-p --repetition-penalty --seed".split()
LIMITS = ["--stop", "--json-schema", "--regex"]
PLACE = ["--device", "--dtype", "--threads"]
# Scripts rely on these: add to them, never take away.
TOOLS = ["--tools", "--mcp", "--search-in", "--allow-address", "--image-model", "--no-python",
         "--no-browser", "--unsafe-python"]
AGENT = ["--all-tools", *TOOLS, "--approval", "--rounds", "--plan", "--guided", "--trace"]
SURFACE = {
    "chat": ["model", "--adapter", "--url", "--model", "--api-key", "--system", *LIMITS, *SAMPLING, *PLACE,
             *AGENT],
    "serve": ["model", "--adapter", "--host", "--port", "--api-key", "--api-key-file", "--name",
              "--requests-per-minute", "--concurrency", "--parallel", "--max-queue", "--max-tokens", "--max-body-mb",
              "--pool-tokens", "--kv-dtype", "--cors", "--allow-host", "--grace", *AGENT, *PLACE],
    "replay": ["traces", "--example", "--quiet"],
    "generate": ["model", "--adapter", "--prompt", "--tokens", *LIMITS, *SAMPLING, *PLACE, "--json"],
    "fill": ["model", "--adapter", "--prompt", "--beams", "--length-penalty", "--no-repeat-ngram", "--min-new-tokens",
             *SAMPLING, *PLACE, "--json"],
    "logits": ["model", "--adapter", "--tokens", "--out", *PLACE, "--json"],
    "perplexity": ["model", "--adapter", "--text", "--window", "--stride", *PLACE, "--json"],
    "eval": ["model", "tasks", "--adapter", "--limit", "--out", "--parallel", "--max-new-tokens", "--guided", *PLACE,
             "--json"],
    "train": ["config", "overrides", "--resume", "--json"],
    "data prepare": ["sources", "--tokenizer", "--out", "--field", "--workers", "--json"],
    "data check": ["file", "--model", "--limit", "--json"],
    "tokenizer train": ["sources", "--vocab-size", "--out", "--field", "--sample-bytes", "--json"],
    "inspect": ["model", "--adapter", "--json"],
    "inspect prompt": ["model", "messages", "--json"],
    "plan": ["model", "--devices", "--precision", "--quantize", "--group", "--quantize-embeddings", "--kv", "--context",
             "--batch", "--tp", "--chunk", "--json"],
    "bench generate": ["model", "--adapter", "--prompt-tokens", "--new-tokens", "--batch", "--repeats", *PLACE,
                       "--json"],
    "bench serve": ["model", "--adapter", "--url", "--api-key", "--clients", "--seconds", "--max-tokens", *PLACE,
                    "--json"],
    "bench train": ["config", "overrides", "--steps", "--json"],
    "convert": ["source", "target", "--format", "--quantize", "--group", "--symmetric", "--method", "--calibration",
                "--embeddings", "--head", "--quantize-embeddings", "--dtype", "--tp", "--adapter", "--text-only",
                "--report", "--text", "--json"],
    "tools": [*TOOLS, "--json"],
    "mcp": [*TOOLS, "--http", "--host", "--api-key"],
    "doctor": ["--json"],
}  # fmt: skip

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run main(argv) in this process: (exit code, stdout, stderr)."""

    def run(*argv: object) -> tuple[int, str, str]:
        code = main([str(a) for a in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def last_json(out: str) -> dict[str, object]:
    value = json.loads(out.splitlines()[-1])
    assert isinstance(value, dict)
    return value


# -------------------------------------------------------------------- surface


def test_the_surface_is_frozen() -> None:
    assert list(COMMANDS) == list(SURFACE)
    for name, command in COMMANDS.items():
        parser = Parser(name, command.help)
        command.options(parser)
        found = [a.option_strings[0] if a.option_strings else a.dest for a in parser._actions]
        assert sorted(found) == sorted([*SURFACE[name], "-h", "--debug"]), name


@pytest.mark.parametrize("code", ["import openglm", "from openglm.cli import main; main(['--help'])",
                                  "from openglm.cli import main; main(['train', '--help'])"])  # fmt: skip
def test_help_and_import_leave_torch_alone(code: str) -> None:
    heavy = "{'torch', 'numpy', 'tokenizers', 'yaml', 'safetensors', 'tqdm'}"
    script = f"{code}\nimport sys\nfound = {heavy} & set(sys.modules)\nassert not found, found"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_lists_every_verb(cli: Cli) -> None:
    code, out, _ = cli("--help")
    assert code == 0 and all(re.search(rf"^  {name}  ", out, re.M) for name in COMMANDS)
    for name in COMMANDS:
        code, out, _ = cli(*name.split(), "--help")
        assert code == 0 and out.startswith(f"usage: openglm {name}")
    assert cli("--version")[1].strip() == f"openglm {openglm.__version__}"
    assert cli()[0] == 2


def test_module_and_script_agree() -> None:
    done = subprocess.run([sys.executable, "-m", "openglm", "generat"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'generate'" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "argv,words",
    [
        (["generat"], "unknown verb 'generat' (did you mean 'generate'?)"),
        (["data"], "data needs one of: prepare, check"),
        (["data", "prepair"], "unknown verb 'data prepair'"),
        (["serve", "no/folder", "--port", "0"], "no model at no/folder"),
        (["bench", "serve", "no/folder"], "no model at no/folder"),
        (["bench", "serve", "--clients", "0"], "--clients and --max-tokens must be at least 1"),
        (["serve", "--port", "99999"], "--port must be 0 to 65535"),
        (["serve", "--port", "0", "--api-key", "a b"], "an API key must be printable"),
        (["generate", "--promt", "x"], "unknown option --promt (did you mean '--prompt'?)"),
        (["generate"], "--prompt --tokens is required"),
        (["generate", "a", "b", "--prompt", "x"], "unexpected argument 'b'"),
        (["generate", "random:glm-nano", "--tokens", "1,x"], "--tokens wants ids"),
        (["generate", "--prompt", "x", "--seed", "one"], "argument --seed: invalid int value: 'one'"),
        (["generate", "no/folder", "--prompt", "x"], "no model at no/folder"),
        (["generate", "random:glm-nano", "--prompt", "x"], "no tokenizer"),
        (["generate", "random:glm-nan", "--prompt", "x"], "did you mean 'glm-nano'"),
        (["generate", "random:glm-nano", "--tokens", "1", "--threads", "0"], "--threads must be at least 1"),
        (["logits", "random:glm-nano", "--tokens", "1", "--out", "no/folder/x.npy"], "no/folder does not exist"),
        (["logits", "random:glm-nano?n_layers=1", "--tokens", "99999", "--out", "x.npy"], "outside the vocabulary"),
        (["perplexity", "random:glm-nano", "--text", "no.txt"], "no.txt: No such file"),
        (["inspect", "no/folder"], "no model at no/folder"),
        (["inspect", "prompt", "random:glm-nano", "no.json"], "no.json: No such file"),
        (["train", "no.yaml"], "no.yaml"),
        (["chat", "random:glm-nano?n_layers=1"], "no chat format"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    cli: Cli, argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*argv)
    assert code == 2 and words in err and out == ""
    assert err.startswith("openglm: error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


def test_our_faults_exit_1_and_show_the_place_on_demand(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(reference: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("openglm.loading.resolve", broken)
    code, _, err = cli("inspect")
    assert code == 1 and err == "openglm: error: RuntimeError: two lines (--debug shows where)\n"
    code, _, err = cli("inspect", "--debug")
    assert code == 1 and "Traceback" in err and "in broken" in err


# -------------------------------------------------------------------- text in, text out


def test_generate(cli: Cli, tiny_checkpoint: Path) -> None:
    base = ("generate", tiny_checkpoint, "--prompt", "The quick", "--seed", 3, "--max-new-tokens", 9, "--device", "cpu")
    code, out, err = cli(*base, "--json")
    value = last_json(out)
    assert code == 0 and set(value) == {"text", "token_ids", "finish_reason"} and err == ""
    expected = openglm.load(tiny_checkpoint, device="cpu").generate("The quick", seed=3, max_new_tokens=9)
    assert value == {"text": expected, "token_ids": list(expected.token_ids), "finish_reason": expected.finish_reason}
    assert cli(*base)[1] == f"{expected}\n"
    assert last_json(cli(*base[:4], "--seed", 4, "--json")[1])["text"] != expected


def test_generate_takes_token_ids(cli: Cli) -> None:
    base = ("generate", "random:glm-nano?n_layers=1", "--tokens", "1, 2,3", "--max-new-tokens", 4, "--temperature", 0)
    value = last_json(cli(*base, "--json")[1])
    assert value["text"] == "" and value["finish_reason"] == "length" and len(value["token_ids"]) == 4  # type: ignore
    assert cli(*base)[1] == ",".join(map(str, value["token_ids"])) + "\n"  # type: ignore[call-overload]


def test_a_prompt_may_be_any_bytes(cli: Cli, tiny_checkpoint: Path) -> None:
    code, out, _ = cli("generate", tiny_checkpoint, "--prompt", b"caf\xe9".decode("utf-8", "surrogateescape"), "--json")
    assert code == 0 and last_json(out)["token_ids"]


def test_a_prompt_over_the_context(cli: Cli, tiny_checkpoint: Path) -> None:
    code, _, err = cli("generate", tiny_checkpoint, "--prompt", "fox 1234567 " * 90)
    assert code == 2 and re.search(r"the prompt has \d+ tokens but the context holds 128 .*shorten", err)


def test_fill(cli: Cli, tiny_checkpoint: Path) -> None:
    base = ("fill", tiny_checkpoint, "--prompt", "The [MASK] fox [MASK] dog", "--max-new-tokens", 5)
    value = last_json(cli(*base, "--json")[1])
    assert {"text", "blanks"} <= set(value) and len(value["blanks"]) == 2  # type: ignore[arg-type]
    assert value == last_json(cli(*base, "--json")[1]), "greedy by default"
    code, out, err = cli(*base, "--beams", 3)
    assert code == 0 and out.count("\n") >= 1 and err.count("blank 2") == 3
    code, _, err = cli("fill", tiny_checkpoint, "--prompt", "no blank")
    assert code == 2 and "put [MASK]" in err


# -------------------------------------------------------------------- scores


def test_logits(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "logits.npy"
    code, text, _ = cli("logits", tiny_checkpoint, "--tokens", "1,2,3", "--out", out, "--dtype", "float32", "--json")
    array = np.load(out)
    assert code == 0 and array.shape == (3, 640) and array.dtype == np.float32
    assert last_json(text) == {"out": str(out), "shape": [3, 640]}
    assert np.array_equal(array, openglm.load(tiny_checkpoint, device="cpu").logits([1, 2, 3]))
    assert [p.name for p in tmp_path.iterdir()] == ["logits.npy"]


def test_perplexity(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox. 北京是首都。" * 20, encoding="utf-8")
    base = ("perplexity", tiny_checkpoint, "--text", path, "--window", 64, "--stride", 32)
    value = last_json(cli(*base, "--json")[1])
    assert set(value) == {"nll_per_token", "bits_per_byte", "tokens"}
    assert "bits per byte" in cli(*base)[1]
    path.write_bytes(b"abc\xff")
    code, _, err = cli(*base)
    assert code == 2 and "not UTF-8 (byte 3)" in err
    path.write_bytes(b"")
    code, _, err = cli(*base)
    assert code == 2 and "is empty" in err


# -------------------------------------------------------------------- looking


def test_a_vision_tower_is_spoken_of(cli: Cli, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "golden" / "glm-4v-9b"
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    n = sum(name.startswith("transformer.vision.") for name in index)
    value = last_json(cli("inspect", source, "--json")[1])
    assert value["vision_tensors"] == n > 0 and value["vision_bytes"] > 0
    assert f"{n} tensors" in cli("inspect", source)[1]
    code, _, err = cli("convert", source, tmp_path / "out", "--format", "hf")
    assert code == 2 and "--text-only" in err and err.count("\n") == 1
    code, out, _ = cli("convert", source, tmp_path / "out", "--format", "hf", "--text-only")
    assert code == 0 and f"left out: the vision tower, {n} tensors" in out


def test_adapters_and_positions_are_spoken_of(cli: Cli, shared_data: Path) -> None:
    prefix = shared_data / "golden" / "ptuning-v2-chatglm-6b" / "plain"
    n = json.loads((prefix / "config.json").read_text())["pre_seq_len"]
    assert last_json(cli("inspect", prefix, "--json")[1])["prefix_tokens"] == n > 0
    assert f"prefix of {n} tokens" in cli("inspect", shared_data / "golden/chatglm-6b", "--adapter", prefix)[1]
    assert "prefix of" not in cli("inspect", shared_data / "golden/chatglm-6b")[1]
    assert "learned positions" in cli("inspect", shared_data / "golden/glm-10b/mp1")[1]
    assert "base 5e+06" in cli("inspect", shared_data / "golden/glm-4-9b")[1]  # rope_ratio 500


def test_inspect_reads_no_weights(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = cli("inspect", tiny_checkpoint, "--json")
    value = last_json(out)
    n = sum(p.numel() for p in openglm.load(tiny_checkpoint, device="cpu").engine.model.parameters())
    assert code == 0 and value["parameters"] == n and value["weight_bytes"] == 4 * n
    assert value["weight_bytes_by_part"] == {k: 4 * v for k, v in value["parameters_by_part"].items()}  # type: ignore
    assert value["chat_format"] == "glm-4" and value["context"] == 128 and value["precision"] == ["float32"]
    for name in ("config.json", "model.safetensors", "manifest.json"):
        shutil.copy(tiny_checkpoint / name, tmp_path / name)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "damaged header" in cli("inspect", tmp_path)[2]

    def read(self: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("openglm.model.sources.TensorInfo.read", read)
    assert last_json(cli("inspect", tiny_checkpoint, "--json")[1])["weight_bytes"] == 4 * n
    assert "9,399,951,360" in cli("inspect", "random:glm-4-9b")[1]


def test_inspect_prompt(cli: Cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "messages.json"
    path.write_text(json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]))
    value = last_json(cli("inspect", "prompt", tiny_checkpoint, path, "--json")[1])
    model = openglm.load(tiny_checkpoint, device="cpu")
    ids, mask = value["ids"], value["loss_mask"]
    assert isinstance(ids, list) and isinstance(mask, list)
    assert model.tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]).strip() == "Yes."
    assert value["n_context"] == 1
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, _ = cli("inspect", "prompt", tiny_checkpoint, path)
    assert code == 0 and "\x1b[35m<|assistant|>" in out and "\x1b[32m" in out
    path.write_text('{"messages": []}')
    assert "must hold a list of messages" in cli("inspect", "prompt", tiny_checkpoint, path)[2]
    path.write_text("{")
    assert "is not JSON" in cli("inspect", "prompt", tiny_checkpoint, path)[2]
    path.write_text('[{"role": "usr", "content": "x"}]')
    assert "messages[0].role" in cli("inspect", "prompt", tiny_checkpoint, path)[2]


def test_data_check(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}
    path.write_text((json.dumps(row) + "\n") * 5)
    code, out, err = cli("data", "check", path, "--model", tiny_checkpoint, "--limit", 2)
    assert code == 0 and out.count("(sft)") == 2 and "<|assistant|>" in out
    value = last_json(cli("data", "check", path, "--model", tiny_checkpoint, "--json")[1])
    assert value["type"] == "chat" and len(value["examples"]) == 3  # type: ignore[arg-type]
    path.write_text("{}\n")
    assert cli("data", "check", path, "--model", tiny_checkpoint)[0] == 2
    assert "no tokenizer" in cli("data", "check", path, "--model", "random:glm-nano")[2]


# -------------------------------------------------------------------- from text to a model


def test_text_to_tokenizer_to_shards_to_model(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main job through the command line alone: train a tokenizer and a model, fill a blank with it."""
    monkeypatch.chdir(tmp_path)
    lines = [f"The {a} fox sees {b} dogs in the {c}. 北京有{b}只狗。" for a in ("red", "old", "shy", "big")
             for b in range(2, 9) for c in ("wood", "city", "park", "field")]  # fmt: skip
    Path("text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    code, out, err = cli("tokenizer", "train", "text.txt", "--vocab-size", 300, "--out", "tok", "--json")
    assert code == 0 and last_json(out)["vocab_size"] == 300, err
    code, out, err = cli("data", "prepare", "text.txt", "--tokenizer", "tok", "--out", "shards", "--json")
    assert code == 0 and last_json(out)["tokens"] > 0, err
    Path("run.yaml").write_text(
        "objective: infill\n"
        "model: {preset: glm-nano, vocab_size: 300, dim: 32, n_layers: 1, n_heads: 2, n_kv_heads: 1, head_dim: 16,"
        " ffn_dim: 32, max_seq_len: 64}\n"
        "tokenizer: tok\nrun_dir: out\nsteps: 4\nrow_len: 64\nmicro_batch_rows: 2\nbatch_rows: 2\n"
        "data: {train: [shards]}\nprecision: fp32\nsample_every: 2\n"
    )
    code, out, err = cli("train", "run.yaml", "optimizer.lr=1e-3", "--json")
    assert code == 0, err
    value = last_json(out)
    assert value["finished"] is True and value["step"] == 4 and value["model_dir"] == "out/model"
    events = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    drawn = [e for e in events if e["event"] == "sample"]
    assert {e["step"] for e in drawn} == {2, 4} and all("fills" in e for e in drawn)
    code, out, err = cli("fill", "out/model", "--prompt", "The [MASK] fox", "--max-new-tokens", 4, "--json")
    assert code == 0 and len(last_json(out)["blanks"]) == 1, err  # type: ignore[arg-type]
    code, _, err = cli("train", "run.yaml", "optimizer.lrr=1")
    assert code == 2 and "did you mean 'lr'" in err


def test_doctor(cli: Cli) -> None:
    code, out, _ = cli("doctor", "--json")
    value = last_json(out)
    assert code == 0
    assert {"python", "torch", "cpu", "memory_bytes", "compiler", "bundled_model", "extras"} <= set(value)
    assert "memory" in cli("doctor")[1]
