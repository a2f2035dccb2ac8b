"""Functions of users as tools: the schema that is made of them, calls, results, errors, and files of them.

python -m pytest tests/test_functions.py
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import jsonschema
import numpy as np
import pytest
from pydantic import BaseModel, Field

from openglm.agent.schema import schema_error
from openglm.agent.toolbox import Toolbox, ToolboxConfig
from openglm.agent.tools.function import FunctionTool, tool
from openglm.agent.tools.load import load_tools
from openglm.types import Observation, Tool, ToolContext, ToolFile


class Unit(enum.Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


class Place(BaseModel):
    x: float
    title: str = "none"


class Node(BaseModel):
    value: int
    below: list[Node] = []


@dataclass
class Point:
    x: int
    when: date


def call(function: Tool, known: ToolContext | None = None, /, **arguments: Any) -> Observation:
    return asyncio.run(function.call(arguments, known or ToolContext()))


@tool
def weather(
    city: str,
    days: Annotated[int, Field(ge=1, le=14)] = 1,
    unit: Unit = Unit.CELSIUS,
    when: datetime | None = None,
    near: list[Place] | None = None,
    tree: Node | None = None,
    mode: Literal["short", "long"] = "short",
    note: Optional[str] = None,  # noqa: UP045
    schema: int = 3,
    _hidden: bool = False,
    model_x: int = None,  # type: ignore[assignment]
    *,
    context: ToolContext,
) -> dict[str, Any]:
    """Forecasts the weather.

    It knows large cities only.

    Args:
        city: name of a city,
            in English
        days: today included
    """
    return {"city": city, "days": days, "unit": unit, "when": when, "near": near, "tree": tree, "schema": schema,
            "hidden": _hidden, "conversation": context.conversation,
            "types": [type(unit).__name__, type(when).__name__]}  # fmt: skip


# -------------------------------------------------------------------- schema


def test_the_schema_says_what_hints_and_docstring_say() -> None:
    spec = weather.spec
    assert spec.name == "weather" and not spec.builtin
    assert spec.description == "Forecasts the weather.\nIt knows large cities only."
    jsonschema.Draft202012Validator.check_schema(spec.parameters)
    properties = spec.parameters["properties"]
    assert list(properties) == ["city", "days", "unit", "when", "near", "tree", "mode", "note", "schema", "_hidden",
                                "model_x"]  # fmt: skip
    assert spec.parameters["required"] == ["city"] and spec.parameters["additionalProperties"] is False
    assert properties["city"] == {"type": "string", "description": "name of a city, in English"}
    assert properties["days"] == {
        "type": "integer", "minimum": 1, "maximum": 14, "default": 1, "description": "today included",
    }  # fmt: skip
    assert properties["unit"] == {"type": "string", "enum": ["celsius", "kelvin"], "default": "celsius"}
    assert properties["when"]["anyOf"][0] == {"type": "string", "format": "date-time"}
    assert properties["near"]["anyOf"][0]["items"]["properties"] == {
        "x": {"type": "number"}, "title": {"type": "string", "default": "none"},
    }  # fmt: skip
    assert properties["mode"] == {"type": "string", "enum": ["short", "long"], "default": "short"}
    assert properties["model_x"]["anyOf"] == [{"type": "integer"}, {"type": "null"}]
    assert "Node" in spec.parameters["$defs"], "what refers to itself stays a reference"
    assert schema_error(spec, {"city": "x", "tree": {"value": 1, "below": [{"value": "a"}]}}) is not None


def google(a: int, b: str = "x") -> str:
    """Does it.

    Args:
        a (int): the first
        b: the second

    Returns:
        a text
    """
    return b * a


def numpy_style(a: int, b: str = "x") -> str:
    """Does it.

    Parameters
    ----------
    a : int
        the first
    b : str, optional
        the second
    """
    return b * a


def rest(a: int, b: str = "x") -> str:
    """Does it.

    :param a: the first
    :param b: the second
    :returns: a text
    """
    return b * a


@pytest.mark.parametrize("function", [google, numpy_style, rest])
def test_three_ways_to_write_docstrings(function: Callable[..., str]) -> None:
    spec = FunctionTool(function).spec
    assert spec.description == "Does it."
    assert {n: p["description"] for n, p in spec.parameters["properties"].items()} == {
        "a": "the first",
        "b": "the second",
    }


def test_the_description_of_a_field_goes_before_that_of_the_docstring() -> None:
    def function(
        a: Annotated[int, Field(description="of the field")], b: int = Field(2, description="b", le=9)
    ) -> None:
        """Does it.

        Args:
            a: of the docstring
            b: of the docstring
        """

    properties = FunctionTool(function).spec.parameters["properties"]
    assert properties["a"]["description"] == "of the field"
    assert properties["b"] == {"type": "integer", "default": 2, "maximum": 9, "description": "b"}


def star(*numbers: int) -> None:
    """Adds."""


def keywords(**settings: int) -> None:
    """Sets."""


def bare(city) -> None:  # type: ignore[no-untyped-def]
    """Looks."""


def silent(city: str) -> None:
    pass


def odd(city: threading.Lock) -> None:
    """Locks."""


def unknown(city: "Nowhere") -> None:  # type: ignore[name-defined]  # noqa: F821, UP037
    """Looks."""


def yields(n: int) -> Any:
    """Counts."""
    yield n


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (star, r"star in .*: \*numbers has no names"),
        (keywords, r"keywords in .*: \*\*settings has no names"),
        (bare, "bare in .*: the argument 'city' has no type hint, such as city: str"),
        (silent, "silent in .* has no docstring"),
        (odd, "odd in .*"),
        (unknown, "unknown in .*: its type hints cannot be read .*Nowhere"),
        (yields, "yields in .* yields: let it return one value"),
        (3, "a tool is made of a function, not of int"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_with_the_reason(function: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        FunctionTool(function)
    assert "\n" not in str(caught.value)


def test_names_and_descriptions_of_one_s_own() -> None:
    @tool(name="sum-up", description="Adds two numbers.")
    def add(a: int, b: int) -> int:
        return a + b

    assert (add.spec.name, add.spec.description) == ("sum-up", "Adds two numbers.") and add(1, 2) == 3
    with pytest.raises(ValueError, match="'a b' is no name of a tool"):
        FunctionTool(google, name="a b")
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        FunctionTool(google, timeout_s=0)


# -------------------------------------------------------------------- calls


def test_arguments_are_converted() -> None:
    near = [{"x": 1}]
    found = call(weather, ToolContext("talk"), city="Rome", unit="kelvin", when="2026-05-06T07:08:09", near=near,
                 _hidden=True, schema=4, tree={"value": 1, "below": [{"value": 2}]})  # fmt: skip
    assert not found.error and found.data is not None and json.loads(found.content) == found.data
    assert found.data == {
        "city": "Rome", "days": 1, "unit": "kelvin", "when": "2026-05-06T07:08:09",
        "near": [{"x": 1.0, "title": "none"}], "tree": {"value": 1, "below": [{"value": 2, "below": []}]}, "schema": 4,
        "hidden": True, "conversation": "talk",
        "types": ["Unit", "datetime"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "'city' is missing (a text: name of a city, in English)"),
        ({"city": "Rome", "context": {}}, "there is no argument 'context'"),
        ({"city": "Rome", "days": 15}, "'days' must be at most 14, not 15"),
        ({"city": "Rome", "unit": "C"}, '\'unit\' must be "celsius" or "kelvin", not "C"'),
        ({"city": "Rome", "when": "2026-13-01T00:00:00"}, "'when"),
        ({"city": "Rome", "days": "3", "near": [{}]}, "'near[0].x' is missing (a number)"),
    ],
)
def test_wrong_arguments_name_the_field(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call(weather, **arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_positional_arguments_and_methods() -> None:
    class Counter:
        def __init__(self) -> None:
            self.n = 0

        def add(self, by: int, /, times: int = 1) -> int:
            """Counts on."""
            self.n += by * times
            return self.n

    counter = FunctionTool(Counter().add)
    assert call(counter, by=3, times=2).content == "6" and call(counter, by=1).content == "7"


def test_async_functions_run_in_the_loop_and_others_in_a_thread_with_their_context() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

    @tool
    async def one(x: int) -> str:
        """One."""
        await asyncio.sleep(0)
        return threading.current_thread().name

    @tool
    def two(x: int) -> str:
        """Two."""
        return f"{threading.current_thread().name} {variable.get()}"

    variable.set("seen")
    assert call(one, x=1).content == "MainThread" and call(two, x=1).content == "function-tool seen"


def test_a_call_that_takes_too_long_is_stopped() -> None:
    ended = threading.Event()

    @tool(timeout_s=0.1)
    def busy(n: int) -> None:
        """Counts."""
        try:
            while True:
                n += 1
        finally:
            ended.set()

    @tool
    async def sleepy(n: int) -> None:
        """Sleeps."""
        await asyncio.sleep(60)

    found = call(busy, n=0)
    assert found.error and found.content == "busy took more than 0.1 s and was stopped."
    assert ended.wait(10), "the thread goes on"
    found = call(sleepy, ToolContext(timeout_s=0.05), n=0)
    assert found.error and found.content == "sleepy took more than 0.05 s and was stopped."


def test_cancelling_stops_the_function() -> None:
    begun, ended = threading.Event(), threading.Event()

    @tool
    def busy(n: int) -> None:
        """Counts."""
        begun.set()
        try:
            while True:
                time.sleep(0.001)
        finally:
            ended.set()

    async def go() -> None:
        task = asyncio.ensure_future(busy.call({"n": 1}, ToolContext()))
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert ended.wait(10)


def helper(x: int) -> float:
    return json.loads(f"[{x}")


@pytest.mark.parametrize("is_async", [False, True])
def test_an_exception_is_a_short_error(is_async: bool) -> None:
    def fails(x: int) -> float:
        """Divides."""
        if x == 1:
            return helper(x)  # the last line of this file is in it
        if x == 2:
            raise SystemExit("left")
        if x == 3:
            raise TimeoutError
        return 1 / x

    async def waits(x: int) -> float:
        """Divides."""
        return fails(x)

    made = FunctionTool(waits if is_async else fails)
    name, file = made.spec.name, Path(__file__).name
    found = call(made, x=0)
    assert found.error and found.content.startswith(f"{name} failed: ZeroDivisionError: division by zero (line ")
    assert found.content.endswith(f"of {file}: return 1 / x)") and "Traceback" not in found.content
    assert call(made, x=1).content.endswith(f'of {file}: return json.loads(f"[{{x}}"))')
    assert "failed: SystemExit: left" in call(made, x=2).content
    assert "failed: TimeoutError (line" in call(made, x=3).content


# -------------------------------------------------------------------- results


def returning(value: Any) -> Observation:
    def function() -> Any:
        """Returns it."""
        return value

    return call(FunctionTool(function))


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("as it is\n", "as it is\n"), (None, "(done)"), (42, "42"), (True, "true"), (0.5, "0.5"),
        ([1, "二"], '[1,"二"]'), ({"a": None}, '{"a":null}'), (Place(x=1), '{"x":1.0,"title":"none"}'),
        (Point(1, date(2026, 5, 6)), '{"x":1,"when":"2026-05-06"}'), (Unit.KELVIN, "kelvin"),
        (date(2026, 5, 6), "2026-05-06"), (np.float32(0.5), "0.5"), (np.arange(3), "[0,1,2]"), ({1}, "[1]"),
        ({"a": np.int64(3)}, '{"a":3}'), (float("nan"), "NaN"), (Path("a/b"), "a/b"),
    ],
)  # fmt: skip
def test_values_become_text_and_data(value: Any, content: str) -> None:
    found = returning(value)
    assert found.content == content and not found.error and found.files == ()
    json.dumps(found.data, allow_nan=False)


def test_pictures_and_bytes_become_files() -> None:
    from matplotlib.figure import Figure
    from PIL import Image

    found = returning(Image.new("RGB", (4, 3)))
    assert found.content == "[function.png: picture of 4 x 3 pixels]" and found.files[0].mime == "image/png"
    assert Image.open(io.BytesIO(found.files[0].read())).size == (4, 3)
    figure = Figure(figsize=(1, 1))
    figure.subplots().set_title("Sales")
    found = returning(["Two plots:", figure, figure])
    assert found.content == "Two plots:\n[function-1.png: plot 'Sales']\n[function-2.png: plot 'Sales']"
    assert all(Image.open(io.BytesIO(file.read())).size == (100, 100) for file in found.files)
    found = returning(b"%PDF-1.4")
    assert (found.files[0].name, found.files[0].mime) == ("function.pdf", "application/pdf")
    assert returning(b"\0").files[0].mime == "application/octet-stream"
    file, whole = ToolFile("a.txt", "text/plain", b"x"), Observation("seen", data={"a": 1})
    assert returning(file).files == (file,) and returning(whole) is whole


# -------------------------------------------------------------------- files


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


ADD = """
def add(a: int, b: int) -> int:
    "Adds."
    return a + b
"""
DECORATED = "from openglm.agent.tools.function import tool\n"


def names(path: Path | str) -> list[str]:
    return [found.spec.name for found in load_tools(path)]


def test_what_of_a_file_counts(tmp_path: Path) -> None:
    write(tmp_path, plain=f"from json import dumps\n{ADD}\ndef _own(): ...\nclass C: ...\n", helpers="BY = 3",
          marked=f"{DECORATED}from plain import add\nfrom helpers import BY\n@tool\ndef by(a: int) -> int:\n  'B.'\n"
                 "  return a * BY\ndef other(): ...\n",
          listed=f"__all__ = ['minus']\n{ADD}\ndef minus(a: int) -> int:\n  'M.'\n  return -a\n")  # fmt: skip
    assert names(tmp_path / "plain.py") == ["add"] and names(str(tmp_path / "marked.py")) == ["by"]
    assert names(tmp_path / "listed.py") == ["minus"]
    assert call(load_tools(tmp_path / "marked.py")[0], a=2).content == "6"
    (tmp_path / "helpers.py").unlink()
    write(tmp_path, _hidden="1/0")
    assert names(tmp_path) == ["minus", "by", "add"], "a folder, in the order of its files"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(:", "tools.py, line 1: SyntaxError: invalid syntax"),
        ("x = 1\ny = 1 / 0", "tools.py, line 2: ZeroDivisionError: division by zero"),
        ("import nowhere_at_all", "tools.py, line 1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("raise SystemExit(3)", "tools.py, line 1: SystemExit: 3"),
        ("x = 1", "tools.py defines no function that could be a tool"),
        ("def f(x):\n  'Does.'", "f in {path}: the argument 'x' has no type hint"),
        (f"{DECORATED}@tool\ndef f(x):\n  'Does.'", "f in {path}: the argument 'x' has no type hint"),
    ],
)
def test_a_file_that_cannot_serve_is_named_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    write(tmp_path, tools=text)
    path = tmp_path / "tools.py"
    with pytest.raises(ValueError) as caught:
        load_tools(path)
    assert words.format(path=path) in str(caught.value) and "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_paths_that_hold_no_tools(tmp_path: Path) -> None:
    (tmp_path / "tools.txt").write_text("x")
    (tmp_path / "tools.json").write_text('[{"name": "f"}]')
    (tmp_path / "servers.json").write_text('{"mcpServers": {}}')
    (tmp_path / "broken.yaml").write_text("a: [")
    for name, words in {
        "none.py": "no file or folder", "": "holds no Python file", "tools.txt": "is no source of tools",
        "tools.json": "is no OpenAPI document", "servers.json": "give it with --mcp",
        "broken.yaml": "is neither JSON nor YAML",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words) as caught:
            load_tools(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_two_tools_of_one_name_are_refused_naming_both(tmp_path: Path) -> None:
    write(tmp_path, a=ADD, b=ADD)
    words = r"two tools are called 'add': add in .*a\.py, and add in .*b\.py; rename one"
    with pytest.raises(ValueError, match=words):
        load_tools(tmp_path)
    with pytest.raises(ValueError, match=words):
        Toolbox(ToolboxConfig(python=False, tools=(tmp_path / "a.py", tmp_path / "b.py")))
    box = Toolbox(ToolboxConfig(python=False, tools=(tmp_path / "a.py",)))
    assert [row.name for row in box.rows()] == ["add"] and call(box.tools[0], a=1, b=2).content == "3"
