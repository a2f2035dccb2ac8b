"""Pictures over HTTP: our endpoint with OpenAI's client, and our client with endpoints of several makes.

python -m pytest tests/test_server_images.py
"""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from PIL import Image

from openglm.agent import images_http
from openglm.agent.images import ImageBackend, ImageRequest, ImageUnavailable, Picture
from openglm.agent.images_http import HttpImages
from openglm.agent.images_open import open_images
from openglm.chat import ChatModel
from openglm.server.config import ServeConfig
from openglm.server.service import Service
from tests.image_helpers import save_cogview4
from tests.server_helpers import running, scripted, until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_cogview4(tmp_path_factory.mktemp("pipelines") / "tiny-cogview")


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return scripted("glm-4", "\nHi")[0]


@pytest.fixture(scope="module")
def client(folder: Path, model: ChatModel) -> Iterator[OpenAI]:
    with running(service(model, open_images(str(folder)), api_keys=("secret",))) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)


def service(model: ChatModel, images: ImageBackend | None, **config: Any) -> Service:
    return Service(model, ServeConfig(**config), "tiny", images=images)


def generate(backend: ImageBackend, **fields: Any) -> list[Picture]:
    return asyncio.run(backend.generate(ImageRequest(**{"prompt": "a red kite", **fields})))


# -------------------------------------------------------------------- our endpoint


def test_openais_client_gets_the_pictures_of_the_model(client: OpenAI, folder: Path) -> None:
    more = {"seed": 5, "steps": 2, "guidance": 3.0, "negative_prompt": "the sea"}
    size: Any = "48x32"
    answer: Any = client.images.generate(
        model="tiny-cogview", prompt="一 red kite", n=2, size=size, response_format="b64_json", extra_body=more
    )
    wanted = generate(open_images(str(folder)), prompt="一 red kite", n=2, size=(48, 32), **more)
    assert [base64.b64decode(image.b64_json) for image in answer.data] == [picture.png for picture in wanted]
    assert [image.seed for image in answer.data] == [5, 6] and answer.data[0].url is None
    assert answer.size == "48x32" and answer.output_format == "png" and answer.created > 1_700_000_000
    plain: Any = client.images.generate(prompt="the sea", extra_body={"steps": 1})
    assert plain.size == "32x32" and Image.open(io.BytesIO(base64.b64decode(plain.data[0].b64_json))).size == (32, 32)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": ""}), ("prompt", {"prompt": " "}), ("prompt", {"prompt": 3}),
    ("prompt", {"prompt": "a" * 8001}),
    ("n", {"n": 0}), ("n", {"n": 11}), ("n", {"n": True}), ("size", {"size": "big"}), ("size", {"size": "33x34"}),
    ("size", {"size": "9999x9999"}), ("response_format", {"response_format": "url"}),
    ("response_format", {"response_format": "gif"}), ("seed", {"seed": -1}), ("steps", {"steps": 1000}),
    ("guidance", {"guidance": -1}), ("quality", {"quality": "hd"}), ("background", {"background": "transparent"}),
    ("output_format", {"output_format": "webp"}), ("stream", {"stream": True}), ("style", {"style": "vivid"}),
    ("partial_images", {"partial_images": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("param", "fields"), REFUSED)
def test_what_is_wrong_is_named(client: OpenAI, param: str, fields: dict[str, Any]) -> None:
    body = {"prompt": "a red kite", "steps": 1, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/images/generations", body=body, cast_to=object)
    assert caught.value.param == param and len(str(caught.value)) < 600


def test_key_name_and_description(client: OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").images.generate(prompt="a")
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a", model="dall-e-3")
    assert caught.value.param == "model" and "tiny-cogview" in str(caught.value)
    root = str(client.base_url).removesuffix("/v1/")
    described = httpx.get(f"{root}/openapi.json").json()
    body = described["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["$ref"].endswith("/ImagesRequest")
    assert set(described["components"]["schemas"]["ImagesRequest"]["properties"]) >= {"prompt", "size", "seed"}
    assert client.models.list().data[0].images is True  # type: ignore[attr-defined]


def test_a_server_without_an_image_model_says_how_to_get_one(model: ChatModel) -> None:
    with running(service(model, None)) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.NotFoundError, match="--image-model PATH_OR_URL") as caught:
            client.images.generate(prompt="a")
        assert caught.value.code == "no_image_model"
        assert client.models.list().data[0].images is False  # type: ignore[attr-defined]


class Slow:
    """A backend that draws until it is told to go on."""

    name = "slow"

    def __init__(self) -> None:
        self.go = threading.Event()
        self.running = self.most = self.cancelled = 0
        self.closed = False

    async def generate(self, asked: ImageRequest, on_progress: Callable[[str], None] = print) -> list[Picture]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            while not self.go.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if asked.prompt == "away":
            raise ImageUnavailable("the model is away")
        return [Picture(b"png", 1, 1, "drawn " + asked.prompt, "slow")]

    async def close(self) -> None:
        self.closed = True


def test_one_at_a_time_and_few_waiting_while_all_else_is_answered(model: ChatModel) -> None:
    slow = Slow()
    served = service(model, slow, max_image_queue=2)
    with running(served) as url, ThreadPoolExecutor(8) as pool:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        asked = [pool.submit(client.images.generate, prompt=f"p{i}") for i in range(3)]
        until(lambda: served.image_turns.n_inside == 3)
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt="p3")
        assert caught.value.code == "queue_full" and caught.value.response.headers["retry-after"] == "5"
        talk: Any = [{"role": "user", "content": "Hi"}]
        assert client.chat.completions.create(model="tiny", messages=talk).choices[0].message.content == "Hi"
        slow.go.set()
        answers: list[Any] = [future.result() for future in asked]
        assert [a.data[0].revised_prompt for a in answers] == ["drawn p0", "drawn p1", "drawn p2"] and slow.most == 1
        with pytest.raises(openai.InternalServerError, match="the model is away") as failed:
            client.images.generate(prompt="away")
        assert failed.value.status_code == 503 and served.image_turns.n_inside == 0
    assert slow.closed


def test_a_client_that_goes_away_ends_its_picture(model: ChatModel) -> None:
    slow = Slow()
    served = service(model, slow)
    with running(served) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/images/generations", json={"prompt": "a"}, timeout=1.0)
        until(lambda: slow.cancelled == 1 and served.image_turns.n_inside == 0)


# -------------------------------------------------------------------- our client


def test_our_client_at_our_endpoint(client: OpenAI, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENGLM_IMAGE_API_KEY", "secret")
    backend = open_images(f"{client.base_url}?model=tiny-cogview")
    more: dict[str, Any] = {"n": 2, "size": (32, 48), "seed": 7, "steps": 2, "guidance": 2.0, "negative_prompt": "sea"}
    wanted = generate(open_images(str(folder)), **more)
    pictures = generate(backend, **more)
    assert [p.seed for p in pictures] == [7, 8] and pictures[0].model == "tiny-cogview"
    for one, other in zip(pictures, wanted, strict=True):
        assert Image.open(io.BytesIO(one.png)).tobytes() == Image.open(io.BytesIO(other.png)).tobytes()
    with pytest.raises(ValueError, match="answered 400: size: "):
        generate(backend, size=(33, 33))
    monkeypatch.setenv("OPENGLM_IMAGE_API_KEY", "wrong")
    with pytest.raises(ImageUnavailable, match="answered 401: this API key"):
        generate(open_images(str(client.base_url)))


def picture_bytes(form: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 10, 10)).save(data, form)
    return data.getvalue()


PNG64 = base64.b64encode(picture_bytes()).decode()


def endpoint(answer: Callable[[httpx.Request], httpx.Response], url: str = "http://images.test/v1", **more: Any) -> Any:
    backend = HttpImages(url, **more)
    backend._options["transport"] = httpx.MockTransport(answer)
    return backend


def test_links_and_other_makes_of_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if request.method == "GET":
            return httpx.Response(200, content=picture_bytes("JPEG"))
        if b"response_format" in request.content:  # as OpenAI's gpt-image models say it
            return httpx.Response(400, json={"error": {"message": "Unknown parameter: 'response_format'."}})
        links = ["/files/1.jpg", "https://93.184.216.34/2.jpg"]
        return httpx.Response(200, json={"data": [{"url": link, "revised_prompt": "a kite"} for link in links]})

    told: list[str] = []
    backend = endpoint(answer, "http://images.test/v1/images/generations?model=big", api_key="k")
    pictures = asyncio.run(backend.generate(ImageRequest("a red kite", 2), told.append))
    assert [(p.width, p.height, p.prompt, p.seed, p.model) for p in pictures] == [(8, 6, "a kite", None, "big")] * 2
    assert told == ["big draws"] and seen[0].headers["authorization"] == "Bearer k"
    assert b'"model":"big"' in seen[1].content.replace(b" ", b"") and b"seed" not in seen[1].content
    gets = [request for request in seen if request.method == "GET"]
    assert [str(r.url) for r in gets] == ["http://images.test/files/1.jpg", "https://93.184.216.34/2.jpg"]
    assert all(r.headers.get("authorization") != "Bearer k" for r in gets), "the key is for the endpoint alone"


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"url": "http://127.0.0.1/x.png"}, "private network"),
        ({"url": "http://169.254.169.254/latest/meta-data"}, "private network"),
        ({"url": "http://[::1]/x.png"}, "private network"),
        ({"url": "http://no-such-host.invalid/x.png"}, "private network"),
        ({"url": "file:///etc/passwd"}, "none to the web"),
        ({"url": "/moved"}, "answered 302"),
        ({"url": "/large"}, "larger than"),
        ({"url": "/text"}, "no picture in PNG"),
        ({"b64_json": "?!"}, "no base64"),
        ({"b64_json": base64.b64encode(b"GIF89a").decode()}, "no picture"),
        ({}, "neither b64_json nor url"),
        ("a picture", "neither b64_json nor url"),
    ],
)  # fmt: skip
def test_an_endpoint_that_sends_no_picture(entry: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_http, "MAX_PICTURE_BYTES", 3000)
    pages = {
        "/moved": httpx.Response(302, headers={"location": "http://127.0.0.1/"}),
        "/large": httpx.Response(200, content=b"x" * 5000), "/text": httpx.Response(200, content=b"<html>"),
    }  # fmt: skip

    def answer(request: httpx.Request) -> httpx.Response:
        found = httpx.Response(200, json={"data": [entry]})
        return found if request.method == "POST" else pages[request.url.path]

    with pytest.raises(ImageUnavailable, match=text):
        generate(endpoint(answer))


@pytest.mark.parametrize(
    ("response", "text"),
    [
        (httpx.Response(200, text="hello"), "does not speak"),
        (httpx.Response(200, json=[]), "does not speak"),
        (httpx.Response(200, json={"data": []}), "sent no pictures"),
        (httpx.Response(500, text="<h1>no</h1>"), "answered 500: no reason"),
        (httpx.Response(429, json={"error": {"message": "slow\ndown"}}), "answered 429: slow down"),
        (httpx.Response(422, json={"detail": "n is too large"}), "answered 422: n is too large"),
        (httpx.Response(200, content=b" " * (8 << 20)), "larger than"),
    ],
)  # fmt: skip
def test_an_endpoint_that_fails(response: httpx.Response, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_http, "MAX_PICTURE_BYTES", 1 << 20)
    with pytest.raises(ValueError, match=text):
        generate(endpoint(lambda request: response))


def test_an_endpoint_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageUnavailable, match="cannot be reached"):
        generate(HttpImages("http://127.0.0.1:1/v1"))

    def late(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("late")

    with pytest.raises(ImageUnavailable, match="in time"):
        generate(endpoint(late))
    for url in ("http://", "ftp://host/"):
        with pytest.raises(ImageUnavailable, match="no address"):
            HttpImages(url)


def test_keys_go_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENGLM_IMAGE_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "of-openai")
    assert HttpImages("https://api.openai.com/v1")._headers == {"Authorization": "Bearer of-openai"}
    assert HttpImages("https://elsewhere.test/v1")._headers == {}
    assert HttpImages("https://elsewhere.test/v1", api_key="k")._headers == {"Authorization": "Bearer k"}


def test_a_cancelled_request_closes_its_connection() -> None:
    ended = threading.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            pass
        ended.set()
        writer.close()

    async def go() -> None:
        server = await asyncio.start_server(hold, "127.0.0.1", 0)
        told: list[str] = []
        backend = HttpImages(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        task = asyncio.ensure_future(backend.generate(ImageRequest("a"), told.append))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        end = time.monotonic() + 30
        while not ended.is_set():
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        server.close()

    asyncio.run(go())
    assert ended.is_set()
