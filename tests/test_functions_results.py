"""What becomes of the values that functions return, and files of functions: what counts, and what is refused.

python -m pytest tests/test_functions_results.py
"""

from __future__ import annotations

import asyncio
import io
import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openglm.agent.toolbox import Toolbox, ToolboxConfig
from openglm.agent.tools.function import FunctionTool
from openglm.agent.tools.load import load_tools
from openglm.types import Observation, Tool, ToolContext, ToolFile
from tests.test_functions import Place, Unit


@dataclass
class Point:
    x: int
    when: date


def call(function: Tool, /, **arguments: Any) -> Observation:
    return asyncio.run(function.call(arguments, ToolContext()))


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
        Toolbox(ToolboxConfig(python=False, browser=False, images=False, tools=(tmp_path / "a.py", tmp_path / "b.py")))
    box = Toolbox(ToolboxConfig(python=False, browser=False, images=False, tools=(tmp_path / "a.py",)))
    assert [row.name for row in box.rows()] == ["add"] and call(box.tools[0], a=1, b=2).content == "3"
