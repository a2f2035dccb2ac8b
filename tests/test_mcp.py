"""MCP: our client against servers made with the official SDK, and our server, over stdio and HTTP.

python -m pytest tests/test_mcp.py
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from openglm.agent import mcp_server
from openglm.agent.mcp_server import ToolServer, http_app
from openglm.agent.toolbox import Toolbox, ToolboxConfig
from openglm.agent.tools.function import FunctionTool
from openglm.agent.tools.mcp_client import connect_servers
from openglm.agent.tools.mcp_config import MCPServerConfig, parse_servers
from openglm.types import Observation, StatefulTool, Tool, ToolContext, ToolFile
from tests.mcp_helpers import PNG, make_server

SMALL = str(Path(__file__).with_name("mcp_helpers.py"))
REPOSITORY = Path(__file__).resolve().parent.parent


def call(tool: Tool, known: ToolContext | None = None, /, **arguments: Any) -> Observation:
    return asyncio.run(tool.call(arguments, known or ToolContext()))


def close(tools: dict[str, Tool]) -> None:
    for tool in tools.values():
        assert isinstance(tool, StatefulTool)
        asyncio.run(tool.close())


def small(**more: Any) -> MCPServerConfig:
    environment = {"PYTHONPATH": str(REPOSITORY), "WORD": "told"}
    return MCPServerConfig(name="small", command=sys.executable, args=(SMALL,), env=environment, **more)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/mcp"
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module", params=["stdio", "http"])
def tools(request: pytest.FixtureRequest) -> Iterator[dict[str, Tool]]:
    """Those of the small server."""
    if request.param == "stdio":
        found, missing = connect_servers([small()], [])
        assert missing == []
        yield (named := {tool.spec.name: tool for tool in found})
        close(named)
        return
    with listening(make_server().streamable_http_app()) as url:
        found, missing = connect_servers([MCPServerConfig(name="small", url=url)], [])
        assert missing == []
        yield (named := {tool.spec.name: tool for tool in found})
        close(named)


# -------------------------------------------------------------------- our client


def test_the_tools_of_a_server(tools: dict[str, Tool]) -> None:
    assert list(tools) == ["add", "person", "picture", "things", "fails", "slow", "small_process_about", "die"]
    spec = tools["add"].spec
    assert spec.description == "Adds two numbers." and spec.parameters["required"] == ["a"]
    assert call(tools["add"], a=2, b=40).content == "42"
    found = call(tools["person"], name="李")
    assert json.loads(found.content) == found.data == {"name": "李", "age": 3} and not found.error


def test_every_kind_of_content(tools: dict[str, Tool]) -> None:
    found = call(tools["picture"])
    assert [(f.name, f.mime, f.read()) for f in found.files] == [("picture-1.png", "image/png", PNG)]
    assert found.content == "[picture-1.png: image/png, 16 bytes]"
    found = call(tools["things"])
    assert [(f.name, f.mime, f.read()) for f in found.files] == [
        ("things-1.wav", "audio/wav", b"RIFF"), ("table.csv", "text/csv", b"a,b"),
    ]  # fmt: skip
    assert found.content.splitlines() == [
        "words", "[things-1.wav: audio/wav, 4 bytes]", "[memo://a]", "the page", "[table.csv: text/csv, 3 bytes]",
        "[link more https://example.org/more: the rest]",
    ]  # fmt: skip


def test_errors_and_limits_of_time(tools: dict[str, Tool]) -> None:
    found = call(tools["fails"])
    assert found.error and "out of order" in found.content and "Traceback" not in found.content
    assert call(tools["add"], a="x").error
    said: list[str] = []
    found = call(tools["slow"], ToolContext(timeout_s=1.0, on_output=lambda stream, text: said.append(text)))
    assert found.error and "no answer within 1 s" in found.content
    assert said == ["1 of 2 half\n"]
    assert call(tools["add"], a=1).content == "2", "the connection is still good"


def test_cancelling_gives_up_a_call(tools: dict[str, Tool]) -> None:
    async def go() -> None:
        task = asyncio.ensure_future(tools["slow"].call({}, ToolContext()))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert call(tools["add"], a=1).content == "2"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_server_that_ends_is_started_anew_and_closing_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENGLM_SECRET", "hidden")
    found, _ = connect_servers([small()], [])
    named = {tool.spec.name: tool for tool in found}
    about = json.loads(call(named["small_process_about"]).content)
    assert about["environment"]["WORD"] == "told" and "OPENGLM_SECRET" not in about["environment"]
    broken = call(named["die"])
    assert broken.error and "MCP server small: it ended during the call" in broken.content
    assert "I leave" in broken.content and "started anew at the next call" in broken.content
    again = json.loads(call(named["small_process_about"]).content)["pid"]
    assert again != about["pid"] and alive(again) and not alive(about["pid"])
    os.kill(again, 9)
    while alive(again):
        time.sleep(0.01)
    time.sleep(0.2)  # until the end of its output is noticed
    third = json.loads(call(named["small_process_about"]).content)["pid"]
    assert third not in (again, about["pid"]), "ended between two calls: the second is made all the same"
    close(named)
    deadline = time.monotonic() + 20
    while alive(third) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(third)
    with pytest.raises(ValueError, match="is closed"):
        asyncio.run(named["add"].connection.call(lambda client: client.list_tools()))  # type: ignore[attr-defined]


def test_servers_that_do_not_start_are_missing_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import sys; print('no licence', file=sys.stderr); sys.exit(1)")
    (tmp_path / "mute.py").write_text("import time; time.sleep(60)")
    configs = [
        MCPServerConfig(name="absent", command="no-such-command-here"),
        MCPServerConfig(name="bad", command=sys.executable, args=(str(tmp_path / "bad.py"),)),
        MCPServerConfig(name="mute", command=sys.executable, args=(str(tmp_path / "mute.py"),), start_timeout_s=1.0),
        MCPServerConfig(name="nobody", url="http://127.0.0.1:9/mcp"),
    ]
    tools, missing = connect_servers(configs, [])
    reasons = dict(missing)
    assert tools == [] and list(reasons) == ["absent", "bad", "mute", "nobody"]
    assert "no command no-such-command-here" in reasons["absent"]
    assert "no licence" in reasons["bad"] and "no answer in time" in reasons["mute"]
    assert "http://127.0.0.1:9/mcp" in reasons["nobody"] and all("\n" not in why for why in reasons.values())
    box = Toolbox(ToolboxConfig(python=False, browser=False, images=False, mcp_servers=tuple(configs[:1])))
    assert [(row.name, row.ready) for row in box.rows()] == [("absent", False)]


# -------------------------------------------------------------------- which servers


def test_what_names_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "geheim")
    assert parse_servers("npx -y 'some server' .") == [
        MCPServerConfig(name="npx", command="npx", args=("-y", "some server", "."))
    ]
    assert parse_servers("https://host.example:8/mcp")[0].name == "host_example_8"
    path = tmp_path / "mcp.json"
    entries = {
        "files": {"command": "npx", "args": ["-y", 3], "env": {"TOKEN": "${MY_KEY}"}},
        "web": {"type": "http", "url": "https://h/mcp?k=1", "headers": {"Authorization": "Bearer ${MY_KEY}"}},
        "off": {"command": "x", "disabled": True},
    }
    path.write_text(json.dumps({"mcpServers": entries}))
    files, web = parse_servers(str(path))
    assert files.args == ("-y", "3") and files.env == {"TOKEN": "geheim"}
    assert web.headers == {"Authorization": "Bearer geheim"} and web.place == "web (https://h/mcp)"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (3, "must be an object, not int"), ({}, "needs a command or a url"),
        ({"command": "x", "url": "http://x"}, "needs a command or a url, and not both"),
        ({"command": "x", "arg": []}, "unknown field 'arg' (did you mean 'args'?)"),
        ({"command": "x", "args": "y"}, "args must be a list"), ({"url": "ftp://x"}, "is no http or https URL"),
        ({"command": "x", "env": {"A": "${NOT_SET_HERE}"}}, "the environment variable NOT_SET_HERE is not set"),
        ({"url": "http://x", "type": "sse"}, "type 'sse' is not spoken"),
        ({"command": "x", "timeout_s": "5"}, "timeout_s must be a number"),
        ({"command": "x", "timeout_s": 0}, "must be above 0"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named_in_one_line(tmp_path: Path, entry: Any, words: str) -> None:
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({"mcpServers": {"s": entry}}))
    with pytest.raises(ValueError) as caught:
        parse_servers(str(path))
    assert words in str(caught.value) and "'s'" in str(caught.value) and "\n" not in str(caught.value)


def test_what_names_no_server(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("{}")
    for text, words in {
        "": "needs a command", "a 'b": "is no command line", str(tmp_path / "a.json"): "is not JSON",
        str(tmp_path / "b.json"): 'has no "mcpServers"', str(tmp_path / "c.json"): "no file",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words):
            parse_servers(text)


# -------------------------------------------------------------------- our server


def note(text: str, context: ToolContext) -> Observation:
    """Notes a text down."""
    context.on_output("progress", "writing")
    files = (
        ToolFile("a.png", "image/png", PNG),
        ToolFile("b.txt", "text/plain", b"x"),
        ToolFile("c.wav", "audio/wav", b"R"),
    )
    return Observation(f"{text} in {context.conversation}", files, error=text == "bad")


def boxed(*functions: Any) -> Toolbox:
    box = Toolbox(ToolboxConfig(python=False, browser=False, images=False))
    box.tools += [FunctionTool(function) for function in functions]
    return box


def test_our_tools_over_http_through_our_client() -> None:
    with listening(http_app(ToolServer(boxed(note), "1.0"))) as url:
        found, missing = connect_servers([MCPServerConfig(name="ours", url=url)], ["note"])
        assert missing == [] and [tool.spec.name for tool in found] == ["ours_note"]
        assert found[0].spec.parameters["required"] == ["text"] and found[0].spec.description == "Notes a text down."
        said: list[str] = []
        one = ToolContext("one", on_output=lambda stream, text: said.append(text))
        first, second = call(found[0], one, text="x"), call(found[0], ToolContext("two"), text="x")
        assert first.content.startswith("x in mcp-") and said == ["1 writing\n"]
        assert [(f.name, f.mime, f.read()) for f in first.files] == [
            ("ours_note-1.png", "image/png", PNG), ("b.txt", "text/plain", b"x"),
            ("ours_note-3.wav", "audio/wav", b"R"),
        ]  # fmt: skip
        assert first.content != second.content, "each conversation has a state of its own"
        assert first.content == call(found[0], ToolContext("one"), text="x").content
        assert call(found[0], text="bad").error
        wrong = call(found[0], txt="x")
        assert wrong.error and "there is no argument 'txt' (did you mean 'text'?)" in wrong.content
        close({"note": found[0]})


def test_a_key_is_asked_for_where_there_is_one() -> None:
    with listening(http_app(ToolServer(boxed(note)), keys=("geheim",))) as url:
        for headers, n in (({}, 0), ({"Authorization": "Bearer falsch"}, 0), ({"Authorization": "Bearer geheim"}, 1)):
            found, missing = connect_servers([MCPServerConfig(name="ours", url=url, headers=headers)], [])
            assert (len(found), len(missing)) == (n, 1 - n)
            close({tool.spec.name: tool for tool in found})
    with pytest.raises(ValueError, match="opens the tools to other machines: give --api-key"):
        asyncio.run(mcp_server.serve_http(ToolServer(boxed(note)), 0, "0.0.0.0"))


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_clients_that_name_no_conversation_have_a_state_each(mode: Any) -> None:
    """The SDK's own client; "auto" would take the version of the protocol that has no sessions."""
    from mcp.client import Client

    async def talk(url: str) -> list[str]:
        async with Client(url, mode=mode) as client:
            answers = [await client.call_tool("note", {"text": "x"}) for _ in range(2)]
            return [answer.content[0].text for answer in answers]

    with listening(http_app(ToolServer(boxed(note)))) as url:
        one, two = asyncio.run(talk(url)), asyncio.run(talk(url))
    assert one[0] == one[1] and two[0] == two[1] and one[0] != two[0]


def test_only_so_many_conversations_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_server, "MAX_CONVERSATIONS", 2)
    ended: list[str] = []

    class Kept:
        spec = FunctionTool(note).spec

        async def call(self, arguments: dict[str, Any], context: ToolContext) -> Observation:
            return Observation(context.conversation)

        async def end(self, conversation: str) -> None:
            ended.append(conversation)

        async def close(self) -> None:
            ended.append("all")

    box = boxed()
    box.tools.append(Kept())
    with listening(http_app(ToolServer(box))) as url:
        found, _ = connect_servers([MCPServerConfig(name="ours", url=url)], [])
        seen = [call(found[0], ToolContext(name), text="x").content for name in ("a", "b", "a", "c")]
        assert ended == [seen[1]] and seen[0] == seen[2]
        close({"note": found[0]})


def test_our_tools_over_stdio_through_our_client(tmp_path: Path) -> None:
    """The verb itself. What a tool prints must not get among the messages."""
    (tmp_path / "mine.py").write_text(
        "import os\nprint('noise')\ndef shout(text: str) -> str:\n    'Shouts.'\n    print('noise')\n"
        "    os.system('echo more noise')\n"
        "    return text.upper()\n"
    )
    args = ("-m", "openglm", "mcp", "--no-python", "--no-browser", "--tools", str(tmp_path / "mine.py"))
    config = MCPServerConfig(name="ours", command=sys.executable, args=args, env={"PYTHONPATH": str(REPOSITORY)})
    found, missing = connect_servers([config], [])
    assert missing == [] and [tool.spec.name for tool in found] == ["shout"]
    assert call(found[0], text="ja").content == "JA" and call(found[0], text="nein").content == "NEIN"
    close({"shout": found[0]})
