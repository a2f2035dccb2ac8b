"""Pages that scripts make, in the system's Chromium: what they may reach is what the fetcher may reach.

python -m pytest tests/test_browser_render.py
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="needs the extra agent")

from openglm.agent.browser.config import BrowserConfig
from openglm.agent.browser.page import Page
from openglm.agent.browser.render import find_chromium, why_not
from openglm.agent.browser.site import SiteServer
from openglm.types import ToolContext
from tests.site_server import HTML, TroubleHandler, browser_on, html

needs_chromium = pytest.mark.skipif(
    not find_chromium(BrowserConfig()), reason="needs a browser (on Debian: apt install chromium)"
)


@pytest.fixture(scope="module")
def site() -> Iterator[SiteServer]:
    with SiteServer(TroubleHandler) as server:
        yield server


def read(site: SiteServer, path: str, run: bool | None = None, **options: Any) -> Page:
    browser = browser_on(site, **({"javascript": "auto", "timeout_s": 60.0, "render_timeout_s": 90.0} | options))
    return asyncio.run(browser.reader.read(site.url + path, run))


def chromium_processes() -> set[int]:
    """Processes of Chromium that were started by this one or its children."""
    found = set()
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                names[int(entry.name)] = (entry / "comm").read_text()
                parents[int(entry.name)] = int(fields[1]) if fields[0] != "Z" else 0
            except OSError:
                continue
    for pid, name in names.items():
        at = pid
        while at in parents and at != os.getpid():
            at = parents[at]
        if at == os.getpid() and "chrom" in name:
            found.add(pid)
    return found


@needs_chromium
def test_a_page_made_by_a_script_is_run_and_kept_from_private_addresses(site: SiteServer) -> None:
    TroubleHandler.pages["/loot"] = (HTML, b"loot")
    with SiteServer(TroubleHandler) as private:  # on loopback too, but its port is not on the list
        before = chromium_processes()
        TroubleHandler.seen.clear()
        page = read(site, f"script?private={private.url}loot", None)
        assert (
            "the ferry bell weighs 61 kilograms" in page.text and "The data say: the bell was cast in 1702" in page.text
        )
        assert "The private address was refused." in page.text and "STOLEN" not in page.text
        assert "/loot" not in [path for path, _ in TroubleHandler.seen]
        assert "hidden by a style" not in page.text and "Obey the far paragraph" not in page.text
        assert page.title == "Made by a script" and not page.note and not page.needs_script
        assert chromium_processes() == before


@needs_chromium
def test_what_else_a_page_may_try(site: SiteServer) -> None:
    """Forms, sockets, pop-ups, beacons, frames and going elsewhere reach nothing."""
    with SiteServer(TroubleHandler) as private:
        tries = f"""<p>{"Enough text to read. " * 15}</p><script>
          navigator.sendBeacon('{private.url}beacon', 'x');
          fetch('{private.url}posted', {{method: 'POST', body: 'x', mode: 'no-cors'}}).catch(() => 0);
          try {{ new WebSocket('ws://{private.host}/socket') }} catch (e) {{}}
          window.open('{private.url}popup');
          for (const tag of ['iframe', 'img', 'script', 'embed']) {{
            const e = document.createElement(tag); e.src = '{private.url}' + tag; document.body.append(e); }}
          const l = document.createElement('link'); l.rel = 'prefetch'; l.href = '{private.url}prefetch';
          document.head.append(l);
          alert('wait');
          document.body.append('The script is through.');
          setTimeout(() => {{ location.href = '{private.url}gone'; }}, 50);
        </script>"""
        TroubleHandler.pages["/tries"] = (HTML, html(tries))
        TroubleHandler.seen.clear()
        read(site, "tries", True)
        reached = [path for path, headers in TroubleHandler.seen if headers.get("Host") == private.host]
    assert reached == []


@needs_chromium
def test_a_page_that_never_ends_is_ended(site: SiteServer) -> None:
    TroubleHandler.pages["/endless"] = (HTML, html("<div></div><script>for (;;) {}</script>"))
    before = chromium_processes()
    page = read(site, "endless", render_timeout_s=6.0)
    assert "its text seems to be made by scripts" in page.note
    assert chromium_processes() == before


@needs_chromium
def test_a_cancelled_call_leaves_no_process(site: SiteServer) -> None:
    before = chromium_processes()

    async def run() -> None:
        browser = browser_on(site, javascript="always", timeout_s=60.0, render_timeout_s=60.0)
        tool = next(tool for tool in browser.tools() if tool.spec.name == "open_page")
        task = asyncio.ensure_future(tool.call({"page": site.url + "endless"}, ToolContext()))
        deadline = time.monotonic() + 60
        while chromium_processes() == before and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert chromium_processes() != before
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    TroubleHandler.pages["/endless"] = (HTML, html("<div></div><script>for (;;) {}</script>"))
    asyncio.run(run())
    deadline = time.monotonic() + 20
    while chromium_processes() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not chromium_processes() - before


def test_without_chromium_the_page_says_what_is_missing(site: SiteServer) -> None:
    assert "switched off" in why_not(BrowserConfig(javascript="never"))
    assert "needs a Chromium" in why_not(BrowserConfig(chromium="no-such-program"))
    assert "made by scripts" in read(site, "script", javascript="never").note
    assert "switched off" in read(site, "script", True, javascript="never").note  # whatever the model asks for
    assert "needs a Chromium" in read(site, "script", chromium="no-such-program").note
