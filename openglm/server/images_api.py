"""POST /v1/images/generations: pictures from a text, as OpenAI's protocol has it.

    {"prompt": "a red kite over the sea", "n": 1, "size": "1024x1024", "seed": 7}
    {"created": 1735689600, "data": [{"b64_json": "...", "seed": 7}], "size": "1024x1024", "output_format": "png"}

One request is drawn at a time, some more may wait. A client that goes away ends its own between two steps.
"""

from __future__ import annotations

import base64
import time
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from openglm.agent.images import ImageBackend, ImageRequest, ImageUnavailable, Picture, parse_size
from openglm.server.errors import ApiError
from openglm.server.limits import Lease
from openglm.server.protocol import Model, load_json, parse
from openglm.server.service import Service
from openglm.server.sse import while_connected

__all__ = ["ImagesRequest", "generations"]


class ImagesRequest(Model):
    """Pictures of a text. Beyond OpenAI's fields: seed, steps, guidance, negative_prompt."""

    prompt: Annotated[str, Field(min_length=1, max_length=8000)]
    model: str | None = Field(None, description="Name of the image model; may be left out.")
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    size: Annotated[str, Field(description="width x height in pixels, or auto: the model's own")] | None = None
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json, also when left out")
    seed: Annotated[int, Field(ge=0, lt=2**63, description="picture i has seed + i")] | None = None
    steps: Annotated[int, Field(ge=1, le=200)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    negative_prompt: Annotated[str, Field(max_length=8000)] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None
    output_format: Literal["png"] | None = None
    stream: Literal[False] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None


async def generations(service: Service, request: Request, body: bytes, lease: Lease) -> Response:
    asked = parse(ImagesRequest, load_json(body))
    backend = service.images
    if backend is None:
        text = "this server draws no pictures: start it with --image-model PATH_OR_URL"
        raise ApiError(text, None, 404, "no_image_model")
    if asked.model not in (None, backend.name):
        text = f"the image model {asked.model!r} is not served here: this is {backend.name!r}"
        raise ApiError(text, "model", 404, "model_not_found")
    if asked.response_format == "url":
        raise ApiError("response_format: pictures are not kept, so they have no url: ask for b64_json",
                       "response_format")  # fmt: skip
    wanted = ImageRequest(
        asked.prompt, asked.n or 1, parse_size(asked.size or "auto"), asked.seed, asked.steps, asked.guidance,
        asked.negative_prompt or "",
    )  # fmt: skip
    pictures = await while_connected(request, _draw(service, backend, wanted))
    sizes = {f"{picture.width}x{picture.height}" for picture in pictures}
    answer: dict[str, Any] = {
        "created": int(time.time()), "data": [_entry(picture, wanted) for picture in pictures], "output_format": "png",
        "size": sizes.pop(),
    }  # fmt: skip
    return JSONResponse(answer)


async def _draw(service: Service, backend: ImageBackend, wanted: ImageRequest) -> list[Picture]:
    async with service.image_turns:
        try:
            return await backend.generate(wanted)
        except ImageUnavailable as error:
            raise ApiError(str(error), None, 503, "image_model_failed") from None


def _entry(picture: Picture, wanted: ImageRequest) -> dict[str, Any]:
    entry: dict[str, Any] = {"b64_json": base64.b64encode(picture.png).decode()}
    if picture.seed is not None:
        entry["seed"] = picture.seed
    if picture.prompt != wanted.prompt:
        entry["revised_prompt"] = picture.prompt
    return entry
