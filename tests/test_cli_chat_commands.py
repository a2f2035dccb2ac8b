"""Commands of `openglm chat`, over a pipe, with a server that says what it was asked; and mistakes on the way there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from openglm.cli import main
from tests.http_helpers import Reply, chunk, scripted_server, sse


def echo(body: dict[str, Any] | None, headers: Mapping[str, str]) -> Reply:
    if body is None:
        return Reply.json(200, {"data": [{"id": "one"}]})
    if body["messages"][-1]["content"] == "fail":
        return Reply.json(500, {"error": "out of luck"})
    n = sum(m["role"] == "user" for m in body["messages"])
    usage = {"prompt_tokens": 10 * n, "completion_tokens": 2}
    return Reply(pieces=sse(chunk({"content": f"answer {n}"}), chunk({}, "stop"), chunk(usage=usage)))


def talk(url: str, *lines: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "openglm", "chat", "--url", url, "--api-key", "k"],
        input="\n".join(map(str, lines)), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def asked(requests: list[dict[str, Any]]) -> list[list[str]]:
    """What each request held: first letters of roles, and contents."""
    return [[f"{m['role'][0]}:{m['content']}" for m in r["messages"]] for r in requests]


def test_commands_change_what_is_asked(tmp_path: Path) -> None:
    notes, saved = tmp_path / "notes.txt", tmp_path / "talk.json"
    notes.write_text("北京 ```x```\n", encoding="utf-8")
    with scripted_server(echo) as server:
        done = talk(
            server.url, "/set temperature 0.5", "/set top_p=0.9", "one", "two", "/undo", "/retry", "/edit ONE",
            f"/file {notes}", "three", "/set temperature default", '"""', "four", "", "five", '"""', f"/save {saved}",
            "/clear", "/system S", "six", f"/load {saved}", "/set", "/stats", "seven", "/exit",
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    attached = "u:notes.txt:\n````\n北京 ```x```\n````\n\nthree"
    base = ["u:ONE", "a:answer 1", attached, "a:answer 2"]
    assert asked(server.requests) == [
        ["u:one"], ["u:one", "a:answer 1", "u:two"], ["u:one"], ["u:ONE"], base[:3], [*base, "u:four\n\nfive"],
        ["s:S", "u:six"], [*base, "u:four\n\nfive", "a:answer 3", "u:seven"],
    ]  # fmt: skip
    assert [(r.get("temperature"), r["top_p"], r["model"]) for r in server.requests[4:6]] == [
        (0.5, 0.9, "one"), (None, 0.9, "one"),
    ]  # fmt: skip
    assert "forgotten: two" in done.stdout and "temperature default" in done.stdout
    assert "prompt 10, answer 2, together 12 tokens" in done.stdout and "you>" not in done.stdout


def test_mistakes_end_nothing(tmp_path: Path) -> None:
    binary, wrong, big = tmp_path / "x.png", tmp_path / "w.json", tmp_path / "big.txt"
    binary.write_bytes(b"\x89PNG\0\0")
    wrong.write_text('[{"role": "boss", "content": ""}]')
    big.write_text("x" * (2 << 20))
    cases = [
        ("/undo", "there is no question yet"), ("/retry", "there is no question yet"),
        ("/edit", "/edit needs the new text here"), ("/set heat 1", "no setting 'heat'"),
        ("/set temperature hot", "temperature must be a number, not 'hot'"),
        ("/set temperature -1", "temperature must be 0.0 to"), ("/save", "/save needs a file name"),
        ("/stats", "there is no answer yet"), (f"/file {tmp_path}/no", f"cannot read {tmp_path}/no: No such file"),
        (f"/file {binary}", "it is no text"), (f"/file {big}", "larger than 1 MiB"), (f"/file {tmp_path}", "directory"),
        (f"/load {wrong}", "messages[0].role must be one of"), (f"/tools {wrong}", "a tool needs a function"),
        ("/relod x", "unknown command /relod"),
    ]  # fmt: skip
    with scripted_server(echo) as server:
        done = talk(server.url, *[line for line, _ in cases], "fail", "/retry", "fine")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == len(cases) + 2
    for (line, words), error in zip(cases, errors, strict=False):
        assert words in error, line
    assert errors[-1] == errors[-2] and errors[-1].endswith("failed (500): out of luck")
    assert asked(server.requests) == [["u:fail"], ["u:fail"], ["u:fine"]], "a question without answer is not kept"


def test_files_that_wait_go_with_the_next_question_whichever_command_asks_it(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("grey\n")
    with scripted_server(echo) as server:
        done = talk(server.url, "one", f"/file {notes}", "/retry", "/edit two", "three")
    attached = "notes.txt:\n```\ngrey\n```\n\n"
    assert asked(server.requests) == [
        ["u:one"], ["u:one"], [f"u:{attached}two"], [f"u:{attached}two", "a:answer 1", "u:three"]
    ]  # fmt: skip
    assert done.returncode == 0


def test_a_pipe_is_told_that_its_last_message_has_no_answer() -> None:
    with scripted_server(echo) as server:
        assert talk(server.url, "fine", "fail").returncode == 2
        assert talk(server.url, "fail", "/quit").returncode == 2
        assert talk(server.url, "fail", "fine").returncode == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--url", "localhost:8000"], "is no address of a server"),
        (["--url", "http://127.0.0.1:1"], "is the server running there?"),
        (["--url", "http://127.0.0.1:1", "--device", "cpu"], "--device is for a model here"),
        (["some/model", "--url", "http://127.0.0.1:1"], "MODEL is for a model here"),
        (["--model", "x"], "--model goes with --url"),
        (["--api-key", "x"], "--api-key goes with --url"),
    ],
)
def test_mistakes_of_the_command_line(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_saved_conversation_with_calls_comes_back(tmp_path: Path) -> None:
    from openglm.cli_chat_commands import Conversation
    from openglm.types import Message, ToolCall

    talk = Conversation("S")
    talk.messages = [
        Message("user", "q"), Message("assistant", "", (ToolCall("f", '{"x": 1}', "i"), ToolCall("g", "{}"))),
        Message("tool", "r", tool_call_id="i", name="f"), Message("assistant", "a", reasoning="hm"),
    ]  # fmt: skip
    talk.save(tmp_path / "t.json")
    other = Conversation(None)
    other.load(tmp_path / "t.json")
    assert other.all() == talk.all()
    value = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps({"messages": value}))
    other.load(tmp_path / "t.json")
    assert other.all() == talk.all()
