"""The page on the real server: `openglm serve` with the bundled model, in a real browser.

    python -m pytest tests/test_page_served.py
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.conftest import REPOSITORY
from tests.page_helpers import Desk

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BUNDLED = REPOSITORY / "openglm" / "assets" / "glm-nano" / "config.json"
KEY = "open-sesame"


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """Address of `openglm serve`, which wants a key."""
    if not BUNDLED.is_file():
        pytest.skip("needs the bundled model in openglm/assets/glm-nano, which is not here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "openglm", "serve", "--port", str(port), "--api-key", KEY]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(1800):
            assert process.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(url + "health", timeout=5) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def user(browser: Browser, served: str) -> Iterator[Desk]:
    desk = Desk(browser, served, None)
    desk.page.fill("#key", KEY)
    desk.page.press("#key", "Enter")
    desk.until("document.getElementById('model').textContent !== ''")
    yield desk
    desk.context.close()
    assert not desk.trouble


def limit_answers(desk: Desk, tokens: int) -> None:
    desk.page.click("#open-settings")
    desk.page.fill("#set-max_tokens", str(tokens))
    desk.page.fill("#set-seed", "1")
    desk.page.keyboard.press("Escape")


def test_chat_stop_and_go_on(user: Desk) -> None:
    page = user.page
    assert page.inner_text("#model") == "glm-nano"
    limit_answers(user, 24)
    user.ask("Hello! Who are you?")
    assert page.locator(".note.error").count() == 0
    first = user.last_answer()
    assert first and "tok/s" in page.inner_text("#speed") and "/ " in page.inner_text("#context .figure")
    user.ask("北京是哪个国家的首都？")
    assert user.answers.count() == 2 and page.locator(".note.error").count() == 0
    page.locator(".assistant .again").first.click()
    page.wait_for_selector(".place")
    user.finished(0)
    assert user.texts()[-1] == first  # the same seed and messages
    limit_answers(user, 900)
    page.fill("#input", "Tell me a long story.")
    page.press("#input", "Enter")
    page.wait_for_selector("#stop:visible")
    page.click("#stop")
    page.wait_for_selector("#send:visible")
    user.reload()
    assert "Tell me a long story." in user.texts() and page.locator(".note.error").count() == 0


def test_blanks_have_probabilities(user: Desk) -> None:
    page = user.page
    page.click("#open-fill")
    page.fill("#fill-input", "Paris is the capital of ____.")
    page.select_option("#fill-fillLength", "8")
    page.click("#fill-run")
    page.wait_for_selector("#fillings li >> nth=4")
    figures = page.locator("#fillings .figure").all_inner_texts()
    assert len(figures) == 5 and all(figure.endswith("%") for figure in figures)
    page.locator("#fillings button").first.click()
    taken = page.input_value("#fill-input")
    assert taken.startswith("Paris is the capital of ") and "_" not in taken
    assert page.locator("#fill-note.error").count() == 0
