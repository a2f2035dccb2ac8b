"""Pages as lines: main text, links, hidden parts, encodings, PDF, plain text.

python -m pytest tests/test_browser_page.py
"""

from __future__ import annotations

import pytest

pytest.importorskip("trafilatura", reason="needs the extra agent")

from openglm.agent.browser.decode import decode
from openglm.agent.browser.fetch import FetchError, Reply
from openglm.agent.browser.hidden import visible_text
from openglm.agent.browser.page import Page, html_page, language_of, read_page, text_page
from openglm.agent.browser.pdf import read_pdf
from openglm.agent.browser.wrap import columns, join, wrap
from tests.site_server import CHINESE, make_pdf

STORY = "The lighthouse keeper wrote down the weather every morning before the lamp was cleaned. "


def reply(body: bytes | str, kind: str = "text/html; charset=utf-8", status: int = 200) -> Reply:
    data = body.encode() if isinstance(body, str) else body
    return Reply("https://example.org/dir/page", status, data, {"content-type": kind} if kind else {})


def test_an_article_among_menus() -> None:
    menu = "".join(f"<li><a href='/menu/{n}'>Menu entry {n}</a></li>" for n in range(6))
    body = f"""<html lang="en-GB"><head><title> The  Keeper </title><meta name="date" content="2024-03-05">
      </head><body><nav><ul>{menu}</ul></nav><article><h1>The Keeper</h1><p>{STORY * 4}</p>
      <h2>Work</h2><p>{STORY * 3} See <a href="lamp.html#top">the lamp</a> and <a href="/menu/2">two</a>.</p>
      <ul><li>First thing to do</li><li>Second thing to do</li></ul>
      <table><tr><th>Day</th><th>Wind</th></tr><tr><td>Monday</td><td>7</td></tr></table></article>
      <footer><a href="mailto:a@b.example">mail</a> <a href="javascript:x()">x</a></footer></body></html>"""
    page = read_page(reply(body))
    assert (page.title, page.language, page.date, page.kind) == ("The Keeper", "en-gb", "2024-03-05", "html")
    assert page.lines[0] == "# The Keeper" and all(columns(line) <= 170 for line in page.lines)
    text = "\n".join(page.lines)
    assert "[the lamp](1)" in text and page.links[0] == "https://example.org/dir/lamp.html"
    assert "[two](2)" in text and page.links[1] == "https://example.org/menu/2"
    assert "- First thing to do" in page.lines and "Monday | 7" in text
    at = page.lines.index("Other links of the page:")
    assert [line for line in page.lines[at + 1 :]] == [
        f"- [Menu entry {n}]({number})" for number, n in enumerate((0, 1, 3, 4, 5), 3)
    ]
    assert len(page.links) == 7 and not any("mail" in link or "javascript" in link for link in page.links)
    assert STORY.strip() in page.text and "see the lamp and two." in page.text.lower()


HIDDEN = {
    "display": "<p style='display: none'>SECRET</p>", 
    "important": "<div style='DISPLAY : NONE !important'>SECRET</div>",
    "visibility": "<p style='visibility:hidden'>SECRET</p>", "opacity": "<p style='opacity:0.0'>SECRET</p>",
    "size": "<p style='font-size:0px'>SECRET</p>", "tiny": "<p style='font-size: 1px'>SECRET</p>",
    "far": "<p style='position:absolute; left:-9999px'>SECRET</p>", 
    "indent": "<p style='text-indent:-999em'>SECRET</p>",
    "clip": "<p style='clip:rect(0 0 0 0)'>SECRET</p>", "no room": "<p style='height:0;overflow:hidden'>SECRET</p>",
    "attribute": "<p hidden>SECRET</p>", "white": "<p style='color:#fff'>SECRET</p>",
    "nearly white": "<p style='color:rgb(250, 250, 252)'>SECRET</p>", "font": "<font color=white>SECRET</font>",
    "transparent": "<p style='color: transparent'>SECRET</p>",
    "black on black": "<div style='background:#000'><p style='color:#000000'>SECRET</p></div>",
    "class": "<style>.x-1{display:none}</style><p class='y x-1'>SECRET</p>",
    "id": "<style>p { margin:0 } #Gone, .a b { visibility : hidden }</style><p id=Gone>SECRET</p>",
    "child": "<div style='display:none'><p><b>SECRET</b></p></div>", "template": "<template><p>SECRET</p></template>",
    "noscript": "<noscript>SECRET</noscript>", "comment": "<!-- SECRET --><p>a</p>", 
    "script": "<script>'SECRET'</script>",
    "style": "<style>/* SECRET */</style>", "svg": "<svg><text>SECRET</text></svg>", 
    "select": "<select><option>SECRET</select>",
    "area": "<textarea>SECRET</textarea>", "closed": "<dialog>SECRET</dialog>", "alt": "<img alt='SECRET' src='x.png'>",
    "data": "<p data-x='SECRET' title='SECRET' aria-label='SECRET'>a</p>", 
    "meta": "<meta name='description' content='SECRET'>",
    "input": "<input value='SECRET'>", "frame": "<iframe srcdoc='SECRET'>SECRET</iframe>",
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_hidden_text_is_dropped(name: str, long: bool) -> None:
    story = STORY * (8 if long else 1)
    page = html_page(
        f"<html><body><p>{story}</p>{HIDDEN[name]}<p>The end is seen. {story}</p></body></html>", "https://a.example/"
    )
    text = "\n".join(page.lines) + page.title
    assert "SECRET" not in text and "The end is seen." in text


@pytest.mark.parametrize("shown", [
    "<div style='background-color:#222'><p style='color:white'>VISIBLE</p></div>",
    "<table bgcolor=black><tr><td><font color=white>VISIBLE</font></table>", "<p style='color:#333'>VISIBLE</p>",
    "<link rel=stylesheet href=a.css><p style='color:white'>VISIBLE</p>", "<p style='opacity:0.9'>VISIBLE</p>",
    "<style>@media print{.a{display:none}}</style><p class=a>VISIBLE</p>", "<dialog open>VISIBLE</dialog>",
    "<style>div.a{display:none}</style><p class=a>VISIBLE</p>", "<p style='font-size:10px'>VISIBLE</p>",
    "<p style='margin-left:-20px'>VISIBLE</p>", "<p style='font-size:1.5em;line-height:0'>VISIBLE</p>",
])  # fmt: skip
def test_what_is_seen_stays(shown: str) -> None:
    assert "VISIBLE" in html_page(f"<html><body><p>{STORY}</p>{shown}</body></html>", "https://a.example/").text


def test_characters_without_a_shape_are_dropped() -> None:
    smuggled = "".join(chr(0xE0000 + ord(c)) for c in "open the door")
    assert visible_text(f"a{smuggled}b\u200b\u202ec\ufeffd\u00ade\x07") == "abcde"
    assert visible_text("می\u200cخواهم") == "می\u200cخواهم"


@pytest.mark.parametrize(("encoding", "declared"), [
    ("utf-8", "utf-8"), ("utf-8", ""), ("utf-8", "gb2312"), ("utf-8", "iso-8859-1"), ("gbk", "gbk"), ("gbk", "utf-8"),
    ("gbk", ""), ("gbk", "iso-8859-1"), ("gb18030", "gb2312"), ("big5", "big5"), ("utf-16", ""), ("utf-8-sig", "gbk"),
    ("gbk", "nonsense-7"), ("utf-16-le", "utf-16-le"),
])  # fmt: skip
def test_encodings_declared_rightly_and_wrongly(encoding: str, declared: str) -> None:
    text = "栖云鎮圖書館於一九三四年開館" * 4 if encoding == "big5" else CHINESE
    body = f"<html><head><title>x</title></head><p>{text}</p>".encode(encoding)
    assert text in decode(body, declared)


def test_damaged_and_cut_text_stays_what_it_is() -> None:
    body = CHINESE.encode()
    assert decode(body[:-1], "utf-8").startswith(CHINESE[:-1])
    damaged = decode(body[:30] + b"\xff" + body[30:], "gbk")
    assert damaged.replace("\ufffd", "") == CHINESE
    assert decode(CHINESE.encode("gbk")[:-1], "gbk").startswith(CHINESE[:-1])
    assert (
        decode("Où est le café près de l'hôtel ?".encode("latin-1"), "iso-8859-1") == "Où est le café près de l'hôtel ?"
    )
    assert decode(b"<meta charset='shift_jis'>" + "図書館は九時に開く。".encode("shift_jis")).endswith(
        "図書館は九時に開く。"
    )
    assert decode(b"") == ""


def test_pdf_is_read_and_broken_pdf_is_told_of() -> None:
    page = read_page(reply(make_pdf(["Tours start at (about) 11:30.", "Second line."]), "application/pdf"))
    assert (page.kind, page.title, page.lines) == (
        "pdf",
        "A leaflet",
        ("Tours start at (about) 11:30.", "Second line."),
    )
    assert read_page(reply(make_pdf(["By its look."]), "application/octet-stream")).lines == ("By its look.",)
    with pytest.raises(FetchError, match="cannot be read"):
        read_pdf(b"%PDF-1.4\nnothing of the kind", "x.pdf")
    with pytest.raises(FetchError, match="too long"):
        read_page(
            Reply("https://a.example/x.pdf", 200, b"%PDF-1.4", {"content-type": "application/pdf"}, truncated=True)
        )


@pytest.mark.parametrize(
    ("status", "why"), [(404, "no such page"), (403, "denied"), (429, "too many"), (500, "failed")]
)
def test_errors_of_the_server(status: int, why: str) -> None:
    with pytest.raises(FetchError, match=why):
        read_page(reply("<p>no</p>", status=status))


def test_other_kinds() -> None:
    with pytest.raises(FetchError, match="image/png"):
        read_page(reply(b"\x89PNG", "image/png"))
    assert read_page(reply('{"a": 1}', "application/json")).lines == ('{"a": 1}',)
    assert read_page(reply("<!doctype html><p>Typed as text.", "text/plain")).kind == "html"
    assert read_page(reply("plain words", "")).lines == ("plain words",)
    assert read_page(reply(b"", "text/html")).note
    page = text_page("# Head\n\nSee [the plan](plan.md) and ![no](x.png).\n\n\n\nEnd", "local://docs/A.md")
    assert page.title == "Head" and page.links == ("local://docs/plan.md",) and "[the plan](1)" in page.lines[2]
    assert page.lines[3:] == ("", "End")


def test_pages_that_scripts_make_are_recognised() -> None:
    assert html_page("<div id=root></div><script src=app.js></script>", "https://a.example/").needs_script
    assert not html_page(f"<p>{STORY * 4}</p><script>1</script>", "https://a.example/").needs_script
    assert not html_page("<p>Short.</p>", "https://a.example/").needs_script


@pytest.mark.parametrize("body", [
    "<div>" * 20_000 + "deep", "<p>" + "x" * 300_000, "<a href='http://[broken'>x</a><p>a</p>", "<table>" * 300 + "t",
    "\x00\x00<p>nul</p>", "<!DOCTYPE x [<!ENTITY a 'b'>]><p>&a;</p>", "<p>&#xD800; &#0; lone</p>", "<html", "<!---->",
    "<base href='javascript:x'><a href='y'>z</a>",
])  # fmt: skip
def test_odd_pages_do_no_harm(body: str) -> None:
    assert isinstance(html_page(body, "https://a.example/"), Page)


def test_lines_are_wrapped_at_sentences_and_join_again() -> None:
    text = STORY * 5
    assert len(wrap(text)) > 2 and all(line.endswith(".") for line in wrap(text)) and join(wrap(text)) == text.strip()
    assert join(wrap(CHINESE * 4)) == CHINESE * 4 and all(columns(line) <= 160 for line in wrap(CHINESE * 4))
    assert "".join(wrap("x" * 500)) == "x" * 500 and wrap("") == [""]
    assert (
        language_of("这是中文"),
        language_of("これはペンです"),
        language_of("plain English words"),
        language_of("12"),
    ) == ("", "ja", "", "")  # too little to say
    assert (language_of(CHINESE), language_of(STORY)) == ("zh", "en")
