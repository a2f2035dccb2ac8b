"""Pictures from a folder with a diffusers pipeline: CogView4, CogView3-Plus, or any other that takes a text.

    backend = DiffusersImages("cogview4-6b")
    pictures = asyncio.run(backend.generate(ImageRequest("a red kite", seed=7, steps=30), print))

The pipeline is read at the first picture and works in a thread of its own, one picture after the other.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import inspect
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openglm.agent.images import REMEDY, ImageRequest, ImageUnavailable, Picture, no_progress, png_of

__all__ = ["DiffusersImages"]

INDEX = "model_index.json"
# Our fields and the arguments of a pipeline; not every pipeline has them all.
FIELDS = {"negative_prompt": "negative_prompt", "steps": "num_inference_steps", "guidance": "guidance_scale"}
ROOM = 1.3  # memory for a pipeline and its work, in sizes of its weights


class _Stopped(Exception):
    """Raised between two steps of a pipeline whose picture nobody waits for any more."""


class DiffusersImages:
    """folder: with model_index.json and safetensors. device: auto, cpu, cuda, ...; dtype: None: bfloat16 (float16 on
    GPUs without it), float32 on a CPU.

    A pipeline that does not fit in a GPU's free memory is kept in the machine's and moved over part by part. Code in
    the folder is never run. ImageUnavailable when diffusers or the folder is not there.
    """

    def __init__(self, folder: str | Path, device: str = "auto", dtype: str | None = None) -> None:
        self.folder = Path(folder).expanduser()
        if missing := [m for m in ("diffusers", "transformers", "PIL") if importlib.util.find_spec(m) is None]:
            raise ImageUnavailable(f"pictures need {', '.join(missing)}", "pip install 'openglm[image]'")
        self.class_name = _class_of(self.folder)
        if dtype not in (None, "float32", "float16", "bfloat16"):
            raise ValueError(f"dtype must be float32, float16 or bfloat16, not {dtype!r}")
        self._device, self._dtype = device, dtype
        self._pipeline: Any = None
        self._thread = ThreadPoolExecutor(1, "images")
        self._live: set[threading.Event] = set()  # of requests; set when one is to end
        self._closed = False

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    async def generate(self, asked: ImageRequest, on_progress: Callable[[str], None] = no_progress) -> list[Picture]:
        if self._closed:
            raise ImageUnavailable("the image model is closed")
        stop = threading.Event()
        self._live.add(stop)
        work = self._thread.submit(self._generate, asked, on_progress, stop)
        waiting = asyncio.wrap_future(work)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            stop.set()
            if not work.cancel():  # it runs: a step may take seconds
                await asyncio.wait([waiting])
                waiting.exception()  # nobody is left to be told of it
            raise
        finally:
            self._live.discard(stop)

    def _generate(
        self, asked: ImageRequest, on_progress: Callable[[str], None], stop: threading.Event
    ) -> list[Picture]:
        try:
            if self._pipeline is None:
                on_progress(f"loading {self.name}")
                with _quiet():
                    self._pipeline = self._load()
            seed = secrets.randbits(31) if asked.seed is None else asked.seed
            return [self._one(asked, i, seed + i, on_progress, stop) for i in range(asked.n)]
        except _Stopped:
            raise ImageUnavailable("the picture was stopped") from None

    def _one(
        self, asked: ImageRequest, number: int, seed: int, on_progress: Callable[[str], None], stop: threading.Event
    ) -> Picture:
        import torch

        if stop.is_set():
            raise _Stopped
        pipeline = self._pipeline
        options = self._options(asked)
        place = f"picture {number + 1} of {asked.n}: " if asked.n > 1 else ""
        n_steps = 0

        def after_step(pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
            nonlocal n_steps
            n_steps = step + 1
            on_progress(f"{place}step {n_steps} of {getattr(pipe, 'num_timesteps', None) or '?'}")
            if stop.is_set():
                raise _Stopped
            return kept

        if "callback_on_step_end" in self._takes():
            options["callback_on_step_end"] = after_step
        generator = torch.Generator("cpu").manual_seed(seed)  # the same noise on every device
        with _one_line():
            made = pipeline(prompt=asked.prompt, generator=generator, **options)
        if any(getattr(made, "nsfw_content_detected", None) or ()):
            raise ValueError("prompt: the model's own safety check withheld the picture; ask for another")
        return png_of(made.images[0], asked, self.name, seed, n_steps or asked.steps)

    def _options(self, asked: ImageRequest) -> dict[str, Any]:
        """Arguments of the pipeline; ValueError names a field that it does not take."""
        takes, options = self._takes(), {}
        for field, argument in FIELDS.items():
            value = getattr(asked, field)
            if value in (None, ""):
                continue
            if argument not in takes:
                raise ValueError(f"{field}: {self.class_name} has no such setting; leave it out")
            options[argument] = value
        if asked.size is not None:
            if not {"width", "height"} <= takes:
                raise ValueError(f"size: {self.class_name} draws in one size only; leave it out")
            options["width"], options["height"] = asked.size
        return options

    def _takes(self) -> set[str]:
        return set(inspect.signature(self._pipeline.__call__).parameters)

    # ---------------------------------------------------------------- the pipeline

    def _load(self) -> Any:
        import torch
        from diffusers import AutoPipelineForText2Image, DiffusionPipeline

        device = _device(self._device)
        dtype = getattr(torch, self._dtype) if self._dtype else _dtype(device)
        options = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
        try:
            try:
                pipeline = AutoPipelineForText2Image.from_pretrained(self.folder, **options)
            except ValueError as error:
                if "can't find a pipeline" not in str(error):
                    raise
                pipeline = DiffusionPipeline.from_pretrained(self.folder, **options)
        except (OSError, ValueError, ImportError, AttributeError) as error:
            raise ImageUnavailable(f"the pipeline in {self.folder} cannot be read: {_line(error)}") from None
        takes = inspect.signature(pipeline.__call__).parameters
        required = [n for n, p in takes.items() if p.default is p.empty and n not in ("prompt", "args", "kwargs")]
        if "prompt" not in takes or required:
            raise ImageUnavailable(f"{self.class_name} draws no picture from a text alone", REMEDY)
        pipeline.set_progress_bar_config(disable=True)
        if device.type == "cuda" and _weight_bytes(pipeline) * ROOM > torch.cuda.mem_get_info(device)[0]:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
        return pipeline

    async def close(self) -> None:
        """Requests that wait or run end; later ones are refused."""
        self._closed = True
        for stop in list(self._live):
            stop.set()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
        self._pipeline = None
        gc.collect()


def _class_of(folder: Path) -> str:
    """The pipeline class that a folder names; ImageUnavailable where there is none, or it brings code of its own."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ImageUnavailable(f"no diffusers pipeline ({INDEX}) in {folder}", REMEDY) from None
    except (OSError, ValueError) as error:
        raise ImageUnavailable(f"{folder / INDEX} cannot be read: {_line(error)}") from None
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str) or not name.isidentifier():
        raise ImageUnavailable(f"{folder / INDEX} names no pipeline of diffusers: folders with code are not used")
    return name


def _device(name: str) -> Any:
    import torch

    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError:
            raise ImageUnavailable(f"device: PyTorch knows no {name!r}") from None
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def _dtype(device: Any) -> Any:
    import torch

    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16


def _weight_bytes(pipeline: Any) -> int:
    parts = [part for part in pipeline.components.values() if hasattr(part, "parameters")]
    return sum(weight.numel() * weight.element_size() for part in parts for weight in part.parameters())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' bars and their words about what is not installed and not needed."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        from diffusers.utils import logging as of_diffusers

        of_diffusers.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _one_line() -> Iterator[None]:
    """What a pipeline refuses, as our errors say it: "size: ..." where it is about width and height."""
    try:
        yield
    except ValueError as error:
        text = _line(error)
        field = "size: " if "height" in text or "width" in text else ""
        raise ValueError(f"{field}{text}") from None
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        raise ValueError(f"size: no memory for such a picture, ask for a smaller one ({_line(error)[:120]})") from None
