"""Keys, limits, damaged bodies, clients that go away, slow readers, the end of the server; schemathesis finds no 5xx.

    python -m pytest -q tests/test_server_robust.py
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from openglm.cli import main
from openglm.server.config import ServeConfig
from openglm.server.errors import ApiError
from openglm.server.events import CallArguments, Finish, Text, fold
from openglm.server.limits import Gate
from openglm.server.service import Service
from openglm.server.static import WEB
from openglm.server.worker import Outlet
from tests.server_helpers import running, scripted, service_of, until

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    model, _ = scripted("glm-4", "\nHello")
    with running(service_of(model, max_body_bytes=1 << 20)) as address:
        yield address


def post(url: str, body: bytes | dict[str, Any], path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(url + path, content=data, headers={"content-type": "application/json", **headers}, timeout=60)


# -------------------------------------------------------------------- bodies

BODIES: dict[str, tuple[bytes, int, str | None]] = {
    "empty": (b"", 400, None),
    "no JSON": (b'{"messages": [', 400, None),
    "not UTF-8": (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400, None),
    "a list": (b"[1, 2]", 400, None),
    "a number": (b"3", 400, None),
    "NaN": (b'{"messages": [], "temperature": NaN}', 400, None),
    "infinite": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', 400, "temperature"),
    "thousands of digits": (b'{"seed": ' + b"9" * 9000 + b"}", 400, None),
    "deep": (b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, None),
    "deeper": (b"[" * 200_000, 400, None),
    "deep in a schema": (
        b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": "f", '
        b'"parameters": ' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}}]}", 400, "tools[0].function"),
    "half a surrogate": (
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "messages[0].content"),
    "too large": (b'{"messages": "' + b"x" * (1 << 20) + b'"}', 413, None),
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES)
def test_damaged_bodies(url: str, case: str) -> None:
    body, status, param = BODIES[case]
    answer = post(url, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["message"]


def test_other_kinds_of_request(url: str) -> None:
    assert post(url, CHAT, **{"content-type": "text/plain"}).status_code == 415
    assert httpx.get(url + "/v1/chat/completions").status_code == 405
    assert httpx.get(url + "/nothing").json()["error"]["message"] == "there is nothing at /nothing"
    assert httpx.post(url + "/health").status_code == 405
    error = post(url, {"max_tokens": 1}, "/v1/messages").json()
    assert error["type"] == "error" and error["error"]["message"].startswith("messages")
    assert "x-request-id" in post(url, CHAT).headers


def test_methods_beside_the_page() -> None:
    model, _ = scripted("glm-4", "\nHello")
    with running(service_of(model), WEB) as url:
        for method, path, status in [
            ("GET", "/v1/chat/completions", 405), ("POST", "/nothing", 404), ("GET", "/nothing", 404),
            ("POST", "/health", 405), ("POST", "/index.html", 405), ("HEAD", "/health", 200), ("GET", "/", 200),
        ]:  # fmt: skip
            answer = httpx.request(method, url + path)
            assert answer.status_code == status, (method, path)
            words = {405: f"{path} does not take {method}", 404: f"there is nothing at {path}"}.get(status)
            assert words is None or answer.json()["error"]["message"] == words
        assert "POST" in httpx.get(url + "/v1/chat/completions").headers["allow"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"grace_s": -1.0}, "grace_s must be 0 to"), ({"grace_s": float("nan")}, "grace_s must be 0 to"),
        ({"cors_origins": ("app.example",)}, "web origin"), ({"cors_origins": ("https://app.example/",)}, "web origin"),
    ],
)  # fmt: skip
def test_settings_that_would_do_nothing_are_refused(
    setting: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=words):
        ServeConfig(**setting)
    assert main(["serve", "--port", "0", "--max-body-mb", "0"]) == 2
    assert "--max-body-mb must be at least 1" in capsys.readouterr().err, "in the words of the command line"
    ServeConfig(grace_s=0.0, cors_origins=("*", "https://app.example:8443", "tauri://localhost"))


# -------------------------------------------------------------------- who may call


def test_keys() -> None:
    model, _ = scripted("glm-4", "\nHello")
    with running(service_of(model, api_keys=("one", "two"))) as url:
        for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "Basic one"}, {"x-api-key": "on"}):
            answer = post(url, CHAT, **headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert httpx.get(url + "/v1/models", headers=headers).status_code == 401
            assert httpx.get(url + "/metrics", headers=headers).status_code == 401
        for headers in ({"authorization": "Bearer one"}, {"authorization": "bearer two"}, {"x-api-key": "two"}):
            assert post(url, CHAT, **headers).status_code == 200
        assert httpx.get(url + "/health").status_code == 200


def test_only_names_of_this_machine_reach_an_open_server(url: str) -> None:
    assert post(url, CHAT, host="evil.example").status_code == 403
    assert post(url, CHAT, host="localhost:9").status_code == 200
    model, _ = scripted("glm-4", "\nHello")
    with running(service_of(model, allowed_hosts=("glm.lan",))) as other:
        assert post(other, CHAT, host="glm.lan").status_code == 200


def test_other_origins_only_where_they_were_named(url: str) -> None:
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(url + "/v1/models", headers=ask).headers
    model, _ = scripted("glm-4", "\nHello")
    with running(service_of(model, cors_origins=("https://a.example",))) as other:
        answer = httpx.options(other + "/v1/chat/completions", headers=ask)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        asked = {"access-control-request-headers": "authorization,x-stainless-lang", **ask}  # as OpenAI's in a browser
        preflight = httpx.options(other + "/v1/chat/completions", headers=asked)
        assert preflight.status_code == 200 and "x-stainless-lang" in preflight.headers["access-control-allow-headers"]
        other_origin = post(other, CHAT, origin="https://b.example")
        assert "access-control-allow-origin" not in other_origin.headers


class _Request:
    def __init__(self, key: str) -> None:
        self.headers = {"authorization": f"Bearer {key}"}
        self.client = None


def test_rates_and_concurrency_of_each_key() -> None:
    now = [0.0]
    gate = Gate(ServeConfig(api_keys=("a", "b"), requests_per_minute=2, concurrency=3), lambda: now[0])
    enter: Any = gate.enter
    leases = [enter(_Request("a")) for _ in range(2)]
    with pytest.raises(ApiError) as limited:
        enter(_Request("a"))
    assert limited.value.status == 429 and limited.value.headers["Retry-After"] == "30"
    enter(_Request("b"))  # has a rate of its own
    now[0] = 30.0
    leases.append(enter(_Request("a")))
    now[0] = 90.0
    with pytest.raises(ApiError) as busy:
        enter(_Request("a"))
    assert busy.value.code == "concurrency_limit_exceeded"
    for _ in range(3):  # giving back twice frees one place
        leases[0].release()
    enter(_Request("a"))
    with pytest.raises(ApiError):
        enter(_Request("a"))


def test_a_full_queue_says_when_to_come_again() -> None:
    model, script = scripted("glm-4", "\n" + "Hello " * 50)
    script.delay_s = 0.01
    service = service_of(model, max_queue=0)
    with running(service) as url:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(post(url, CHAT | {"n": 4}))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(a.status_code for a in answers) == [200, 200, 429, 429]
        full = next(a for a in answers if a.status_code == 429)
        assert int(full.headers["retry-after"]) >= 1 and full.json()["error"]["code"] == "queue_full"
        assert service.n_live == 0 and post(url, CHAT).status_code == 200


# -------------------------------------------------------------------- clients that go away, or read slowly


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(stream: bool) -> None:
    model, script = scripted("glm-4", "\n" + "Hello " * 400)
    script.delay_s = 0.01
    service = service_of(model, concurrency=1)
    with running(service) as url:
        body = json.dumps(CHAT | {"stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as client:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: service.n_live == 1)
        until(lambda: service.n_live == 0)
        until(lambda: not model.engine.has_work)
        model.engine.check_integrity()
        script.delay_s = 0.0
        assert post(url, CHAT | {"max_tokens": 3}).status_code == 200, "its place among the caller's requests is free"


def test_a_slow_reader_stalls_no_one_and_is_dropped_in_the_end() -> None:
    model, script = scripted("glm-4", "\n" + "The quick brown fox. " * 160)
    service = service_of(model, stall_s=1.0)
    with running(service) as url:
        port = int(url.rsplit(":", 1)[1])
        body = json.dumps(CHAT | {"stream": True, "n": 8, "logprobs": True, "top_logprobs": 20}).encode()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert post(url, CHAT | {"max_tokens": 30}).status_code == 200  # while the other one reads nothing
        until(lambda: service.n_live == 0)
        time.sleep(1.5)
        received = b""
        client.settimeout(20)
        while piece := client.recv(1 << 16):
            received += piece
        assert b"[DONE]" not in received, "it was cut off"


def test_what_waits_for_a_reader_is_joined() -> None:
    async def work() -> None:
        outlet = Outlet()
        for i in range(10_000):
            outlet.put(0, [Text(f"{i} ")])
        assert len(outlet) < 100
        outlet.put(0, [CallArguments(0, "a"), CallArguments(0, "b"), CallArguments(1, "c"), Finish("stop")])
        events = (await outlet.all(1))[0]
        assert "".join(e.text for e in events if isinstance(e, Text)) == "".join(f"{i} " for i in range(10_000))
        assert CallArguments(0, "ab") in events and CallArguments(1, "c") in events
        assert fold(e for e in events if not isinstance(e, CallArguments)).finish == Finish("stop")

    asyncio.run(work())


# -------------------------------------------------------------------- faults, start and end


def test_a_fault_of_the_engine_is_told_and_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    model, script = scripted("glm-4", "\nHello")
    with running(service_of(model)) as url:
        whole = script.run
        monkeypatch.setattr(script, "run", lambda chunks: whole(chunks) * float("nan"))
        assert post(url, CHAT).json()["error"]["type"] == "server_error"
        streamed = post(url, CHAT | {"stream": True}).text
        assert '"type":"server_error"' in streamed and streamed.endswith("data: [DONE]\n\n")
        monkeypatch.setattr(script, "run", whole)
        assert post(url, CHAT).json()["choices"][0]["message"]["content"] == "Hello"


def test_running_answers_are_finished_when_the_server_stops() -> None:
    model, script = scripted("glm-4", "\n" + "Hello " * 30)
    script.delay_s = 0.01
    service = service_of(model)
    answers: list[httpx.Response] = []
    with running(service) as url:
        thread = threading.Thread(target=lambda: answers.append(post(url, CHAT)))
        thread.start()
        until(lambda: service.n_live == 1)
        assert service.announce_stop() == 1
        refused = post(url, CHAT)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
    thread.join()
    assert answers[0].json()["choices"][0]["message"]["content"] == ("Hello " * 30)
    assert (service.n_at_stop, service.n_cut) == (1, 0)


def test_requests_wait_for_the_model() -> None:
    model, _ = scripted("glm-4", "\nHello")
    gate = threading.Event()

    def load() -> Any:
        gate.wait(30)
        return model

    service = Service(load, ServeConfig(), "tiny")
    with running(service, loaded=False) as url:
        until(lambda: httpx.get(url + "/health").status_code == 503)
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(post(url, CHAT)))
        thread.start()
        assert httpx.get(url + "/health").json()["status"] == "loading"
        gate.set()
        thread.join(30)
        assert answers[0].status_code == 200 and httpx.get(url + "/health").json()["status"] == "ready"


def test_metrics_count(url: str) -> None:
    before = post(url, CHAT).json()["usage"]["completion_tokens"]
    text = httpx.get(url + "/metrics").text
    assert before > 0 and 'openglm_requests_total{path="/v1/chat/completions",status="200"}' in text
    for name in ("time_to_first_token_seconds_count", "inter_token_seconds_count", "generated_tokens_total",
                 "prompt_tokens_total", "tool_calls_total", "kv_used", "waiting", "cache_hit_tokens"):  # fmt: skip
        assert f"openglm_{name}" in text


def test_the_page_has_types_and_a_strict_policy(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<h1>page</h1>")
    (tmp_path / "app.mjs").write_text("export {}")
    model, _ = scripted("glm-4", "\nHello")
    with running(service_of(model), tmp_path) as url:
        page = httpx.get(url + "/")
        assert page.text == "<h1>page</h1>" and page.headers["content-type"].startswith("text/html")
        assert "script-src 'self'" in page.headers["content-security-policy"]
        module = httpx.get(url + "/app.mjs")
        assert module.headers["content-type"].startswith("text/javascript")
        again = httpx.get(url + "/app.mjs", headers={"if-none-match": module.headers["etag"]})
        assert again.status_code == 304
        assert httpx.get(url + "/../conftest.py").status_code == 404
        assert httpx.get(url + "/v1/models").status_code == 200


def test_schemathesis_finds_no_failure(url: str) -> None:
    """Requests made from our own description, and damaged ones: every answer below 500."""
    import schemathesis

    schema = schemathesis.openapi.from_url(url + "/openapi.json")

    n = 0
    for operation in schema.get_all_operations():
        limits = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        _fuzz(operation.ok(), url, limits)
        n += 1
    assert n >= 12


def _fuzz(operation: Any, url: str, limits: Any) -> None:
    from schemathesis import GenerationMode

    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

        @limits
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            response = case.call(base_url=url, timeout=60)
            assert response.status_code < 500, response.text

        try:
            check()
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE, "a GET without parameters has nothing to be damaged"
