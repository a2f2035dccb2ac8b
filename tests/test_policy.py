"""House rules that a machine can check: short files, a docstring on top, no leftovers, no paths of one machine.

    python -m pytest tests/test_policy.py
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CODE_FOLDERS = ("openglm", "runs", "bench", "tests")
TEXT_FOLDERS = (*CODE_FOLDERS, "docs", ".ci")
TEXT_SUFFIXES = {".py", ".md", ".sh", ".yaml", ".yml", ".toml", ".svg", ".json", ".html", ".css", ".js", ""}
GENERATED = {"__pycache__", "assets"}  # assets: the bundled model, data rather than text
VENDORED = REPOSITORY / "openglm" / "server" / "web" / "vendor"  # see test_page_policy.py
MAX_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_CHECKPOINT_BYTES = 64_000_000

# In two pieces where the rule would otherwise find itself.
MACHINE_PATH = re.compile(r"""(?<![\w.~}$:/-])/(?:work|root|home|Users|opt|mnt|media|srv)(?:/|\b(?=["'\s]))""")
LEFTOVER = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b|\bissue " r"#?\d")
FOREIGN = re.compile(r"SPDX-License|All rights " r"reserved|Copyright \(c\)|Adapted from https?:", re.IGNORECASE)
VENDOR_FOLDERS = {"vendor", "vendored", "third_party", "thirdparty", "node_modules", "site-packages", "extern"}


def files(folders: tuple[str, ...], suffixes: set[str]) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.is_file() and path.suffix in suffixes and VENDORED not in path.parents:
                if not GENERATED & set(path.relative_to(REPOSITORY).parts):
                    yield path


def python_files() -> list[Path]:
    return list(files(CODE_FOLDERS, {".py"}))


def text_files() -> list[Path]:
    root = [p for p in sorted(REPOSITORY.iterdir()) if p.is_file() and p.suffix in TEXT_SUFFIXES]
    return [p for p in [*root, *files(TEXT_FOLDERS, TEXT_SUFFIXES)] if p.name not in ("LICENSE", ".coverage")]


def name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def lines_matching(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{name(path)}:{number}: {line.strip()[:100]}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]


def test_there_is_something_to_check() -> None:
    assert len(python_files()) > 40 and len(text_files()) > len(python_files())


def test_files_are_short() -> None:
    counts = {name(p): len(p.read_text(encoding="utf-8").splitlines()) for p in python_files()}
    long = [f"{file}: {count} lines" for file, count in counts.items() if count > MAX_LINES]
    assert not long, f"at most {MAX_LINES} lines a file:\n" + "\n".join(long)


def test_functions_fit_a_screen() -> None:
    long = [
        f"{name(path)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in python_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]  # fmt: skip
    assert not long, f"at most {MAX_FUNCTION_LINES} lines a function:\n" + "\n".join(long)


def test_every_file_says_what_it_is() -> None:
    """A docstring on top; the __init__.py of a folder may be empty."""
    wrong = []
    for path in python_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree):
            wrong.append(name(path))
    assert not wrong, "no docstring on top: " + ", ".join(wrong)


def test_no_paths_of_one_machine() -> None:
    assert not (found := lines_matching(MACHINE_PATH, text_files())), "\n".join(found)


def test_no_leftovers() -> None:
    assert not (found := lines_matching(LEFTOVER, text_files())), "\n".join(found)


def test_no_stubs() -> None:
    """A verb, option or function that does not exist is absent; nothing raises NotImplementedError."""
    wrong = [
        f"{name(path)}:{node.lineno}"
        for path in files(("openglm",), {".py"})
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "NotImplementedError"
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_vendored() -> None:
    code = [p for p in text_files() if p.suffix != ".md"]
    assert not (found := lines_matching(FOREIGN, [p for p in code if p != Path(__file__)])), "\n".join(found)
    folders = {part for path in files(TEXT_FOLDERS, TEXT_SUFFIXES) for part in path.relative_to(REPOSITORY).parts[:-1]}
    assert not folders & VENDOR_FOLDERS


def test_links_between_documents_lead_somewhere() -> None:
    link = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|(?:src|href)=\"([^\"#]+)\"")
    broken = []
    for path in (p for p in text_files() if p.suffix == ".md"):
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for match in link.finditer(text):
            target = match.group(1) or match.group(2)
            if not re.match(r"[a-z]+:", target) and not (path.parent / target).exists():
                broken.append(f"{name(path)}: {target}")
    assert not broken, "\n".join(broken)


def test_the_bundled_model_is_small() -> None:
    folder = REPOSITORY / "openglm" / "assets" / "glm-nano"
    if not folder.is_dir():
        pytest.skip("needs the bundled model in openglm/assets/glm-nano, which is not here")
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= MAX_CHECKPOINT_BYTES


def test_dependencies_are_what_the_package_imports() -> None:
    """Every outside import is a declared dependency, or of an extra; no declared dependency is unused."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # Those whose names differ.
    modules = {"pyyaml": "yaml", "markdown-it-py": "markdown_it", "pyzmq": "zmq", "ipython": "IPython", "pillow": "PIL"}

    def names_of(requirements: list[str]) -> set[str]:
        found = (re.match(r"[\w-]+", r) for r in requirements)
        return {modules.get(m.group().lower(), m.group().lower().replace("-", "_")) for m in found if m}

    needed = names_of(project["dependencies"])
    extras = project["optional-dependencies"]
    groups = ("chat", "data", "tensorboard", "grammar", "agent", "search", "mcp", "serve", "image")
    extra = names_of([r for group in groups for r in extras[group]])
    imported = set()
    for path in files(("openglm",), {".py"}):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    outside = {module for module in imported if module not in sys.stdlib_module_names} - {"openglm"}
    assert outside - extra <= needed, f"not declared: {sorted(outside - extra - needed)}"
    assert needed <= outside, f"declared but not imported: {sorted(needed - outside)}"


@pytest.mark.parametrize(
    ("pattern", "line", "found"),
    [
        (MACHINE_PATH, 'folder = "/ho' 'me/ann/data"', True),
        (MACHINE_PATH, "see /ro" "ot/x", True),
        (MACHINE_PATH, "https://example.org/home/page, out/work/x, ~/work/x, a/opt/b", False),
        (LEFTOVER, "# TO" "DO: later", True),
        (LEFTOVER, "as iss" "ue 12 asks", True),
        (LEFTOVER, "an issue of 12 pages", False),
    ],
)  # fmt: skip
def test_the_rules_find_what_they_should(pattern: re.Pattern[str], line: str, found: bool) -> None:
    assert bool(pattern.search(line)) is found
