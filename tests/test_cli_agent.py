"""`openglm chat` with tools, over a scripted server: in a pipe and in a terminal; traces and `openglm replay`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from openglm.agent.isolation import SandboxUnavailable, find_isolation
from openglm.agent.sandbox_config import SandboxConfig
from tests.http_helpers import Reply, chunk, scripted_server, sse
from tests.terminal_helpers import terminal

CHAT = [sys.executable, "-m", "openglm", "chat"]
FUNCTIONS = '''
from openglm.agent.tools.function import tool

@tool
def price(fruit: str) -> str:
    """The price of a fruit."""
    return f"{fruit}: 3 euros"
'''


def called(name: str, **arguments: Any) -> Reply:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return Reply(
        pieces=sse(chunk({"tool_calls": [{"index": 0, "id": "c", "function": function}]}), chunk({}, "tool_calls"))
    )


def text(content: str) -> Reply:
    return Reply(pieces=sse(chunk({"content": content}), chunk({}, "stop")))


def scripted(*replies: Reply) -> Callable[[dict[str, Any] | None, Mapping[str, str]], Reply]:
    waiting = list(replies)
    return lambda body, headers: waiting.pop(0)


@pytest.fixture
def functions(tmp_path: Path) -> str:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return str(path)


def run(url: str, lines: str, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    state = {"XDG_STATE_HOME": str(tmp_path / "state"), "OPENAI_API_KEY": ""}
    return subprocess.run(
        [*CHAT, "--url", url, "--model", "m", *options], input=lines, text=True, capture_output=True, timeout=120,
        cwd=tmp_path, env={**os.environ, **state, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip


def replayed(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "openglm", "replay", *arguments], text=True, capture_output=True)


def test_functions_in_a_pipe_and_their_trace(functions: str, tmp_path: Path) -> None:
    with scripted_server(scripted(called("price", fruit="apple"), text("Three euros."), text("Bye."))) as server:
        done = run(server.url, "How much?\nBye\n", tmp_path, "--tools", functions)
    assert done.returncode == 0, done.stderr
    assert done.stdout == '[call] price {"fruit": "apple"}\n[result] price, 0.0 s apple: 3 euros\nThree euros.\nBye.\n'
    second = server.requests[1]["messages"]
    assert [m["role"] for m in second] == ["system", "user", "assistant", "tool"]
    assert [m["role"] for m in server.requests[2]["messages"]] == [m["role"] for m in second] + ["assistant", "user"]
    traces = sorted((tmp_path / "state" / "openglm" / "traces").iterdir())
    assert len(traces) == 2
    again = replayed(*map(str, traces), "--example", str(tmp_path / "rows.jsonl"))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("the same") == 2 and 'round 1 calls price {"fruit": "apple"}' in again.stdout
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["messages"][-1]["content"] == "Three euros." and rows[0]["tools"][0]["function"]["name"] == "price"
    changed = traces[0].read_text().replace("apple: 3 euros", "apple: 4 euros", 1)
    (tmp_path / "changed.jsonl").write_text(changed)
    different = replayed(str(tmp_path / "changed.jsonl"), "--quiet")
    assert different.returncode == 1 and "DIFFERENT" in different.stdout and "euros" in different.stdout


def test_approval_in_a_terminal(functions: str, tmp_path: Path) -> None:
    """No; yes for good, so that the next is not asked; Ctrl-C while the model is silent."""
    release = threading.Event()

    def silent() -> Any:
        yield sse(chunk({"content": "so far"}))[0]
        release.wait(120)

    replies = scripted(
        called("price", fruit="a"), text("Not allowed."), called("price", fruit="b"), called("price", fruit="c"),
        text("Both **known**."), Reply(pieces=silent()),
    )  # fmt: skip
    environment = {"XDG_STATE_HOME": str(tmp_path / "state")}
    with scripted_server(replies) as server:
        options = ["--url", server.url, "--model", "m", "--tools", functions, "--approval", "*=ask", "--trace", "none"]
        with terminal([*CHAT, *options], environment, rows=60) as screen:
            screen.wait("Tools: price.")
            screen.wait_prompt(1)
            screen.press("one\r")
            screen.wait("allow price?")
            screen.press("n\r")
            screen.wait("did not allow")
            screen.wait("Not allowed.")
            screen.wait_prompt(2)
            screen.press("two\r")
            screen.wait(lambda shown: shown.count("allow price?") == 2)
            screen.press("a\r")
            shown = screen.wait("Both known.")
            assert "b: 3 euros" in shown and "c: 3 euros" in shown and shown.count("allow price?") == 2
            screen.wait_prompt(3)
            screen.press("three\r")
            screen.wait("so far")
            screen.press(b"\x03")
            screen.wait("openglm: stopped")
            release.set()
            screen.wait_prompt(4)
            assert screen.leave() == 0
    assert not (tmp_path / "state" / "openglm" / "traces").exists()


def test_python_and_its_pictures(tmp_path: Path) -> None:
    try:
        find_isolation(SandboxConfig())
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    code = "import matplotlib.pyplot as plt\nprint(6 * 7)\nplt.plot([1, 2])\nplt.show()"
    with scripted_server(scripted(called("python", code=code), text("42"))) as server:
        done = run(server.url, "Plot\n", tmp_path, "--all-tools", "--trace", str(tmp_path / "traces"))
    assert done.returncode == 0, done.stderr
    assert "[result] python" in done.stdout and "\n42\n" in done.stdout
    (picture,) = (tmp_path / "openglm-files").iterdir()
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.name in done.stdout
    (trace,) = (tmp_path / "traces").iterdir()
    assert replayed(str(trace), "--quiet").stdout == f"{trace}: the same\n"


def test_bad_options(functions: str, tmp_path: Path) -> None:
    for options, problem in (
        (["--plan"], "--plan goes with --all-tools, --tools or --mcp"),
        (["--guided"], "--guided goes with --all-tools, --tools or --mcp"),
        (["--no-guided"], "--guided goes with --all-tools, --tools or --mcp"),
        (["--unsafe-python"], "--unsafe-python goes with"),
        (["--all-tools", "--approval", "always"], "--approval takes a tool and a rule, such as python=ask"),
        (["--all-tools", "--approval", "python=perhaps"], "approval of 'python' must be ask, always, never"),
        (["--all-tools", "--rounds", "0"], "n_rounds must be a whole number of at least 1"),
        (["--tools", str(tmp_path / "absent.py")], "absent.py"),
    ):
        done = run("http://127.0.0.1:9", "Hi\n", tmp_path, *options)
        assert done.returncode == 2 and problem in done.stderr and done.stderr.count("\n") == 1, (options, done.stderr)
    done = replayed(str(tmp_path / "nothing.jsonl"))
    assert done.returncode == 2 and "cannot be read" in done.stderr
