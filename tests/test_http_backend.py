"""HttpBackend over real HTTP on loopback: streams of many servers, errors, cancelling; and the answer parser alone."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openglm.agent.http_backend import BackendError, HttpBackend, base_url
from openglm.agent.http_stream import HttpAnswer, said_by
from openglm.types import Event, Grammar, Message, ToolCall, ToolSpec, Usage
from tests.http_helpers import Reply, chunk, scripted_server, sse


def key_told(body: object, headers: Mapping[str, str]) -> Reply:
    return Reply(pieces=sse(chunk({"content": headers.get("Authorization", "none")}, "stop")))


HELLO = [Message("user", "Hello!")]
USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
WEATHER = {"name": "get_weather", "description": "Weather.", "parameters": {"type": "object", "properties": {}}}


def call(index: int | None, name: str | None, arguments: str, identity: str | None = None) -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": name} if name is not None else {})
    piece: dict[str, Any] = {"function": function} | ({} if index is None else {"index": index})
    return {"tool_calls": [piece | ({"id": identity, "type": "function"} if identity else {})]}


def told(events: Sequence[Event]) -> tuple[str, str, list[ToolCall], str | None]:
    """(text, reasoning, calls, finish reason); only the last event has a reason."""
    assert all(e.finish_reason is None for e in events[:-1])
    calls = [e.tool_call for e in events if e.tool_call is not None]
    text, reasoning = ("".join(getattr(e, part) for e in events) for part in ("text", "reasoning"))
    return text, reasoning, calls, events[-1].finish_reason


def both_ways(backend: HttpBackend, *arguments: Any, **sampling: Any) -> list[Event]:
    """The events of stream, which astream gives too."""

    async def collect() -> list[Event]:
        return [e async for e in backend.astream(*arguments, **sampling)]

    events = list(backend.stream(*arguments, **sampling))
    assert asyncio.run(collect()) == events
    return events


# -------------------------------------------------------------------- answers

TWO_CALLS = [ToolCall("f", '{"x": 1}', "a"), ToolCall("g", "{}", "b")]
STREAMS: dict[str, tuple[list[dict[str, Any]], tuple[str, str, list[ToolCall], str]]] = {
    "openai": ([chunk({"role": "assistant", "content": ""}), chunk({"content": "Hel"}), chunk({"content": "lo"}),
                chunk({}, "stop"), chunk(usage=USAGE)], ("Hello", "", [], "stop")),
    "reasoning_content": ([chunk({"reasoning_content": "hm"}), chunk({"content": "4", "reasoning_content": None}),
                           chunk({}, "stop")], ("4", "hm", [], "stop")),
    "reasoning": ([chunk({"reasoning": "hm"}), chunk({"content": "4"}, "length")], ("4", "hm", [], "length")),
    "calls": ([chunk(call(0, "f", "", "a")), chunk(call(0, None, '{"x":')), chunk(call(0, None, " 1}")),
               chunk(call(1, "g", "", "b")), chunk({}, "tool_calls")], ("", "", TWO_CALLS, "tool_calls")),
    "whole calls, one index": ([chunk(call(0, "f", '{"x": 1}', "a")), chunk(call(0, "g", "{}", "b"), "stop")],
                               ("", "", TWO_CALLS, "tool_calls")),
    "calls without index": ([chunk(call(None, "f", '{"x"', "a")), chunk(call(None, None, ": 1}")),
                             chunk(call(None, "g", "{}", "b")), chunk({}, "stop")], ("", "", TWO_CALLS, "tool_calls")),
    "name and id in each piece": ([chunk(call(0, "f", '{"x"', "a")), chunk(call(0, "f", ": 1}", "a")),
                                   chunk(call(1, "g", "{}", "b")), chunk({}, "stop")],
                                  ("", "", TWO_CALLS, "tool_calls")),
    "no ids": ([chunk(call(None, "f", "{}")), chunk(call(None, "g", "{}")), chunk({}, "stop")],
               ("", "", [ToolCall("f", "{}"), ToolCall("g", "{}")], "tool_calls")),
    "line ends inside text": ([chunk({"content": "a\u2028b\x85c\x0b d\n\r\n北京🙂"}), chunk({}, "stop")],
                              ("a\u2028b\x85c\x0b d\n\r\n北京🙂", "", [], "stop")),
    "other choices": ([{"choices": [{"index": 1, "delta": {"content": "no"}}]}, chunk({"content": "yes"}, "eos")],
                      ("yes", "", [], "stop")),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_streams_of_many_servers(name: str) -> None:
    values, expected = STREAMS[name]
    with scripted_server(lambda body, headers: Reply(pieces=sse(*values))) as server:
        events = both_ways(HttpBackend(server.url, "m"), HELLO)
    assert told(events) == expected
    assert events[-1].usage == (Usage(5, 3) if name == "openai" else None)


@given(st.sampled_from(sorted(STREAMS)), st.data(), st.sampled_from([b"\n", b"\r\n", b"\r"]))
@settings(max_examples=60, deadline=None)
def test_an_answer_is_the_same_however_its_bytes_are_cut(name: str, data: st.DataObject, newline: bytes) -> None:
    values, expected = STREAMS[name]
    body = b": keep-alive\n\n" + b"".join(sse(*values)).replace(b"data: ", b"event: message\ndata:")
    body = body.replace(b"\n", newline)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    answer = HttpAnswer()
    edges = [0, *cuts, len(body)]
    events = [e for i, j in zip(edges, edges[1:], strict=False) for e in answer.feed(body[i:j])]
    assert told([*events, *answer.finish()]) == expected and answer.done


def test_a_server_that_does_not_stream() -> None:
    message = {"role": "assistant", "content": "Hi", **call(None, "f", "{}", "a"), "reasoning_content": "hm"}
    whole = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}], "usage": USAGE}
    with scripted_server(lambda body, headers: Reply.json(200, whole)) as server:
        events = both_ways(HttpBackend(server.url, "m"), HELLO)
    assert told(events) == ("Hi", "hm", [ToolCall("f", "{}", "a")], "tool_calls") and events[-1].usage == Usage(5, 3)


def test_events_come_as_they_are_sent() -> None:
    seen = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield from sse(chunk({"content": "a"}), done=False)
        assert seen.wait(30), "the first piece waited for the second"
        yield from sse(chunk({"content": "b"}, "stop"))

    with scripted_server(lambda body, headers: Reply(pieces=pieces())) as server:
        stream = HttpBackend(server.url, "m").stream(HELLO)
        assert next(stream).text == "a"
        seen.set()
        assert [e.text for e in stream] == ["b", ""]


# -------------------------------------------------------------------- requests


def test_a_request_says_what_was_asked() -> None:
    messages = [
        Message("system", "Brief."), Message("user", "Hi", name="Ann"),
        Message("assistant", "", (ToolCall("f", "{}"), ToolCall("g", "{}", "x")), reasoning="secret thought"),
        Message("tool", "1", name="f"), Message("tool", "2", tool_call_id="x"),
    ]  # fmt: skip
    schema = Grammar("json_schema", '{"type": "object"}')
    with scripted_server(
        lambda body, headers: Reply(pieces=sse(chunk({"content": headers.get("Authorization")}, "stop")))
    ) as server:
        backend = HttpBackend(f"{server.url}/v1/chat/completions", "m", api_key=" key ")
        events = list(backend.stream(
            messages, [WEATHER, ToolSpec.of_builtin("python")], temperature=0.5, max_new_tokens=7, stop_strings=("x",),
            logit_bias={3: float("-inf")}, grammar=schema, top_k=5, seed=None,
        ))  # fmt: skip
    assert events[0].text == "Bearer key"
    (body,) = server.requests
    assert server.paths == ["/v1/chat/completions"]
    call_id = body["messages"][2]["tool_calls"][0]["id"]
    assert body["messages"] == [
        {"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": call_id, "type": "function", "function": {"name": "f", "arguments": "{}"}},
            {"id": "x", "type": "function", "function": {"name": "g", "arguments": "{}"}}]},
        {"role": "tool", "content": "1", "tool_call_id": call_id},
        {"role": "tool", "content": "2", "tool_call_id": "x"},
    ]  # fmt: skip
    assert "secret" not in json.dumps(body)
    assert [t["function"]["name"] for t in body["tools"]] == ["get_weather", "python"]
    assert (body["model"], body["temperature"], body["max_tokens"], body["stop"]) == ("m", 0.5, 7, ["x"])
    assert body["logit_bias"] == {"3": -100.0} and body["top_k"] == 5 and "seed" not in body and body["stream"] is True
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}


@pytest.mark.parametrize(
    ("arguments", "sampling", "words"),
    [
        ([{"role": "user", "text": "x"}], {}, "messages[0] has an unknown field 'text'"),
        ([{"role": "user"}], {}, "messages[0].content is missing"),
        (HELLO, {"temprature": 1}, "no sampling option 'temprature' for a server (did you mean 'temperature'?)"),
        (HELLO, {"grammar": Grammar("regex", "a+")}, "no grammar of kind regex"),
        ([Message("tool", "1")], {}, "no message before it called"),
    ],
)
def test_what_cannot_be_asked_is_said_at_once(
    arguments: Sequence[Any], sampling: Mapping[str, Any], words: str
) -> None:
    with pytest.raises(ValueError) as error:
        HttpBackend("http://127.0.0.1:1").stream(arguments, **sampling)
    assert words in str(error.value)


def test_addresses_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for given_url, url in [("http://h:1", "http://h:1/v1"), ("https://h/api/v3/", "https://h/api/v3"),
                           (" http://h/v1/chat/completions ", "http://h/v1")]:  # fmt: skip
        assert base_url(given_url) == url
    for wrong in ("localhost:8000", "ftp://h", "http://", ""):
        with pytest.raises(ValueError, match="such as http://localhost:8000/v1"):
            base_url(wrong)
    with pytest.raises(ValueError, match="copy it again"):
        HttpBackend("http://h", api_key="clé")
    monkeypatch.setenv("OPENAI_API_KEY", "from-env")
    with scripted_server(
        lambda body, headers: Reply(pieces=sse(chunk({"content": headers.get("Authorization", "none")}, "stop")))
    ) as server:
        assert next(HttpBackend(server.url, "m").stream(HELLO)).text == "Bearer from-env"
        assert next(HttpBackend(server.url, "m", "").stream(HELLO)).text == "none"


def test_the_only_model_is_taken() -> None:
    models = {"data": [{"id": "one"}]}
    answers: list[dict[str, Any]] = [models, {"data": [{"id": "a"}, {"id": "b"}]}, {"data": []}, {"hello": 1}]
    ok = Reply(pieces=sse(chunk({"content": "x"}, "stop")))
    with scripted_server(lambda body, headers: ok if body else Reply.json(200, answers.pop(0))) as server:
        assert told(both_ways(HttpBackend(server.url), HELLO))[0] == "x"
        assert [r["model"] for r in server.requests] == ["one", "one"] and server.paths[0] == "/v1/models"
        for words in ("serves several models: a, b; say which", "names no model", "no OpenAI-compatible server"):
            with pytest.raises(BackendError, match=words):
                next(HttpBackend(server.url).stream(HELLO))


# -------------------------------------------------------------------- errors


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def error_of(backend: HttpBackend) -> BackendError:
    async def first() -> Event:
        return await anext(backend.astream(HELLO))

    with pytest.raises(BackendError) as found:
        next(backend.stream(HELLO))
    with pytest.raises(BackendError) as other:
        asyncio.run(first())
    assert "\n" not in str(found.value) and found.value.status == other.value.status
    if found.value.status:
        assert str(other.value) == str(found.value)
    return found.value


OPENAI_ERROR = {"error": {"message": "Bad\nkey\x1b[31m", "type": "x", "code": None}}


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply.json(401, OPENAI_ERROR), "refused the key (401): Bad key [31m; give --api-key or set OPENAI_API_KEY"),
        (Reply.json(404, {"detail": "no such model"}),
         "has no model 'glm', or no chat there (404): no such model; it serves glm-4, nano"),
        (Reply.json(429, {"error": "slow down"}, Retry_After="7"), "(429): slow down; try again in 7 s"),
        (Reply.json(400, {"message": "top_k is unknown"}), "refused the request (400): top_k is unknown"),
        (Reply(503, [b"<!doctype html><html>down</html>"], {}), "failed (503): a page of HTML"),
        (Reply(307, [b""], {"Location": "http://else/"}), "refused the request (307): it points to http://else/"),
        (Reply(pieces=[b"data: {oops\n\n"]), "the server sent no JSON: {oops"),
        (Reply(pieces=[b"hello"]), "the server sent no JSON: hello"),
        (Reply(pieces=[b"data: [1]\n\n"]), "JSON that is no object"),
        (Reply.json(200, {"object": "error", "message": "busy"}), "no chat completion: busy"),
        (Reply(pieces=sse({"error": {"message": "out of memory"}})), "in the middle of its answer: out of memory"),
        (Reply(pieces=sse(done=False)), "no JSON: nothing"),
        (Reply(pieces=sse(chunk({}), done=False)), "broke off in the middle of its answer"),
        (Reply(pieces=sse(chunk({}), done=False), drop=True), "broke"),
        (Reply(pieces=sse(chunk({}, "content_filter"))), "withheld its answer"),
        (Reply(pieces=sse(chunk(call(0, None, "{}")))), "a tool call without a name"),
    ],
)  # fmt: skip
def test_errors_are_one_line(reply: Reply, words: str) -> None:
    known = Reply.json(200, {"data": [{"id": "glm-4"}, {"id": "nano"}]})
    with scripted_server(lambda body, headers: reply if body else known) as server:
        error = error_of(HttpBackend(server.url, "glm"))
    assert words in str(error)
    assert error.status == (reply.status if reply.status != 200 else None)
    assert error.retry_after_s == (7.0 if reply.status == 429 else None)


def test_no_server_and_a_silent_one() -> None:
    port = free_port()
    error = error_of(HttpBackend(f"http://user:secret@127.0.0.1:{port}", "m"))
    assert f"cannot reach http://127.0.0.1:{port}/v1" in str(error) and "is the server running there?" in str(error)
    with scripted_server(lambda body, headers: Reply(pieces=sse(chunk({"content": "a"})), pause_s=2.0)) as server:
        stream = HttpBackend(server.url, "m", timeout_s=0.2).stream(HELLO)
        assert next(stream).text == "a"
        with pytest.raises(BackendError, match=r"was silent for 0.2 s"):
            next(stream)


def test_an_endless_line_is_refused() -> None:
    answer = HttpAnswer()
    with pytest.raises(BackendError, match="16 MiB"):
        for _ in range(17):
            answer.feed(b"x" * (1 << 20))
    assert len(said_by(b"x" * 10_000)) == 300


def test_a_busy_server_is_asked_again() -> None:
    replies = [Reply.json(429, {}, Retry_After="0"), Reply.json(503, {}, Retry_After="0")]
    ok = Reply(pieces=sse(chunk({"content": "x"}, "stop")))
    with scripted_server(lambda body, headers: (replies or [ok]).pop(0)) as server:
        assert told(list(HttpBackend(server.url, "m", retries=2).stream(HELLO)))[0] == "x"
        assert len(server.requests) == 3
        replies += [Reply.json(429, {}, Retry_After="3600"), ok]
        with pytest.raises(BackendError, match="try again in 3600 s"):
            list(HttpBackend(server.url, "m", retries=2).stream(HELLO))
        replies[:] = [Reply.json(401, {}), ok]
        with pytest.raises(BackendError, match="401"):
            list(HttpBackend(server.url, "m", retries=2).stream(HELLO))


def test_older_and_newer_forms_of_the_protocol() -> None:
    def answer(body: dict[str, Any] | None, headers: Mapping[str, str]) -> Reply:
        assert body is not None
        if "stream_options" in body:
            return Reply.json(422, {"error": "extra field stream_options"})
        if "max_tokens" in body:
            return Reply.json(400, {"error": {"message": "use 'max_completion_tokens' instead"}})
        return Reply(pieces=sse(chunk({"content": str(body["max_completion_tokens"])}, "stop")))

    with scripted_server(answer) as server:
        assert both_ways(HttpBackend(server.url, "m"), HELLO, max_new_tokens=9)[0].text == "9"
