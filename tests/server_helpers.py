"""A server in a thread, and models whose answers are known in advance.

with running(service_of(scripted("glm-4", "\\nHi!"))) as url: ...
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import uvicorn
from openai import OpenAI
from torch import Tensor

from openglm.chat import ChatModel
from openglm.config import GLMConfig, RopeConfig
from openglm.engine import Chunk, Engine, EngineOptions
from openglm.engine.grammar import Grammars
from openglm.formats.base import BaseFormat
from openglm.model.checkpoint import CheckpointMeta
from openglm.model.init import init_weights
from openglm.model.transformer import Transformer
from openglm.server.app import create_app
from openglm.server.config import ServeConfig
from openglm.server.service import Service
from tests.format_helpers import SPECIALS_OF, format_named, tokenizer_with

CONTEXT = 4096
CONFIG = GLMConfig(
    vocab_size=640, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, ffn_dim=16, max_seq_len=CONTEXT,
    rope=RopeConfig(),
)  # fmt: skip
OPTIONS = EngineOptions(n_parallel=8, step_tokens=8192, pool_tokens=8 * CONTEXT, prefix_cache=False)


class Script:
    """A runner that computes nothing: every request draws `ids`, then the stop id.

    noise: the rest of the logits, large where a grammar decides. delay_s: of each pass.
    """

    def __init__(self, ids: Sequence[int], stop_id: int) -> None:
        self.config, self.page_size, self.n_pages, self.kv_bytes = CONFIG, 16, 8 * CONTEXT // 16, 0
        self.ids, self.stop_id = list(ids), stop_id
        self.noise, self.delay_s = False, 0.0
        self.seen: list[list[int]] = []  # prompts
        self._of: dict[int, tuple[int, list[int]]] = {}  # first page -> (length of the prompt, script)

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        time.sleep(self.delay_s)
        rows = []
        for chunk in chunks:
            if chunk.start == 0:
                self._of[chunk.pages[0]] = (len(chunk.ids), self.ids)
                self.seen.append(list(chunk.ids))
            n_prompt, ids = self._of[chunk.pages[0]]
            place = chunk.start + len(chunk.ids) - n_prompt
            row = torch.zeros(CONFIG.vocab_size)
            if self.noise:
                rng = random.Random(place)
                row = torch.tensor([rng.uniform(0, 8) for _ in range(CONFIG.vocab_size)])
                row[self.stop_id] = 20.0  # ends as soon as it may
            else:
                row[ids[place] if place < len(ids) else self.stop_id] = 50.0
            rows.append(row)
        return torch.stack(rows)


def scripted(name: str, text: str | Sequence[int] = "", stop: str | None = None) -> tuple[ChatModel, Script]:
    """A model of that chat format which answers with this text; names of special tokens in it are the tokens."""
    chat_format, tokenizer = format_named(name), tokenizer_with(SPECIALS_OF[name])
    ids = tokenizer.encode_marked(text, SPECIALS_OF[name]) if isinstance(text, str) else list(text)
    stop_id = chat_format.stop_ids[0] if stop is None else tokenizer.special_ids[stop]
    runner = Script(ids, stop_id)
    model = init_weights(Transformer(CONFIG), seed=1).requires_grad_(False)
    assert isinstance(chat_format, BaseFormat)
    grammars = Grammars(tokenizer, chat_format.syntax(()).spelled)
    engine = Engine(
        model, tokenizer.special_ids, tokenizer.vocab_size, OPTIONS, runner=runner, grammar_state=grammars
    )  # fmt: skip
    meta = CheckpointMeta(tokenizer.special_ids, tuple(chat_format.stop_ids), name, generation={"temperature": 0.0})
    return ChatModel(engine, tokenizer, chat_format, meta), runner


@contextlib.contextmanager
def running(service: Service, web: Any = None, loaded: bool = True) -> Iterator[str]:
    """The address of a server that runs in a thread until the block is left. loaded: wait until it has its model."""
    config = uvicorn.Config(create_app(service, web), log_level="error", lifespan="on", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        until(lambda: service.state != "loading" or not loaded)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(condition: Any, seconds: float = 60.0) -> None:
    """Wait for something to become true; AssertionError when it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def service_of(model: ChatModel, **config: Any) -> Service:
    return Service(model, ServeConfig(**config), "tiny")


# -------------------------------------------------------------------- OpenAI's client

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "weather",
        "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"], "additionalProperties": False,
        },
    },
}  # fmt: skip
TIME = {"type": "function", "function": {"name": "get_time", "description": "time"}}
TOOLS: list[Any] = [WEATHER, TIME]
HI: list[Any] = [{"role": "user", "content": "Hi"}]


class Server:
    """One server for each chat format; `says` sets what the next answers are."""

    def __init__(self, name: str, client: OpenAI, script: Script) -> None:
        self.name, self.client, self.script = name, client, script
        self.tokenizer = tokenizer_with(SPECIALS_OF[name])

    def says(self, text: str, stop: str | None = None, noise: bool = False) -> None:
        self.script.ids = self.tokenizer.encode_marked(text, SPECIALS_OF[self.name])
        self.script.stop_id = self.tokenizer.special_ids[stop] if stop else self.stop_id
        self.script.noise = noise

    @property
    def stop_id(self) -> int:
        names = {"chatml": "<|im_end|>", "jinja": "<|im_end|>"}
        return self.tokenizer.special_ids[names.get(self.name, "<|user|>")]

    def chat(self, **fields: Any) -> Any:
        """The answer, asked for twice: whole and streamed. They must be the same."""
        fields = {"model": "tiny", "messages": HI, **fields}
        whole = self.client.chat.completions.create(**fields)
        streamed = {**fields, "stream": True, "stream_options": {"include_usage": True}}
        chunks = list(self.client.chat.completions.create(**streamed))
        assert joined(chunks) == [plain(choice) for choice in whole.choices]
        assert chunks[-1].usage == whole.usage
        return whole


def plain(choice: Any) -> dict[str, Any]:
    m = choice.message
    return {
        "content": m.content or "",
        "reasoning": getattr(m, "reasoning_content", None) or "",
        "calls": [(c.function.name, c.function.arguments) for c in m.tool_calls or []],
        "finish": choice.finish_reason,
        "logprobs": [t.model_dump() for t in choice.logprobs.content] if choice.logprobs else [],
    }


def joined(chunks: list[Any]) -> list[dict[str, Any]]:
    """What a client makes of a stream, with every rule that OpenAI's streams keep."""
    assert len({c.id for c in chunks}) == 1 and len({c.model for c in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage and not any(c.usage for c in chunks[:-1])
    found: dict[int, dict[str, Any]] = {}
    ids: dict[tuple[int, int], str] = {}
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            d = choice.delta
            if choice.index not in found:
                assert d.role == "assistant", "the first delta says who speaks"
            new: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish": None, "logprobs": []}
            answer = found.setdefault(choice.index, new)
            assert answer["finish"] is None, "nothing follows the finish reason"
            answer["content"] += d.content or ""
            answer["reasoning"] += getattr(d, "reasoning_content", None) or ""
            for call in d.tool_calls or []:
                if call.id is not None:
                    assert (choice.index, call.index) not in ids, "an id comes once, with the whole name"
                    assert call.function.name and call.function.arguments == "" and call.type == "function"
                    assert call.id not in ids.values() and call.index == len(answer["calls"])
                    ids[choice.index, call.index] = call.id
                    answer["calls"].append([call.function.name, ""])
                else:
                    assert call.function.name is None
                    answer["calls"][call.index][1] += call.function.arguments
            answer["logprobs"] += [t.model_dump() for t in choice.logprobs.content] if choice.logprobs else []
            answer["finish"] = choice.finish_reason
    return [found[i] | {"calls": [tuple(c) for c in found[i]["calls"]]} for i in sorted(found)]


@contextlib.contextmanager
def openai_server(name: str, **config: Any) -> Iterator[Server]:
    """A server whose model answers in that chat format."""
    model, script = scripted(name)
    with running(service_of(model, **config)) as url:
        yield Server(name, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), script)
