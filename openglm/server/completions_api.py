"""POST /v1/completions: texts continued, or, with a suffix, the text between both.

A suffix makes a blank: of up to 16 tokens a [MASK], of more an [sMASK], on models that fill blanks; CodeGeeX4's and
Qwen-Coder's infilling where the model has their tokens.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from openglm.engine.fill import MASKS, Blanks
from openglm.formats.codegeex import CODE_PARTS, CodeGeex4Format
from openglm.server.chat_api import client_name, sampling_of, stops_of, stream_error, timings_of
from openglm.server.errors import ApiError
from openglm.server.events import AnswerEvent, Finish, PlainReader, Text, TokenInfo, TokenSpelling, fold
from openglm.server.limits import Lease
from openglm.server.protocol import CompletionRequest, load_json, parse
from openglm.server.service import Prompt, Service
from openglm.server.sse import DONE, EventStream, sse, while_connected
from openglm.server.worker import Job, Outlet

__all__ = ["can_infill", "completions"]

DEFAULT_MAX_TOKENS = 16  # OpenAI's
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_WORDS = 16  # tokens up to which a blank is one of words


@dataclass(frozen=True)
class _Echo:
    """The prompt in front of an answer. tokens: with their log-probabilities, where they were asked for."""

    text: str = ""
    tokens: tuple[TokenInfo | None, ...] = ()
    spelled: tuple[bytes, ...] = ()


async def completions(service: Service, request: Request, body: bytes, lease: Lease) -> Response:
    asked = parse(CompletionRequest, load_json(body))
    service.check_name(asked.model)
    n = asked.n or 1
    if asked.best_of is not None and asked.best_of != n:
        raise ApiError("best_of is not supported, but as large as n", "best_of", code="unknown_parameter")
    if asked.max_tokens == 0 and not asked.echo:
        raise ApiError("max_tokens: 0 tokens are an answer only with echo", "max_tokens")
    inputs = _inputs(asked)
    prompts = await asyncio.to_thread(lambda: [_prompt(service, asked, p) for p in inputs])
    echoes = [await _echo(service, asked, text, p) for text, p in zip(inputs, prompts, strict=True)]
    shape = Shape(service, asked.logprobs is not None, [e for e in echoes for _ in range(n)])
    if asked.max_tokens == 0:
        if asked.stream:
            raise ApiError("max_tokens: 0 tokens cannot be streamed", "max_tokens")
        return JSONResponse(shape.echoed(sum(len(p.ids) for p in prompts)))
    outlet, jobs = await service.submit([(prompt, n) for prompt in prompts], client_name(lease, asked.user))
    if asked.stream:
        include_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        chunks = shape.stream(outlet, jobs, include_usage, n)
        return EventStream(chunks, stream_error, service.config.stall_s, lambda: service.cancel(jobs))
    try:
        lists = await while_connected(request, outlet.all(len(jobs)))
    finally:
        service.cancel(jobs)
    return JSONResponse(shape.whole(lists, jobs, n))


def _inputs(asked: CompletionRequest) -> list[str | list[int]]:
    prompt = asked.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError("prompt: the list is empty", "prompt")
    if isinstance(prompt[0], int):
        return [list(prompt)]
    return list(prompt)


def _prompt(service: Service, asked: CompletionRequest, given: str | list[int]) -> Prompt:
    model = service.model
    budget = DEFAULT_MAX_TOKENS if asked.max_tokens is None else max(asked.max_tokens, 1)
    sampling = {**sampling_of(asked), "max_new_tokens": budget}
    if asked.suffix:
        if asked.echo or not isinstance(given, str):
            raise ApiError("suffix goes with a prompt that is a text, and not with echo", "suffix")
        ids, stops, after_space = _infill(service, given, asked.suffix, budget)
        return service.text_prompt(
            ids, sampling, stops_of(asked), asked.logprobs, stops,
            lambda: PlainReader(model.tokenizer, stops, after_space),
        )  # fmt: skip
    if isinstance(given, list):
        _check_ids(given, model.tokenizer.vocab_size)
    ids = model.text_ids(given) if isinstance(given, str) else given
    if not ids:
        raise ApiError("prompt: it is empty, and this model needs at least one token", "prompt")
    return service.text_prompt(ids, sampling, stops_of(asked), asked.logprobs)


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    for id in ids:
        if id >= vocab_size:
            raise ApiError(f"prompt: token ids are 0 to {vocab_size - 1}, not {id}", "prompt")


def can_infill(service: Service) -> bool:
    """Whether a suffix is taken."""
    special = service.model.engine.special_ids
    code = isinstance(service.model.chat_format, CodeGeex4Format) and all(name in special for name in CODE_PARTS)
    prefix = service.model.engine.config.mask == "prefix" and "[MASK]" in special and "<sop>" in special
    return code or prefix or all(name in special for name in FIM)


def _infill(service: Service, before: str, after: str, budget: int) -> tuple[list[int], tuple[int, ...], bool]:
    """(ids, stop ids, whether the answer's first space is the prompt's last)"""
    model = service.model
    special, chat_format = model.engine.special_ids, model.chat_format
    if not can_infill(service):
        raise ApiError("this model cannot write text in front of a suffix", "suffix")
    if isinstance(chat_format, CodeGeex4Format):
        return chat_format.render_infill(before, after).ids, chat_format.stop_ids, False
    encode = model.tokenizer.encode
    if all(name in special for name in FIM):
        prefix, suffix, middle = (special[name] for name in FIM)
        others = [special[name] for name in (*FIM, "<|fim_pad|>", "<|file_sep|>", "<|repo_name|>") if name in special]
        return [prefix, *encode(before), suffix, *encode(after), middle], (*model.text_stops(), *others), False
    for name, text in (("prompt", before), ("suffix", after)):
        if any(mask in text for mask in MASKS):
            raise ApiError(f"{name}: it holds a blank of its own: POST /fill fills texts with blanks", name)
    mask = "[sMASK]" if budget > _WORDS and "[sMASK]" in special else "[MASK]"
    ids, _, _ = model.fill_prompt(f"{before}{mask}{after}")
    return Blanks(model.engine, ids).prompt([]), model.text_stops(), before.endswith(" ")


async def _echo(service: Service, asked: CompletionRequest, given: str | list[int], prompt: Prompt) -> _Echo:
    if not asked.echo:
        return _Echo()
    model = service.model
    text = given if isinstance(given, str) else model.tokenizer.decode(given, skip_special=False)
    if asked.logprobs is None:
        return _Echo(text)
    ids = prompt.ids
    n_head = len(ids) - len(given if isinstance(given, list) else model.tokenizer.encode(given))
    n_head -= len(model.meta.prompt_suffix) if isinstance(given, str) else 0
    spelling = TokenSpelling(model.tokenizer, asked.logprobs)
    k = max(asked.logprobs, 1)
    scores = await service.worker.call(lambda: model.engine.top_logprobs(ids, k)) if len(ids) > 1 else []
    tokens: list[TokenInfo | None] = []
    shown = ids[n_head : len(ids) - (len(model.meta.prompt_suffix) if isinstance(given, str) else 0)]
    for place, id in enumerate(shown, n_head):
        if place == 0:
            tokens.append(None)
            continue
        logprob, top = scores[place - 1]
        likeliest = tuple((spelling.spell(i), value) for i, value in top[: asked.logprobs])
        tokens.append(TokenInfo(spelling.spell(id), logprob, likeliest))
    return _Echo(text, tuple(tokens), tuple(spelling.spell(id) for id in shown))


class Shape:
    """Renders event lists as OpenAI's objects. echoes: what stands in front of each answer."""

    def __init__(self, service: Service, logprobs: bool, echoes: Sequence[_Echo]) -> None:
        self._head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
                      "model": service.name, "system_fingerprint": service.fingerprint}  # fmt: skip
        self._logprobs, self._echoes = logprobs, echoes
        self._offsets = [0 for _ in echoes]

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "choices": choices}

    def _choice(self, index: int, text: str, tokens: Sequence[TokenInfo], reason: str | None) -> dict[str, Any]:
        logprobs = self._table(index, tokens) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _echoed(self, index: int) -> dict[str, Any]:
        echo = self._echoes[index]
        infos = [t or TokenInfo(s, float("nan")) for t, s in zip(echo.tokens, echo.spelled, strict=True)]
        return self._choice(index, echo.text, infos, None)

    def _table(self, index: int, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
        """OpenAI's older form: one list for each thing that is told of a token."""
        table: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            text, known = token.spelled.decode("utf-8", "replace"), token.logprob == token.logprob
            table["tokens"].append(text)
            table["token_logprobs"].append(max(token.logprob, -9999.0) if known else None)
            top = {s.decode("utf-8", "replace"): max(value, -9999.0) for s, value in reversed(token.top)}
            table["top_logprobs"].append(top if known else None)
            table["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(text)
        return table

    # ---------------------------------------------------------------- whole

    def whole(self, lists: Sequence[Sequence[AnswerEvent]], jobs: Sequence[Job], n: int) -> dict[str, Any]:
        choices = []
        for i, events in enumerate(lists):
            choice, answer = self._echoed(i), fold(events)
            assert answer.finish is not None
            rest = self._choice(i, answer.text, answer.tokens, answer.finish.reason)
            choices.append(_joined(choice, rest))
        return self._object(choices) | {"usage": _usage(jobs, n), "timings": timings_of(jobs)}

    def echoed(self, n_prompt: int) -> dict[str, Any]:
        """The prompts alone."""
        choices = [self._echoed(i) | {"finish_reason": "length"} for i in range(len(self._echoes))]
        usage = {"prompt_tokens": n_prompt, "completion_tokens": 0, "total_tokens": n_prompt}
        return self._object(choices) | {"usage": usage}

    # ---------------------------------------------------------------- streamed

    async def stream(self, outlet: Outlet, jobs: Sequence[Job], include_usage: bool, n: int) -> AsyncIterator[bytes]:
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        begun = [sse(self._object([self._echoed(i)]) | usage) for i, echo in enumerate(self._echoes) if echo.text]
        yield b"".join(begun)
        async for batch in outlet.batches():
            yield b"".join(self._event(index, event, usage) for index, event in batch)
        if include_usage:
            yield sse(self._object([]) | {"usage": _usage(jobs, n), "timings": timings_of(jobs)})
        yield DONE

    def _event(self, index: int, event: AnswerEvent, usage: dict[str, Any]) -> bytes:
        match event:
            case Text():
                choice = self._choice(index, event.text, event.tokens, None)
            case Finish():
                choice = self._choice(index, "", (), event.reason)
            case _:
                raise AssertionError(f"a plain text has no {type(event).__name__}")
        return sse(self._object([choice]) | usage)


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    out = second | {"text": first["text"] + second["text"]}
    if first["logprobs"] is not None:
        out["logprobs"] = {name: first["logprobs"][name] + second["logprobs"][name] for name in first["logprobs"]}
    return out


def _usage(jobs: Sequence[Job], n: int) -> dict[str, Any]:
    n_prompt = sum(job.n_prompt for job in jobs[::n])
    n_drawn = sum(job.answer.n_tokens for job in jobs)
    cached = {"cached_tokens": sum(job.n_reused for job in jobs[::n])}
    return {"prompt_tokens": n_prompt, "completion_tokens": n_drawn, "total_tokens": n_prompt + n_drawn,
            "prompt_tokens_details": cached}  # fmt: skip
