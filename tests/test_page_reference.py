"""The page of the endpoints at /docs, in a real browser: all of openapi.json is on it, and nothing is from outside.

python -m pytest tests/test_page_reference.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest

from openglm.server.static import REFERENCE, WEB
from tests.server_helpers import running, scripted, service_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(service_of(scripted("glm-4", "\nHello")[0])) as address:
        yield address


def test_every_endpoint_and_field_is_shown(browser: Browser, url: str) -> None:
    described = httpx.get(url + "/openapi.json", timeout=60).json()
    trouble: list[str] = []
    context = browser.new_context()
    page = context.new_page()
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    page.on("request", lambda r: None if r.url.startswith((url, "data:")) else trouble.append(r.url))
    page.goto(url + "/docs")
    page.wait_for_selector("html[data-ready]", timeout=60_000)
    titles = page.locator("section h2 code").all_inner_texts()
    assert titles == [path for path, methods in described["paths"].items() for _ in methods]
    assert "/v1/responses" in titles and "/v1/chat/completions" in titles
    shown = page.locator("section#post--v1-chat-completions")
    fields = shown.locator(":scope > div > table td:first-child").all_inner_texts()
    assert fields == list(described["components"]["schemas"]["ChatRequest"]["properties"])
    assert shown.locator("summary", has_text="RequestMessage").count() == 1
    upload = page.locator("section#post--v1-files")
    assert upload.locator("td:first-child").all_inner_texts()[:2] == ["file", "purpose"]
    assert "-F file=@" in upload.locator("pre").inner_text()
    page.set_viewport_size({"width": 360, "height": 780})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert not trouble
    body = re.search(r"-d '(.*)'", shown.locator("pre").inner_text(), re.S)
    assert body is not None
    context.close()
    answer = httpx.post(url + "/v1/chat/completions", json=json.loads(body[1]), timeout=60)
    assert answer.status_code == 200, "the example on the page is answered"


def test_it_is_small_and_loads_nothing_from_outside(url: str) -> None:
    page = httpx.get(url + "/docs/", timeout=60)
    policy = page.headers["content-security-policy"]
    assert page.status_code == 200 and "unsafe" not in policy and "default-src 'self'" in policy
    files = sorted(p.name for p in REFERENCE.iterdir())
    assert files == ["index.html", "reference.css", "reference.js"]
    for file in REFERENCE.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"https?://|innerHTML|\sstyle=|\son\w+=", text), file.name
        assert len(text) < 10_000


def test_the_chat_page_leads_there_in_both_languages(browser: Browser) -> None:
    with running(service_of(scripted("glm-4", "\nHello")[0]), WEB) as address:
        context = browser.new_context(locale="en-US")
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        assert page.locator("#reference").inner_text() == "API reference"
        page.locator("#language").click()
        assert page.locator("#reference").inner_text() == "API 文档"
        page.locator("#language").focus()
        page.keyboard.press("Tab")
        with context.expect_page() as opened:
            page.keyboard.press("Enter")
        opened.value.wait_for_selector("html[data-ready]", timeout=60_000)
        assert opened.value.locator("h1").inner_text() == "Endpoints"
        assert httpx.get(f"{address}/docs", follow_redirects=True).url == f"{address}/docs/"
        context.close()
