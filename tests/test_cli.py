"""The command line: verbs and options frozen, exit codes and one-line errors, JSON keys, a chat session with Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import pytest

import openglm
from openglm.cli import COMMANDS, main
from openglm.cli_options import Parser

SAMPLING = "--max-new-tokens --temperature --top-k --top-p --min-p --repetition-penalty --seed".split()
PLACE = ["--device", "--dtype", "--threads"]
# Scripts rely on these: add to them, never take away.
SURFACE = {
    "chat": ["model", "--system", *SAMPLING, *PLACE],
    "generate": ["model", "--prompt", "--tokens", *SAMPLING, *PLACE, "--json"],
    "fill": ["model", "--prompt", "--beams", "--length-penalty", "--no-repeat-ngram", "--min-new-tokens", *SAMPLING,
             *PLACE, "--json"],
    "logits": ["model", "--tokens", "--out", *PLACE, "--json"],
    "perplexity": ["model", "--text", "--window", "--stride", *PLACE, "--json"],
    "train": ["config", "overrides", "--resume", "--json"],
    "data prepare": ["sources", "--tokenizer", "--out", "--field", "--workers", "--json"],
    "data check": ["file", "--model", "--limit", "--json"],
    "tokenizer train": ["sources", "--vocab-size", "--out", "--field", "--sample-bytes", "--json"],
    "inspect": ["model", "--json"],
    "inspect prompt": ["model", "messages", "--json"],
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
        (["serve"], "unknown verb 'serve'"),
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

    monkeypatch.setattr("openglm.chat.resolve", broken)
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


def test_inspect_reads_no_weights(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = cli("inspect", tiny_checkpoint, "--json")
    value = last_json(out)
    n = sum(p.numel() for p in openglm.load(tiny_checkpoint, device="cpu").engine.model.parameters())
    assert code == 0 and value["parameters"] == n and value["weight_bytes"] == 4 * n
    assert value["weight_bytes_by_part"] == {k: 4 * v for k, v in value["parameters_by_part"].items()}  # type: ignore
    assert value["chat_format"] == "glm-4" and value["context"] == 128 and value["precision"] == ["F32"]
    # Only the header of the weights is read: a file that ends behind it does.
    for name in ("config.json", "model.safetensors"):
        data = (tiny_checkpoint / name).read_bytes()
        (tmp_path / name).write_bytes(data[: 8 + int.from_bytes(data[:8], "little")] if name[0] == "m" else data)
    assert last_json(cli("inspect", tmp_path, "--json")[1])["weight_bytes"] == 4 * n
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "damaged header" in cli("inspect", tmp_path)[2]
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


def test_doctor(cli: Cli) -> None:
    code, out, _ = cli("doctor", "--json")
    value = last_json(out)
    assert code == 0
    assert {"python", "torch", "cpu", "memory_bytes", "compiler", "bundled_model", "extras"} <= set(value)
    assert "memory" in cli("doctor")[1]


# -------------------------------------------------------------------- a conversation


def chat_command(model: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "openglm", "chat", str(model), "--device", "cpu", "--threads", "1", *options]


def test_chat_over_a_pipe(tiny_checkpoint: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = ["/system Be brief.", "Hello!", "", "And now?", f"/save {saved}", "/sav", "/help", "/clear",
             f"/save {tmp_path}/empty.json", f"/save {tmp_path}/no/x.json", "/quit", "never read"]  # fmt: skip
    done = subprocess.run(
        chat_command(tiny_checkpoint, "--max-new-tokens", "8", "--seed", "1"),
        input="\n".join(lines), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    talk = json.loads(saved.read_text())
    assert [m["role"] for m in talk] == ["system", "user", "assistant", "user", "assistant"]
    assert talk[0]["content"] == "Be brief." and talk[1]["content"] == "Hello!"
    expected = openglm.load(tiny_checkpoint, device="cpu").chat(talk[:2], max_new_tokens=8, seed=1)
    assert talk[2]["content"] == expected.content, "the answer is the model's, given the conversation"
    assert json.loads((tmp_path / "empty.json").read_text()) == talk[:1]
    assert "unknown command /sav (did you mean '/save'?)" in done.stderr and "cannot write" in done.stderr
    assert "/system TEXT" in done.stdout and "you>" not in done.stdout


def test_chat_ends_with_its_input_and_survives_a_message_too_long(tiny_checkpoint: Path) -> None:
    text = b"1234567 people \xff" * 60 + b"\nHello!\n"
    done = subprocess.run(
        chat_command(tiny_checkpoint, "--max-new-tokens", "4"), input=text, capture_output=True, timeout=120
    )
    assert done.returncode == 0
    assert b"context holds 128" in done.stderr and b"Traceback" not in done.stderr


@pytest.fixture
def endless_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A model that never stops by itself for a long while: a wide context and no stop ids drawn at temperature 0."""
    import dataclasses

    from openglm.model.checkpoint import load_checkpoint, save_checkpoint

    model, meta = load_checkpoint(tiny_checkpoint)
    config = dataclasses.replace(model.config, max_seq_len=200_000)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state["embed.weight"][list(meta.special_ids.values())] *= 0.0  # a special's logit is 0, some other is above it
    files = {p.name: p.read_bytes() for p in tiny_checkpoint.glob("tokenizer*")}
    save_checkpoint(tmp_path / "endless", state, config, meta, files)
    return tmp_path / "endless"


def read_until(
    stream: IO[bytes], enough: Callable[[bytes], bool], again: Callable[[], None] = lambda: None, seconds: float = 120.0
) -> bytes:
    """Read until `enough`; `again` is called whenever nothing came for half a second."""
    seen, until = b"", time.monotonic() + seconds
    while not enough(seen):
        assert time.monotonic() < until, f"gave up waiting; so far: {seen[-300:]!r}"
        if not select.select([stream], [], [], 0.5)[0]:
            again()
            continue
        piece = os.read(stream.fileno(), 4096)
        assert piece, f"the program ended: {seen[-300:]!r}"
        seen += piece
    return seen


def test_ctrl_c_stops_the_answer_and_not_the_program(endless_checkpoint: Path, tmp_path: Path) -> None:
    command = chat_command(endless_checkpoint, "--temperature", "0", "--max-new-tokens", "100000")
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdin and process.stdout and process.stderr
        for _ in range(2):
            process.stdin.write(b"Go on for ever\n")
            process.stdin.flush()
            read_until(process.stdout, lambda seen: len(seen) > 20)
            process.send_signal(signal.SIGINT)
            read_until(process.stderr, lambda seen: b"openglm: stopped\n" in seen)
        process.stdin.write(f"/save {tmp_path}/talk.json\n/quit\n".encode())
        process.stdin.flush()
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    talk = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in talk] == ["user", "assistant"] * 2
    assert len(talk[1]["content"]) > 5, "what was said stays in the conversation"


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    leader, follower = pty.openpty()
    yield leader, follower
    os.close(leader)


def test_chat_in_a_terminal(tiny_checkpoint: Path, terminal: tuple[int, int]) -> None:
    """Prompts, Ctrl-C at the prompt, Ctrl-D."""
    leader, follower = terminal
    command = chat_command(tiny_checkpoint, "--max-new-tokens", "5", "--seed", "1")
    process = subprocess.Popen(
        command,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(follower)
    with open(leader, "rb", buffering=0, closefd=False) as screen:
        try:
            read_until(screen, lambda seen: b"you> " in seen)
            os.write(leader, b"Hello\n")
            read_until(screen, lambda seen: b"glm> " in seen and seen.endswith(b"you> "))
            # A signal that comes just before the line editor waits is seen with the next key or signal only.
            interrupt = partial(process.send_signal, signal.SIGINT)
            interrupt()
            read_until(screen, lambda seen: b"Ctrl-D leaves" in seen and seen.endswith(b"you> "), interrupt)
            os.write(leader, b"\x04")
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
