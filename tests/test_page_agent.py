"""All Tools in the page, in a real browser: cards as tools run, approval, stop, files up and down, citations.

python -m pytest tests/test_page_agent.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import FilePayload

from tests.page_helpers import Desk
from tests.page_server import seen
from tests.test_page_xss import PAYLOADS, URLS, settle

DeskMaker = Callable[..., Desk]


def begun(desk: Desk, text: str = "agent") -> None:
    """All Tools on, asked, and at the call that waits for the user."""
    assert desk.mock is not None
    desk.mock.decisions.clear()
    desk.mock.files["/v1/files/file-1/content"] = ("text/csv", b"a,b\n1,2\n")
    desk.page.click("#all-tools")
    desk.ask(text, wait=False)
    desk.page.wait_for_selector(".approval button")


def test_a_call_waits_runs_and_shows_what_it_does(desk: Desk) -> None:
    begun(desk)
    page, card = desk.page, desk.page.locator(".tool").first
    sent = desk.asked()[-1]
    assert sent["tools"] == [{"type": "all_tools"}] and f"#c={sent['conversation']}" in page.url
    assert card.get_attribute("data-status") == "approval" and "files" not in sent
    assert card.locator("pre").first.inner_text().startswith("for i in range(3)"), "what would run is in sight"
    group = page.get_by_role("group", name="May python run?")
    assert group.locator("button").all_inner_texts() == ["Deny", "Allow"]
    assert page.inner_text("#announce") == "May python run?"
    group.get_by_role("button", name="Allow").press("Enter")
    desk.finished(0)
    assert desk.mock is not None and desk.mock.decisions == {"call_1": "allow"}
    assert [c.get_attribute("data-status") for c in page.locator(".tool").all()] == ["ok", "ok", "ok"]
    assert not group.is_visible() and not card.locator("pre").first.is_visible(), "it closes when it is done"
    assert card.locator("summary").inner_text().split("\n") == ["python", "0.0", "0.3 s"]
    with page.expect_download() as saved:
        card.locator("a.file").click()
    assert saved.value.suggested_filename == "table.csv" and Path(saved.value.path()).read_bytes() == b"a,b\n1,2\n"
    desk.until("document.querySelectorAll('.tool img')[0].naturalWidth === 560")
    assert page.locator(".tool img").is_visible()
    browser = page.locator(".tool").nth(1)
    browser.locator("summary").click()
    assert browser.locator("li a").all_inner_texts() == ["The GLM <models>", "风筝的历史"]
    desk.reload()
    assert page.locator(".tool summary").first.inner_text().split("\n") == ["python", "0.0", "0.3 s"]
    assert page.locator(".sources li").count() == 2


def test_output_comes_while_it_runs_and_stop_ends_it(desk: Desk) -> None:
    begun(desk, "agent hold")
    page, card = desk.page, desk.page.locator(".tool").first
    assert desk.mock is not None
    page.get_by_role("button", name="Allow").click()
    desk.until("document.querySelector('.tool .output')?.innerText.includes('still at it')")
    assert card.get_attribute("data-status") == "running" and card.locator(".output").is_visible()
    assert card.locator(".output").inner_text().startswith("0.0\n1.5\n3.0\nstill at it")
    card.locator("summary").click()  # the user's wish counts: it stays closed though more comes
    page.wait_for_timeout(120)
    assert not card.locator(".output").is_visible()
    stopped = desk.mock.stopped
    page.click("#stop")
    desk.finished(0)
    assert card.get_attribute("data-status") == "stopped"
    for _ in range(200):
        if desk.mock.stopped > stopped:
            break
        page.wait_for_timeout(25)
    assert desk.mock.stopped == stopped + 1, "the server is told by the connection that ends"
    assert page.locator(".note.stopped").count() == 1


def test_a_denied_call_and_an_answer_that_does_not_arrive(desk: Desk) -> None:
    begun(desk)
    page, card = desk.page, desk.page.locator(".tool").first
    page.route("**/v1/agent/approvals", lambda route: route.fulfill(status=404, body="{}"))
    page.get_by_role("button", name="Deny").click()
    page.wait_for_selector(".toast:has-text('did not reach')")
    page.unroute("**/v1/agent/approvals")
    page.get_by_role("button", name="Deny").click()
    desk.finished(0)
    assert card.get_attribute("data-status") == "denied" and desk.last_answer() == "Then I will not."
    assert "Not allowed" in card.locator("summary").inner_text()


def test_stop_while_a_call_waits(desk: Desk) -> None:
    begun(desk)
    desk.page.click("#stop")
    desk.finished(0)
    assert desk.page.locator(".tool").get_attribute("data-status") == "stopped"
    assert desk.page.locator(".approval button").count() == 0


def test_citations_are_footnotes(desk: Desk) -> None:
    begun(desk)
    page = desk.page
    page.get_by_role("button", name="Allow").click()
    desk.finished(0)
    marks = page.locator(".prose sup a")
    assert marks.all_inner_texts() == ["2", "3"]
    assert marks.first.get_attribute("href") == "https://example.org/glm?a=1&b=2"
    assert marks.first.get_attribute("title") == "The GLM <models>"
    assert marks.first.get_attribute("rel") == "noopener noreferrer nofollow"
    assert desk.last_answer().endswith("see also【9†none】."), "a source that nobody read is no link"
    listed = page.get_by_role("region", name="Sources")
    assert listed.locator("li").all_inner_texts() == ["The GLM <models> example.org", "风筝的历史 example.com"]
    assert listed.locator("li").first.get_attribute("value") == "2"
    assert desk.mock is not None
    desk.mock.answers["later"] = "As said【3†x】."
    desk.ask("later")
    assert page.locator(".prose sup a").last.inner_text() == "3", "sources of earlier answers can be cited"
    assert [m["role"] for m in desk.asked()[-1]["messages"]].count("tool") == 3


def test_files_go_to_the_server_where_tools_are_on(desk: Desk) -> None:
    page = desk.page
    assert desk.mock is not None
    desk.mock.uploads.clear()
    page.click("#all-tools")
    data = FilePayload(name="数据 1.bin", mimeType="application/octet-stream", buffer=b"\x00\x01\xff" * 10)
    other = FilePayload(name="refuse-me.txt", mimeType="text/plain", buffer=b"x")
    page.set_input_files("#files", [data, other])
    page.wait_for_selector(".toast:has-text('refuse-me.txt was not taken by the server: the file is too large')")
    page.wait_for_selector("#attachments .chip:not([aria-busy])")
    assert page.locator("#attachments .chip span").all_inner_texts() == ["数据 1.bin"]
    assert len(desk.mock.uploads) == 1 and b"\x00\x01\xff" * 10 in desk.mock.uploads[0]
    assert 'filename="数据 1.bin"'.encode() in desk.mock.uploads[0] and b"assistants" in desk.mock.uploads[0]
    desk.ask("echo this")
    sent = desk.asked()[-1]
    assert sent["files"] == ["file-up1"] and sent["messages"][-1]["content"] == "echo this"
    assert page.locator(".user .chip").inner_text() == "数据 1.bin"
    desk.ask("echo more")
    later = desk.asked()[-1]
    assert "files" not in later, "the folder keeps them"
    assert later["messages"][0]["content"] == "[files in the working folder: 数据 1.bin]\n\necho this"
    page.click("#all-tools")
    page.set_input_files("#files", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"inline"})
    page.wait_for_selector("#attachments .chip")
    desk.ask("echo text")
    assert "inline" in desk.asked()[-1]["messages"][-1]["content"] and len(desk.mock.uploads) == 1


def test_files_that_wait_follow_the_switch(desk: Desk) -> None:
    """Attached with the tools on and sent with them off, or the other way, a file is where the model can read it."""
    page = desk.page
    assert desk.mock is not None
    desk.mock.uploads.clear()
    page.set_input_files("#files", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"told in text"})
    page.wait_for_selector("#attachments .chip")
    page.click("#all-tools")
    desk.until("document.querySelectorAll('#attachments .chip:not([aria-busy])').length === 1")
    desk.until("document.querySelectorAll('#attachments .chip').length === 1")
    desk.ask("echo one")
    assert desk.asked()[-1]["files"] == ["file-up1"] and desk.asked()[-1]["messages"][-1]["content"] == "echo one"
    page.set_input_files("#files", {"name": "b.txt", "mimeType": "text/plain", "buffer": b"told in text"})
    page.wait_for_selector("#attachments .chip:not([aria-busy])")
    page.click("#all-tools")
    page.wait_for_selector("#attachments .chip:not([aria-busy])")
    desk.ask("echo two")
    sent = desk.asked()[-1]
    assert "files" not in sent and sent["messages"][-1]["content"] == "b.txt\n```\ntold in text\n```\n\necho two"
    page.locator(".user .edit").first.click()
    page.press(".editor textarea", "Enter")  # without the tools the model learns at least that there was a file
    desk.finished(0)
    assert desk.asked()[-1]["messages"][-1]["content"] == "[files in the working folder: a.txt]\n\necho one"


def test_nothing_that_tools_say_can_run(desk: Desk) -> None:
    """Names, arguments, output, contents, files, titles and addresses of sources: as text, never as more."""
    assert desk.mock is not None
    bad = [*URLS, "ftp://example.org/pwned", "mailto:a@b", "vbscript:x", 'https://exa"onclick=alert(1)//.org/']
    sources = [{"number": i, "url": url, "title": PAYLOADS[i]} for i, url in enumerate(bad)]
    url = 'https://example.org/?q="><img src=x onerror="window.pwned=1">'
    fine = {"number": 77, "url": url, "title": PAYLOADS[3]}
    deltas = []
    for i, payload in enumerate(PAYLOADS):
        call, url = f"c{i}", URLS[i % len(URLS)]
        deltas.append(seen(call, payload, "running", arguments=json.dumps({"code": payload}), output=payload))
        files = [{"name": payload, "mime": mime, "url": url, "id": payload} for mime in ("image/png", "text/html")]
        kept: object = [*sources, fine, None, 3, {"number": "1", "url": 5}] if i % 2 else payload
        last = ("ok", "error", "denied", "refused", payload)[i % 5]
        deltas.append(seen(call, payload, last, content=payload, files=files, data={"sources": kept}))
    deltas.append(seen("wait", PAYLOADS[0], "approval", arguments=PAYLOADS[1]))
    marks = " ".join(f"【{number}†{payload}】" for number, payload in enumerate(PAYLOADS))
    deltas.append({"content": f'{marks} 【77†"><img src=x onerror=window.pwned=1>】\n\n' + "\n\n".join(PAYLOADS[:5])})
    desk.mock.observations = deltas
    desk.ask("observed")
    settle(desk)
    hrefs = desk.page.locator(".sources a").evaluate_all("all => all.map((a) => a.protocol)")
    assert hrefs and set(hrefs) == {"https:"} and desk.page.locator(".tool ol a").count() > 0
    assert desk.page.locator(".tool").count() == len(PAYLOADS) + 1
    desk.reload()
    settle(desk)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_phone_width_both_languages(desks: DeskMaker, theme: str) -> None:
    desk = desks(viewport={"width": 360, "height": 720}, color_scheme=theme, locale="zh-CN", has_touch=True)
    begun(desk)
    page = desk.page
    group = page.get_by_role("group", name="允许运行 python 吗？")
    assert group.locator("button").all_inner_texts() == ["拒绝", "允许"]
    assert desk.wide_by() <= 0
    page.get_by_role("button", name="允许", exact=True).tap()
    desk.finished(0)
    assert page.locator(".sources h4").inner_text() == "来源" and desk.wide_by() <= 0
    for summary in page.locator(".tool summary").all():
        summary.tap()
    assert desk.wide_by() <= 0


def test_a_user_may_want_to_be_asked_before_every_call(desk: Desk) -> None:
    page = desk.page
    page.click("#all-tools")
    page.click("#open-settings")
    choice = page.get_by_role("group", name="Calls")
    assert choice.locator("[aria-pressed=true]").inner_text() == "Run at once"
    choice.get_by_role("button", name="Ask me first").click()
    page.keyboard.press("Escape")
    desk.reload()
    desk.ask("agent", wait=False)
    page.wait_for_selector(".approval button")
    assert desk.asked()[-1]["tools"] == [{"type": "all_tools", "approval": "ask"}]
    page.get_by_role("button", name="Deny").click()
    desk.finished(0)
