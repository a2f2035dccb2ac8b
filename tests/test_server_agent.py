"""Chat requests whose tools the server runs: streamed and whole, approval, files, conversations, refusals."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from openglm.agent.events import AgentConfig
from openglm.agent.replay import replay
from openglm.agent.toolbox import ToolboxConfig
from openglm.agent.trace import read_trace
from openglm.server.config import ServeConfig
from openglm.server.errors import ApiError
from openglm.server.files import FileStore
from openglm.server.service import Service
from openglm.types import ToolFile
from tests.format_helpers import SPECIALS_OF
from tests.server_helpers import running, scripted

FUNCTIONS = '''
import asyncio
from pathlib import Path
from openglm.agent.tools.function import tool
from openglm.types import Observation, ToolContext, ToolFile

@tool
def price(fruit: str) -> str:
    """The price of a fruit."""
    return f"{fruit}: 3 euros"

@tool
def draw(context: ToolContext) -> Observation:
    """A picture."""
    context.on_output("stdout", "drawing")
    return Observation("drawn", (ToolFile("p.png", "image/png", b"\\x89PNG", description="a dot"),), {"k": 1})

@tool
async def wait() -> str:
    """Waits."""
    Path("BEGUN").write_text("x")
    try:
        await asyncio.sleep(60)
    finally:
        Path("ENDED").write_text("x")
    return "never"
'''
ALL = [{"type": "all_tools"}]
ASK: list[Any] = [{"role": "user", "content": "Hi"}]


def call(name: str, **arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


class Server:
    def __init__(self, url: str, script: Any, tokenizer: Any) -> None:
        self.url, self.script, self.tokenizer = url, script, tokenizer
        self.client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def will_say(self, *answers: str) -> None:
        """One after another, for the next requests of the engine."""
        waiting = [self.tokenizer.encode_marked(answer, SPECIALS_OF["chatml"]) for answer in answers]
        script = self.script

        class Of(dict):  # type: ignore[type-arg]
            def __setitem__(self, page: int, value: tuple[int, list[int]]) -> None:
                super().__setitem__(page, (value[0], waiting.pop(0)))

        script._of = Of()

    def post(self, path: str, value: Any, **headers: str) -> httpx.Response:
        return httpx.post(self.url + path, json=value, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("agent")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    (folder / "functions.py").write_text(
        FUNCTIONS.replace("BEGUN", str(folder / "begun")).replace("ENDED", str(folder / "ended"))
    )
    toolbox = ToolboxConfig(python=False, browser=False, images=False, tools=(folder / "functions.py",))
    model, script = scripted("chatml")
    config = ServeConfig(toolbox=toolbox, agent=AgentConfig(n_rounds=4, guided=False), trace_dir=folder / "traces")
    with running(Service(model, config, "tiny")) as url:
        yield Server(url, script, model.tokenizer)


def streamed(server: Server, **more: Any) -> tuple[str, list[dict[str, Any]], str]:
    """(text, observations, finish reason)"""
    stream = server.client.chat.completions.create(
        model="tiny", messages=ASK, stream=True, extra_body={"tools": ALL, **more}
    )  # fmt: skip
    text, reason = "", ""
    seen: list[dict[str, Any]] = []
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            seen += getattr(choice.delta, "observations", None) or []
            reason = choice.finish_reason or reason
    return text, seen, reason


def test_streamed(server: Server, folder: Path) -> None:
    """Each call has its news in order, then the answer; the run's trace replays."""
    server.will_say(f"I look.\n{call('price', fruit='fig')}\n{call('draw')}", "It costs 3 euros.")
    text, seen, reason = streamed(server)
    assert text == "I look.\n\nIt costs 3 euros." and reason == "stop"
    ids = list(dict.fromkeys(entry["id"] for entry in seen))
    price, draw = ([entry for entry in seen if entry["id"] == id] for id in ids)
    assert price[0] == {"id": ids[0], "name": "price", "status": "running", "arguments": '{"fruit": "fig"}'}
    assert price[-1]["status"] == "ok" and price[-1]["content"] == "fig: 3 euros" and price[-1]["seconds"] >= 0
    assert [entry.get("output") for entry in draw] == [None, "drawing", None]
    (file,) = draw[-1]["files"]
    assert file["name"] == "p.png" and draw[-1]["data"] == {"k": 1}
    got = httpx.get(server.url + file["url"])
    assert got.content == b"\x89PNG" and got.headers["content-type"] == "image/png"
    assert "sandbox" in got.headers["content-security-policy"] and got.headers["x-content-type-options"] == "nosniff"
    trace = read_trace(max((folder / "traces").iterdir(), key=lambda path: path.stat().st_mtime_ns))
    assert trace.model == "tiny" and trace.outcome is not None and replay(trace) == []


def test_whole(server: Server) -> None:
    server.will_say(call("price", fruit="fig"), "3 euros")
    done = server.post("/v1/chat/completions", {"messages": ASK, "tools": ALL}).json()
    message = done["choices"][0]["message"]
    assert message["content"] == "3 euros" and "tool_calls" not in message
    (seen,) = message["observations"]
    assert (seen["name"], seen["status"], seen["arguments"]) == ("price", "ok", '{"fruit": "fig"}')
    assert done["timings"]["rounds"] == 2 and done["usage"]["completion_tokens"] > 10


def test_functions_of_the_client_stay_its_own(server: Server) -> None:
    book = {"type": "function", "function": {"name": "book", "parameters": {"type": "object", "properties": {}}}}
    answer = f"{call('price', fruit='fig')}\n{call('book')}"
    server.will_say(answer)
    done = server.post("/v1/chat/completions", {"messages": ASK, "tools": [*ALL, book]}).json()["choices"][0]
    assert done["finish_reason"] == "tool_calls"
    assert [c["function"]["name"] for c in done["message"]["tool_calls"]] == ["book"]
    assert [o["name"] for o in done["message"]["observations"]] == ["price"]
    # The client runs its own, and goes on with all results in the history.
    seen = done["message"]["observations"][0]
    history = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": seen["id"], "type": "function", "function": {"name": "price", "arguments": seen["arguments"]}},
            *done["message"]["tool_calls"]]},
        {"role": "tool", "tool_call_id": seen["id"], "content": seen["content"]},
        {"role": "tool", "tool_call_id": done["message"]["tool_calls"][0]["id"], "content": "booked"},
    ]  # fmt: skip
    server.will_say("All done.")
    done = server.post("/v1/chat/completions", {"messages": history, "tools": [*ALL, book]}).json()["choices"][0]
    assert done["message"]["content"] == "All done."


@pytest.mark.parametrize("decision", ["allow", "deny"])
def test_approval(server: Server, decision: str) -> None:
    server.will_say(call("price", fruit="fig"), "Well.")
    stream = server.client.chat.completions.create(
        model="tiny", messages=ASK, stream=True, extra_body={"tools": [{"type": "all_tools", "approval": "ask"}]}
    )
    seen: list[dict[str, Any]] = []
    for chunk in stream:
        for choice in chunk.choices:
            for entry in getattr(choice.delta, "observations", None) or []:
                seen.append(entry)
                if entry["status"] == "approval":
                    wrong = server.post("/v1/agent/approvals", {"id": "call_none", "decision": "allow"})
                    assert wrong.status_code == 404 and wrong.json()["error"]["param"] == "id"
                    said = server.post("/v1/agent/approvals", {"id": entry["id"], "decision": decision})
                    assert said.json() == {"id": entry["id"], "decision": decision}
    assert [entry["status"] for entry in seen] == ["running", "approval", "ok" if decision == "allow" else "denied"]
    late = server.post("/v1/agent/approvals", {"id": seen[0]["id"], "decision": "allow"})
    assert late.status_code == 404


def test_a_client_that_goes_away_stops_the_tools(server: Server, folder: Path) -> None:
    server.will_say(call("wait"))
    with httpx.stream("POST", f"{server.url}/v1/chat/completions",
                      json={"messages": ASK, "tools": ALL, "stream": True}) as response:  # fmt: skip
        for line in response.iter_lines():
            if "wait" in line:
                break
        _until(lambda: (folder / "begun").exists())
    _until(lambda: (folder / "ended").exists())


def _until(condition: Any) -> None:
    for _ in range(600):
        if condition():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it did not happen in time")


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"tools": ALL, "n": 2}, "n", "n cannot be asked for where the server runs the tools"),
        ({"tools": ALL, "response_format": {"type": "json_object"}}, "response_format", "cannot be asked for"),
        ({"tools": ALL, "tool_choice": "none"}, "tool_choice", "cannot be asked for"),
        ({"tools": [{"type": "python"}]}, "tools[0].type", "this server has no tool python"),
        ({"tools": [{"type": "telepathy"}]}, "tools[0].type", "telepathy"),
        ({"conversation": "a"}, "conversation", "needs tools of the server"),
        ({"tools": ALL, "conversation": "a/b"}, "conversation", "pattern"),
        ({"tools": ALL, "files": ["file-0"]}, "files[0]", "there is no file"),
        (
            {"tools": [*ALL, {"type": "function", "function": {"name": "price"}}]},
            "tools",
            "the server has a tool 'price'",
        ),
    ],
)
def test_refusals(server: Server, body: dict[str, Any], param: str, text: str) -> None:
    for stream in (False, True):
        refused = server.post("/v1/chat/completions", {"messages": ASK, "stream": stream, **body})
        error = refused.json()["error"]
        assert refused.status_code in (400, 404) and error["param"] == param and text in error["message"], error


def test_a_server_without_tools_says_so() -> None:
    model, _ = scripted("chatml")
    with running(Service(model, ServeConfig(), "tiny")) as url:
        refused = httpx.post(f"{url}/v1/chat/completions", json={"messages": ASK, "tools": ALL})
        assert refused.status_code == 400 and "started without --all-tools" in refused.json()["error"]["message"]
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["all_tools"] is False


def test_models_say_which_tools_there_are(server: Server) -> None:
    found = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert found["all_tools"] is True and found["server_tools"] == ["price", "draw", "wait"]


def test_files_as_openai_has_them(server: Server) -> None:
    made = server.client.files.create(file=("表.csv", b"a,b\n1,2\n"), purpose="assistants")
    assert made.id.startswith("file-") and made.bytes == 8 and made.filename == "表.csv"
    assert server.client.files.content(made.id).read() == b"a,b\n1,2\n"
    assert server.client.files.retrieve(made.id).id == made.id
    kind = httpx.get(f"{server.url}/v1/files/{made.id}/content").headers
    assert kind["content-type"] == "application/octet-stream" and kind["content-disposition"].startswith("attachment")
    refused = server.post("/v1/chat/completions", {"messages": ASK, "tools": ALL, "files": [made.id]})
    assert refused.json()["error"]["message"] == "files need the tool python"
    assert server.client.files.delete(made.id).deleted
    assert httpx.get(f"{server.url}/v1/files/{made.id}").status_code == 404
    for parts, text in (
        ({"files": {"file": ("../../etc/passwd", b"x")}}, None), ({"files": {"file": (".hidden", b"x")}}, "not begin"),
        ({"files": {"other": ("a", b"x")}}, "unknown"), ({"data": {"file": "x"}}, "multipart"),
        ({"files": {"file": ("a", b"x")}, "data": {"purpose": "fine-tune"}}, "purpose"),
        ({"content": b"nonsense", "headers": {"content-type": "multipart/form-data"}}, "form cannot be read"),
    ):  # fmt: skip
        got = httpx.post(f"{server.url}/v1/files", **parts)
        if text is None:
            assert got.json()["filename"] == "passwd"
        else:
            assert got.status_code in (400, 415) and text in got.json()["error"]["message"], got.text


def test_the_store_is_bounded_and_keeps_callers_apart() -> None:
    store = FileStore(max_bytes=400)
    first = store.add("a", "x", "text/plain", b"1" * 60, "assistants")
    store.add("a", "y", "text/plain", b"1" * 60, "assistants")
    with pytest.raises(ApiError, match="there is no file"):
        store.get("a", first.id)  # a caller has a quarter at most
    other = store.add("b", "z", "text/plain", b"2" * 60, "assistants")
    with pytest.raises(ApiError, match="there is no file"):
        store.get("a", other.id)
    with pytest.raises(ApiError, match="100 are the most"):
        store.add("a", "big", "text/plain", b"1" * 101, "assistants")
    told = store.of_tool("a", ToolFile("big.bin", "x/y", b"1" * 101))
    assert told == {"name": "big.bin", "mime": "x/y", "description": ""}
    store.check_integrity()


def test_keys_guard_files_and_approvals(folder: Path) -> None:
    toolbox = ToolboxConfig(python=False, browser=False, images=False, tools=(folder / "functions.py",))
    model, _ = scripted("chatml")
    with running(Service(model, ServeConfig(toolbox=toolbox, api_keys=("k1", "k2")), "tiny")) as url:
        assert httpx.post(f"{url}/v1/files", files={"file": ("a", b"x")}).status_code == 401
        one = httpx.post(f"{url}/v1/files", files={"file": ("a", b"x")}, headers={"Authorization": "Bearer k1"}).json()
        where = f"{url}/v1/files/{one['id']}/content"
        assert httpx.get(where).status_code == 401
        assert httpx.get(where, headers={"Authorization": "Bearer k2"}).status_code == 404
        assert httpx.get(where, headers={"Authorization": "Bearer k1"}).content == b"x"
        assert httpx.post(f"{url}/v1/agent/approvals", json={"id": "a", "decision": "allow"}).status_code == 401


def test_python_keeps_its_state_in_a_conversation(tmp_path: Path) -> None:
    from openglm.agent.tools.python import PythonTool

    if why := PythonTool.why_not():
        pytest.skip(why)
    model, script = scripted("chatml")
    config = ServeConfig(toolbox=ToolboxConfig(browser=False, images=False), agent=AgentConfig(guided=False))
    with running(Service(model, config, "tiny")) as url:
        server = Server(url, script, model.tokenizer)
        made = server.client.files.create(file=("t.csv", b"a,b\n1,2\n"), purpose="assistants")
        asked = {"messages": ASK, "tools": [{"type": "code_interpreter"}], "conversation": "c1", "files": [made.id]}
        server.will_say(call("python", code="x = open('t.csv').read(); print(len(x))"), "ok")
        done = server.post("/v1/chat/completions", asked).json()["choices"][0]["message"]
        assert done["observations"][0]["content"] == "8"
        assert "[files in the working folder: t.csv]" in model.tokenizer.decode(script.seen[-1])
        server.will_say(call("python", code="print(x[:3])"), "ok")
        del asked["files"]
        done = server.post("/v1/chat/completions", asked).json()["choices"][0]["message"]
        assert done["observations"][0]["content"] == "a,b"
        server.will_say(call("python", code="print(x)"), "ok")
        other = server.post("/v1/chat/completions", {**asked, "conversation": "c2"}).json()["choices"][0]["message"]
        assert "NameError" in other["observations"][0]["content"] and other["observations"][0]["status"] == "error"
