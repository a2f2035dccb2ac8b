"""OpenAPI documents as tools: against a FastAPI application on loopback, and documents written by hand.

python -m pytest tests/test_functions_openapi.py
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import pytest
import uvicorn
import yaml
from fastapi import Body, Cookie, FastAPI, Form, Header, HTTPException, Query, Request, Response, Security, UploadFile
from fastapi.responses import PlainTextResponse, RedirectResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import BaseModel, Field

from openglm.agent.tools.load import load_tools
from openglm.types import Observation, Tool, ToolContext

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 8
BEARER, X_KEY = HTTPBearer(), APIKeyHeader(name="X-Key")


class Owner(BaseModel):
    name: str
    friends: list[Owner] = []


class Pet(BaseModel):
    name: str = Field(description="what it is called")
    age: int = Field(ge=0)
    owner: Owner | None = None


def application() -> FastAPI:
    app = FastAPI()

    @app.get("/pets/{name}", operation_id="get_pet", summary="Finds a pet.", description="By its name.")
    def get_pet(name: str, tags: Annotated[list[str] | None, Query()] = None, limit: int = 3, deep: bool = False,
                x_trace: Annotated[str | None, Header()] = None,
                session: Annotated[str | None, Cookie()] = None) -> dict[str, Any]:  # fmt: skip
        if name == "nobody":
            raise HTTPException(404, "no such pet")
        return {"name": name, "tags": tags, "limit": limit, "deep": deep, "trace": x_trace, "session": session}

    @app.post("/pets/{name}", operation_id="add_pet")
    def add_pet(name: str, pet: Pet, dry: bool = False) -> dict[str, Any]:
        return {"path": name, "body": pet.model_dump(), "dry": dry}

    @app.post("/sum", operation_id="add_up")
    def add_up(numbers: Annotated[list[int], Body()]) -> int:
        return sum(numbers)

    @app.post("/form", operation_id="send_form")
    def send_form(a: Annotated[str, Form()], b: Annotated[int, Form()]) -> str:
        return f"{a} {b}"

    @app.post("/upload", operation_id="upload")
    def upload(title: Annotated[str, Form()], pages: Annotated[list[int], Form()], notes: UploadFile,
               more: list[UploadFile]) -> dict[str, Any]:  # fmt: skip
        files = [(f.filename, f.content_type, f.file.read().decode()) for f in (notes, *more)]
        return {"title": title, "pages": pages, "files": files}

    @app.get("/secret", operation_id="secret")
    def secret(token: Annotated[Any, Security(BEARER)]) -> str:
        return f"token {token.credentials}"

    @app.get("/keyed", operation_id="keyed")
    def keyed(key: Annotated[str, Security(X_KEY)]) -> str:
        return f"key {key}"

    @app.get("/text", operation_id="long_text", response_class=PlainTextResponse)
    def long_text(n: int) -> str:
        return "字" * n

    @app.get("/picture", operation_id="picture")
    def picture() -> Response:
        return Response(PNG, media_type="image/png")

    @app.delete("/pets/{name}", operation_id="remove_pet", status_code=204)
    def remove_pet(name: str) -> None:
        return None

    @app.get("/slow", operation_id="slow")
    async def slow() -> None:
        await asyncio.sleep(30)

    @app.get("/broken", operation_id="broken")
    def broken() -> None:
        raise HTTPException(503, "out\nof order")

    @app.get("/moved", operation_id="moved")
    def moved(to: str) -> RedirectResponse:
        return RedirectResponse(to)

    @app.get("/headers", operation_id="headers")
    def headers(request: Request) -> dict[str, str]:
        return dict(request.headers)

    return app


def serve(app: FastAPI) -> tuple[uvicorn.Server, threading.Thread, str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    return server, thread, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server, thread, url = serve(application())
    yield url
    server.should_exit = server.force_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def tools(url: str) -> dict[str, Tool]:
    return {tool.spec.name: tool for tool in load_tools(f"{url}/openapi.json")}


def call(tool: Tool, timeout_s: float | None = None, /, **arguments: Any) -> Observation:
    return asyncio.run(tool.call(arguments, ToolContext(timeout_s=timeout_s)))


def test_each_operation_is_a_tool_with_one_schema(tools: dict[str, Tool]) -> None:
    assert len(tools) == 14
    for tool in tools.values():
        jsonschema.Draft202012Validator.check_schema(tool.spec.parameters)
        assert "#/components" not in json.dumps(tool.spec.parameters)
    spec = tools["get_pet"].spec
    assert spec.description == "Finds a pet.\nBy its name." and spec.parameters["required"] == ["name"]
    assert list(spec.parameters["properties"]) == ["name", "tags", "limit", "deep", "x-trace", "session"]
    spec = tools["add_pet"].spec
    assert list(spec.parameters["properties"]) == ["name", "dry", "name_body", "age", "owner"]
    assert spec.parameters["required"] == ["name", "name_body", "age"]
    assert spec.parameters["properties"]["age"] == {"type": "integer", "minimum": 0}
    assert tools["upload"].spec.parameters["properties"]["notes"]["description"] == "(the text in the file)"


def test_arguments_reach_their_places(tools: dict[str, Tool]) -> None:
    found = call(tools["get_pet"], name="a/b c?", tags=["x", "y&z"], deep=True, **{"x-trace": "t"}, session="s 1")
    expected = {"name": "a/b c?", "tags": ["x", "y&z"], "limit": 3, "deep": True, "trace": "t", "session": "s%201"}
    # The application's router splits at the slash that its server decoded: such a name is another path there.
    assert found.error
    found = call(tools["get_pet"], name="b c?", tags=["x", "y&z"], deep=True, **{"x-trace": "t"}, session="s 1")
    assert json.loads(found.content) == expected | {"name": "b c?"} and found.data is not None
    assert found.data["status"] == 200 and found.data["json"]["tags"] == ["x", "y&z"]
    owner = {"name": "Li", "friends": [{"name": "Wu", "friends": []}]}
    found = call(tools["add_pet"], name="p", name_body="Tom", age=3, owner=owner, dry=True)
    assert json.loads(found.content) == {"path": "p", "body": {"name": "Tom", "age": 3, "owner": owner}, "dry": True}
    assert call(tools["add_up"], body=[1, 2, 3]).content == "6"
    assert call(tools["send_form"], a="x y", b=2).content == '"x y 2"'
    answer = call(tools["upload"], title="标题", pages=[1, 2], notes="a\nb", more=["c", "d"])
    kind = "application/octet-stream"
    assert answer.data is not None and answer.data["json"] == {
        "title": "标题", "pages": [1, 2],
        "files": [["notes.txt", kind, "a\nb"], ["more.txt", kind, "c"], ["more.txt", kind, "d"]],
    }  # fmt: skip
    assert call(tools["remove_pet"], name="p").content == "(done: HTTP 204)"


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("get_pet", {}, "'name' is missing (a text)"),
        ("get_pet", {"name": ".."}, "'name' is a part of the URL: it cannot be '..'"),
        ("get_pet", {"name": "a", "x-trace": "a\r\nX: b"}, "'x-trace' goes into the header"),
        ("add_pet", {"name": "p", "name_body": "T", "age": -1}, "'age' must be at least 0, not -1"),
        ("add_pet", {"name": "p", "name_body": "T", "agee": 1}, "there is no argument 'agee' (did you mean 'age'?)"),
    ],
)
def test_wrong_arguments_are_not_sent(tools: dict[str, Tool], name: str, arguments: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call(tools[name], **arguments)
    assert words in str(caught.value)


def test_what_goes_wrong_is_an_error(tools: dict[str, Tool], url: str) -> None:
    found = call(tools["get_pet"], name="nobody")
    assert (
        found.error
        and found.content == 'HTTP 404 Not Found: {"detail":"no such pet"}'
        and found.data == {"status": 404}
    )
    found = call(tools["broken"])
    assert found.error and found.content.startswith("HTTP 503 Service Unavailable: ")
    found = call(tools["slow"], 0.2)
    assert found.error and "did not answer within 0.2 s" in found.content
    server, thread, other = serve(application())
    gone = {tool.spec.name: tool for tool in load_tools(f"{other}/openapi.json")}["get_pet"]
    server.should_exit = True
    thread.join(10)
    found = call(gone, name="x")
    assert found.error and found.content.startswith("The request to 127.0.0.1:") and "failed: " in found.content
    with pytest.raises(ValueError, match="cannot be read"):
        load_tools(f"{other}/openapi.json")
    with pytest.raises(ValueError, match="cannot be read: HTTP 404"):
        load_tools(f"{url}/none.json")


def test_only_the_named_host_is_contacted(tools: dict[str, Tool], url: str) -> None:
    assert call(tools["moved"], to="/pets/Tom").content.startswith('{"name": "Tom"')
    other_server, thread, other = serve(application())
    for target in (f"{other}/pets/Tom", f"http://localhost:{url.rpartition(':')[2]}/pets/Tom", "ftp://127.0.0.1/x"):
        found = call(tools["moved"], to=target)
        assert found.error and "redirects to another host" in found.content, target
    found = call(tools["moved"], to="/moved?to=/moved")
    assert found.error
    other_server.should_exit = True
    thread.join(10)


def test_long_answers_are_cut_and_pictures_are_files(tools: dict[str, Tool]) -> None:
    assert call(tools["long_text"], n=5).content == "字" * 5
    found = call(tools["long_text"], n=50_000)
    assert found.content.startswith("字" * 20_000 + "\n[cut: the answer has 50000 characters]")
    found = call(tools["long_text"], n=2 << 20)
    assert "more than" in found.content[-60:] and len(found.content) < 21_000
    found = call(tools["picture"])
    assert found.files[0].read() == PNG and found.files[0].name == "picture.png" and "image/png" in found.content


def test_keys_come_from_the_named_variable(tools: dict[str, Tool], url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(tools["secret"]).error and call(tools["keyed"]).error
    with pytest.raises(ValueError, match="the environment variable PETS_KEY is not set"):
        load_tools(f"{url}/openapi.json#key=PETS_KEY")
    monkeypatch.setenv("PETS_KEY", "geheim")
    keyed = {tool.spec.name: tool for tool in load_tools(f"{url}/openapi.json#key=PETS_KEY")}
    assert call(keyed["secret"]).content == '"token geheim"' and call(keyed["keyed"]).content == '"key geheim"'
    assert "geheim" not in call(keyed["headers"]).content, "an operation that asks for none is sent none"
    assert "geheim" not in str(keyed["secret"].spec)


def test_some_operations_and_another_server(url: str, tmp_path: Path) -> None:
    assert [tool.spec.name for tool in load_tools(f"{url}/openapi.json#only=add_up,get_pet")] == ["get_pet", "add_up"]
    with pytest.raises(ValueError, match=r"no operation 'get_pett' \(did you mean 'get_pet'\?\)"):
        load_tools(f"{url}/openapi.json#only=get_pett")
    with pytest.raises(ValueError, match="no setting 'base' after #"):
        load_tools(f"{url}/openapi.json#base=x")
    path = tmp_path / "api.yaml"
    path.write_text(yaml.safe_dump(application().openapi()))
    with pytest.raises(ValueError, match="names no server .* add #server="):
        load_tools(path)
    assert call(load_tools(f"{path}#server={url}&only=add_up")[0], body=[4, 5]).content == "9"


HAND = {
    "openapi": "3.0.3",
    "info": {"title": "t", "version": "1"},
    "servers": [{"url": "http://{host}/v1", "variables": {"host": {"default": "127.0.0.1:9"}}}],
    "paths": {
        "/a/{id}": {
            "parameters": [{"$ref": "#/components/parameters/Id"}],
            "get": {
                "parameters": [
                    {"name": "filter", "in": "query", "style": "deepObject", "schema": {"type": "object"}},
                    {"name": "ids", "in": "query", "explode": False, "schema": {"type": "array", "items": {}}},
                    {"name": "where", "in": "query", "content": {"application/json": {"schema": {"type": "object"}}}},
                    {"name": "Authorization", "in": "header", "schema": {"type": "string"}},
                ]
            },
            "put": {"requestBody": {"required": True, "content": {"image/png": {}}}},
            "post": {
                "operationId": "a.create!",
                "requestBody": {"content": {"application/vnd.x+json": {"schema": {"$ref": "#/components/schemas/B"}}}},
            },
        }
    },
    "components": {
        "parameters": {"Id": {"name": "id", "in": "path", "required": True, "schema": {"type": "integer"}}},
        "schemas": {
            "A": {
                "type": "object",
                "required": ["id", "n"],
                "properties": {
                    "id": {"type": "string", "readOnly": True},
                    "n": {"type": "number", "minimum": 0, "exclusiveMinimum": True, "nullable": True, "example": 3},
                    "title": {"type": "string", "enum": ["a"], "nullable": True, "title": "A title"},
                },
            },
            "B": {"allOf": [{"$ref": "#/components/schemas/A"}, {"properties": {"m": {}}, "required": ["m"]}]},
        },
    },
}


def test_a_document_of_version_3_0(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "api.json"
    path.write_text(json.dumps(HAND))
    with caplog.at_level(logging.WARNING):
        found = {tool.spec.name: tool for tool in load_tools(path)}
    assert "PUT /a/{id} is left out: its body is image/png" in caplog.text
    assert set(found) == {"get_a_id", "a_create"}
    assert found["get_a_id"].spec.description == "GET /a/{id}"
    assert list(found["get_a_id"].spec.parameters["properties"]) == ["id", "filter", "ids", "where"]
    assert found["a_create"].spec.parameters["properties"] == {
        "id": {"type": "integer"},
        "n": {"type": ["number", "null"], "exclusiveMinimum": 0},
        "title": {"type": ["string", "null"], "enum": ["a", None]},
        "m": {},
    }
    assert found["a_create"].spec.parameters["required"] == ["id"], "the body may be left out"


def test_styles_of_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app, seen = FastAPI(), []

    @app.get("/v1/a/{id}")
    def a(id: str, request: Request) -> None:
        seen.append(str(request.url.query))

    server, thread, url = serve(app)
    path = tmp_path / "api.json"
    path.write_text(json.dumps(HAND))
    tool = load_tools(f"{path}#server={url}/v1&only=get_a_id")[0]
    assert not call(tool, id=1, filter={"x": 1, "y": True}, ids=[1, "b"], where={"z": [1]}).error
    assert seen == ["filter%5Bx%5D=1&filter%5By%5D=true&ids=1%2Cb&where=%7B%22z%22%3A+%5B1%5D%7D"] or seen == [
        "filter%5Bx%5D=1&filter%5By%5D=true&ids=1%2Cb&where=%7B%22z%22%3A%20%5B1%5D%7D"
    ]
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"swagger": "2.0"}, "is Swagger 2: version 3 is needed"),
        ([], "is no OpenAPI document"),
        (HAND | {"paths": {}}, "has no operation that can be called"),
        (HAND | {"paths": {"/": {"get": {"parameters": [{"$ref": "#/nowhere"}]}}}}, "#/nowhere leads nowhere"),
        (HAND | {"paths": {"/": {"get": {"parameters": [{"$ref": "http://x/y"}]}}}}, "leads out of the document"),
    ],
)
def test_documents_that_cannot_serve(tmp_path: Path, document: Any, words: str) -> None:
    path = tmp_path / "api.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=words) as caught:
        load_tools(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
