"""`openglm chat --url` and HttpBackend with our own server: the answers are those of the model in this process."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import openglm
from openglm.agent.http_backend import BackendError, HttpBackend
from openglm.chat import ChatModel
from openglm.types import Event, Message, Usage

SAMPLING: dict[str, Any] = {"max_new_tokens": 8, "seed": 1, "temperature": 0.9}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> ChatModel:
    return openglm.load(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path) -> Iterator[str]:
    """Our server, with the tiny model, behind a key."""
    import uvicorn

    from openglm.server.app import create_app
    from openglm.server.config import ServeConfig
    from openglm.server.service import Service

    app = create_app(Service(openglm.load(tiny_checkpoint, device="cpu"), ServeConfig(api_keys=("key",)), "tiny"))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        until = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < until and thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(60)


def test_the_backend_answers_as_the_model_does(url: str, model: ChatModel) -> None:
    messages = [Message("system", "Brief."), Message("user", "你好!")]
    expected = list(model.stream(messages, **SAMPLING))
    backend = HttpBackend(url, api_key="key")

    async def collect() -> list[Event]:
        return [e async for e in backend.astream(messages, **SAMPLING)]

    for events in (list(backend.stream(messages, **SAMPLING)), asyncio.run(collect())):
        assert "".join(e.text for e in events) == "".join(e.text for e in expected)
        assert events[-1].finish_reason == expected[-1].finish_reason
        assert isinstance(events[-1].usage, Usage) and events[-1].usage == expected[-1].usage
    assert backend.model == "tiny"


def test_what_the_server_refuses_is_said(url: str) -> None:
    with pytest.raises(BackendError, match=r"refused the key \(401\)"):
        next(HttpBackend(url, "tiny", "wrong").stream([Message("user", "x")]))
    with pytest.raises(BackendError, match=r"has no model 'tinny'.*it serves tiny \(did you mean 'tiny'\?\)"):
        next(HttpBackend(url, "tinny", "key").stream([Message("user", "x")]))
    with pytest.raises(BackendError, match=r"refused the request \(400\).*temperature"):
        next(HttpBackend(url, "tiny", "key").stream([Message("user", "x")], temperature=-1))


def test_the_terminal_over_a_pipe(url: str, model: ChatModel, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    done = subprocess.run(
        [sys.executable, "-m", "openglm", "chat", "--url", url, "--max-new-tokens", "8", "--seed", "1",
         "--temperature", "0.9"],
        input=f"你好!\n/stats\n/save {saved}\n", capture_output=True, text=True, timeout=120,
        env={**os.environ, "OPENAI_API_KEY": "key"},
    )  # fmt: skip
    assert done.returncode == 0 and "error" not in done.stderr, done.stderr
    answer = model.chat([Message("user", "你好!")], **SAMPLING)
    assert json.loads(saved.read_text(encoding="utf-8"))[-1]["content"] == answer.content


def test_limits_of_an_answer_go_along(url: str, tmp_path: Path) -> None:
    """--json-schema and --stop hold at the server too; --regex is refused in one line, since the protocol has none."""
    pytest.importorskip("xgrammar")
    schema = '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}'

    def asked(*options: str) -> subprocess.CompletedProcess[str]:
        saved = tmp_path / "talk.json"
        return subprocess.run(
            [sys.executable, "-m", "openglm", "chat", "--url", url, "--seed", "3", "--temperature", "1.5", *options],
            input=f"Hi\n/save {saved}\n", capture_output=True, text=True, timeout=240,
            env={**os.environ, "OPENAI_API_KEY": "key"},
        )  # fmt: skip

    done = asked("--json-schema", schema, "--max-new-tokens", "60")
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))[-1]["content"]
    assert json.loads(answer)["a"] in (1, 2)
    done = asked("--json-schema", schema, "--stop", ":")
    assert json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))[-1]["content"] == answer.split(":")[0]
    done = asked("--regex", "a+")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--json-schema" in done.stderr
