"""Pages that scripts make: run in Chromium, which has no network of its own; what it asks for is fetched by us.

    html = await render(fetcher, reply)            # the page as it stands when its scripts are done

Every request of the page goes through the same Fetcher, with the same checks; Chromium itself is told to use a proxy
that does not exist, so whatever would go around that leads nowhere. Only GET requests are served. One browser process
for one page, ended with it, also when the task is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Sequence
from typing import Any

from openglm.agent.browser.config import BrowserConfig, BrowserUnavailable
from openglm.agent.browser.fetch import Fetcher, Reply

__all__ = ["find_chromium", "render", "why_not"]

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
INSTALL = "install Chromium (on Debian and Ubuntu: apt install chromium) and pip install 'openglm[agent]'"
DEAD_PROXY = "http://127.0.0.1:9"  # discard; requests of the page never come to it
FLAGS = (
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--disable-dev-shm-usage", "--disable-extensions", "--disable-default-apps",
    "--mute-audio", "--proxy-bypass-list=<-loopback>", "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--dns-prefetch-disable", "--no-pings", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--js-flags=--max-old-space-size=512",
)  # fmt: skip
NOT_NEEDED = ("image", "media", "font", "manifest", "other", "texttrack", "eventsource", "websocket", "ping")
N_REQUESTS = 150
SETTLE_S = 5.0
QUIET_MS = 400
# Takes out of the page what is not seen, by the styles that hold, before it is read.
DROP_INVISIBLE = """() => {
  const colours = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const doomed = [];
  for (const e of document.body ? document.body.querySelectorAll('*') : []) {
    if (['SCRIPT', 'STYLE', 'BR', 'TEMPLATE', 'NOSCRIPT'].includes(e.tagName)) continue;
    const s = getComputedStyle(e);
    let hide = s.display === 'none' || s.visibility !== 'visible' || +s.opacity === 0 || parseFloat(s.fontSize) < 2;
    if (!hide && e.childElementCount === 0 && e.textContent.trim()) {
      const box = e.getBoundingClientRect();
      hide = box.width * box.height > 0 && (box.right + scrollX < 0 || box.bottom + scrollY < 0);
      let ground = e, fill = [255, 255, 255, 1];
      for (; ground; ground = ground.parentElement) {
        const style = getComputedStyle(ground), c = colours(style.backgroundColor);
        if (style.backgroundImage !== 'none') { fill = null; break; }
        if (c.length && (c.length < 4 || c[3] > 0.5)) { fill = c; break; }
      }
      const ink = colours(s.color);
      hide = hide || (ink.length === 4 && ink[3] === 0)
        || (fill && ink.length >= 3 && [0, 1, 2].every(i => Math.abs(ink[i] - fill[i]) <= 12));
    }
    if (hide) doomed.push(e);
  }
  doomed.forEach(e => e.remove());
}"""


def find_chromium(config: BrowserConfig) -> str:
    """The path of the program, or nothing."""
    names: Sequence[str] = (config.chromium,) if config.chromium else PROGRAMS
    return next((path for name in names if (path := shutil.which(name))), "")


def why_not(config: BrowserConfig) -> str:
    """Why pages of scripts cannot be run here, or nothing."""
    if config.javascript == "never":
        return "switched off (BrowserConfig.javascript)"
    try:
        import playwright  # noqa: F401
    except ImportError:
        return f"needs playwright: {INSTALL}"
    return "" if find_chromium(config) else f"needs a Chromium: {INSTALL}"


async def render(fetcher: Fetcher, first: Reply) -> Reply:
    """The page with its scripts run. BrowserUnavailable without Chromium, or where it does not start."""
    config = fetcher.config
    if reason := why_not(config):
        raise BrowserUnavailable(f"pages made by scripts cannot be run: {reason}")
    from playwright.async_api import Error, async_playwright

    root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium's own sandbox does not work for root
    try:
        async with asyncio.timeout(config.render_timeout_s), async_playwright() as driver:
            browser = await driver.chromium.launch(
                executable_path=find_chromium(config), args=[*FLAGS, *(["--no-sandbox"] if root else [])],
                proxy={"server": DEAD_PROXY}, chromium_sandbox=not root, env=_environment(),
            )  # fmt: skip
            try:
                html, url = await _run(fetcher, browser, first)
            finally:
                with contextlib.suppress(Error):
                    await browser.close()
    except TimeoutError:
        raise BrowserUnavailable(f"{first.url} was not done after {config.render_timeout_s:g} s in Chromium") from None
    except Error as error:
        raise BrowserUnavailable(f"Chromium failed: {error.message.splitlines()[0][:200]}") from None
    return Reply(url, 200, html.encode(), {"content-type": "text/html; charset=utf-8"}, hops=first.hops)


def _environment() -> dict[str, str | float | bool]:
    """That of the caller without what may be secret."""
    harmless = ("PATH", "HOME", "LANG", "TMPDIR", "FONTCONFIG_PATH")
    return {name: os.environ[name] for name in harmless if name in os.environ}


async def _run(fetcher: Fetcher, browser: Any, first: Reply) -> tuple[str, str]:
    from playwright.async_api import Error, TimeoutError

    context = await browser.new_context(
        user_agent=fetcher.config.user_agent, service_workers="block", accept_downloads=False, java_script_enabled=True
    )
    served = Served(fetcher, first)
    await context.route("**/*", served.answer)
    await context.route_web_socket("**/*", lambda socket: socket.close())
    page = await context.new_page()
    page.on("dialog", lambda dialog: asyncio.ensure_future(dialog.dismiss()))
    page.on("popup", lambda popup: asyncio.ensure_future(popup.close()))
    budget_ms = fetcher.config.render_timeout_s * 1000 / 2
    await page.goto(first.url, wait_until="domcontentloaded", timeout=budget_ms)
    with contextlib.suppress(TimeoutError):  # a page that never rests is read as it is
        await page.wait_for_load_state("networkidle", timeout=min(SETTLE_S * 1000, budget_ms))
    await page.wait_for_timeout(QUIET_MS)
    with contextlib.suppress(Error):  # a page that goes elsewhere meanwhile
        await page.evaluate(DROP_INVISIBLE)
    return str(await page.content())[: fetcher.config.max_bytes], str(page.url)


class Served:
    """Answers the requests of one page through the Fetcher."""

    def __init__(self, fetcher: Fetcher, first: Reply) -> None:
        self.fetcher, self.first = fetcher, first
        self.count = 0
        self.refused: list[str] = []

    async def answer(self, route: Any) -> None:
        from playwright.async_api import Error

        request = route.request
        with contextlib.suppress(Error):  # the page may be gone
            if request.resource_type == "document" and request.url == self.first.url and self.count == 0:
                self.count = 1
                await route.fulfill(status=200, headers=_headers(self.first), body=self.first.body)
                return
            self.count += 1
            if request.method != "GET" or request.resource_type in NOT_NEEDED or self.count > N_REQUESTS:
                await route.abort("blockedbyclient")
                return
            try:
                reply = await self.fetcher.get(request.url, accept="*/*", robots=False)
            except ValueError as error:  # blocked, or it failed
                self.refused.append(str(error))
                await route.abort("blockedbyclient")
                return
            await route.fulfill(status=reply.status, headers=_headers(reply), body=reply.body)


def _headers(reply: Reply) -> dict[str, str]:
    """Of the reply, and a policy: no plug-ins, no frames."""
    headers = {name: value for name, value in reply.headers.items() if name != "content-encoding"}
    return headers | {"Content-Security-Policy": "object-src 'none'; frame-src 'none'; worker-src 'none'"}
