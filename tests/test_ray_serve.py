"""deploy/ray_serve.py with a Ray of its own: two replicas on this machine. Skipped where Ray is not installed.

pip install 'openglm[ray]' && python -m pytest tests/test_ray_serve.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from openglm.server.affinity import affinity
from openglm.tokenizer import Tokenizer
from tests.server_helpers import until

ROOT = Path(__file__).parent.parent
KEY = "geheim"


def test_turns_of_a_conversation_share_a_name_and_others_do_not() -> None:
    def name(path: str = "/v1/chat/completions", **body: Any) -> str:
        return affinity(path, json.dumps(body).encode())

    system, user = {"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"}
    later = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "And?"}]
    first = name(messages=[system, user])
    assert first == name(messages=[system, user, *later], temperature=0.5, stream=True)
    assert len({first, name(messages=[user]), name(messages=[system, later[1]]), name(messages=[user], tools=[1])}) == 4
    assert name("/v1/responses", input=[user]) == name("/v1/responses", input=[user, *later])
    assert name("/v1/messages", messages=[user], system="a") != name("/v1/messages", messages=[user], system="b")
    text = "Once upon a time " * 40
    assert name("/v1/completions", prompt=text) == name("/v1/completions", prompt=text + "there") != name(prompt="x")
    assert affinity("/v1/chat/completions", b"{no json") == affinity("/fill", b"[]") == ""
    assert affinity("/v1/files/file-1", b"", "key0") == "key0"


@pytest.fixture(scope="module")
def checkpoint(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model, whose prompts the prefix cache keeps."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs Ray Serve: pip install 'openglm[ray]'")
    from openglm.config import GLMConfig, RopeConfig
    from openglm.model.checkpoint import CheckpointMeta, save_checkpoint
    from openglm.model.init import init_weights
    from openglm.model.transformer import Transformer

    config = GLMConfig(
        vocab_size=640, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, max_seq_len=1 << 16,
        rope=RopeConfig(),
    )  # fmt: skip
    special = tiny_tokenizer.special_ids
    stops = tuple(special[name] for name in ("<|endoftext|>", "<|user|>", "<|observation|>"))
    meta = CheckpointMeta(special, stops, "glm-4", tokenizer=tiny_tokenizer.kind, generation={"temperature": 0.0})
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = init_weights(Transformer(config), seed=3, std=0.3)
    save_checkpoint(folder, model, config, meta, tiny_tokenizer.files)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """(address, process that started everything)"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, str(ROOT / "deploy/ray_serve.py"), str(checkpoint), "--replicas", "2",
               "--port", str(port), "--api-key", KEY, "--concurrency", "3", "--device", "cpu"]  # fmt: skip
    log = tmp_path_factory.mktemp("ray") / "log"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": path})
    try:
        until(lambda: process.poll() is not None or "2 replicas at" in log.read_text(), 240)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}", process.pid
        stream = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY).completions.create(
            model="tiny", prompt="Hi", max_tokens=4000, stream=True, extra_body={"min_tokens": 4000}
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)  # an answer that runs is finished
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, log.read_text()


@pytest.fixture(scope="module")
def client(server: tuple[str, int]) -> OpenAI:
    return OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0, timeout=120)


def talk(client: OpenAI, messages: list[Any], **fields: Any) -> tuple[str, str]:
    """(answer, replica that gave it)"""
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=messages, max_tokens=fields.pop("max_tokens", 8), **fields
    )
    return raw.parse().choices[0].message.content or "", raw.headers["x-replica"]


def metrics(server: tuple[str, int], name: str) -> dict[str, float]:
    text = httpx.get(f"{server[0]}/metrics", headers={"x-api-key": KEY}).text
    found = re.findall(rf'^{name}{{replica="(\w+)"}} (\S+)$', text, re.MULTILINE)
    return {replica: float(value) for replica, value in found}


def test_conversations_keep_their_replica_and_its_cache(server: tuple[str, int], client: OpenAI) -> None:
    replicas = set()
    for i in range(16):
        messages: list[Any] = [{"role": "user", "content": f"Question {i}: " + "what is there to say? " * 6}]
        answer, replica = talk(client, messages)
        replicas.add(replica)
        before = metrics(server, "openglm_cache_hit_tokens")
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
        assert talk(client, messages)[1] == replica
        until(lambda: metrics(server, "openglm_cache_hit_tokens")[replica] > before[replica] + 16, 30)  # noqa: B023
    assert len(replicas) == 2 == len(before)


def test_streams_say_what_whole_answers_say(client: OpenAI, server: tuple[str, int]) -> None:
    messages: list[Any] = [{"role": "user", "content": "Say something long."}]
    whole, _ = talk(client, messages, max_tokens=48)
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=48, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert len(chunks) > 8 and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens <= 48


def test_every_endpoint_passes(client: OpenAI, server: tuple[str, int]) -> None:
    url, headers = server[0], {"Authorization": f"Bearer {KEY}"}
    assert client.models.list().data[0].id == "tiny"
    assert len(client.embeddings.create(model="tiny", input="Hi").data[0].embedding) == 32
    ids = httpx.post(f"{url}/tokenize", json={"text": "你好"}, headers=headers).json()["tokens"]
    assert httpx.post(f"{url}/detokenize", json={"tokens": ids}, headers=headers).json()["text"] == "你好"
    assert "<title>" in httpx.get(url).text and httpx.get(f"{url}/docs/").status_code == 200
    file = client.files.create(file=("a.txt", b"abc"), purpose="user_data")
    assert client.files.content(file.id).read() == b"abc"  # of this caller: on one replica
    assert client.responses.create(model="tiny", input="Hi", max_output_tokens=16).object == "response"
    health = httpx.get(f"{url}/health").json()
    assert health["status"] == "ready" and len(health["replicas"]) == 2


def test_keys_limits_and_errors_hold(client: OpenAI, server: tuple[str, int]) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
    with pytest.raises(openai.AuthenticationError):
        talk(client.with_options(api_key="other"), [{"role": "user", "content": "Hi"}])
    assert httpx.get(f"{server[0]}/metrics").status_code == 401
    with pytest.raises(openai.BadRequestError) as failure:
        talk(client, [{"role": "user", "content": 3}])
    assert failure.value.param == "messages[0].content"
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30000, "stream": True,
             "min_tokens": 30000}  # fmt: skip
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(timeout=60, headers=headers) as http:
        streams, heads = [], []
        for i in range(3):  # of the key, over all replicas
            request = http.build_request("POST", f"{server[0]}/v1/chat/completions", json={**asked, "seed": i})
            streams.append(http.send(request, stream=True))
            heads.append(streams[-1].iter_lines())
            next(heads[-1])
        refused = http.post(f"{server[0]}/v1/chat/completions", json=asked)
        assert refused.status_code == 429 and refused.headers["retry-after"]
        for stream in streams:
            stream.close()
        until(lambda: httpx.get(f"{server[0]}/health").json()["live"] == 0, 30)  # clients that left free their place
    assert talk(client, [{"role": "user", "content": "Hi"}])[0]


def _replicas_of(parent: int) -> list[int]:
    """Process ids of replicas that this process began."""
    parents: dict[int, int] = {}
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if "ServeReplica:openglm:Replica" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:
            continue

    def ours(pid: int) -> bool:
        while pid > 1 and pid != parent:
            pid = parents.get(pid, 0)
        return pid == parent

    return [pid for pid in found if ours(pid)]


def test_a_killed_replica_is_replaced_and_requests_go_on(client: OpenAI, server: tuple[str, int]) -> None:
    before = {r["replica"] for r in httpx.get(f"{server[0]}/health").json()["replicas"]}
    victims = _replicas_of(server[1])
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    for i in range(12):  # some of them were the dead one's
        assert talk(client, [{"role": "user", "content": f"Question {i}"}])[0] is not None
        time.sleep(0.05)

    def healed() -> bool:
        found = httpx.get(f"{server[0]}/health", timeout=30).json()["replicas"]
        return len(found) == 2 and {r["replica"] for r in found} != before

    until(healed, 120)
    assert {talk(client, [{"role": "user", "content": f"Question {i}"}])[1] for i in range(16)} == {
        r["replica"] for r in httpx.get(f"{server[0]}/health").json()["replicas"]
    }


def test_a_stream_whose_replica_dies_says_so(client: OpenAI, server: tuple[str, int]) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30000, "min_tokens": 30000, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{server[0]}/v1/chat/completions", json=body, headers=headers, timeout=60) as stream:
        lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: "))
        next(lines)
        for pid in _replicas_of(server[1]):
            os.kill(pid, signal.SIGKILL)
        *_, last, done = lines
    assert json.loads(last)["error"]["code"] == "replica_lost" and done == "[DONE]"
    until(lambda: len(httpx.get(f"{server[0]}/health", timeout=30).json()["replicas"]) == 2, 120)
    assert talk(client, [{"role": "user", "content": "Hi"}])[0] is not None
