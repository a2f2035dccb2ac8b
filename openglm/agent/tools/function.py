"""Functions of users as tools: type hints and docstring become the schema, pydantic checks and converts the arguments.

    from openglm.agent.tools.function import tool

    @tool
    def weather(city: str, days: int = 1) -> str:
        '''Forecasts the weather.

        Args:
            city: name of a city, in English
            days: how many days, today included
        '''

A decorated function is still called like a function.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import functools
import inspect
import json
import linecache
import re
import threading
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, overload

from openglm.agent.schema import inline, place, schema_error
from openglm.agent.tools.result import as_observation
from openglm.types import Observation, ToolContext, ToolSpec

__all__ = ["FunctionTool", "tool"]

TIMEOUT_S = 60.0
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Argument:
    """One argument of the function. field: of the pydantic model; empty for the context, which models do not give."""

    name: str
    field: str
    positional: bool


class FunctionTool:
    """A Tool that calls `function`, sync (in a thread) or async. ValueError for one that cannot be a tool.

    name, description: in place of the function's own. timeout_s: longest time of a call; that of the context counts
    where it is shorter.
    """

    def __init__(
        self, function: Callable[..., Any], *, name: str | None = None, description: str | None = None,
        timeout_s: float | None = None,
    ) -> None:  # fmt: skip
        if not callable(function):
            raise ValueError(f"a tool is made of a function, not of {type(function).__name__}")
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, not {timeout_s}")
        self.function, self.timeout_s = function, timeout_s
        own = getattr(function, "__name__", type(function).__name__)
        self.source = f"{own} in {_file(function)}"
        name = name or own
        if not NAME.fullmatch(name):
            raise ValueError(f"{self.source}: {name!r} is no name of a tool (letters, digits, _ and -, at most 64)")
        text, about = _docstring(function)
        description = description or text
        if not description:
            raise ValueError(f"{self.source} has no docstring: its first line tells the model what it does")
        self._arguments, self._model = _model(function, self.source, about)
        self.spec = ToolSpec(name, description, _schema(self._model, self.source))
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> Observation:
        """ValueError for arguments that do not fit, saying which. What the function raises is an Observation."""
        args, kwargs = self._bound(arguments, context)
        limit = min((t for t in (self.timeout_s, context.timeout_s) if t is not None), default=TIMEOUT_S)
        clock = asyncio.timeout(limit)
        try:
            async with clock:
                if inspect.iscoroutinefunction(inspect.unwrap(self.function)):
                    value = await self.function(*args, **kwargs)
                else:
                    value = await in_thread(functools.partial(self.function, *args, **kwargs))
                    value = await value if inspect.isawaitable(value) else value
            return await asyncio.to_thread(as_observation, value, self.spec.name)
        except TimeoutError as error:
            if not clock.expired():
                return self._failed(error)
            return Observation(f"{self.spec.name} took more than {limit:g} s and was stopped.", error=True)
        except (Exception, SystemExit) as error:
            return self._failed(error)

    def _bound(self, arguments: Mapping[str, Any], context: ToolContext) -> tuple[list[Any], dict[str, Any]]:
        from pydantic import ValidationError

        try:
            values = self._model.model_validate_json(json.dumps(arguments))
        except ValidationError as error:
            raise ValueError(self._words(error, arguments)) from None
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for argument in self._arguments:
            value = getattr(values, argument.field) if argument.field else context
            if argument.positional:
                args.append(value)
            else:
                kwargs[argument.name] = value
        return args, kwargs

    def _words(self, error: Any, arguments: Mapping[str, Any]) -> str:
        """What is wrong, in the words of the schema; in pydantic's where the schema cannot say it (no such day)."""
        wrong = {e["loc"][0] for e in error.errors() if e["loc"]}
        parameters = self.spec.parameters
        required = [name for name in parameters.get("required", ()) if name in wrong]
        spec = ToolSpec(self.spec.name, "", {**parameters, "required": required})
        found = schema_error(spec, {name: value for name, value in arguments.items() if name in wrong})
        return found or "; ".join(f"'{place(e['loc'])}': {e['msg']}" for e in error.errors()[:3])

    def _failed(self, error: BaseException) -> Observation:
        """Its kind and message, and the last line of the user's own file."""
        message = " ".join(str(error).split())[:500]
        file, place = _file(self.function), ""
        frame = error.__traceback__
        while frame is not None:
            if frame.tb_frame.f_code.co_filename == file:
                line = linecache.getline(file, frame.tb_lineno).strip()
                place = f" (line {frame.tb_lineno} of {Path(file).name}: {line[:200]})"
            frame = frame.tb_next
        kind = f"{type(error).__name__}: {message}" if message else type(error).__name__
        return Observation(f"{self.spec.name} failed: {kind}{place}", error=True)


@overload
def tool(function: Callable[..., Any], /) -> FunctionTool: ...
@overload
def tool(
    *, name: str | None = None, description: str | None = None, timeout_s: float | None = None
) -> Callable[[Callable[..., Any]], FunctionTool]: ...
def tool(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Decorator: @tool, or @tool(name=..., description=..., timeout_s=...)."""
    if function is None:
        return lambda function: FunctionTool(function, **options)
    return FunctionTool(function)


# -------------------------------------------------------------------- from a signature to a model


def _file(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    return code.co_filename if code is not None else getattr(function, "__module__", "?")


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """(description, argument -> what it is). Google's, numpy's and reST's ways of writing are told apart."""
    try:
        from docstring_parser import parse
    except ModuleNotFoundError:
        raise ValueError("functions as tools need docstring_parser: pip install 'openglm[agent]'") from None
    parsed = parse(inspect.getdoc(function) or "")
    text = "\n".join(filter(None, (parsed.short_description, parsed.long_description)))
    about = {name: " ".join((p.description or "").split()) for p in parsed.params for name in p.arg_name.split(", ")}
    return text, about


def _model(function: Callable[..., Any], source: str, about: Mapping[str, str]) -> tuple[list[Argument], Any]:
    """The arguments in order, and a pydantic model that checks them. Its fields have names of our own, since not every
    name of an argument may be one of a field.
    """
    from pydantic import ConfigDict, Field, create_model

    arguments: list[Argument] = []
    fields: dict[str, Any] = {}
    hints = _hints(function, source)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ValueError(f"{source} yields: let it return one value")
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            star = "*" if parameter.kind == parameter.VAR_POSITIONAL else "**"
            raise ValueError(f"{source}: {star}{name} has no names that a model could be told; use named arguments")
        if name not in hints:
            raise ValueError(f"{source}: the argument {name!r} has no type hint, such as {name}: str")
        positional = parameter.kind == parameter.POSITIONAL_ONLY
        hint, default = hints[name], parameter.default
        if _is_context(hint):
            arguments.append(Argument(name, "", positional))
            continue
        if default is None and not _takes_none(hint):
            hint = hint | None if not isinstance(hint, str) else hint
        told: dict[str, Any] = {"alias": name, "validation_alias": name, "serialization_alias": name}
        if about.get(name) and not _has_description(hint, default):
            told["description"] = about[name]
        field = f"argument_{len(fields)}"
        fields[field] = (Annotated[hint, Field(**told)], ... if default is parameter.empty else default)
        arguments.append(Argument(name, field, positional))
    try:
        config = ConfigDict(extra="forbid", protected_namespaces=())
        return arguments, create_model("Arguments", __config__=config, **fields)
    except Exception as error:  # pydantic has no common class for types that it does not know
        raise ValueError(f"{source}: {_first_line(error)}") from None


def _hints(function: Callable[..., Any], source: str) -> dict[str, Any]:
    target = function if inspect.isroutine(function) else getattr(function, "func", type(function).__call__)
    try:
        return typing.get_type_hints(target, include_extras=True)
    except (NameError, TypeError, SyntaxError) as error:
        raise ValueError(f"{source}: its type hints cannot be read ({_first_line(error)})") from None


def _is_context(hint: Any) -> bool:
    return hint is ToolContext or ToolContext in typing.get_args(hint)


def _takes_none(hint: Any) -> bool:
    if typing.get_origin(hint) is Annotated:
        return _takes_none(typing.get_args(hint)[0])
    return hint in (Any, None, NoneType) or NoneType in typing.get_args(hint)


def _has_description(hint: Any, default: Any) -> bool:
    notes = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    return any(getattr(note, "description", None) for note in (*notes, default))


def _schema(model: Any, source: str) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of defaults that are no JSON: they are left out of the schema
            schema = model.model_json_schema(by_alias=True)
    except Exception as error:
        raise ValueError(f"{source}: {_first_line(error)}") from None
    plain = _untitled(inline(schema, schema))
    return {"type": "object", "properties": {}} | plain


def _untitled(schema: Any, names: bool = False) -> Any:
    """Without pydantic's titles, which repeat the names. names: the keys of this object are names, not keywords."""
    if isinstance(schema, list):
        return [_untitled(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: _untitled(value, key in ("properties", "$defs") and not names) if key not in ("default", "enum") else value
        for key, value in schema.items()
        if names or key != "title" or not isinstance(value, str)
    }


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


# -------------------------------------------------------------------- threads


class Stopped(BaseException):
    """Raised inside a function whose time is over."""


async def in_thread(function: Callable[[], Any]) -> Any:
    """Its result, from a thread of its own that keeps no program alive. A cancelled one is told to stop, which ends
    Python code at its next step; a call that waits outside Python ends when it returns, and nobody waits for it.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = context.run(function)
        except BaseException as raised:
            error = RuntimeError("it was stopped") if isinstance(raised, Stopped | StopIteration) else raised
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            pass  # the loop is closed: nobody waits

    context = contextvars.copy_context()
    thread = threading.Thread(target=work, name="function-tool", daemon=True)
    thread.start()
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if thread.is_alive() and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Stopped))
            await asyncio.wait([future], timeout=0.5)
        raise
