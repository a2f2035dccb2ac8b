"""HttpBackend: any OpenAI-compatible server as a ChatBackend. It answers as a ChatModel in this process would.

    from openglm.agent.http_backend import HttpBackend
    backend = HttpBackend("http://localhost:8000")          # ours, vLLM, SGLang, llama.cpp, OpenAI, ...
    for event in backend.stream([{"role": "user", "content": "Hello!"}], temperature=0.5):
        print(event.text, end="")

    async for event in backend.astream(messages, tools): ...        # the same for asyncio
    async for event in stream_async(model, messages, tools): ...    # for any ChatBackend, a ChatModel too

Events, messages, tools and sampling options are those of `openglm.types`. Leaving the loop, closing the iterator or
cancelling the task ends the answer at the server. Errors are BackendError, a ValueError of one line.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from openglm.agent.http_stream import BackendError, HttpAnswer, said_by
from openglm.config import nearest
from openglm.types import ChatBackend, Event, Grammar, Message, ToolSpec

if TYPE_CHECKING:
    import ssl

    import httpx

__all__ = ["BackendError", "HttpBackend", "base_url", "stream_async"]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
CONNECT_TIMEOUT_S = 10.0
MAX_WAIT_S = 60.0  # a server that asks for more is not waited for
# Our options and the fields of a request. Those below the line are of vLLM, SGLang, llama.cpp and our own server.
FIELDS = {
    "max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "seed": "seed",
    "stop_strings": "stop", "frequency_penalty": "frequency_penalty", "presence_penalty": "presence_penalty",
    "logit_bias": "logit_bias", "grammar": "response_format",
    # ----
    "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty",
}  # fmt: skip


def base_url(url: str) -> str:
    """The address under which a server has its endpoints: http://host:8000 is http://host:8000/v1."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a server: give one such as http://localhost:8000/v1")
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return parts._replace(path=path or "/v1", query="", fragment="").geturl()


class HttpBackend:
    """url: of the server, with or without /v1. model: as the server names it; None takes the only one it serves.

    api_key: None takes OPENAI_API_KEY from the environment, "" sends none. timeout_s: longest silence of the server.
    retries: how often a request that was not answered at all is sent again (429, 502, 503, 504, connection refused),
    after what Retry-After says. May be used from several threads.
    """

    def __init__(
        self, url: str, model: str | None = None, api_key: str | None = None, timeout_s: float = 600.0, retries: int = 0
    ) -> None:
        self.url = base_url(url)
        try:
            import httpx
        except ImportError:
            raise ValueError("a server at a URL needs httpx: pip install 'openglm[chat]'") from None
        parts = urlsplit(self.url)
        self._shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        key = (os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key).strip()
        if not key.isascii() or not all(c.isprintable() for c in key):
            raise ValueError("the API key holds characters that no key has: copy it again")
        self._options: dict[str, Any] = {
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            "verify": parts.scheme == "https" and _tls(),
            "trust_env": parts.hostname not in LOOPBACK,  # no proxy leads back to this machine
        }
        self.timeout_s, self.retries, self._model = timeout_s, retries, model
        self._client = httpx.Client(**self._options)

    def close(self) -> None:
        self._client.close()

    @property
    def model(self) -> str:
        """The model that answers, as the server names it."""
        if self._model is None:
            known = self.models()
            if len(known) != 1:
                listed = f"serves several models: {', '.join(known)}" if known else "names no model that it serves"
                raise BackendError(f"{self._shown} {listed}; say which (--model NAME)")
            self._model = known[0]
        return self._model

    def models(self) -> list[str]:
        """Names of the models that the server has."""
        with self._explained():
            response = self._client.get(f"{self.url}/models")
        if response.status_code != 200:
            raise self._refusal(response, "")
        try:
            return [str(entry["id"]) for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            raise BackendError(f"{self._shown} is no OpenAI-compatible server: /models has no list of models") from None

    def stream(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[ToolSpec | Mapping[str, Any]] | None = None,
        **sampling: Any,
    ) -> Iterator[Event]:
        """The assistant's next message as events. What was asked wrongly raises at once, the rest while iterating."""
        return self._events(_payload(messages, tools, sampling))

    def _events(self, payload: dict[str, Any]) -> Iterator[Event]:
        payload["model"] = self.model
        for attempt in itertools.count():
            try:
                with self._explained(), self._client.stream("POST", self._chat_url, json=payload) as response:
                    if response.status_code == 200:
                        yield from self._read(response)
                        return
                    response.read()
                    raise self._refusal(response, payload["model"])
            except BackendError as error:
                time.sleep(self._before_another(error, attempt, payload))

    def _read(self, response: httpx.Response) -> Iterator[Event]:
        answer = HttpAnswer()
        for piece in response.iter_bytes():
            yield from answer.feed(piece)
            if answer.done:
                break
        yield from answer.finish()

    async def astream(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[ToolSpec | Mapping[str, Any]] | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[Event]:
        """`stream` for asyncio."""
        import httpx

        payload = _payload(messages, tools, sampling)
        payload["model"] = await asyncio.to_thread(lambda: self.model)
        for attempt in itertools.count():
            try:
                async with httpx.AsyncClient(**self._options) as client:
                    with self._explained():
                        async with client.stream("POST", self._chat_url, json=payload) as response:
                            if response.status_code == 200:
                                answer = HttpAnswer()
                                async for piece in response.aiter_bytes():
                                    for event in answer.feed(piece):
                                        yield event
                                    if answer.done:
                                        break
                                for event in answer.finish():
                                    yield event
                                return
                            await response.aread()
                            raise self._refusal(response, payload["model"])
            except BackendError as error:
                await asyncio.sleep(self._before_another(error, attempt, payload))

    # ---------------------------------------------------------------- errors

    @property
    def _chat_url(self) -> str:
        return f"{self.url}/chat/completions"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the network in one line of ours."""
        import httpx

        try:
            yield
        except httpx.ConnectTimeout:
            raise BackendError(f"{self._shown} does not answer: is the address right?") from None
        except httpx.TimeoutException:
            raise BackendError(f"{self._shown} was silent for {self.timeout_s:g} s: gave up waiting") from None
        except httpx.ConnectError as error:
            why = said_by(str(error)) or "no connection"
            raise BackendError(f"cannot reach {self._shown} ({why}): is the server running there?", 0) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = said_by(str(error)) or type(error).__name__
            raise BackendError(f"the connection to {self._shown} broke: {why}") from None

    def _refusal(self, response: httpx.Response, model: str) -> BackendError:
        """What a status other than 200 means, and what helps."""
        status, said = response.status_code, said_by(response.content)
        said = f": {said}" if said else ""
        wait = _seconds(response.headers.get("retry-after"))
        if status in (401, 403):
            text = f"{self._shown} refused the key ({status}){said}; give --api-key or set OPENAI_API_KEY"
        elif status == 404 and model:
            text = f"{self._shown} has no model {model!r}, or no chat there (404){said}{self._known(model)}"
        elif status == 404:
            text = f"nothing is there (404): is {self._shown} the address of an OpenAI-compatible server?"
        elif status == 429:
            again = "" if wait is None else f"; try again in {wait:g} s"
            text = f"{self._shown} takes no more requests now (429){said}{again}"
        elif status >= 500:
            text = f"{self._shown} failed ({status}){said}"
        else:
            where = response.headers.get("location", "") if response.is_redirect else ""
            text = f"{self._shown} refused the request ({status}){said}" + (f": it points to {where}" if where else "")
        return BackendError(text, status, wait)

    def _known(self, model: str) -> str:
        try:
            known = self.models()
        except BackendError:
            return ""
        return f"; it serves {', '.join(known)}{nearest(model, known)}" if known else ""

    def _before_another(self, error: BackendError, attempt: int, payload: dict[str, Any]) -> float:
        """Seconds until the request goes out again, perhaps put otherwise; raises the error if it shall not."""
        if error.status in (400, 422):  # servers that know an older or a newer form of the protocol
            if "stream_options" in str(error) and payload.pop("stream_options", None):
                return 0.0
            if "max_completion_tokens" in str(error) and "max_tokens" in payload:
                payload["max_completion_tokens"] = payload.pop("max_tokens")
                return 0.0
        wait = 0.5 * 2**attempt if error.retry_after_s is None else error.retry_after_s
        if error.status not in (0, 429, 502, 503, 504) or attempt >= self.retries or wait > MAX_WAIT_S:
            raise error
        return wait


@functools.cache
def _tls() -> ssl.SSLContext:
    import httpx

    return httpx.create_ssl_context()


def _seconds(value: str | None) -> float | None:
    """Of a Retry-After header, which may be a date instead."""
    from email.utils import parsedate_to_datetime

    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        try:
            return max(round(parsedate_to_datetime(value).timestamp() - time.time(), 1), 0.0)
        except ValueError:
            return None


# -------------------------------------------------------------------- requests


def _payload(
    messages: Sequence[Message | Mapping[str, Any]],
    tools: Sequence[ToolSpec | Mapping[str, Any]] | None,
    sampling: Mapping[str, Any],
) -> dict[str, Any]:
    """The body of a request, all but the model."""
    body: dict[str, Any] = {
        "messages": _messages(messages),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if tools:
        specs = [t if isinstance(t, ToolSpec) else ToolSpec.from_dict(t) for t in tools]
        body["tools"] = [
            {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.parameters}}
            for t in specs
        ]
    for name, value in sampling.items():
        if name not in FIELDS:
            raise ValueError(f"no sampling option {name!r} for a server{nearest(name, [*FIELDS])}: {', '.join(FIELDS)}")
        if value is not None:
            body[FIELDS[name]] = _field(name, value)
    return body


def _field(name: str, value: Any) -> Any:
    if name == "grammar":
        return _response_format(value)
    if name == "logit_bias":
        pairs = value.items() if isinstance(value, Mapping) else value
        return {str(token): max(float(bias), -100.0) for token, bias in pairs}  # JSON has no -inf; -100 forbids
    return list(value) if name == "stop_strings" else value


def _response_format(grammar: Grammar) -> dict[str, Any]:
    if grammar.kind == "json":
        return {"type": "json_object"}
    if grammar.kind != "json_schema":
        raise ValueError(f"the protocol has no grammar of kind {grammar.kind}: give a json_schema")
    schema = {"name": "answer", "strict": True, "schema": json.loads(grammar.text)}
    return {"type": "json_schema", "json_schema": schema}


def _messages(messages: Sequence[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's shape. Calls without an id get one, and results without one belong to the calls in their order.

    What was thought stays here: several servers refuse it, and chat templates leave old thoughts out.
    """
    values, waiting = [], []
    for i, given in enumerate(messages):
        m = given if isinstance(given, Message) else Message.from_dict(given, f"messages[{i}]")
        value: dict[str, Any] = {"role": m.role, "content": m.content}
        if m.tool_calls:
            waiting = [call.id or f"call_{i}_{k}" for k, call in enumerate(m.tool_calls)]
            functions = [{"name": call.name, "arguments": call.arguments} for call in m.tool_calls]
            value["content"] = m.content or None
            value["tool_calls"] = [
                {"id": identity, "type": "function", "function": function}
                for identity, function in zip(waiting, functions, strict=True)
            ]
        elif m.role == "tool":
            if m.tool_call_id is None and not waiting:
                raise ValueError(f"messages[{i}] is the result of a tool that no message before it called")
            value["tool_call_id"] = m.tool_call_id or waiting[0]
            waiting = [identity for identity in waiting if identity != value["tool_call_id"]]
        elif m.name is not None:
            value["name"] = m.name
        values.append(value)
    return values


# -------------------------------------------------------------------- asyncio


async def stream_async(
    backend: ChatBackend,
    messages: Sequence[Message | Mapping[str, Any]],
    tools: Sequence[ToolSpec | Mapping[str, Any]] | None = None,
    **sampling: Any,
) -> AsyncGenerator[Event]:
    """`backend.stream` for asyncio. A backend without `astream` works in a thread, ahead by a few events at most.

    Ending the iteration early (break within `contextlib.aclosing`, or cancelling the task) closes the stream: at once
    where there is `astream`, else when its next event comes.
    """
    astream = getattr(backend, "astream", None)
    if astream is not None:
        async with aclosing(astream(messages, tools, **sampling)) as events:
            async for event in events:
                yield event
        return
    loop, ended = asyncio.get_running_loop(), threading.Event()
    queue: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
    room = threading.Semaphore(16)

    def work() -> None:
        last: BaseException | None = None
        try:
            iterator = backend.stream(messages, tools, **sampling)
            try:
                while not ended.is_set() and (event := next(iterator, None)) is not None:
                    room.acquire()
                    loop.call_soon_threadsafe(queue.put_nowait, event)
            finally:
                close = getattr(iterator, "close", None)
                if close is not None:
                    close()
        except BaseException as error:
            last = error
        if not ended.is_set():
            loop.call_soon_threadsafe(queue.put_nowait, last)

    thread = threading.Thread(target=work, daemon=True, name="chat backend")
    thread.start()
    try:
        while (found := await queue.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            room.release()
            yield found
    finally:
        ended.set()
        room.release()
