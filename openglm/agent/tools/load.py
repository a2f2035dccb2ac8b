"""Tools that a user names: Python files, folders of them, and OpenAPI documents.

    python -m openglm.agent.tools.load tools.py       lists what it finds

Of a Python file the decorated functions count. Where none is decorated, those that it defines itself and whose names
begin with no underscore (where it has an `__all__`, those in it).
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

from openglm.agent.tools.function import FunctionTool
from openglm.types import Tool

__all__ = ["load_tools", "refuse_clashes"]

DOCUMENTS = (".json", ".yaml", ".yml")


def load_tools(path: str | Path) -> list[Tool]:
    """Tools of a .py file, of all of a folder, or of an OpenAPI document (file or URL), each with a `source` that says
    where it comes from. ValueError, in one line, naming file, function and cause.
    """
    is_url = str(path).startswith(("http://", "https://"))
    file = Path(str(path).partition("#")[0] if "#" in str(path) and not Path(path).exists() else path).expanduser()
    tools: list[Tool]
    if is_url or (file.suffix in DOCUMENTS and file.is_file()):
        from openglm.agent.tools.openapi import load_openapi

        tools = list(load_openapi(str(path)))
    elif file.is_dir():
        files = sorted(f for f in file.glob("*.py") if not f.name.startswith("_"))
        if not files:
            raise ValueError(f"{file} holds no Python file (.py) with functions to be tools")
        tools = [tool for f in files for tool in _of_module(f)]
    elif not file.exists():
        raise ValueError(f"no file or folder {file} to take tools from")
    elif file.suffix == ".py":
        tools = _of_module(file)
    else:
        raise ValueError(f"{file} is no source of tools: give a .py file, a folder of them, or an OpenAPI document")
    refuse_clashes(tools)
    return tools


def refuse_clashes(tools: list[Tool]) -> None:
    """ValueError naming both where two tools have one name."""
    seen: dict[str, Tool] = {}
    for tool in tools:
        if (other := seen.setdefault(tool.spec.name, tool)) is not tool:
            first, second = (getattr(t, "source", "") or "comes with OpenGLM" for t in (other, tool))
            raise ValueError(f"two tools are called {tool.spec.name!r}: {first}, and {second}; rename one")


def _of_module(file: Path) -> list[Tool]:
    module = _run(file)
    values = list(vars(module).values())
    decorated = [v for v in values if isinstance(v, FunctionTool) and v.function.__module__ == module.__name__]
    if decorated:
        return list(dict.fromkeys(decorated))
    public = getattr(module, "__all__", None)
    functions = [
        value for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
        and (name in public if public is not None else not name.startswith("_"))
    ]  # fmt: skip
    if not functions:
        raise ValueError(f"{file} defines no function that could be a tool")
    return [FunctionTool(function) for function in functions]


def _run(file: Path) -> ModuleType:
    """The module of a file, run anew; its folder can be imported from, as for a script."""
    path = file.resolve()
    name = f"openglm_tools_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, ValueError) and str(path) in str(error):  # of the decorator: names file and function
            raise
        raise ValueError(f"{file}{_line_of(error, path)}: {type(error).__name__}: {error}") from None
    return module


def _line_of(error: BaseException, path: Path) -> str:
    """The last line of that file that was at work."""
    line, frame = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == str(path):
            line = frame.tb_lineno
        frame = frame.tb_next
    return f", line {line}" if line else ""


if __name__ == "__main__":
    for found in load_tools(sys.argv[1]):
        print(f"{found.spec.name:<24} {found.spec.description.splitlines()[0]}")
