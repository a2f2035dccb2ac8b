"""`openglm chat`: over a pipe, in a terminal, and Ctrl-C in both."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

import pytest

import openglm


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

    from openglm.model.checkpoint import save_checkpoint
    from openglm.model.load import load_checkpoint

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
