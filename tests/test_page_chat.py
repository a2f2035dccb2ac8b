"""The chat page in a real browser: answers, stop, branches, what the browser keeps.

    python -m pytest tests/test_page_chat.py
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from tests.page_helpers import Desk

DeskMaker = Callable[..., Desk]


def test_from_the_first_click_to_the_streamed_answer(desk: Desk) -> None:
    page = desk.page
    assert page.locator("#empty").is_visible()
    page.locator("#examples button").first.click()
    assert page.input_value("#input") == "Write a short poem about rain in spring."
    page.click("#send")
    desk.finished(0)
    assert desk.texts() == [
        "Write a short poem about rain in spring.", "You said: Write a short poem about rain in spring."
    ]  # fmt: skip
    assert not page.locator("#empty").is_visible() and page.input_value("#input") == ""
    assert page.inner_text("#model") == "glm-test" and page.inner_text("#speed") == "38 tok/s"
    assert page.inner_text("#context .figure") == "37 / 4,096"
    assert desk.titles() == ["Write a short poem about rain in spring."]
    sent = desk.asked()[0]
    assert sent["messages"] == [{"role": "user", "content": "Write a short poem about rain in spring."}]
    assert sent["stream"] is True and sent["stream_options"] == {"include_usage": True}
    assert not {"temperature", "top_p", "max_tokens", "seed", "tools"} & set(sent)  # the model's defaults hold


def test_the_answer_is_shown_while_it_streams_and_stops_when_asked(desk: Desk) -> None:
    page = desk.page
    desk.ask("slow please", wait=False)
    desk.until("document.querySelector('.assistant .prose')?.innerText.includes('12 ')")
    assert desk.answers.last.get_attribute("aria-busy") == "true"
    assert not page.locator("#send").is_visible()
    page.press("#input", "Enter")  # nothing to send, and nothing is sent while an answer comes
    page.click("#stop")
    desk.finished(0)
    assert "Stopped." in desk.answers.last.inner_text()
    numbers = desk.last_answer().split()
    assert numbers[:3] == ["1", "2", "3"] and len(numbers) < 390
    assert len(desk.asked()) == 1
    desk.ask("echo after")
    assert [m["role"] for m in desk.asked()[1]["messages"]] == ["user", "assistant", "user"]
    assert desk.mock is not None and desk.mock.stopped == 1  # the server saw the client leave


def test_no_more_than_one_drawing_per_frame_and_settled_blocks_stay(desk: Desk) -> None:
    assert desk.mock is not None
    text = "# Title\n\nFirst paragraph.\n\n" + "word " * 400
    desk.mock.answers["long"] = text
    page = desk.page
    page.evaluate("""() => {
        window.frames_ = 0; window.drawings = 0; window.first = null;
        const tick = () => { window.frames_++; requestAnimationFrame(tick); };
        requestAnimationFrame(tick);
        new MutationObserver(() => {
            window.drawings++;
            window.first ??= document.querySelector(".prose .block");
        }).observe(document.getElementById("messages"), {childList: true, subtree: true, characterData: true});
    }""")
    desk.ask("long")
    frames, drawings = page.evaluate("[window.frames_, window.drawings]")
    assert 0 < drawings <= frames + 8  # a few more: the message itself, its buttons, its end
    assert page.evaluate("window.first === document.querySelector('.prose .block')")
    assert page.inner_text(".prose h1") == "Title"


def test_figures_that_come_behind_the_last_word_are_shown(desk: Desk) -> None:
    assert desk.mock is not None
    desk.mock.late_s = 0.4  # long enough for the ended answer to be drawn
    desk.ask("echo one")
    assert desk.page.inner_text(".assistant .stats").startswith("38 tok/s · ")


def test_the_way_to_the_end_is_offered_only_where_there_is_one(desk: Desk) -> None:
    assert desk.mock is not None
    desk.mock.answers["long"] = "line\n\n" * 60
    page = desk.page
    desk.ask("short")
    page.locator(".assistant .again").click()
    page.wait_for_selector(".place")
    desk.finished(0)
    desk.ask("long")
    page.evaluate("document.getElementById('scroller').scrollTop = 0")
    page.wait_for_selector("#to-end:visible")
    page.locator(".turn-left").click()  # the version that nothing follows
    page.wait_for_selector("#to-end", state="hidden")


def test_reload_keeps_the_conversation_and_what_had_come_of_an_answer(desk: Desk) -> None:
    desk.ask("remember this")
    desk.reload()
    assert desk.texts() == ["remember this", "You said: remember this"]
    desk.ask("slow now", wait=False)
    desk.until("document.querySelectorAll('.assistant .prose')[1]?.innerText.includes('60 ')")
    desk.reload()
    assert desk.texts()[2] == "slow now" and desk.last_answer().startswith("1 2 3")
    assert "Stopped." in desk.answers.last.inner_text()
    assert desk.page.url.startswith(desk.url + "#c=")


def test_edit_and_ask_again_make_branches(desk: Desk) -> None:
    page = desk.page
    desk.ask("version one")
    desk.ask("version two")
    first = page.locator(".message.user").first
    first.hover()
    first.locator(".edit").click()
    page.fill(".editor textarea", "version edited")
    page.press(".editor textarea", "Enter")
    desk.finished(0)
    assert desk.texts() == ["version edited", "Version 3"]
    assert desk.asked()[2]["messages"] == [{"role": "user", "content": "version edited"}]
    assert page.locator(".place").all_inner_texts() == ["2/2"]
    page.locator(".turn-left").click()
    assert desk.texts() == ["version one", "Version 1", "version two", "Version 2"]  # nothing is lost below
    page.locator(".assistant .again").last.click()
    desk.until("document.querySelectorAll('.prose')[1]?.innerText === 'Version 4'")
    desk.finished(1)
    assert page.locator(".place").all_inner_texts() == ["1/2", "2/2"]
    assert [m["content"] for m in desk.asked()[3]["messages"]] == ["version one", "Version 1", "version two"]
    desk.reload()
    assert desk.texts() == ["version one", "Version 1", "version two", "Version 4"]
    assert page.locator(".turn-right").last.is_disabled()


def test_editing_can_be_given_up(desk: Desk) -> None:
    desk.ask("as it was")
    desk.page.locator(".user .edit").click()
    desk.page.fill(".editor textarea", "changed")
    desk.page.press(".editor textarea", "Escape")
    assert desk.texts() == ["as it was", "You said: as it was"] and len(desk.asked()) == 1


def test_enter_does_not_send_while_an_input_method_composes(desks: DeskMaker) -> None:
    desk = desks(locale="zh-CN")
    page = desk.page
    assert page.get_attribute("#input", "placeholder") == "想问什么都可以"
    keys = desk.context.new_cdp_session(page)
    page.click("#input")
    keys.send("Input.imeSetComposition", {"text": "你好", "selectionStart": 2, "selectionEnd": 2})
    page.evaluate("""() => document.getElementById("input").dispatchEvent(
        new KeyboardEvent("keydown", {key: "Enter", isComposing: true, bubbles: true, cancelable: true}))""")
    keys.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", "key": "Enter", "windowsVirtualKeyCode": 229})
    assert desk.answers.count() == 0 and page.input_value("#input") == "你好"
    keys.send("Input.insertText", {"text": "你好，世界"})
    page.press("#input", "Shift+Enter")
    page.type("#input", "再见")
    assert desk.answers.count() == 0
    page.press("#input", "Enter")
    desk.finished(0)
    assert desk.asked()[0]["messages"][0]["content"] == "你好，世界\n再见"
    assert page.get_attribute(".assistant .prose", "lang") == "zh-CN"


def test_conversations_are_searched_renamed_deleted_and_brought_back(desk: Desk) -> None:
    page = desk.page
    for text in ("the grey heron", "下雨的春天"):
        page.click("#new-chat")
        desk.ask(text)
    assert desk.titles() == ["下雨的春天", "the grey heron"]
    page.fill("#search", "HERON said")  # words of an answer too, in any case
    assert desk.titles() == ["the grey heron"]
    page.fill("#search", "春天")
    assert desk.titles() == ["下雨的春天"]
    page.fill("#search", "nowhere")
    assert desk.titles() == [] and page.locator("#no-match").inner_text() == "Nothing found."
    page.press("#search", "Escape")
    desk.menu("Rename", 1)
    page.fill(".rename", "Birds")
    page.press(".rename", "Enter")
    assert "Birds" in desk.titles()
    desk.menu("Rename", 0)
    page.fill(".rename", "not kept")
    page.press(".rename", "Escape")
    desk.reload()
    assert sorted(desk.titles()) == ["Birds", "下雨的春天"]
    desk.menu("Delete", desk.titles().index("Birds"))
    assert desk.titles() == ["下雨的春天"]
    page.locator(".toast button").click()
    assert "Birds" in desk.titles()
    desk.menu("Delete", desk.titles().index("Birds"))
    desk.reload()
    assert desk.titles() == ["下雨的春天"]


def test_export_and_import(desk: Desk, desks: DeskMaker, tmp_path: Path) -> None:
    desk.ask("version one")
    desk.page.locator(".assistant .again").click()
    desk.page.wait_for_selector(".place")
    desk.finished(0)
    desk.ask("tool and picture")
    with desk.page.expect_download() as download:
        desk.menu("Export")
    file = tmp_path / "export.json"
    download.value.save_as(file)
    exported = json.loads(file.read_text(encoding="utf-8"))
    assert exported["format"] == "openglm-conversations" and len(exported["conversations"]) == 1
    other = desks()
    other.page.click("#open-settings")
    other.page.set_input_files("#import-file", file)
    other.page.wait_for_selector("#conversations .open")
    other.page.keyboard.press("Escape")
    other.page.locator("#conversations .open").click()
    assert other.texts() == desk.texts() and other.page.inner_text(".place") == "2/2"
    assert other.page.locator(".tool").count() == 2
    with other.page.expect_download() as download:
        other.menu("Export")
    again = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert shape(again["conversations"][0]) == shape(exported["conversations"][0])


def shape(conversation: dict[str, object]) -> list[object]:
    """What a conversation says, without ids and what has no value."""
    messages = conversation["messages"]
    assert isinstance(messages, list)
    kept, in_parts = ("role", "content", "files", "finish"), ("type", "text", "name", "content")
    return [[m.get(k) for k in kept] + [{k: p.get(k) for k in in_parts} for p in m.get("parts", [])] for m in messages]


def test_notices_stand_in_front_of_the_drawer(desks: DeskMaker, tmp_path: Path) -> None:
    """On a phone it covers all of the page."""
    page = desks(viewport={"width": 380, "height": 700}, color_scheme="light").page
    file = tmp_path / "import.json"
    file.write_text("{not json", encoding="utf-8")
    page.click("#open-settings")
    page.set_input_files("#import-file", file)
    notice = page.locator(".toast")
    notice.wait_for()
    picture = Image.open(io.BytesIO(notice.screenshot())).convert("RGB")
    assert picture.getpixel((8, picture.height // 2)) == (0x22, 0x27, 0x1F), "the notice's own ground"


GOOD = {"id": "a", "parent": None, "role": "user", "content": "x"}


NO_EXPORTS: list[tuple[object, str]] = [
    ("{not json", "JSON"),
    ('{"format": "other"}', "format"),
    ('{"format": "openglm-conversations", "version": 2}', "version"),
    ([{"messages": [GOOD, {**GOOD, "id": "b", "parent": "c"}]}], "messages[1].parent"),
    ([{"messages": [{**GOOD, "parent": "a"}]}], "messages[0].parent"),
    ([{"messages": [GOOD, GOOD]}], "messages[1].id"),
    ([{"messages": [{**GOOD, "role": "system"}]}], "messages[0].role"),
    ([{"messages": [{**GOOD, "content": {"a": 1}}]}], "messages[0].content"),
    ([{"messages": [{**GOOD, "role": "assistant", "parts": [{"type": "html", "text": "x"}]}]}], "parts.type"),
    ([{"title": 7, "messages": []}], "title"),
    ([{"messages": "many"}], "messages"),
    ([None], "conversations[0]"),
]


def test_imports_that_are_no_export_are_refused_whole(desk: Desk, tmp_path: Path) -> None:
    page, file = desk.page, tmp_path / "import.json"
    page.click("#open-settings")
    for content, named in NO_EXPORTS:
        whole = {"format": "openglm-conversations", "version": 1, "conversations": content}
        file.write_text(content if isinstance(content, str) else json.dumps(whole), encoding="utf-8")
        page.set_input_files("#import-file", file)
        notice = page.locator(".toast").last
        notice.wait_for()
        assert "not imported" in notice.inner_text() and named in notice.inner_text()
        page.evaluate("document.getElementById('toasts').replaceChildren()")
    page.keyboard.press("Escape")
    assert desk.titles() == []


def test_two_tabs_agree(desk: Desk) -> None:
    desk.ask("from the first tab")
    other = desk.open()
    assert other.locator("#conversations .open").all_inner_texts() == ["from the first tab"]
    desk.page.bring_to_front()
    desk.ask("and more")
    other.bring_to_front()
    other.locator("#conversations .open").click()
    desk.until("document.querySelectorAll('.message').length === 4", other)
    desk.page.bring_to_front()
    desk.menu("Delete")
    desk.until("document.querySelectorAll('#conversations .open').length === 0", other)


def test_full_storage_is_said_once_and_the_chat_goes_on(desk: Desk) -> None:
    desk.page.evaluate("""() => { IDBObjectStore.prototype.put = () => {
        throw new DOMException("full", "QuotaExceededError"); } }""")
    desk.page.evaluate("""() => { window.notices = []; new MutationObserver((all) => {
        for (const {addedNodes} of all) for (const node of addedNodes) window.notices.push(node.textContent);
    }).observe(document.getElementById("toasts"), {childList: true}) }""")
    desk.ask("one")
    desk.ask("two")
    assert desk.last_answer() == "You said: two"
    notices = desk.page.evaluate("window.notices")
    assert len(notices) == 1 and "storage is full" in notices[0]


def test_a_browser_without_storage_still_chats(desk: Desk) -> None:
    desk.context.add_init_script("Object.defineProperty(window, 'indexedDB', {get() { throw new Error('private') }})")
    desk.reload()
    assert "keeps nothing" in desk.page.inner_text(".toast")
    desk.ask("still here")
    assert desk.last_answer() == "You said: still here"
