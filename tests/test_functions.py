"""Functions of users as tools: the schema that is made of them, calls and errors.

python -m pytest tests/test_functions.py
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import json
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import jsonschema
import pytest
from pydantic import BaseModel, Field

from openglm.agent.schema import schema_error
from openglm.agent.tools.function import FunctionTool, tool
from openglm.types import Observation, Tool, ToolContext


class Unit(enum.Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


class Place(BaseModel):
    x: float
    title: str = "none"


class Node(BaseModel):
    value: int
    below: list[Node] = []


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
