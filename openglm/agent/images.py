"""Text-to-image, whatever makes the pictures: one interface, and the PNG files that come out of it.

    pictures = await backend.generate(ImageRequest("a red kite", size=(1024, 1024), seed=7))

Each picture is a PNG that says in its metadata (`Description`, `seed`, `model`, ...) how it was made.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "MODEL_VARIABLE", "REMEDY", "ImageBackend", "ImageRequest", "ImageUnavailable", "Picture", "no_progress",
    "parse_size", "png_of", "read_picture",
]  # fmt: skip

MODEL_VARIABLE = "OPENGLM_IMAGE_MODEL"
REMEDY = (
    "give a folder with a diffusers pipeline (CogView4, CogView3-Plus or another text-to-image one) or the address of "
    f"an endpoint that speaks OpenAI's images protocol: --image-model PATH_OR_URL or {MODEL_VARIABLE}=PATH_OR_URL, and "
    "pip install 'openglm[image]'"
)
MAX_PROMPT = 8000  # characters
MAX_IMAGES = 10
MAX_STEPS = 200
MAX_SIDE, MAX_PIXELS = 4096, 4096 * 2160
FORMATS = ("PNG", "JPEG", "WEBP")  # that an endpoint may send


class ImageUnavailable(ValueError):
    """Nothing can make a picture: why, and what helps."""

    def __init__(self, why: str, remedy: str = "") -> None:
        super().__init__(f"{why}: {remedy}" if remedy else why)
        self.why, self.remedy = why, remedy


@dataclass(frozen=True)
class ImageRequest:
    """What to draw. size: (width, height) in pixels; None: the model's own. negative_prompt: what should not be seen.

    seed: of the first picture, the next has the next; None draws a fresh one. steps, guidance: None takes the model's
    own. The same request gives the same pictures on the same machine, each the same however many are asked for.
    """

    prompt: str
    n: int = 1
    size: tuple[int, int] | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("prompt: say what to draw; it is empty")
        for name in ("prompt", "negative_prompt"):
            if len(getattr(self, name)) > MAX_PROMPT:
                raise ValueError(f"{name}: at most {MAX_PROMPT} characters, not {len(getattr(self, name))}")
        if not 1 <= self.n <= MAX_IMAGES:
            raise ValueError(f"n: 1 to {MAX_IMAGES} pictures, not {self.n}")
        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps: 1 to {MAX_STEPS}, not {self.steps}")
        if self.guidance is not None and not 0 <= self.guidance <= 100:
            raise ValueError(f"guidance: 0 to 100, not {self.guidance}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: 0 to {2**63 - 1}, not {self.seed}")
        if self.size is not None:
            width, height = self.size
            if not (16 <= width <= MAX_SIDE and 16 <= height <= MAX_SIDE and width * height <= MAX_PIXELS):
                raise ValueError(f"size: 16 to {MAX_SIDE} pixels a side and {MAX_PIXELS} in all, not {width}x{height}")


def parse_size(text: str) -> tuple[int, int] | None:
    """(1024, 768) of "1024x768", None of "auto". ValueError for other texts."""
    width, _, height = text.partition("x")
    if text == "auto":
        return None
    if not (width.isdecimal() and height.isdecimal() and len(text) <= 11):
        raise ValueError(f"size: width x height in pixels, such as 1024x1024, or auto; not {text[:40]!r}")
    return int(width), int(height)


@dataclass(frozen=True)
class Picture:
    """One picture, as a PNG with metadata. seed: None where the endpoint did not say. prompt: as it was drawn."""

    png: bytes
    width: int
    height: int
    prompt: str
    model: str
    seed: int | None = None


def no_progress(text: str) -> None:
    """The `on_progress` of a caller that does not watch."""


class ImageBackend(Protocol):
    """What makes pictures. name: of the model.

    generate raises ValueError ("FIELD: why") for what the model does not do, ImageUnavailable where it does not run.
    on_progress(text) is called from any thread. When its task is cancelled the work ends before CancelledError goes on.
    """

    @property
    def name(self) -> str: ...

    async def generate(
        self, asked: ImageRequest, on_progress: Callable[[str], None] = no_progress
    ) -> list[Picture]: ...

    async def close(self) -> None:
        """Let go of the model or the connections."""


# -------------------------------------------------------------------- PNG


def png_of(image: Image, asked: ImageRequest, model: str, seed: int | None, steps: int | None = None) -> Picture:
    """The picture as a PNG whose text chunks hold what it was made from: tEXt, and iTXt for what is not Latin-1."""
    from PIL.PngImagePlugin import PngInfo

    shown = image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGB")
    notes = {
        "Software": "OpenGLM", "Description": asked.prompt, "negative_prompt": asked.negative_prompt, "model": model,
        "seed": "" if seed is None else str(seed), "steps": "" if steps is None else str(steps),
        "guidance": "" if asked.guidance is None else str(asked.guidance), "size": f"{shown.width}x{shown.height}",
    }  # fmt: skip
    info = PngInfo()
    for key, text in notes.items():
        if text:
            info.add_text(key, text.replace("\0", " "))
    out = io.BytesIO()
    shown.save(out, "PNG", pnginfo=info)
    return Picture(out.getvalue(), shown.width, shown.height, asked.prompt, model, seed)


def read_picture(
    data: bytes, asked: ImageRequest, model: str, seed: int | None = None, drawn: str | None = None
) -> Picture:
    """A picture that came from elsewhere, made anew as a PNG; ValueError when it is none or too large.

    drawn: the prompt as the endpoint changed it.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"the picture has {image.width}x{image.height} pixels: more than {MAX_PIXELS}")
            image.load()
            plain = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"what came is no picture in {', '.join(FORMATS)} ({type(error).__name__})") from None
    return png_of(plain, asked if not drawn else replace(asked, prompt=drawn[:MAX_PROMPT]), model, seed)
