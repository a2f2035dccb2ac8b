"""The package is built in layers: a module imports only from lower ones, lazily or not, and nothing goes in circles.

    python -m pytest tests/test_layering.py

The table is the one of docs/ARCHITECTURE.md. Modules of one folder, and the files of layers 0 and 8, are one unit and
may import each other; two units of one layer may not. Imports under `if TYPE_CHECKING` count like any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "openglm"

# Layer of each unit: a folder of the package, or a file of its root.
LAYERS = {
    "config": 0, "presets": 0, "types": 0, "plot": 0, "log": 0, "dist": 0,
    "ops": 1, "tokenizer": 1,
    "model": 2, "formats": 2,
    "quant": 3, "data": 3, "loading": 3,
    "engine": 4, "convert": 4,
    "chat": 5,
    "train": 6, "quality": 6, "agent": 6,
    "eval": 7, "server": 7,
    "cli": 8, "__main__": 8,
}  # fmt: skip
SHARED_LAYERS = (0, 8)  # files of one layer that make one unit
NO_TORCH = ("config", "presets", "types", "plot", "log")
LAZY = {"load": "chat"}  # names the package itself gives, and the unit behind each


@dataclass(frozen=True)
class Import:
    """`module` imports `target` (dotted names below openglm, "" the package itself), or anything else (outside)."""

    module: str
    target: str
    line: int
    outside: bool = False

    def __str__(self) -> str:
        return f"{path_of(self.module)}:{self.line} imports {self.target if self.outside else 'openglm.' + self.target}"


def module_names() -> list[str]:
    names = (p.relative_to(PACKAGE).with_suffix("").parts for p in sorted(PACKAGE.rglob("*.py")))
    return [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names]


MODULES = frozenset(module_names())


def path_of(module: str) -> str:
    base = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    found = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    return str(found.relative_to(REPOSITORY))


def imports_of(module: str, source: str | None = None) -> Iterator[Import]:
    """Every import of a module, wherever it stands."""
    text = (REPOSITORY / path_of(module)).read_text(encoding="utf-8") if source is None else source
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _import(module, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path_of(module).endswith("__init__.py") else module.split(".")[:-1]
                kept = [p for p in package if p][: len(package) - node.level + 1]
                base = ".".join(["openglm", *kept, *filter(None, [base])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                below = full.removeprefix("openglm.")
                if base == "openglm" and alias.name in LAZY:
                    full = f"openglm.{LAZY[alias.name]}"
                elif not (full.startswith("openglm.") and below in MODULES):
                    full = base  # a name in a module, not a module
                yield _import(module, full, node.lineno)


def _import(module: str, full: str, line: int) -> Import:
    if full == "openglm":
        return Import(module, "", line)
    if full.startswith("openglm."):
        return Import(module, full.removeprefix("openglm."), line)
    return Import(module, full, line, outside=True)


def unit_of(module: str) -> str:
    first = module.split(".")[0]
    return "cli" if first.startswith("cli_") else first


def is_allowed(module: str, target: str) -> bool:
    """Whether openglm.<module> may import openglm.<target>."""
    if module == "" or target == "":  # the package itself holds the version and the lazy names, checked above
        return True
    here, there = unit_of(module), unit_of(target)
    if here == there:
        return True
    if LAYERS[here] == LAYERS[there]:
        return LAYERS[here] in SHARED_LAYERS
    return LAYERS[there] < LAYERS[here]


def test_every_file_has_a_layer() -> None:
    unknown = sorted({unit_of(m) for m in MODULES if m} - set(LAYERS))
    assert not unknown, f"no layer for {', '.join(unknown)}: put them in the table of this file and of ARCHITECTURE.md"


def test_imports_go_down() -> None:
    wrong = [str(i) for m in sorted(MODULES) for i in imports_of(m) if not i.outside and not is_allowed(m, i.target)]
    assert not wrong, "imports from the same or a higher layer:\n" + "\n".join(wrong)


def test_the_package_itself_imports_nothing_when_imported() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    found = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in found}
    assert names <= {"__future__", "typing"}


def test_layer_zero_knows_no_torch() -> None:
    wrong = [
        str(i) for m in sorted(MODULES) if unit_of(m) in NO_TORCH
        for i in imports_of(m) if i.outside and i.target.split(".")[0] == "torch"
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_imports_without_torch_at_run_time() -> None:
    light = ["openglm", "openglm.cli", *(f"openglm.{m}" for m in MODULES if m in NO_TORCH)]
    code = f"import {', '.join(light)}, sys; print(*sorted({{'torch', 'numpy', 'yaml', 'tqdm'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert result.stdout.split() == []


def test_no_import_goes_in_a_circle() -> None:
    edges = {m: sorted({i.target for i in imports_of(m) if not i.outside and i.target}) for m in MODULES}
    assert not (found := circle(edges)), "imports in a circle: " + " -> ".join(found)


def circle(edges: dict[str, list[str]]) -> list[str]:
    """One circle of a graph, its first module repeated at the end; empty when there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in edges.get(module, []):
            if found := walk(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(edges) if (found := walk(module, []))), [])


@pytest.mark.parametrize(
    ("module", "source", "targets"),
    [
        ("engine.engine", "def f():\n    from openglm.chat import ChatModel", ["chat"]),
        ("engine.engine", "import openglm.model.cache as c", ["model.cache"]),
        ("engine.engine", "from openglm import load, __version__", ["chat", ""]),
        ("engine.engine", "from ..train import run", ["train.run"]),
        ("engine", "from .engine import Engine", ["engine.engine"]),
        ("chat", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from openglm.cli import main", ["cli"]),
    ],
)  # fmt: skip
def test_the_reader_of_imports_sees_all_forms(module: str, source: str, targets: list[str]) -> None:
    assert [i.target for i in imports_of(module, source) if not i.outside] == targets


def test_the_rule_refuses_what_it_should() -> None:
    assert is_allowed("data.prepare", "tokenizer") and is_allowed("train.run", "chat") and is_allowed("cli_chat", "cli")
    assert not is_allowed("ops.rope", "model.cache")
    assert not is_allowed("formats", "model.checkpoint") and not is_allowed("tokenizer.train", "ops.loss")
    assert not is_allowed("chat", "cli_chat")
    assert circle({"a": ["b"], "b": ["c"], "c": ["a"]}) == ["a", "b", "c", "a"] and circle({"a": ["b"]}) == []
