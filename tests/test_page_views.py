"""The page in a real browser: tool cards, blanks, settings, files, errors, languages, themes, widths, keyboard.

    python -m pytest tests/test_page_views.py
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.page_helpers import Desk

DeskMaker = Callable[..., Desk]
FILLINGS = [
    {"text": "", "blanks": ["key", "letter"], "probability": 0.5},
    {"text": "", "blanks": ["box", "bird"], "probability": 0.125},
    {"text": "", "blanks": ["door", "cat"], "probability": 0.00034},
    {"text": "", "blanks": ["a", "b"], "probability": 0.000004},
]


def test_a_tool_card_for_each_call(desk: Desk) -> None:
    page = desk.page
    page.click("#all-tools")
    desk.ask("tool please")
    assert desk.asked()[0]["tools"] == [{"type": "all_tools"}]
    python, browser = page.locator(".tool").all()
    assert python.locator("summary").inner_text().split("\n") == ["python", "0.9996", "0.4 s"]
    assert browser.get_attribute("data-status") == "error"
    assert "TimeoutError: no answer in 10 s" in browser.locator("summary").inner_text()
    assert python.locator("img").is_visible() and not python.locator("pre").first.is_visible()
    python.locator("summary").press("Enter")
    assert python.locator("pre").first.inner_text().startswith("import math\nvalues")
    assert python.locator("pre .hljs-keyword").first.inner_text() == "import"
    assert python.locator("pre").last.inner_text() == "0.9996\nsecond line"
    picture = python.locator("img")
    assert picture.is_visible() and picture.get_attribute("alt") == "sine.svg"
    desk.until("document.querySelector('.tool img').naturalWidth === 560")
    assert python.locator("a.file").get_attribute("download") == "sine.svg"
    assert desk.last_answer() == "The largest value is 0.9996."
    desk.ask("echo again")
    turns = desk.asked()[1]["messages"]
    assert [m["role"] for m in turns] == ["user", "assistant", "tool", "tool", "assistant", "user"]
    assert [c["function"]["name"] for c in turns[1]["tool_calls"]] == ["python", "simple_browser"]
    assert [m["tool_call_id"] for m in turns[2:4]] == ["call_a", "call_b"]
    desk.reload()
    assert page.locator(".tool summary").first.inner_text().split("\n") == ["python", "0.9996", "0.4 s"]


def test_reasoning_is_in_a_fold_and_not_sent_again(desk: Desk) -> None:
    desk.ask("think first")
    fold = desk.page.locator(".thought")
    assert re.fullmatch(r"Thought for [\d.]+ s", fold.locator("summary").inner_text())
    assert not fold.locator(".prose").is_visible()
    fold.locator("summary").click()
    assert fold.locator(".prose").inner_text() == "The user wants a number. I take 42."
    assert desk.last_answer() == "The answer is 42."
    desk.ask("echo")
    assert "I take" not in str(desk.asked()[1]["messages"])


def test_blanks_are_filled_and_one_filling_is_taken(desk: Desk) -> None:
    assert desk.mock is not None
    desk.mock.fillings = list(FILLINGS)
    page = desk.page
    page.click("#open-fill")
    assert page.inner_text("#title") == "Fill the blank" and page.locator("#fill-run").is_disabled()
    page.type("#fill-input", "She has the ")
    page.click("#insert-blank")
    page.type("#fill-input", " and a letter.")
    page.evaluate("const box = document.getElementById('fill-input'); box.setSelectionRange(23, 29)")
    page.click("#insert-blank")  # what is selected becomes a blank
    assert page.input_value("#fill-input") == "She has the ____ and a ____."
    assert page.locator(".mirror mark").count() == 2
    page.press("#fill-input", "Enter")
    page.wait_for_selector("#fillings li")
    assert {k: desk.mock.requests[-1][k] for k in ("text", "n", "max_tokens")} == {
        "text": "She has the [MASK] and a [MASK].", "n": 5, "max_tokens": 32,
    }  # fmt: skip
    assert page.locator("#fillings .text").all_inner_texts()[:2] == [
        "She has the key and a letter.", "She has the box and a bird."
    ]  # fmt: skip
    assert page.locator("#fillings .figure").all_inner_texts() == ["50 %", "13 %", "0.03 %", "< 0.001 %"]
    widths = page.evaluate("Array.from(document.querySelectorAll('#fillings .bar span'), (bar) => bar.style.width)")
    assert widths == ["100%", "25%", "1%", "1%"]
    page.locator("#fillings button").nth(1).click()
    assert page.input_value("#fill-input") == "She has the box and a bird."
    assert "Put in a blank first" in page.inner_text("#fill-note")
    page.locator(".toast button").click()
    assert page.input_value("#fill-input") == "She has the ____ and a ____."
    page.click("#language")
    assert page.inner_text("#fill h2") == "填空" and page.locator("#fillings li").count() == 4
    page.locator(".examples button").first.click()
    page.click("#fill-run")
    page.wait_for_selector("#fillings .text:lang(zh)")
    assert page.locator("#fillings .text").first.inner_text() == "北京是key的首都。"
    desk.reload()
    assert page.inner_text("#fill h2") == "填空"  # the view is in the address


def test_a_model_that_cannot_fill_says_so(desk: Desk) -> None:
    assert desk.mock is not None
    desk.mock.model |= {"fills": False, "all_tools": False}
    desk.reload()
    assert not desk.page.locator("#all-tools").is_visible()
    desk.until("document.getElementById('model').textContent === 'glm-test'")
    offered = desk.page.locator("#examples strong").all_inner_texts()
    assert offered == ["Write", "Explain", "Translate", "Code"], "nothing that it cannot do is offered"
    desk.page.click("#open-fill")
    desk.page.fill("#fill-input", "a ____ b")
    assert desk.page.locator("#fill-run").is_disabled()
    assert "cannot fill blanks" in desk.page.inner_text("#fill-note")


def test_system_prompt_and_sampling_go_with_the_request_and_stay(desk: Desk) -> None:
    page = desk.page
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    page.fill("#set-temperature", "0.3")
    page.fill("#set-max_tokens", "77")
    page.fill("#set-seed", "-5")  # not a seed: not taken
    assert page.get_attribute("#set-seed", "aria-invalid") == "true"
    page.keyboard.press("Escape")
    desk.ask("echo")
    sent = desk.asked()[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["temperature"], sent["max_tokens"]) == (0.3, 77) and "seed" not in sent and "top_p" not in sent
    desk.reload()
    page.click("#open-settings")
    assert page.input_value("#system") == "Be brief." and page.input_value("#set-max_tokens") == "77"
    page.locator(".reset:enabled").click()
    page.fill("#set-max_tokens", "")
    page.keyboard.press("Escape")
    page.click("#new-chat")
    desk.ask("echo")
    assert not {"temperature", "max_tokens"} & set(desk.asked()[1])
    assert desk.asked()[1]["messages"][0]["content"] == "Be brief."


def test_files_come_in_as_text(desk: Desk, tmp_path: Path) -> None:
    page = desk.page
    (tmp_path / "notes.md").write_text("Use ```code``` here\n", encoding="utf-8")
    (tmp_path / "国标.txt").write_text("你好，世界", encoding="gb18030")
    (tmp_path / "image.bin").write_bytes(bytes(range(256)))
    (tmp_path / "large.txt").write_text("x" * 600_000)
    page.set_input_files("#files", sorted(tmp_path.iterdir()))
    page.wait_for_selector("#attachments .chip >> nth=1")
    assert page.locator("#attachments .chip").all_inner_texts() == ["notes.md", "国标.txt"]
    notices = " ".join(page.locator(".toast").all_inner_texts())
    assert "image.bin is not a text file" in notices and "large.txt is larger than 512 KB" in notices
    page.evaluate("""() => { const data = new DataTransfer();
        data.items.add(new File(["dropped"], "drop.csv"));
        for (const name of ["dragover", "drop"]) document.getElementById("chat").dispatchEvent(
            new DragEvent(name, {dataTransfer: data, bubbles: true, cancelable: true})); }""")
    page.wait_for_selector("#attachments .chip >> nth=2")
    page.locator("#attachments button").nth(1).click()
    desk.ask("What is in them?")
    assert desk.asked()[0]["messages"][0]["content"] == (
        "notes.md\n````\nUse ```code``` here\n````\n\ndrop.csv\n```\ndropped\n```\n\nWhat is in them?"
    )
    assert page.locator(".user .chip").all_inner_texts() == ["notes.md", "drop.csv"]
    assert page.locator("#attachments .chip").count() == 0
    page.set_input_files("#files", tmp_path / "国标.txt")
    page.wait_for_selector("#attachments .chip")
    desk.ask("And this?")
    assert desk.asked()[1]["messages"][-1]["content"] == "国标.txt\n```\n你好，世界\n```\n\nAnd this?"


def test_errors_are_said_and_the_chat_goes_on(desk: Desk) -> None:
    page = desk.page
    desk.ask("error please")
    assert desk.last_answer() == "Half an ans" and "the engine stumbled" in page.inner_text(".note.error")
    desk.ask("broken please")
    assert "connection broke" in desk.answers.last.inner_text() and desk.last_answer() == "Cut o"
    desk.ask("busy please")
    assert "Try again in 3 s" in desk.answers.last.inner_text()
    buttons = desk.answers.last.locator(".foot button")
    assert buttons.all_inner_texts() == ["Ask again"], "there is nothing to copy, and one thing to do"
    desk.ask("echo fine")
    assert desk.last_answer() == "You said: echo fine"
    page.locator(".assistant .again").nth(2).click()  # where it was busy: another version of that answer
    page.wait_for_selector(".place")
    assert page.inner_text(".place") == "2/2"


def test_the_key_is_asked_for_and_kept_for_the_session(desk: Desk) -> None:
    assert desk.mock is not None
    desk.mock.key = "sesame"
    page = desk.page
    page.reload()
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("#key-dialog .error")
    page.fill("#key", "sesame")
    page.press("#key", "Enter")
    desk.until("document.getElementById('model').textContent === 'glm-test'")
    desk.ask("echo with key")
    assert desk.last_answer() == "You said: echo with key"
    desk.reload()
    desk.until("document.getElementById('model').textContent === 'glm-test'")
    assert not page.locator("#key-dialog").is_visible()
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
    assert not any("sesame" in address for address in desk.mock.seen)


def test_380_pixels_are_wide_enough(desks: DeskMaker) -> None:
    desk = desks(viewport={"width": 380, "height": 720}, has_touch=True)
    assert desk.mock is not None
    page = desk.page
    desk.mock.fillings = list(FILLINGS)
    desk.mock.answers["wide"] = (
        "```python\n" + "x = 1 + " * 60 + "\n```\n\n| " + " | ".join(f"column{i}" for i in range(14)) + " |\n|"
        + "---|" * 14 + "\n|" + "value|" * 14 + "\n\nhttps://example.org/" + "long/" * 60
        + "\n\n$$\n" + " + ".join(f"x_{{{i}}}^2" for i in range(60)) + "\n$$\n\n" + "很长的中文" * 60
    )  # fmt: skip
    assert desk.wide_by() <= 0
    desk.ask("wide")
    page.wait_for_selector(".katex")
    assert desk.wide_by() <= 0 and page.evaluate("document.getElementById('scroller').scrollWidth") <= 380
    desk.ask("tool " + "w" * 300)
    assert desk.wide_by() <= 0 and page.evaluate("document.getElementById('scroller').scrollWidth") <= 380
    assert not page.locator("#sidebar").is_visible()
    page.click("#open-sidebar")
    page.wait_for_selector("#sidebar >> visible=true")
    assert page.evaluate("document.activeElement.id") == "new-chat"
    page.keyboard.press("Escape")
    page.wait_for_selector("#sidebar", state="hidden")
    page.click("#open-sidebar")
    page.click("#open-fill")
    page.locator(".examples button").first.click()
    page.click("#fill-run")
    page.wait_for_selector("#fillings li")
    assert desk.wide_by() <= 0 and page.evaluate("document.getElementById('fill').scrollWidth") <= 380
    page.click("#open-settings")
    assert desk.wide_by() <= 0


def brightness(desk: Desk) -> int:
    colour = desk.page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


def test_themes_follow_the_system_until_one_is_chosen(desks: DeskMaker) -> None:
    desk = desks(color_scheme="dark")
    page = desk.page
    assert brightness(desk) < 150
    page.emulate_media(color_scheme="light")
    assert brightness(desk) > 600
    page.click("#theme")  # system -> light
    page.emulate_media(color_scheme="dark")
    assert brightness(desk) > 600
    page.click("#theme")  # -> dark
    page.emulate_media(color_scheme="light")
    page.goto(desk.url, wait_until="commit")
    page.wait_for_selector("#sidebar")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"  # set before the first paint
    assert brightness(desk) < 150
    page.wait_for_selector("html[data-ready]")
    page.click("#theme")  # -> system
    assert brightness(desk) > 600


def contrast(one: Sequence[int], other: Sequence[int]) -> float:
    def luminance(colour: Sequence[int]) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_are_readable_in_both_themes(desk: Desk) -> None:
    """WCAG AA: 4.5 to 1 for every text colour on every ground it stands on."""
    pairs = [
        *((text, at) for text in ("ink", "soft") for at in ("paper", "sheet", "side", "hover", "code", "bubble")),
        ("faint", "paper"), ("faint", "sheet"), ("faint", "side"), ("faint", "code"), ("faint", "hover"),
        ("accent", "sheet"), ("accent", "paper"), ("accent", "tint"), ("accent-ink", "accent"),
        ("danger", "sheet"), ("danger", "paper"), ("ink", "tint"),
        *((f"c-{name}", "code") for name in ("keyword", "string", "number", "comment", "name")),
    ]  # fmt: skip
    for theme in ("light", "dark"):
        desk.page.emulate_media(color_scheme=theme)
        names = sorted({name for pair in pairs for name in pair})
        script = "(names) => names.map((n) => getComputedStyle(document.documentElement).getPropertyValue('--' + n))"
        values = desk.page.evaluate(script, names)
        colours = {n: [int(v.strip()[i : i + 2], 16) for i in (1, 3, 5)] for n, v in zip(names, values, strict=True)}
        weak = [(pair, round(c, 2)) for pair in pairs if (c := contrast(colours[pair[0]], colours[pair[1]])) < 4.5]
        assert not weak, f"{theme}: {weak}"


def test_languages_switch_everywhere_and_stay(desk: Desk) -> None:
    page = desk.page
    desk.ask("echo")
    page.click("#language")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    english = page.evaluate("""async () => {
        const {TEXTS} = await import("./js/i18n.js");
        const shown = document.body.innerText;
        return Object.values(TEXTS.en).filter((text) => /[a-z]{4}/.test(text) && shown.includes(text));
    }""")
    assert english == [] and page.inner_text("#new-chat") == "新对话"
    page.click("#open-settings")
    assert page.inner_text("#settings-title") == "设置"
    page.locator(".choice button", has_text="English").click()
    assert page.inner_text("#settings-title") == "Settings"
    page.keyboard.press("Escape")
    page.click("#language")
    desk.reload()
    assert page.inner_text("#open-fill") == "填空"


def test_everything_can_be_done_with_the_keyboard(desk: Desk) -> None:
    page = desk.page
    keys = page.keyboard
    page.focus("#new-chat")
    keys.press("Shift+Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # a focus ring
    keys.press("Enter")
    keys.type("version one")
    keys.press("Enter")
    desk.finished(0)
    reached = set()
    for _ in range(40):  # Tab comes by everything
        keys.press("Tab")
        reached |= set(page.evaluate("[document.activeElement.id, ...document.activeElement.classList]"))
    assert {"new-chat", "open-fill", "search", "open", "more", "theme", "language", "open-settings", "edit", "again",
            "copy", "attach", "all-tools", "send", "input"} <= reached  # fmt: skip
    page.focus("#open-settings")
    keys.press("Enter")
    assert page.locator("#settings").is_visible()
    keys.press("Escape")
    assert not page.locator("#settings").is_visible() and page.evaluate("document.activeElement.id") == "open-settings"
    page.focus("#conversations .more")
    keys.press("Enter")
    keys.press("ArrowDown")
    keys.press("ArrowUp")
    assert page.evaluate("document.activeElement.textContent") == "Rename"
    keys.press("Escape")
    assert page.evaluate("document.activeElement.classList.contains('more')")
    keys.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    page.focus(".assistant .again")
    keys.press("Enter")
    desk.until("document.querySelector('.prose')?.innerText === 'Version 2'")
    desk.finished(0)
    page.focus(".turn-left")
    keys.press("Enter")
    assert desk.last_answer() == "Version 1"
    assert page.evaluate("document.activeElement.className").endswith("turn-right")


def test_screen_readers_get_names_and_whole_answers(desk: Desk) -> None:
    page = desk.page
    page.evaluate("""() => { window.said = []; new MutationObserver(() => {
        window.said.push(document.getElementById("announce").textContent);
    }).observe(document.getElementById("announce"), {childList: true}) }""")
    desk.ask("tool please")
    assert page.get_attribute("#announce", "aria-live") == "polite"
    assert page.evaluate("window.said") == [
        "Writing an answer", "I will compute it.\n\nThe largest value is **0.9996**."
    ]  # fmt: skip
    page.click("#open-settings")
    nameless = page.evaluate("""() => Array
        .from(document.querySelectorAll("button, a, input, textarea, select, summary"))
        .filter((e) => !(e.innerText || e.getAttribute("aria-label") || e.labels?.length || e.type === "file"))
        .filter((e) => !e.closest("[hidden]") && !e.textContent)
        .map((e) => e.outerHTML.slice(0, 100))""")
    assert nameless == []
    assert page.locator(".tool summary").last.get_attribute("aria-label") == (
        "simple_browser, Failed, 1.5 s, TimeoutError: no answer in 10 s"
    )
