"""What draws pictures, by its name.

open_images("cogview4-6b")                       # folder of a diffusers pipeline
open_images("http://localhost:8000/v1")          # an endpoint that speaks OpenAI's images protocol
open_images("https://api.openai.com/v1?model=gpt-image-1")
"""

from __future__ import annotations

import os

from openglm.agent.images import MODEL_VARIABLE, REMEDY, ImageBackend, ImageUnavailable
from openglm.agent.images_diffusers import DiffusersImages
from openglm.agent.images_http import HttpImages

__all__ = ["open_images"]


def open_images(reference: str | None = None, device: str = "auto", dtype: str | None = None) -> ImageBackend:
    """reference: a folder or an address, as above; None: what OPENGLM_IMAGE_MODEL says.

    device, dtype: of a folder's pipeline, as for language models; it is read when the first picture is asked for.
    ImageUnavailable where there is none, or a library is missing.
    """
    reference = (os.environ.get(MODEL_VARIABLE, "") if reference is None else reference).strip()
    if not reference:
        raise ImageUnavailable("no image model is set", REMEDY)
    if reference.startswith(("http://", "https://")):
        return HttpImages(reference)
    return DiffusersImages(reference, device, dtype)
