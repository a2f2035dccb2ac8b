"""No text can run script in the page: answers, thoughts, tool output, files, titles, prompts, imported conversations.

    python -m pytest tests/test_page_xss.py

A payload that ran would set `window.pwned`, open a dialog or ask for an address with "pwned" in it; the last two
and any violation of the page's policy end every test of the page, see `Desk`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.page_helpers import Desk

RUN = "window.pwned=1;alert(1);fetch('/pwned')"
PAYLOADS = (
    f"<script>{RUN}</script>",
    f"<img src=x onerror=\"{RUN}\">",
    f"<svg onload=\"{RUN}\">",
    f"<svg><script>{RUN}</script></svg>",
    f"<iframe srcdoc=\"<script>parent.{RUN}</script>\"></iframe>",
    f"<iframe src=\"javascript:{RUN}\"></iframe>",
    f"<details open ontoggle=\"{RUN}\"><summary>x</summary></details>",
    f"<input autofocus onfocus=\"{RUN}\">",
    f"<video><source onerror=\"{RUN}\"></video>",
    f"<a href=\"javascript:{RUN}\">click</a>",
    f"[click](javascript:{RUN})",
    f"[click](JaVaScRiPt:{RUN})",
    f"[click](&#106;avascript:{RUN})",
    f"[click](java\tscript:{RUN})",
    "[click](data:text/html;base64,PHNjcmlwdD53aW5kb3cucHduZWQ9MTwvc2NyaXB0Pg==)",
    f"[click](vbscript:{RUN})",
    f"[click]( javascript:{RUN} )",
    f"![x](javascript:{RUN})",
    f"![x](x \" onerror={RUN} \")",
    f"![x\" onerror=\"{RUN}](x)",
    "![spy](https://example.org/pwned.png)",
    "![spy](//example.org/pwned.png)",
    "<img src=\"https://example.org/pwned.png\">",
    "<link rel=stylesheet href=https://example.org/pwned.css>",
    "<style>@import 'https://example.org/pwned.css'; body { display: none }</style>",
    "<div style=\"background:url(https://example.org/pwned.png)\">x</div>",
    "<meta http-equiv=refresh content=\"0;url=https://example.org/pwned\">",
    "<base href=\"https://example.org/pwned/\">",
    f"<form action=\"javascript:{RUN}\"><button>go</button></form>",
    f"<object data=\"javascript:{RUN}\"></object><embed src=\"javascript:{RUN}\">",
    f"<math><mtext><table><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=1 onerror={RUN}&gt;\">",
    f"<noscript><p title=\"</noscript><img src=x onerror={RUN}>\">",
    f"<form><math><mtext></form><form><mglyph><svg><mtext><style><path id=\"</style><img src onerror={RUN}>\">",
    f"```html\n<script>{RUN}</script>\n```",
    f"```\"><img/src/onerror={RUN}>\ncode\n```",
    f"`<img src=x onerror={RUN}>`",
    f"| <img src=x onerror={RUN}> |\n|---|\n| <script>{RUN}</script> |",
    f"# <img src=x onerror={RUN}>",
    f"$\\href{{javascript:{RUN}}}{{click}}$",
    f"$$\\htmlData{{x=\"><img src=x onerror={RUN}>}}{{y}}$$",
    f"$\\includegraphics{{https://example.org/pwned.png}}$ $<img src=x onerror={RUN}>$",
    f"<a id=\"input\" name=\"body\" href=\"x\">clobber</a><img name=\"getElementById\" onerror={RUN} src=x>",
    f"[x]: javascript:{RUN}\n\n[click][x]",
    f"<javascript:{RUN}>",
    f"\"'><img src=x onerror={RUN}>${{{RUN}}}{{{{constructor.constructor('{RUN}')()}}}}",
    f"<template><script>{RUN}</script></template><xmp><img src=x onerror={RUN}></xmp>",
    f"H<sub onmouseover=\"{RUN}\">2</sub>O <br onclick={RUN}> <mark style=\"position:fixed;inset:0\">cover</mark>",
)  # fmt: skip
URLS = (
    f"javascript:{RUN}", "data:text/html,<script>window.pwned=1</script>", "https://example.org/pwned.png",
    "//example.org/pwned", "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' onload='window.pwned=1'/>",
)  # fmt: skip

UNSAFE = """() => {
    const bad = [];
    const places = ["messages", "conversations", "title", "fill", "toasts", "attachments"].map((id) => `#${id} *`);
    for (const e of document.querySelectorAll(places.join())) {
        if (/^(script|iframe|object|embed|style|link|meta|base|form|input|video|audio|template)$/i.test(e.tagName)
            && !e.closest(".editor") && !e.classList.contains("rename")) bad.push(e.tagName);
        for (const {name, value} of e.attributes) {
            if (name.startsWith("on") || (name === "style" && !e.closest(".formula, #fill"))) bad.push(name);
            if (/^(href|src|action|data|srcdoc|xlink:href)$/.test(name)) {
                const url = new URL(value, document.baseURI);
                const fine = ["http:", "https:", "mailto:"].includes(url.protocol)
                    || (url.protocol === "data:" && e.tagName === "IMG") || e.matches("a.file[download]");
                const foreign = url.protocol !== "data:" && url.origin !== location.origin;
                if (!fine || (e.tagName === "IMG" && foreign)) bad.push(value);
            }
            if ((name === "id" || name === "name") && e.closest(".prose, .bubble, .tool")) bad.push(name);
        }
    }
    return bad;
}"""
PROBE = """() => {
    for (const e of document.querySelectorAll("#messages summary")) e.click();
    for (const e of document.querySelectorAll("#messages .prose *")) {
        for (const type of ["mouseover", "focus", "toggle", "error", "load"]) e.dispatchEvent(new Event(type));
        if (e.tagName === "A") e.removeAttribute("target");
    }
    for (const e of document.querySelectorAll("#messages .prose a[href]")) {
        e.addEventListener("click", (event) => event.preventDefault());
        e.click();
    }
    for (const e of document.querySelectorAll("#messages .prose a:not([href])")) e.click();
}"""


def settle(desk: Desk) -> None:
    """Give everything that was shown the occasion to run; it must not have."""
    desk.page.evaluate(PROBE)
    desk.page.wait_for_timeout(30)
    assert desk.page.evaluate("window.pwned") is None
    assert desk.page.evaluate(UNSAFE) == []


def test_there_are_enough_payloads() -> None:
    assert len(set(PAYLOADS)) >= 40


def test_answers_that_stream_in(desk: Desk) -> None:
    assert desk.mock is not None
    for number, payload in enumerate(PAYLOADS):
        desk.mock.answers[f"payload {number}"] = payload
        desk.ask(f"payload {number}")
    desk.mock.answers["all"] = "\n\n".join(PAYLOADS)
    desk.ask("all")
    settle(desk)
    desk.reload()
    settle(desk)


def test_what_the_user_writes_titles_and_file_names(desk: Desk, tmp_path: Path) -> None:
    page = desk.page
    for payload in PAYLOADS[:10]:
        page.set_input_files("#files", {"name": payload, "mimeType": "text/plain", "buffer": b"x"})
    page.wait_for_selector("#attachments .chip >> nth=9")
    desk.ask("\n".join(PAYLOADS))
    for payload in PAYLOADS[:3]:
        desk.menu("Rename")
        page.fill(".rename", payload)
        page.press(".rename", "Enter")
        assert page.inner_text("#title") == payload and desk.titles() == [payload]
    settle(desk)
    assert all(payload.split("\n")[0] in page.locator(".bubble").inner_text() for payload in PAYLOADS[:5])
    page.click("#open-fill")
    assert desk.mock is not None
    desk.mock.fillings = [{"text": p, "blanks": [p, p], "probability": 0.1} for p in PAYLOADS]
    page.fill("#fill-input", PAYLOADS[0] + " ____")
    page.click("#fill-run")
    page.wait_for_selector("#fillings li")
    page.locator("#fillings button").first.click()
    settle(desk)


def poisoned() -> dict[str, Any]:
    """An export with payloads wherever a text can stand."""
    conversations = []
    for number, payload in enumerate(PAYLOADS):
        call = {
            "type": "call", "id": payload[:300], "name": payload[:300], "arguments": json.dumps({"code": payload}),
            "status": "ok", "content": payload, "seconds": 1,
            "files": [{"name": payload[:300], "mime": "image/png", "url": url} for url in URLS]
            + [{"name": payload[:300], "mime": "text/html", "url": url} for url in (URLS[0], URLS[2])],
        }  # fmt: skip
        files = [{"name": "f", "text": payload}]
        user = {"id": "u", "parent": None, "role": "user", "content": payload, "files": files}
        parts = [{"type": "reasoning", "text": payload}, call, {"type": "text", "text": payload}]
        answer = {
            "id": "a", "parent": "u", "role": "assistant", "parts": parts, "finish": "error", "model": payload[:300],
            "error": {"status": 500, "text": payload}, "stats": {"tok_s": payload},
        }  # fmt: skip
        conversations.append({"title": f"{number} {payload}"[:300], "system": payload, "messages": [user, answer],
                              "chosen": {"__proto__": "a", "": "u"}, "id": payload[:300]})  # fmt: skip
    return {"format": "openglm-conversations", "version": 1, "conversations": conversations}


def test_imported_conversations_and_tool_output(desk: Desk, tmp_path: Path) -> None:
    page = desk.page
    file = tmp_path / "<img src=x onerror=alert(1)>.json"
    file.write_text(json.dumps(poisoned()), encoding="utf-8")
    page.click("#open-settings")
    page.set_input_files("#import-file", file)
    page.wait_for_selector(f"#conversations .open >> nth={len(PAYLOADS) - 1}")
    page.keyboard.press("Escape")
    for row in page.locator("#conversations .open").all():
        row.click()
        assert page.locator(".tool").count() == 1
        page.evaluate(PROBE)
    settle(desk)
    assert page.locator(".tool img").count() == 1  # of the five pictures only the one that is data, and cannot run
    page.reload()
    page.wait_for_selector("html[data-ready]")
    settle(desk)


def test_the_browser_itself_refuses_html_that_was_not_cleaned(desk: Desk) -> None:
    refused = desk.page.evaluate("""() => {
        try { document.body.insertAdjacentHTML("beforeend", "<b>x</b>"); return false; }
        catch (error) { return error instanceof TypeError; }
    }""")
    assert refused
    desk.trouble.clear()  # the browser logs the refusal


@pytest.mark.parametrize("words", ["my secret words", "我的秘密"])
def test_nothing_that_was_written_is_in_an_address(desk: Desk, words: str) -> None:
    assert desk.mock is not None
    desk.ask(words)
    desk.page.fill("#search", words)
    desk.menu("Rename")
    desk.page.fill(".rename", words + "!")
    desk.page.press(".rename", "Enter")
    desk.page.click("#open-fill")
    desk.page.fill("#fill-input", f"{words} ____")
    desk.page.click("#fill-run")
    for address in (desk.page.url, *desk.mock.seen):
        assert "secret" not in address and "%" not in address and "?" not in address
