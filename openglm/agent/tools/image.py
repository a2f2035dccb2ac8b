"""The tool `cogview`: draws pictures with whatever image model there is.

python -m openglm.agent.tools.image "a red kite over the sea" --model cogview4-6b --size 1024x1024 --seed 7
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import sys
import time
from pathlib import Path
from typing import Any

from openglm.agent.images import ImageBackend, ImageRequest, ImageUnavailable, Picture, parse_size
from openglm.agent.images_open import open_images
from openglm.types import Observation, ToolContext, ToolFile, ToolSpec

__all__ = ["ImageTool"]

MAX_PICTURES = 4  # of one call
SHOWN_PROMPT = 300  # characters of it that the model is told again
DESCRIPTION = (
    "Draws pictures from a description and shows them to the user. Describe what is to be seen in whole sentences: "
    "subject, surroundings, light, style. One picture unless the user wants several."
)
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "prompt": {"type": "string", "description": "what is to be seen"},
        "size": {"type": "string", "pattern": "^[0-9]{2,4}x[0-9]{2,4}$", "description": "width x height in pixels"},
        "n": {"type": "integer", "minimum": 1, "maximum": MAX_PICTURES, "description": "how many pictures"},
        "seed": {"type": "integer", "minimum": 0, "description": "the same seed draws the same picture again"},
    },
    "required": ["prompt"],
    "additionalProperties": False,
}


class ImageTool:
    """A StatefulTool around one image model, which all conversations share; closing it closes the model."""

    spec = ToolSpec("cogview", DESCRIPTION, PARAMETERS, builtin=True)

    def __init__(self, backend: ImageBackend) -> None:
        self.backend = backend
        self.note = f"image model: {backend.name}"

    @staticmethod
    def why_not(reference: str | None = None) -> str:
        """The reason why this tool cannot be offered here and what helps, or nothing. reference: as of open_images."""
        try:
            open_images(reference)
        except ImageUnavailable as error:
            return str(error)
        return ""

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> Observation:
        """arguments: {"prompt": text} and what else PARAMETERS says. ValueError names what the model cannot draw."""
        asked = _request(arguments)
        started = time.monotonic()
        try:
            async with asyncio.timeout(context.timeout_s):
                pictures = await self.backend.generate(asked, lambda text: context.on_output("progress", text + "\n"))
        except ImageUnavailable as error:
            return Observation(f"No picture could be drawn: {error}", error=True)
        except TimeoutError:
            return Observation(f"No picture was ready within {context.timeout_s:.0f} s.", error=True)
        return observe(pictures, asked, self.backend.name, time.monotonic() - started)

    async def end(self, conversation: str) -> None:
        """Nothing is kept for a conversation."""

    async def close(self) -> None:
        await self.backend.close()


def _request(arguments: dict[str, Any]) -> ImageRequest:
    unknown = set(arguments) - set(PARAMETERS["properties"])
    prompt, n, seed, size = (arguments.get(name) for name in ("prompt", "n", "seed", "size"))
    if unknown or not isinstance(prompt, str):
        raise ValueError('cogview takes {"prompt": "..."}, and if wanted "size": "1024x1024", "n" and "seed"')
    if not all(value is None or isinstance(value, int) and not isinstance(value, bool) for value in (n, seed)):
        raise ValueError("n and seed are whole numbers")
    if n is not None and n > MAX_PICTURES:
        raise ValueError(f"n: at most {MAX_PICTURES} pictures in one call, not {n}")
    return ImageRequest(prompt, 1 if n is None else n, None if size is None else parse_size(str(size)), seed)


def observe(pictures: list[Picture], asked: ImageRequest, model: str, seconds: float) -> Observation:
    """What the model is told of the pictures, and the files that a page shows."""
    files, notes = [], []
    for picture in pictures:
        name = f"picture-{hashlib.sha256(picture.png).hexdigest()[:8]}.png"
        shown = picture.prompt if len(picture.prompt) <= SHOWN_PROMPT else picture.prompt[:SHOWN_PROMPT] + "..."
        seed = "" if picture.seed is None else f", seed {picture.seed}"
        what = f"picture of {picture.width} x {picture.height} pixels{seed}"
        described = f"{what}, drawn by {picture.model} from: {shown}"
        files.append(ToolFile(name, "image/png", picture.png, description=described))
        notes.append({"name": name, "width": picture.width, "height": picture.height, "seed": picture.seed,
                      "prompt": picture.prompt})  # fmt: skip
    data = {"prompt": asked.prompt, "model": model, "seconds": round(seconds, 3), "images": notes}
    text = "\n".join(f"[{file.name}: {file.description}]" for file in files)
    return Observation(f"{text}\nThe user sees {'it' if len(files) == 1 else 'them'} now.", tuple(files), data)


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(description="Draw a picture.")
    p.add_argument("prompt")
    p.add_argument("--model", help="folder of a diffusers pipeline, or address of an images endpoint")
    p.add_argument("--size", default="auto", help="width x height in pixels")
    p.add_argument("--seed", type=int)
    p.add_argument("--steps", type=int)
    p.add_argument("--negative", default="", help="what should not be seen")
    p.add_argument("--device", default="auto")
    p.add_argument("--out", type=Path, default=Path("picture.png"))
    o = p.parse_args(argv)

    async def draw() -> list[Picture]:
        backend = open_images(o.model, o.device)
        try:
            asked = ImageRequest(o.prompt, 1, parse_size(o.size), o.seed, o.steps, negative_prompt=o.negative)
            return await backend.generate(asked, lambda text: print(text, file=sys.stderr))
        finally:
            await backend.close()

    try:
        picture = asyncio.run(draw())[0]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    o.out.write_bytes(picture.png)
    print(f"{o.out}: {picture.width} x {picture.height}, seed {picture.seed}, {picture.model}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
