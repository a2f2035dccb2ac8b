"""POST /fill: a text with blanks, and the likeliest ways to fill them all, each with its probability.

    {"text": "Paris is the capital of [MASK].", "n": 3}
    {"fillings": [{"text": "Paris is the capital of France.", "blanks": ["France"], "probability": 0.41}, ...]}

A beam search over each blank in turn; a filling's probability is that of all its answers, each with the token that
ends it, given the text and the answers before.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from openglm.engine.fill import Blanks
from openglm.server.errors import ApiError
from openglm.server.limits import Lease
from openglm.server.protocol import Model, load_json, parse
from openglm.server.service import Service
from openglm.server.sse import while_connected

__all__ = ["FillRequest", "fill"]

_MAX_BLANKS = 16


class FillRequest(Model):
    """Fill a text's blanks: write [MASK] for words, [sMASK] for a sentence, [gMASK] for all that follows."""

    text: Annotated[str, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=16, description="fillings wanted, and width of the search")] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=256, description="for each blank; default 32")] | None = None
    model: str | None = None


class _Filling(NamedTuple):
    """answers: ids that go in, in the order of filling. shown: their texts."""

    answers: tuple[list[int], ...] = ()
    shown: tuple[str, ...] = ()
    logprob: float = 0.0


async def fill(service: Service, request: Request, body: bytes, lease: Lease) -> Response:
    asked = parse(FillRequest, load_json(body))
    service.check_name(asked.model)
    n, budget = asked.n or 4, asked.max_tokens or 32
    fillings, order, blanks = await while_connected(request, _search(service, asked.text, n, budget))
    decode = service.model.tokenizer.decode
    found = []
    for filling in fillings:
        texts = [shown for _, shown in sorted(zip(order, filling.shown, strict=True))]
        probability = math.exp(min(filling.logprob, 0.0))
        text = decode(blanks.filled(filling.answers))
        found.append({"text": text, "blanks": texts, "probability": probability, "logprob": filling.logprob})
    return JSONResponse({"fillings": found})


async def _search(service: Service, text: str, n: int, budget: int) -> tuple[list[_Filling], list[int], Blanks]:
    """The best n fillings; other requests get on between the searches of single blanks."""
    model, worker = service.model, service.worker
    stop_ids = frozenset(model.text_stops())
    ids, joined, shown = model.fill_prompt(text)
    if len(ids) >= model.engine.config.max_seq_len:
        raise ApiError(
            f"the text has {len(ids)} tokens, but the context holds {model.engine.config.max_seq_len} with the "
            "answers: shorten it", "text", code="context_length_exceeded",
        )  # fmt: skip
    blanks = Blanks(model.engine, ids)
    if len(blanks.order) > _MAX_BLANKS:
        raise ApiError(f"the text has {len(blanks.order)} blanks, and may have {_MAX_BLANKS}", "text")
    best = [_Filling()]
    for blank in blanks.order:
        longer: list[_Filling] = []
        for filling in best:
            prompt = blanks.prompt(filling.answers)
            beams = await worker.call(
                lambda prompt=prompt: model.engine.beam(prompt, n, budget, min_new_tokens=1, stop_ids=stop_ids)  # type: ignore[misc]
            )
            for found, logprob in beams:
                bare = list(found[:-1] if found and found[-1] in stop_ids else found)
                answers, texts = (*filling.answers, joined(blank, bare)), (*filling.shown, shown(blank, bare))
                longer.append(_Filling(answers, texts, filling.logprob + logprob))
        best = sorted(longer, key=lambda f: -f.logprob)[:n]
    return best, blanks.order, blanks
