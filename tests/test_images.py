"""Pictures from a text: pipelines of the real classes with tiny random weights, and the tool that offers them.

python -m pytest tests/test_images.py
"""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openglm.agent import images_diffusers
from openglm.agent.images import ImageRequest, ImageUnavailable, Picture, parse_size, read_picture
from openglm.agent.images_diffusers import DiffusersImages
from openglm.agent.images_open import open_images
from openglm.agent.toolbox import Toolbox, ToolboxConfig
from openglm.agent.tools.image import ImageTool
from openglm.agent.tools.image import main as draw
from openglm.types import StatefulTool, ToolContext
from tests.image_helpers import save_cogview3plus, save_cogview4, save_stable_diffusion

SAVES: dict[str, Callable[[Path], Path]] = {
    "CogView4Pipeline": save_cogview4, "CogView3PlusPipeline": save_cogview3plus,
    "StableDiffusionPipeline": save_stable_diffusion,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {name: save(root / name) for name, save in SAVES.items()}


@pytest.fixture(scope="module")
def cogview(folders: dict[str, Path]) -> Iterator[DiffusersImages]:
    backend = DiffusersImages(folders["CogView4Pipeline"])
    yield backend
    asyncio.run(backend.close())


def pixels(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png)))


def notes_of(png: bytes) -> dict[str, str]:
    image: Any = Image.open(io.BytesIO(png))
    return dict(image.text)


def generate(backend: Any, **fields: Any) -> list[Picture]:
    return asyncio.run(backend.generate(ImageRequest(**{"prompt": "a red kite", "steps": 2, **fields})))


# -------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("name", SAVES)
def test_pictures_are_those_of_the_pipeline_itself(name: str, folders: dict[str, Path]) -> None:
    import diffusers

    told: list[str] = []
    asked = ImageRequest("一 只 red kite", 2, (48, 32), seed=11, steps=3, guidance=4.0, negative_prompt="the sea")
    backend = DiffusersImages(folders[name])
    pictures = asyncio.run(backend.generate(asked, told.append))
    pipeline = getattr(diffusers, name).from_pretrained(folders[name], local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for i, picture in enumerate(pictures):
        wanted = pipeline(
            prompt="一 只 red kite", negative_prompt="the sea", width=48, height=32, num_inference_steps=3,
            guidance_scale=4.0, generator=torch.Generator().manual_seed(11 + i),
        ).images[0]  # fmt: skip
        assert np.array_equal(pixels(picture.png), np.asarray(wanted)), "the same noise, weights and steps"
        assert (picture.width, picture.height, picture.seed) == (48, 32, 11 + i)
    assert pixels(pictures[0].png).std() > 0 and not np.array_equal(*(pixels(p.png) for p in pictures))
    assert told[0] == f"loading {name}" and told[1:4] == [f"picture 1 of 2: step {i} of 3" for i in (1, 2, 3)]
    assert backend._pipeline.transformer.dtype == torch.float32 if "Cog" in name else True
    asyncio.run(backend.close())
    with pytest.raises(ImageUnavailable, match="closed"):
        generate(backend)


def test_a_picture_says_how_it_was_made(cogview: DiffusersImages) -> None:
    png = generate(cogview, prompt="一只 red kite", seed=5, negative_prompt="sea", size=(32, 32))[0].png
    notes = notes_of(png)
    wanted = {"Software": "OpenGLM", "Description": "一只 red kite", "negative_prompt": "sea", "seed": "5",
              "steps": "2", "model": "CogView4Pipeline", "size": "32x32"}  # fmt: skip
    assert notes == wanted
    assert png.count(b"iTXtDescription") == 1 and b"tEXtseed" in png and str(cogview.folder.parent).encode() not in png


def test_seeds_and_defaults(cogview: DiffusersImages) -> None:
    first, again, other = generate(cogview, seed=1)[0], generate(cogview, seed=1)[0], generate(cogview)[0]
    assert first.png == again.png and (first.width, first.height) == (32, 32), "16 latents of two pixels each"
    assert other.seed not in (None, 1) and generate(cogview, seed=other.seed)[0].png == other.png
    assert generate(cogview, seed=0, n=2)[1].png == first.png, "each picture has a seed of its own"


def test_a_cancelled_picture_ends_between_two_steps(cogview: DiffusersImages) -> None:
    steps: list[str] = []
    begun = threading.Event()

    def told(text: str) -> None:
        steps.append(text)
        begun.set()

    async def go() -> None:
        first = asyncio.ensure_future(cogview.generate(ImageRequest("a red kite", 10, steps=200), told))
        waits = asyncio.ensure_future(cogview.generate(ImageRequest("the sea", steps=1), steps.append))
        await asyncio.to_thread(begun.wait, 60)
        for task in (waits, first):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        before = len(steps)
        await asyncio.sleep(0.05)
        assert len(steps) == before and before < 2000, "nothing goes on behind the back of the caller"

    asyncio.run(go())
    assert generate(cogview, seed=1)[0].png, "the next one is drawn"


def test_closing_ends_what_runs(folders: dict[str, Path]) -> None:
    backend = DiffusersImages(folders["CogView3PlusPipeline"])

    async def go() -> None:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()
        told: Callable[[str], Any] = lambda text: "step" in text and loop.call_soon_threadsafe(begun.set)  # noqa: E731
        task = asyncio.ensure_future(backend.generate(ImageRequest("a red kite", 10, steps=200), told))
        await begun.wait()
        await backend.close()
        with pytest.raises(ImageUnavailable, match="stopped"):
            await task

    asyncio.run(go())
    assert backend._pipeline is None


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"size": (34, 33)}, "^size: .*divisible"),
        ({"size": (8, 32)}, "^size: 16 to"),
        ({"size": (4096, 4096)}, "^size: "),
        ({"prompt": " \n"}, "^prompt: say what"),
        ({"prompt": "a" * 8001}, "^prompt: at most"),
        ({"negative_prompt": "a" * 8001}, "^negative_prompt: at most"),
        ({"n": 11}, "^n: 1 to 10"), ({"n": 0}, "^n: "), ({"steps": 0}, "^steps: "), ({"steps": 201}, "^steps: "),
        ({"guidance": -1.0}, "^guidance: "), ({"guidance": float("nan")}, "^guidance: "), ({"seed": -1}, "^seed: "),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_named(cogview: DiffusersImages, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        generate(cogview, **fields)


def test_what_a_pipeline_does_not_take_is_named(folders: dict[str, Path]) -> None:
    class Plain:
        """The least that a pipeline may be: no size, no negative prompt, no steps to watch."""

        def __call__(self, prompt: str, generator: Any) -> Any:
            class Made:
                images = [Image.fromarray(np.full((8, 8), 7, np.uint8))]
                nsfw_content_detected = [prompt == "hidden"]

            return Made

    backend = DiffusersImages(folders["CogView4Pipeline"])
    backend._pipeline = Plain()
    for field, value in (("size", (32, 32)), ("negative_prompt", "sea"), ("guidance", 2.0), ("steps", 3)):
        with pytest.raises(ValueError, match=f"^{field}: "):
            generate(backend, **{"steps": None, field: value})
    assert pixels(generate(backend, steps=None)[0].png).tolist() == [[7] * 8] * 8
    with pytest.raises(ValueError, match="safety check"):
        generate(backend, steps=None, prompt="hidden")


def test_a_pipeline_too_large_for_the_gpu_stays_in_memory(folders: dict[str, Path], monkeypatch: Any) -> None:
    moved: list[str] = []
    import diffusers

    monkeypatch.setattr(images_diffusers, "_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    base = diffusers.DiffusionPipeline
    monkeypatch.setattr(base, "to", lambda self, device: moved.append(f"to {device}"))
    monkeypatch.setattr(base, "enable_model_cpu_offload", lambda self, device: moved.append(f"offload {device}"))
    for free in (1000, 1 << 40):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        pipeline = DiffusersImages(folders["CogView4Pipeline"])._load()
        assert pipeline.transformer.dtype == torch.float16
    assert moved == ["offload cuda:0", "to cuda:0"]


# -------------------------------------------------------------------- folders


def test_folders_that_are_none(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ImageUnavailable, match=r"no diffusers pipeline \(model_index.json\).*openglm\[image\]"):
        open_images(str(tmp_path / "nothing"))
    for text in ("{", "[]", '{"_class_name": ["my_code", "MyPipeline"]}'):
        (tmp_path / "model_index.json").write_text(text, encoding="utf-8")
        with pytest.raises(ImageUnavailable, match="cannot be read|folders with code"):
            open_images(str(tmp_path))
    with pytest.raises(ValueError, match="^dtype must be"):
        open_images(str(folders["CogView4Pipeline"]), dtype="int8")
    with pytest.raises(ImageUnavailable, match="no 'nonsense'"):
        generate(DiffusersImages(folders["CogView4Pipeline"], "nonsense"))


def test_pickled_weights_and_foreign_code_are_not_read(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["CogView4Pipeline"], tmp_path / "pickled")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(ImageUnavailable, match="cannot be read: .*safetensors"):
        generate(DiffusersImages(folder))
    folder = shutil.copytree(folders["CogView4Pipeline"], tmp_path / "code")
    ran = tmp_path / "ran"
    (folder / "transformer" / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n", encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["transformer"] = ["mine", "Mine"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ImageUnavailable, match="cannot be read"):
        generate(DiffusersImages(folder))
    assert not ran.exists()


def test_a_pipeline_of_another_task(folders: dict[str, Path], tmp_path: Path) -> None:
    """One that changes pictures draws them too; one that takes no text is refused."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    folder = shutil.copytree(folders["StableDiffusionPipeline"], tmp_path / "changes")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = "StableDiffusionImg2ImgPipeline"
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    same = generate(DiffusersImages(folders["StableDiffusionPipeline"]), seed=1)[0]
    assert np.array_equal(pixels(generate(DiffusersImages(folder), seed=1)[0].png), pixels(same.png))
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "no text")
    with pytest.raises(ImageUnavailable, match="draws no picture from a text"):
        generate(DiffusersImages(tmp_path / "no text"))


def test_without_the_extra(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_diffusers.importlib.util, "find_spec", lambda name: None)
    why = ImageTool.why_not(str(folders["CogView4Pipeline"]))
    assert why == "pictures need diffusers, transformers, PIL: pip install 'openglm[image]'"


# -------------------------------------------------------------------- sizes and files


def test_sizes() -> None:
    assert parse_size("1024x768") == (1024, 768) and parse_size("auto") is None
    for text in ("", "10", "10x", "ax10", "1 x 1", "10x10x10", "-1x5", "٣x٣٣", "9" * 50 + "x1"):
        with pytest.raises(ValueError, match="^size: "):
            ImageRequest("a", size=parse_size(text))


def test_pictures_from_elsewhere_become_png() -> None:
    asked = ImageRequest("红 kite")
    for form, mode in (("JPEG", "RGB"), ("WEBP", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "L")):
        data = io.BytesIO()
        Image.new(mode, (9, 7), 3).save(data, form)
        picture = read_picture(data.getvalue(), asked, "m", 4, "a red kite")
        assert (picture.width, picture.height, picture.seed, picture.prompt) == (9, 7, 4, "a red kite")
        shown = Image.open(io.BytesIO(picture.png))
        assert shown.format == "PNG" and notes_of(picture.png)["Description"] == "a red kite"
    gif, large = io.BytesIO(), io.BytesIO()
    Image.new("L", (4, 4)).save(gif, "GIF")
    Image.new("L", (5000, 2000)).save(large, "PNG")
    for data, text in ((gif, "no picture"), (large, "more than"), (io.BytesIO(b""), "no picture"),
                       (io.BytesIO(large.getvalue()[:60]), "no picture|more than")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            read_picture(data.getvalue(), asked, "m")


# -------------------------------------------------------------------- the tool


def call(tool: ImageTool, arguments: dict[str, Any], **context: Any) -> Any:
    return asyncio.run(tool.call(arguments, ToolContext("c", **context)))


def test_the_tool_shows_files_and_tells_the_model(cogview: DiffusersImages) -> None:
    heard: list[tuple[str, str]] = []
    tool = ImageTool(cogview)
    arguments = {"prompt": "a red kite", "size": "32x32", "n": 2, "seed": 3}
    seen = call(tool, arguments, on_output=lambda stream, text: heard.append((stream, text)))
    assert isinstance(tool, StatefulTool) and not seen.error and len(seen.files) == 2
    wanted = [p.png for p in generate(cogview, steps=None, seed=3, n=2, size=(32, 32))]
    assert [file.read() for file in seen.files] == wanted
    names = [file.name for file in seen.files]
    assert len(set(names)) == 2 and all(name.startswith("picture-") and name.endswith(".png") for name in names)
    assert all(file.mime == "image/png" and file.description in seen.content for file in seen.files)
    assert "32 x 32 pixels, seed 4, drawn by CogView4Pipeline from: a red kite" in seen.content
    assert seen.data["images"][1] == {"name": names[1], "width": 32, "height": 32, "seed": 4, "prompt": "a red kite"}
    assert {stream for stream, _ in heard} == {"progress"} and heard[-1][1] == "picture 2 of 2: step 50 of 50\n"


def test_the_tool_refuses_in_words(cogview: DiffusersImages) -> None:
    tool = ImageTool(cogview)
    wrong: list[dict[str, Any]] = [
        {}, {"prompt": 3}, {"prompt": "a", "style": "b"}, {"prompt": "a", "n": 5}, {"prompt": "a", "n": True},
        {"prompt": "a", "seed": "1"}, {"prompt": "a", "size": "big"}, {"prompt": ""},
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(ValueError):
            call(tool, arguments)
    late = call(tool, {"prompt": "a red kite", "n": 4}, timeout_s=0.001)
    assert late.error and "within" in late.content

    class Broken:
        name = "broken"

        async def generate(self, asked: ImageRequest, on_progress: Any = None) -> list[Picture]:
            raise ImageUnavailable("the server is away")

        async def close(self) -> None: ...

    seen = call(ImageTool(Broken()), {"prompt": "a"})
    assert seen.error and seen.content == "No picture could be drawn: the server is away"


def test_the_list_of_tools_says_how_to_get_one(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENGLM_IMAGE_MODEL", raising=False)
    assert "no image model is set" in ImageTool.why_not()
    row = next(row for row in Toolbox(ToolboxConfig(python=False)).rows() if row.name == "cogview")
    assert not row.ready and "--image-model" in row.note and "openglm[image]" in row.note and "folder" in row.note
    folder = str(folders["CogView4Pipeline"])
    monkeypatch.setenv("OPENGLM_IMAGE_MODEL", folder)
    assert ImageTool.why_not() == ""
    for config in (ToolboxConfig(python=False), ToolboxConfig(python=False, images=folder),
                   ToolboxConfig(python=False, images=open_images(folder))):  # fmt: skip
        box = Toolbox(config)
        row = next(row for row in box.rows() if row.name == "cogview")
        assert row.ready and row.note == "image model: CogView4Pipeline"
        asyncio.run(box.close())
    with pytest.raises(ImageUnavailable, match="no diffusers pipeline"):
        Toolbox(ToolboxConfig(python=False, images="no/such/folder"))


def test_from_a_terminal(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kite.png"
    options = ["--model", str(folders["CogView4Pipeline"]), "--seed", "9", "--steps", "2", "--out", str(out)]
    assert draw(["a red kite", *options]) == 0
    assert notes_of(out.read_bytes())["seed"] == "9" and "seed 9" in capsys.readouterr().out
    assert draw(["a red kite", "--model", str(tmp_path)]) == 2 and "no diffusers pipeline" in capsys.readouterr().err
