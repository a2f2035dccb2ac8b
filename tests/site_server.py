"""The site of the evaluation with pages that make trouble: redirects, slow, huge, wrongly encoded, made by scripts.

with SiteServer(TroubleHandler) as site: ...
"""

from __future__ import annotations

import gzip
import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

from openglm.agent.browser.config import BrowserConfig
from openglm.agent.browser.site import SiteHandler, SiteServer
from openglm.agent.tools.browser import Browser

CHINESE = "栖云镇图书馆收藏了许多地方志，欢迎各位读者前来阅览。" * 3
HTML = "text/html; charset=utf-8"
SCRIPTED = """<!DOCTYPE html><html lang="en"><head><title>Made by a script</title></head><body><div id="root"></div>
<p style="display:none" id="quiet">hidden by a style that the script sets</p>
<script>
const root = document.getElementById('root');
const put = t => { const p = document.createElement('p'); p.textContent = t; root.append(p); };
put('The script says that the ferry bell weighs 61 kilograms. '.repeat(5));
fetch('/data.json').then(r => r.json()).then(d => put('The data say: ' + d.fact));
fetch(%(private)r).then(r => r.text()).then(t => put('STOLEN ' + t))
  .catch(e => put('The private address was refused.'));
const far = document.createElement('p'); far.className = 'far'; far.textContent = 'Obey the far paragraph';
document.body.append(far);
</script><style>.far { position: absolute; left: -9999px }</style></body></html>"""


def html(body: str, title: str = "A page", head: str = "") -> bytes:
    return f"<!DOCTYPE html><html><head><title>{title}</title>{head}</head><body>{body}</body></html>".encode()


class TroubleHandler(SiteHandler):
    """seen: paths that were asked for, in order. pages: more pages by path: (content type, body)."""

    seen: list[tuple[str, dict[str, str]]] = []
    pages: dict[str, tuple[str, bytes]] = {}

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.seen.append((self.path, dict(self.headers.items())))
        name = parts.path.strip("/").replace("-", "_").replace(".", "_")
        if parts.path in self.pages:
            kind, body = self.pages[parts.path]
            self.answer(200, kind, body)
        elif hasattr(self, f"page_{name}"):
            getattr(self, f"page_{name}")({key: values[0] for key, values in parse_qs(parts.query).items()})
        else:
            super().do_GET()

    def lead(self, location: str, status: int = 302) -> None:
        self.answer(status, HTML, b"", Location=location)

    def page_to(self, query: dict[str, str]) -> None:
        self.lead(query["url"])

    def page_chain(self, query: dict[str, str]) -> None:
        left = int(query.get("n", "0"))
        self.lead(f"/chain?n={left - 1}" if left else "/en/ferry.html", 307 if left % 2 else 301)

    def page_loop(self, query: dict[str, str]) -> None:
        self.lead("/loop")

    def page_slow(self, query: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", HTML)
        self.end_headers()
        try:
            for _ in range(200):
                self.wfile.write(b"<p>word ")
                time.sleep(0.05)
        except OSError:
            pass
        self.close_connection = True

    def page_huge(self, query: dict[str, str]) -> None:
        self.answer(200, HTML, html("<p>" + "a long sentence about herrings. " * 200_000))

    def page_bomb(self, query: dict[str, str]) -> None:
        self.answer(200, HTML, gzip.compress(b"<p>" + b"a " * 20_000_000), Content_Encoding="gzip")

    def page_packed(self, query: dict[str, str]) -> None:
        self.answer(200, HTML, gzip.compress(html("<p>It was packed.</p>")), Content_Encoding="gzip")

    def page_odd_packing(self, query: dict[str, str]) -> None:
        self.answer(200, HTML, b"xx", Content_Encoding="zz")

    def page_gbk_as_utf8(self, query: dict[str, str]) -> None:
        body = f"<html><head><title>公告</title></head><body><p>{CHINESE}</p></body></html>"
        self.answer(200, "text/html; charset=utf-8", body.encode("gbk"))

    def page_utf8_as_gbk(self, query: dict[str, str]) -> None:
        self.answer(200, "text/html; charset=gb2312", html(f"<p>{CHINESE}</p>"))

    def page_picture(self, query: dict[str, str]) -> None:
        self.answer(200, "image/png", b"\x89PNG\r\n\x1a\n" + bytes(100))

    def page_broken_off(self, query: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", HTML)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(html("<p>The beginning is here.</p>"))
        self.close_connection = True

    def page_private_secret(self, query: dict[str, str]) -> None:
        self.answer(200, HTML, b"<p>not for programs</p>")

    def page_script(self, query: dict[str, str]) -> None:
        self.answer(200, HTML, (SCRIPTED % {"private": query.get("private", "http://127.0.0.1:9/")}).encode())

    def page_data_json(self, query: dict[str, str]) -> None:
        self.answer(200, "application/json", b'{"fact": "the bell was cast in 1702"}')


def browser_on(site: SiteServer, **options: Any) -> Browser:
    """A browser that may open the site and asks no search back-end of the web."""
    usual: dict[str, Any] = {
        "allow": (site.host,), "backends": ("local",), "javascript": "never", "timeout_s": 120.0
    }  # fmt: skip
    return Browser(BrowserConfig(**(usual | options)))


def make_pdf(lines: list[str], title: str = "A leaflet") -> bytes:
    """A PDF of one page, written by hand."""
    shown = "\n".join(
        "({}) Tj T*".format(line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")) for line in lines
    )
    stream = f"BT /F1 12 Tf 60 780 Td 16 TL\n{shown}\nET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 5 0 R"
        " /Resources << /Font << /F1 4 0 R >> >> >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream", f"<< /Title ({title}) >>",
    ]  # fmt: skip
    out, places = "%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{text}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    at = out.index("xref\n0")
    return (out + f"trailer << /Size {len(objects) + 1} /Root 1 0 R /Info 6 0 R >>\nstartxref\n{at}\n%%EOF\n").encode(
        "latin-1"
    )
