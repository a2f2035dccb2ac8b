"""The page in a real browser, for tests: opens it, asks, and keeps watch over what must never happen."""

from __future__ import annotations

import shutil
import time
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Dialog, Locator, Page, Playwright

from tests.page_server import Page as MockState

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
EXPECTED_NOISE = "Failed to load resource"  # what the browser logs for a status that a test asked for


def launch(playwright: Playwright) -> Browser:
    """The system's Chromium; the test is skipped where there is none."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return playwright.chromium.launch(executable_path=path, args=FLAGS)
    pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)} (on Debian: apt install chromium)")


class Desk:
    """One user's browser with the page open. `trouble`: errors, dialogs, policy violations, foreign requests."""

    def __init__(self, browser: Browser, url: str, mock: MockState | None, **options: Any) -> None:
        self.url, self.mock = url, mock
        self.trouble: list[str] = []
        self.context: BrowserContext = browser.new_context(
            **({"viewport": {"width": 1200, "height": 760}, "reduced_motion": "reduce", "locale": "en-US"} | options)
        )
        self.context.set_default_timeout(120_000)
        self.page = self.open()

    def open(self) -> Page:
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        page.on("dialog", self._asked)
        page.on("request", lambda request: self._check(request.url))
        page.on("console", lambda message: self._logged(message.type, message.text))
        page.goto(self.url)
        page.wait_for_selector("html[data-ready]")
        return page

    def _asked(self, dialog: Dialog) -> None:
        self.trouble.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _check(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:" + self.url)) or "pwned" in url:
            self.trouble.append(f"request: {url}")

    def _logged(self, kind: str, text: str) -> None:
        if kind == "error" and EXPECTED_NOISE not in text:
            self.trouble.append(f"console: {text}")

    def reload(self) -> None:
        """Load the page again, after what it is writing is written: a reading waits its turn behind that."""
        self.page.evaluate("import('./js/store.js').then((store) => store.all()).then((found) => found.length)")
        self.page.reload()
        self.page.wait_for_selector("html[data-ready]")

    def ask(self, text: str, wait: bool = True) -> None:
        """Type and send; wait until the answer is complete."""
        n = self.answers.count()
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        if wait:
            self.finished(n)

    def finished(self, n_before: int) -> None:
        self.page.wait_for_selector(f".assistant[aria-busy=false] >> nth={n_before}")
        self.page.wait_for_selector("#send:visible")

    @property
    def answers(self) -> Locator:
        return self.page.locator(".message.assistant")

    def last_answer(self) -> str:
        return self.answers.last.locator(".prose").last.inner_text()

    def asked(self) -> list[dict[str, Any]]:
        """Bodies of the chat requests so far."""
        assert self.mock is not None
        return [r for r in self.mock.requests if r["path"] == "/v1/chat/completions"]

    def until(self, script: str, page: Page | None = None) -> None:
        """Wait until an expression holds. Playwright's own wait evaluates text in the page: its policy forbids that."""
        for _ in range(4000):
            if (page or self.page).evaluate(script):
                return
            time.sleep(0.025)
        raise AssertionError(f"never came true: {script}")

    def texts(self) -> list[str]:
        """Every message that is shown, in order."""
        return self.page.locator(".message .bubble, .message .prose").all_inner_texts()

    def titles(self) -> list[str]:
        return self.page.locator("#conversations .open").all_inner_texts()

    def menu(self, item: str, row: int = 0) -> None:
        """Choose from the menu of a conversation."""
        self.page.locator("#conversations .more").nth(row).click()
        self.page.locator("#row-menu button", has_text=item).click()

    def wide_by(self) -> int:
        """Pixels by which the page is wider than the window."""
        script = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth"
        return int(self.page.evaluate(script))
