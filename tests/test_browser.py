"""The browser as a model uses it: its functions, GLM-4's call forms, sources, windows, quotes and footnotes.

python -m pytest tests/test_browser.py
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

pytest.importorskip("trafilatura", reason="needs the extra agent")

from openglm.agent.browser.citations import Source, find_passage, footnotes, sources_in, unverified_quotes
from openglm.agent.browser.config import BrowserConfig, Folder
from openglm.agent.browser.frame import END, NOTICE
from openglm.agent.browser.native import Call, read_calls
from openglm.agent.browser.site import SITE, SiteServer
from openglm.agent.tools.browser import Browser
from openglm.types import Observation, StatefulTool, ToolContext
from tests.site_server import TroubleHandler, browser_on, html


@pytest.fixture(scope="module")
def site() -> Iterator[SiteServer]:
    with SiteServer(TroubleHandler) as server:
        yield server


class User:
    """Calls the tools of one conversation, as an agent does. Refusals come back as text that begins with !."""

    def __init__(self, browser: Browser, conversation: str = "a", native: bool = False) -> None:
        self.browser, self.context = browser, ToolContext(conversation=conversation)
        self.tools = {tool.spec.name: tool for tool in browser.tools(native=native)}

    def observe(self, name: str, **arguments: Any) -> Observation:
        return asyncio.run(self.tools[name].call(arguments, self.context))

    def __call__(self, name: str, **arguments: Any) -> str:
        try:
            seen = self.observe(name, **arguments)
        except ValueError as error:
            return f"!{error}"
        return f"!{seen.content}" if seen.error else seen.content

    def native(self, code: str) -> str:
        return self("simple_browser", code=code)


@pytest.fixture
def user(site: SiteServer) -> User:
    return User(browser_on(site, folders=(Folder(SITE, url=site.url, live=True),)))


def test_search_open_click_back_quote(user: User, site: SiteServer) -> None:
    results = user.observe("search", query="When was the Tide Library opened?")
    assert results.content.splitlines()[2].startswith(f"# 【1†The Tide Library†{site.host}】")
    assert results.data and results.data["backend"] == "local" and results.data["results"][0]["source"] == 1
    page = user.observe("open_page", page="1")
    assert page.content.startswith(f"【1†The Tide Library】 {site.url}en/library.html\nlines 1-")
    assert "opened on 12 October 1911" in page.content and "[Lantern Museum](1)" in page.content
    assert page.data is not None
    expected = {"kind": "page", "source": 1, "url": site.url + "en/library.html", "title": "The Tide Library",
                "language": "en", "date": "2024-01-22", "first": 1}  # fmt: skip
    assert expected.items() <= page.data.items() and json.dumps(page.data)
    assert "Edda Pellworth" in user("click", link=1) and user("back") == page.content
    assert "Verified" in user("quote", source=1, text="opened on 12 October 1911")
    wrong = user("quote", source=1, text="It was opened on 13 October 1911 in a former sailmakers' loft")
    assert wrong.startswith("!Not verified") and "12 October 1911" in wrong  # the line that it should have been
    user.browser.session("a").check_integrity()


def test_the_same_page_has_one_number(user: User, site: SiteServer) -> None:
    user("search", query="Tide Library")
    assert user("open_page", page=site.url + "en/library.html#hours").startswith("【1†")
    assert user("open_page", page="【1†The Tide Library】").startswith("【1†")
    assert user("open_page", page=f"{site.url}to?url=/en/library.html").startswith("【1†")
    first = user("open_page", page=site.url + "en/bridge.html")
    user("search", query="Orrel's Bridge arches")
    assert first.split("†")[0] in user("open_page", page=site.url + "en/bridge.html")
    user.browser.session("a").check_integrity()


def test_windows_scroll_and_find(site: SiteServer) -> None:
    TroubleHandler.pages["/long"] = (
        "text/html",
        html("".join(f"<p>Paragraph number {n} of many.</p>" for n in range(300))),
    )
    user = User(browser_on(site, window_chars=1000))
    first = user.observe("open_page", page=site.url + "long")
    assert first.data and first.data["first"] == 1 and first.data["n_lines"] == 300
    last = first.data["last"]
    assert len(first.content) < 1400 and f"{300 - last} more lines" in first.content
    second = user.observe("scroll")
    assert second.data and second.data["first"] == last + 1
    assert user.observe("scroll", lines=100).data["first"] == last + 101
    assert user.observe("scroll", lines=-50).data["first"] == last + 51
    assert user.observe("scroll", direction="up").data["first"] < last + 51
    found = user.observe("find", text="number 250 of")
    assert found.data and found.data["lines"] == [251] and "L251: Paragraph number 250 of many." in found.content
    assert user.observe("scroll").data["first"] == 251
    assert "does not stand in this page" in user("find", text="number 999")
    assert user("scroll", lines=1000).startswith("!this is the end")
    assert user("open_page", page=site.url + "long") and user("scroll", direction="up").startswith(
        "!this is the beginning"
    )


@pytest.mark.parametrize(("name", "arguments", "remedy"), [
    ("search", {}, "missing"), ("search", {"query": " "}, "needs words"), ("search", {"query": "a", "n": 2}, "unknown"),
    ("open_page", {"page": "7"}, "no source 7"), ("open_page", {"page": "the library"}, "no address"),
    ("open_page", {"page": "http://169.254.169.254/"}, "no public address"), ("click", {"link": 1}, "no page is open"),
    ("click", {"link": "first"}, "must be a number"), ("find", {"text": "x"}, "no page is open"),
    ("scroll", {}, "no page is open"), ("back", {}, "no page to go back to"),
    ("open_page", {"page": "local://x"}, "Search"),
    ("quote", {"source": 3, "text": "x"}, "opened sources are: none"), ("open_page", {"page": ""}, "give an address"),
])  # fmt: skip
def test_errors_teach_the_remedy(user: User, name: str, arguments: dict[str, Any], remedy: str) -> None:
    answer = user(name, **arguments)
    assert answer.startswith("!") and remedy in answer and "\n" not in answer


def test_numbers_in_every_form_are_understood(user: User, site: SiteServer) -> None:
    user("search", query="Tide Library")
    for page in ("1", 1, "#1", "【1†The Tide Library】", " [1] "):
        assert user("open_page", page=page).startswith("【1†")
    assert "Edda Pellworth" in user("click", link="1") and user("quote", source="1", text="214,000 volumes")[0] == "V"


def test_schemas_are_valid_and_small(user: User) -> None:
    for tool in user.tools.values():
        jsonschema.Draft202012Validator.check_schema(dict(tool.spec.parameters))
        assert len(tool.spec.description) < 90 and isinstance(tool, StatefulTool)
    assert set(user.tools) == {"search", "open_page", "click", "find", "scroll", "back", "quote"}
    assert [tool.spec.name for tool in user.browser.tools(native=True)] == ["simple_browser"]


def test_conversations_are_apart_and_end(user: User, site: SiteServer) -> None:
    other = User(user.browser, "b")
    user("open_page", page=site.url + "en/ferry.html")
    assert other("back").startswith("!") and other("open_page", page="1").startswith("!")
    asyncio.run(user.tools["search"].end("a"))  # type: ignore[attr-defined]
    assert user("find", text="seal").startswith("!no page is open")
    asyncio.run(user.tools["back"].close())  # type: ignore[attr-defined]
    assert user("search", query="x") == "!the browser is closed"


def test_calls_at_the_same_time(user: User, site: SiteServer) -> None:
    async def run() -> list[Observation]:
        names = ("ferry", "bridge", "school", "market", "ferry")
        calls = [user.tools["open_page"].call({"page": f"{site.url}en/{name}.html"}, user.context) for name in names]
        return await asyncio.gather(*calls)

    seen = asyncio.run(run())
    assert all(not one.error for one in seen) and seen[0].data and seen[4].data
    assert seen[0].data["source"] == seen[4].data["source"]
    user.browser.session("a").check_integrity()
    assert len(user.browser.session("a").sources) == 4


def test_old_pages_are_let_go_but_can_be_gone_back_to(site: SiteServer) -> None:
    user = User(browser_on(site, n_pages=2))
    for name in ("ferry", "bridge", "school"):
        user("open_page", page=f"{site.url}en/{name}.html")
    session = user.browser.session("a")
    assert sorted(session.pages) == [2, 3] and sorted(session.sources) == [1, 2, 3]
    session.check_integrity()
    assert "Orrel's Bridge" in user("back") and "Grey Seal" in user("back")
    session.check_integrity()


def test_saved_pages_are_read_from_the_folder_without_any_network() -> None:
    user = User(offline())
    user("search", query="栖云镇图书馆馆长")
    page = user("open_page", page="1")
    assert "贺知秋" in page and "http://twins.example/zh/library.html" in page
    assert "青岭茶叶博物馆" in user("click", link=1)  # a link of the saved page leads to another one


def offline() -> Browser:
    async def nowhere(host: str, port: int) -> list[str]:
        raise AssertionError(f"looked up {host}")

    return Browser(BrowserConfig(backends=("local",), folders=(Folder(SITE, url="http://twins.example"),)), nowhere)


def test_the_native_tool(user: User, site: SiteServer) -> None:
    glm = User(user.browser, "g", native=True)
    assert "# 【0†Ferries from Averlund†" in glm.native('search("Averlund ferry Skarrow", recency_days=30000)')
    both = glm.observe("simple_browser", code="mclick([0, 1])")
    assert both.data and [part["source"] for part in both.data["parts"]] == [0, 1] and "Grey Seal" in both.content
    assert {entry["number"] for entry in both.data["sources"]} == {0, 1}
    assert "18,640" in glm.native(f'open_url("{site.url}en/town.html")') and "L" in glm.native('find("heron")')
    mixed = glm.native("mclick([0, 77])")
    assert mixed.startswith("!there is no source 77; known numbers: 0, 1")
    partly = glm.native(f'open_url("{site.url}en/school.html")\nopen_url("http://10.0.0.1/")')
    assert "486 pupils" in partly and "no public address" in partly and not partly.startswith("!")
    assert glm.native("import os").startswith("!only calls") and glm("simple_browser", query="x").startswith(
        "!simple_browser takes"
    )


@pytest.mark.parametrize(("body", "expected"), [
    ('search("北京 天气")', [Call("search", {"query": "北京 天气"})]),
    ('search(query="a", recency_days=7)', [Call("search", {"query": "a", "recency_days": 7})]),
    ("search('a', 7)", [Call("search", {"query": "a", "recency_days": 7})]),
    ("mclick([0, 3])", [Call("mclick", {"ids": [0, 3]})]), ("mclick(ids=[1])", [Call("mclick", {"ids": [1]})]),
    ("mclick(0, 3)", [Call("mclick", {"ids": [0, 3]})]), ("mclick((1, 2))", [Call("mclick", {"ids": (1, 2)})]),
    ('open_url("https://a.example/?a=1&b=2")', [Call("open_url", {"url": "https://a.example/?a=1&b=2"})]),
    ('open_url(url="x")', [Call("open_url", {"url": "x"})]), ('search("a")\nsearch("b")', [
        Call("search", {"query": "a"}), Call("search", {"query": "b"})]),
    ("```python\nsearch('a')\n```", [Call("search", {"query": "a"})]),
    ("simple_browser\nsearch('a')", [Call("search", {"query": "a"})]),
    ("browser.search('a')", [Call("search", {"query": "a"})]), ("r = search('a')", [Call("search", {"query": "a"})]),
    ("print(search('a'))", [Call("search", {"query": "a"})]), ("await search('a')", [Call("search", {"query": "a"})]),
    ("search(“天气”)", [Call("search", {"query": "天气"})]),
    ("search（\"天气\"）", [Call("search", {"query": "天气"})]),
    ('search("the "best" tea")', [Call("search", {"query": 'the "best" tea'})]),
    ('{"query": "a"}', [Call("search", {"query": "a"})]), ("msearch(queries=['a', 'b'])", [
        Call("search", {"query": ["a", "b"]})]), ("back()", [Call("back", {})]),
])  # fmt: skip
def test_call_forms(body: str, expected: list[Call]) -> None:
    assert read_calls(body) == expected


@pytest.mark.parametrize("body", [
    "", "x", "1 + 1", "import os", "os.system('x')", "search(open('x').read())", "search(f'{x}')", "__import__('os')",
    "search(*['a'])", "search('a' * 10**9)", "search(lambda: 1)", "eval('1')", "for i in x: search(i)", "search(a)",
    "search('a', 1, 2)", "search('a', size=1)", "(" * 5000, "[" * 150 + "]" * 150, "search('a' if 1 else 'b')",
    "search(" + "-" * 5000 + "1)", "search('a'); import os", "def f(): pass", "search('a').x", "search",
])  # fmt: skip
def test_what_is_no_call_is_refused_and_never_run(body: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_calls(body)
    assert "\n" not in str(caught.value)


SOURCES = {
    n: Source(n, f"https://{name}.example/", name) for n, name in ((0, "zero"), (1, "one"), (3, "three"), (12, "dozen"))
}


@pytest.mark.parametrize(("answer", "text", "numbers"), [
    ("Opened in 1911【3†three】.", "Opened in 1911[1].", [3]),
    ("A【3†source】 B【1】 C【3†x】", "A[1] B[2] C[1]", [3, 1]),
    ("A [3] and [3†source] and [^1].", "A [1] and [1] and [2].", [3, 1]), ("A[1, 3].", "A[1, 3].", []),
    ("A [1, 3].", "A [1][2].", [1, 3]), ("A【3†a】【3†b】【1†c】", "A[1][2]", [3, 1]), ("零【0†zero】", "零[1]", [0]),
    ("A 【9†nine】.", "A [?].", []), ("array[1] and x[3]", "array[1] and x[3]", []),
    ("see [1](https://x)", "see [1](https://x)", []),
    ("`【3†x】` and ```\n[1]\n``` but 【3】", "`【3†x】` and ```\n[1]\n``` but [1]", [3]),
    ("[7] stays, [2024] too", "[7] stays, [2024] too", []),
    ("【3†L10-L15】", "[1]", [3]), ("【 12 † dozen 】", "[1]", [12]), ("no marks", "no marks", []),
    ("［3］全角", "[1]全角", [3]),
])  # fmt: skip
def test_footnotes(answer: str, text: str, numbers: list[int]) -> None:
    found = footnotes(answer, SOURCES)
    assert found.text == text and [note.number for note in found.notes] == numbers
    assert found.unknown == ((9,) if "nine" in answer else ()) and json.dumps(found.as_data())
    assert footnotes(answer, list(SOURCES.values())) == found


def test_footnotes_are_listed_once_for_each_page() -> None:
    twice = {1: Source(1, "https://a.example/", "A"), 2: Source(2, "https://a.example/", "A")}
    found = footnotes("x【1】 y【2】", twice)
    assert found.text == "x[1] y[1]" and str(found) == "x[1] y[1]\n\n[1] A https://a.example/"


def test_quotes_are_looked_up_in_the_page() -> None:
    page = "The Tide Library was opened on 12 October 1911, in a former sailmakers' loft. "
    page += "馆藏图书约 9.6 万册，其中地方志 1,130 种。"
    for quote in ("opened on 12 October 1911", "OPENED  ON “12 October 1911”", "馆藏图书约9.6万册",
                  "Tide Library ... sailmakers’ loft", "其中地方志１，１３０种"):  # fmt: skip
        assert find_passage(quote, page), quote
    for quote in ("opened on 13 October 1911", "loft ... Tide Library", "", "...", "a", "馆藏图书约 9.7 万册"):
        assert not find_passage(quote, page), quote
    answer = 'It says "opened on 12 October 1911"【1†x】 and "holds forty thousand volumes" [1], '
    answer += "and 「馆藏图书约 9.6 万册」【2】."
    assert unverified_quotes(answer, {1: page}) == [("holds forty thousand volumes", 1), ("馆藏图书约 9.6 万册", 2)]


def test_an_answer_of_a_conversation(user: User, site: SiteServer) -> None:
    seen = [user.observe("search", query="Tide Library"), user.observe("open_page", page="1")]
    found, wrong = user.browser.footnotes(
        "a", 'It was "opened on 12 October 1911"【1†The Tide Library】. "Made up words"【1】'
    )
    assert found.notes[0].url == site.url + "en/library.html" and wrong == [("Made up words", 1)]
    assert sources_in([one.data for one in seen])[1] == found.notes[0]


def test_what_is_shown_is_framed(user: User, site: SiteServer) -> None:
    for text in (user("search", query="Tide Library"), user("open_page", page="1"), user("find", text="crowns")):
        assert text.count(NOTICE) == 1 and text.count(END) == 1


def test_readiness_names_what_is_missing(site: SiteServer) -> None:
    names = {item.name: item for item in browser_on(site).readiness()}
    assert not names["local"].ready and "folders" in names["local"].why
    assert not names["javascript"].ready and "switched off" in names["javascript"].why
    assert Browser.why_not() == ""


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "note.md").write_text("# Kettles\n\nThe copper kettle holds nine litres.\n")
    command = [
        sys.executable,
        "-m",
        "openglm.agent.tools.browser",
        "copper kettle",
        "--folder",
        str(tmp_path),
        "--open",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.count("The copper kettle holds nine litres.") == 2, done.stderr
    assert "local: ready" in done.stderr
