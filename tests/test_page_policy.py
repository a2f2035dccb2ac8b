"""Rules for the files of the page that need no browser: licences, no outside address, short files, both languages.

    python -m pytest tests/test_page_policy.py
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tests.test_policy import MAX_LINES, REPOSITORY

WEB = REPOSITORY / "openglm" / "server" / "web"
VENDOR = WEB / "vendor"
OWN = sorted(p for p in WEB.rglob("*") if p.is_file() and VENDOR not in p.parents)
TEXT = {".js", ".css", ".html", ".svg"}
MAX_BYTES = 1_200_000
OUTSIDE = re.compile(r"(?:\b(?:https?|wss?):|[\"'`(= ])//[\w-]+(?:\.[\w-]+)+")
# Names of XML vocabularies are no addresses that a browser asks for.
NAMESPACES = re.compile(r"http://www\.w3\.org/(?:2000/svg|1999/xhtml|1998/Math/MathML|1999/xlink|XML/1998/namespace)")
LICENCES = {"marked": "MIT", "dompurify": "Apache License", "highlight": "BSD", "katex": "MIT License"}


def texts(paths: list[Path]) -> dict[str, str]:
    return {str(p.relative_to(WEB)): p.read_text(encoding="utf-8") for p in paths if p.suffix in TEXT}


def test_every_vendored_library_has_its_licence_and_its_source() -> None:
    folders = {p.name for p in VENDOR.iterdir() if p.is_dir()}
    assert folders == set(LICENCES)
    table = (VENDOR / "README.md").read_text(encoding="utf-8")
    for name, words in LICENCES.items():
        licence = (VENDOR / name / "LICENSE").read_text(encoding="utf-8")
        assert words in licence or "Redistribution and use in source and binary forms" in licence
        assert re.search(rf"\| `{name}` \| \S+ \| [\d.]+ \|", table), f"{name} is not in the table of vendor/README.md"
    loose = [p.name for p in VENDOR.iterdir() if p.is_file()]
    assert loose == ["README.md"]
    kinds = {p.suffix for p in VENDOR.rglob("*") if p.is_file() and not p.name.startswith("LICENSE")}
    assert kinds == {".js", ".css", ".woff2", ".md"}


def test_vendored_versions_are_the_ones_in_the_table() -> None:
    readme = (VENDOR / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| \S+ \| ([\d.]+) \|", readme, re.M))
    heads = {"marked": "marked.esm", "dompurify": "purify.min", "highlight": "highlight.min", "katex": "katex.min"}
    for name, file in ((name, f"{head}.js") for name, head in heads.items()):
        assert table[name] in (VENDOR / name / file).read_text(encoding="utf-8"), f"{name} is not {table[name]}"


def test_the_page_is_small() -> None:
    assert sum(p.stat().st_size for p in WEB.rglob("*") if p.is_file()) <= MAX_BYTES


def test_no_file_refers_to_another_server() -> None:
    found = [
        f"{name}: {match.group()}"
        for name, text in texts(OWN).items()
        for match in OUTSIDE.finditer(NAMESPACES.sub("", text))
    ]
    assert found == []


def test_vendored_code_loads_nothing() -> None:
    """Addresses in it stand in comments and error messages alone: nothing that fetches, imports or evaluates."""
    for name, text in texts(sorted(VENDOR.rglob("*"))).items():
        calls = r"(?<!\.)\bfetch\((?!\))|XMLHttpRequest|WebSocket|sendBeacon|\beval\(|new Function\("
        assert not re.search(calls, text), name
        assert not re.search(r"\bimport\s*\(|(?:^|[;}])import\s*[\"'{*]", text), name
        urls = re.findall(r"url\(([^)]*)\)", text) if name.endswith(".css") else []
        assert all((VENDOR / "katex" / url).is_file() for url in urls), name


def test_html_comes_in_by_one_way_and_no_code_is_inline() -> None:
    for name, text in texts(OWN).items():
        if name.endswith(".js"):
            ways = r"(?:inner|outer|Adjacent|set)HTML|document\.write|\beval\(|new Function|DOMParser|srcdoc"
            assert not re.search(ways, text), name
    page = (WEB / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", page)
    assert all(re.match(r"[^>]*\ssrc=\"js/\w+\.js\"></script>", part) for part in page.split("<script")[1:])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy and "require-trusted-types-for 'script'" in policy.group(1) and "unsafe" not in policy.group(1)


def test_files_are_short_and_say_what_they_are() -> None:
    for name, text in texts(OWN).items():
        assert len(text.splitlines()) <= MAX_LINES, name
        if name.endswith(".js"):
            assert text.startswith("// "), name
        if name.endswith(".css"):
            assert text.startswith("/* "), name


def test_every_text_is_there_in_both_languages_and_is_used() -> None:
    source = (WEB / "js" / "i18n.js").read_text(encoding="utf-8")
    english, chinese = (
        dict(re.findall(r"^  (\w+): \"(.*)\",$", part, re.M)) for part in source.split("const ZH")[0:2]
    )  # fmt: skip
    assert list(english) == list(chinese) and len(english) > 100
    for key, text in english.items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", chinese[key])), key
    others = "\n".join(text for name, text in texts(OWN).items() if name != "js/i18n.js")
    named = set(re.findall(r"[\"'`](\w+)[\"'`]", others))
    built = {f"theme_{v}" for v in ("auto", "light", "dark")}
    built |= {f"example{n}{part}" for n in range(1, 6) for part in ("Title", "Text")}
    assert set(english) <= named | built, f"not used: {sorted(set(english) - named - built)}"
    asked = set(re.findall(r"\bt\(\"(\w+)\"", others)) | set(re.findall(r"data-i18n(?:-\w+)?=\"(\w+)\"", others))
    assert asked <= set(english), f"not there: {sorted(asked - set(english))}"


def test_every_module_is_reached_from_the_page() -> None:
    """No file lies about unused, and every import leads to a file."""
    reached, todo = set(), [WEB / "index.html"]
    while todo:
        file = todo.pop()
        reached.add(file)
        text = file.read_text(encoding="utf-8")
        for target in re.findall(r"(?:from|import\(?|src=|href=)\s*\"((?!#)[\w./-]+)\"", text):
            if target == "docs/":
                continue  # the endpoints' page, which has a test of its own
            path = (file.parent / target).resolve()
            assert path.is_file(), f"{file.name} names {target}"
            if path not in reached and path.suffix in {".js", ".html"}:
                todo.append(path)
            reached.add(path)
    assert {p for p in OWN if p.suffix == ".js"} <= reached
    assert {p for p in VENDOR.rglob("*.js")} <= reached


def test_the_wheel_holds_the_page() -> None:
    build = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert "openglm/server/web/**" in build["targets"]["wheel"]["artifacts"]
