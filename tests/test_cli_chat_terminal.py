"""`openglm chat` in a terminal that can be read: line editing, history, markdown, Ctrl-C; here and with a server."""

from __future__ import annotations

import json
import stat
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.http_helpers import Reply, chunk, scripted_server, sse
from tests.terminal_helpers import terminal

CHAT = [sys.executable, "-m", "openglm", "chat"]
ANSWER = """\
# Heading

Some *words* and `code` with <tag> and a [link](http://example.org/x).

```python
def f(x):
    return "北京"
```

1. one
2. two

| a | b |
|---|---|
| 1 | 二 |

The end.
"""
# Without the libraries of the extra: chat has to do without them.
BARE = [sys.executable, "-c", "import sys; sys.modules['prompt_toolkit'] = sys.modules['rich'] = None\n"
        "from openglm.cli import main; sys.exit(main(sys.argv[1:]))", "chat"]  # fmt: skip


def pieces_of(text: str, size: int = 7) -> list[bytes]:
    return sse(*[chunk({"content": text[i : i + size]}) for i in range(0, len(text), size)], chunk({}, "stop"))


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"XDG_STATE_HOME": str(tmp_path / "state")}


def test_a_local_model_in_a_terminal(tiny_checkpoint: Path, home: dict[str, str], tmp_path: Path) -> None:
    """Chinese input, Esc Enter, three quotes, Ctrl-C at the prompt, history in the next run, Ctrl-D."""
    command = [*CHAT, str(tiny_checkpoint), "--device", "cpu", "--threads", "1", "--max-new-tokens", "4", "--seed", "1"]
    saved = tmp_path / "talk.json"
    with terminal(command, home) as screen:
        screen.wait_prompt(1)
        screen.press("你好，世界\x1b\rsecond line\r")
        screen.wait_prompt(2)
        screen.press('"""\rthird\r\rfourth\r"""\r')
        screen.wait_prompt(3)
        screen.press(b"half a line\x03")
        screen.wait("Ctrl-D leaves\n")
        screen.press("/sa\t")
        screen.wait("/save")
        screen.press(f" {saved}\r")
        screen.wait("saved 4 messages")
        screen.wait("tokens/s")
        assert screen.leave() == 0
    talk = json.loads(saved.read_text(encoding="utf-8"))
    assert [m["content"] for m in talk if m["role"] == "user"] == ["你好，世界\nsecond line", "third\n\nfourth"]
    history = tmp_path / "state" / "openglm" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600 and stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    with terminal(command, home) as screen:
        screen.wait_prompt(1)
        screen.press(b"\x1b[A\x1b[A")
        screen.wait("fourth")


def test_markdown_of_a_server(home: dict[str, str]) -> None:
    with scripted_server(lambda body, headers: Reply(pieces=pieces_of(ANSWER), pause_s=0.03)) as server:
        with terminal([*CHAT, "--url", server.url, "--model", "m"], home) as screen:
            screen.wait_prompt(1)
            screen.press("Hi\r")
            text = screen.wait_prompt(2)
            assert screen.leave() == 0
    lines = text.splitlines()
    shown = [line.strip() for line in lines[lines.index("you> Hi") + 1 :] if line.strip()]
    assert "Heading" in shown[0] and "*" not in shown[1] and "`" not in shown[1]
    assert "<tag>" in shown[1] and "http://example.org/x" in " ".join(shown[1:3])
    assert 'return "北京"' in shown and "The end." in shown and not any("```" in line for line in shown)
    for piece in ("def f(x):", "Heading", "The end."):
        assert text.count(piece) == 1, "nothing is left of what was written before"
    coloured = screen.raw.decode("utf-8", "replace")
    assert "\x1b[2J" not in coloured.split("Hi", 1)[1], "the screen is never cleared"


def test_an_answer_longer_than_the_screen_is_whole_in_the_scrollback(home: dict[str, str]) -> None:
    answer = "\n".join(f"- item number {i}" for i in range(60)) + "\n\nDone."
    with scripted_server(lambda body, headers: Reply(pieces=pieces_of(answer, 20), pause_s=0.01)) as server:
        with terminal([*CHAT, "--url", server.url, "--model", "m"], home, rows=12) as screen:
            screen.wait_prompt(1)
            screen.press("List\r")
            text = screen.wait("Done.")
    found = [int(line.split()[-1]) for line in text.splitlines() if "item number" in line]
    assert found == list(range(60))
    # A line is written while it grows, and never again: not once for each of the items after it.
    assert screen.raw.count(b"item number 30") <= 4


def silent_after(first: dict[str, Any], release: threading.Event) -> Iterator[bytes]:
    yield sse(first)[0]
    release.wait(120)


def test_reasoning_tools_and_ctrl_c(home: dict[str, str], tmp_path: Path) -> None:
    """Reasoning is dim, a call is a panel whose result is typed; Ctrl-C stops a silent server at once; /retry."""
    release = threading.Event()
    call = {"index": 0, "id": "c1", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}

    def answer(body: dict[str, Any] | None, headers: Mapping[str, str]) -> Reply:
        assert body is not None
        last = body["messages"][-1]
        if last["role"] == "tool":
            return Reply(pieces=pieces_of(f"It is {last['content']}."))
        if last["content"] == "wait":
            return Reply(pieces=silent_after(chunk({"content": "so far"}), release))
        chunks = [chunk({"reasoning_content": "let me think"}), chunk({"tool_calls": [call]}), chunk({}, "tool_calls")]
        return Reply(pieces=sse(*chunks))

    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"name": "get_weather", "description": "Weather.", "parameters": {}}]))
    with scripted_server(answer) as server, terminal([*CHAT, "--url", server.url, "--model", "m"], home) as screen:
        screen.wait_prompt(1)
        screen.press(f"/tools {tools}\r")
        screen.wait_prompt(2)
        screen.press("Weather?\r")
        text = screen.wait("result of get_weather>")
        assert "let me think" in text and "call: get_weather" in text and '"city": "北京"' in text
        assert "\x1b[2;3mlet me think" in screen.raw.decode(), "dim"
        screen.press("sunny\r")
        screen.wait("It is sunny.")
        screen.wait_prompt(3)
        screen.press("wait\r")
        screen.wait("so far")
        screen.press(b"\x03")
        screen.wait("openglm: stopped")
        release.set()
        screen.wait_prompt(4)
        screen.press("/edit\r")
        screen.wait(lambda text: text.count("you> wait") == 2)
        screen.press("ed?\r")
        screen.wait(lambda text: text.count("result of get_weather>") == 2)
        screen.press("\r")
        screen.wait("no result of get_weather given")
        assert screen.leave() == 0
    sent = [r["messages"] for r in server.requests]
    assert [m["role"] for m in sent[1]] == ["user", "assistant", "tool"] and sent[1][2]["tool_call_id"] == "c1"
    assert [m["content"] for m in sent[-1] if m["role"] == "user"] == ["Weather?", "waited?"]
    assert server.requests[0]["tools"][0]["function"]["name"] == "get_weather"


@pytest.mark.parametrize("bare", [False, True])
def test_plain_where_colours_or_libraries_are_missing(bare: bool, home: dict[str, str]) -> None:
    """NO_COLOR, and neither prompt_toolkit nor rich: markdown as it came, no escape sequences in it."""
    environment = home if bare else {**home, "NO_COLOR": "1"}
    reply = Reply(pieces=sse(chunk({"reasoning_content": "hm"}), chunk({"content": "**bold** \x1b[31m"}, "stop")))
    with scripted_server(lambda body, headers: reply) as server:
        command = [*(BARE if bare else CHAT), "--url", server.url, "--model", "m"]
        with terminal(command, environment) as screen:
            screen.wait_prompt(1)
            screen.press("Hi\r")
            text = screen.wait_prompt(2)
            assert "glm> (thinks) hm" in text and "(answers) **bold** [31m" in text
            assert b"\x1b[31m" not in screen.raw
            assert screen.leave() == 0


def test_state_of_the_terminal_comes_back(home: dict[str, str]) -> None:
    """Keys typed during an answer are not echoed into it, and wait for the prompt."""
    release = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield from pieces_of("A\n\nB")[:2]
        assert release.wait(60)
        yield from sse(chunk({"content": "C"}, "stop"))

    with scripted_server(lambda body, headers: Reply(pieces=pieces())) as server:
        with terminal([*CHAT, "--url", server.url, "--model", "m"], home) as screen:
            screen.wait_prompt(1)
            screen.press("Hi\r")
            screen.wait("B")
            screen.press("typed ahead")
            assert "typed" not in screen.text
            release.set()
            screen.wait("you> typed ahead")
