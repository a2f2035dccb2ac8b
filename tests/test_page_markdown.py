"""Markdown of the page, in a real browser: what comes out, and that streaming in pieces comes to the same.

    python -m pytest tests/test_page_markdown.py
"""

from __future__ import annotations

from tests.page_helpers import Desk

RENDER = """async (text) => {
    const {render} = await import("./js/markdown.js");
    const box = document.createElement("div");
    document.body.append(box);
    render(box, text);
    for (let i = 0; i < 100 && box.querySelector("code.math"); i++) await new Promise((r) => setTimeout(r, 20));
    const html = box.innerHTML;
    const words = box.innerText;
    box.remove();
    return [html, words];
}"""

# Feeds a text in pieces of every size given, and compares the end with the text drawn at once.
STREAM = """async ([text, sizes]) => {
    const {LiveMarkdown, render} = await import("./js/markdown.js");
    const whole = document.createElement("div");
    const box = document.createElement("div");
    document.body.append(whole, box);
    render(whole, text);
    for (let i = 0; i < 100 && whole.querySelector("code.math"); i++) await new Promise((r) => setTimeout(r, 20));
    render(whole, text);
    const wrong = [];
    for (const size of sizes) {
        const live = new LiveMarkdown(box);
        for (let at = size; at < text.length; at += size) live.update(text.slice(0, at));
        live.update(text, true);
        if (box.innerHTML !== whole.innerHTML) wrong.push([size, box.innerHTML, whole.innerHTML]);
    }
    whole.remove();
    box.remove();
    return wrong;
}"""

TEXTS = (
    "# Title\n\nA paragraph with **bold**, *italics* and `code`.\nNext line.\n\nTitle below\n===========\n\nend",
    "1. one\n2. two\n\n   more of two\n3. three\n   - inner\n   - inner\n\n1. one\n\n2. loose\n\n10. ten\n\ntext",
    "| a | b |\n|---|--:|\n| 1 | 2 |\n| 3 | 4 |\n\n> quote\n> more\n\n---\n\n- [x] done\n- [ ] open\n",
    "Before\n\n```python\ndef f(x):\n    return x  # $not$ maths\n\n\nf(1)\n```\n\nAfter `a`\n\n~~~\nplain\n~~~\n",
    "See [one][1] and [two].\n\nMore text.\n\n[1]: https://example.org/1\n[two]: https://example.org/2\n",
    "Sum $a+b$ and\n\n$$\nx = \\frac{1}{2}\n$$\n\n\\[ y \\]\n\nthen \\(z\\) costs $5 or $6.\r\nEnd.",
    "中文**重点：**后文。\n\n“引用”**“强调”**结束\n\n- 一\n- 二\n\n| 列 | 值 |\n|--|--|\n| 甲 | 乙 |\n",
    "<div>raw</div>\n\na <b>tag</b> and H<sub>2</sub>O<br>line\n\n<script>alert(1)</script>\n",
    "```js\nunclosed code\n\nmore",
    "",
    "   \n\n",
    "$$\nopen formula",
)


def test_streamed_text_ends_as_the_whole_text_would(desk: Desk) -> None:
    for text in TEXTS:
        assert desk.page.evaluate(STREAM, [text, [1, 2, 3, 7, 20]]) == [], text
    everything = "\n\n".join(TEXTS[:-4])
    assert desk.page.evaluate(STREAM, [everything, [1, 5, 64]]) == []


def test_what_comes_out(desk: Desk) -> None:
    def html(text: str) -> str:
        return str(desk.page.evaluate(RENDER, text)[0])

    assert "<strong>bold</strong>" in html("**bold**") and "<br>" in html("a\nb")
    link = html("[x](https://example.org/a) [m](mailto:a@b.c) <https://example.org/b>")
    assert link.count("<a ") == 3 and link.count('rel="noopener noreferrer nofollow"') == 3
    assert html("<div>shown</div>").count("&lt;div&gt;shown") == 1
    assert "H<sub>2</sub>O" in html("H<sub>2</sub>O")
    assert '<ol start="3">' in html("3. three\n4. four")
    assert 'align="right"' in html("| a |\n|--:|\n| 1 |")
    code = html("```python\nx = 1\n```")
    assert "copy-code" in code and "<figcaption>python" in code


def test_formulas(desk: Desk) -> None:
    def formulas(text: str) -> int:
        return str(desk.page.evaluate(RENDER, text)[0]).count('class="katex"')

    assert formulas("$x^2$ and \\(y\\)") == 2
    assert formulas("$$\nx\n$$\n\ntext\n\n\\[\ny\n\\]") == 2
    assert formulas("It costs $5 or $10, and $ 3 $.") == 0
    assert formulas("`$x$` and\n\n```\n$$y$$\n```") == 0
    assert formulas("\\$x\\$") == 0
    html, words = desk.page.evaluate(RENDER, "$\\undefined{x}$ and $\\frac{$")
    assert "undefined" in words  # a wrong formula shows its source
    html, words = desk.page.evaluate(RENDER, "$\\href{javascript:alert(1)}{x}$ $\\htmlClass{menu}{y}$")
    assert "href" not in html.replace("\\href", "") and 'class="menu"' not in html


def test_formulas_keep_their_styles(desk: Desk) -> None:
    """Nothing that KaTeX draws is lost to the cleaning or the page's policy: as many styles as in its own HTML."""
    desk.page.evaluate(RENDER, "$x$")
    sources = [
        r"\frac{a}{b}", r"\sqrt[3]{x}", r"\sum_{i=0}^n i^2", r"\begin{pmatrix}a&b\\c&d\end{pmatrix}", r"\vec{v}",
        r"\overbrace{x+y}^{z}", r"\cancel{x}", r"\text{中文}", r"\color{blue}{x}", r"\boxed{x}", r"\pmb{x}",
        r"\oiint x", r"\fcolorbox{red}{blue}{x}", r"\begin{cases}a\\b\end{cases}", r"\xrightarrow{abc}", r"\undefined",
    ]  # fmt: skip
    lost = desk.page.evaluate("""async (sources) => {
        const {render} = await import("./js/markdown.js");
        const box = document.createElement("div");
        document.body.append(box);
        const wrong = [];
        const count = (html) => (html.match(/ style="/g) || []).length;
        for (const source of sources) {
            render(box, "$" + source + "$");
            const options = {throwOnError: false, trust: false, strict: "ignore", errorColor: "currentColor"};
            const own = katex.renderToString(source, options);
            if (!count(own) || count(box.innerHTML) !== count(own)) wrong.push([source, own, box.innerHTML]);
        }
        return wrong;
    }""", sources)  # fmt: skip
    assert lost == []


def test_event_streams_are_read_however_they_are_cut(desk: Desk) -> None:
    """Line ends of all three kinds, comments, several data lines, characters cut in two."""
    text = ": hello\r\n\r\ndata: one\n\ndata:two\r\rdata: a\r\ndata: b\r\n\r\n"
    text += "event: x\nid: 3\ndata: 你好🙂\n\ndata: last"
    found = desk.page.evaluate("""async (text) => {
        const {serverEvents} = await import("./js/api.js");
        const bytes = new TextEncoder().encode(text);
        const results = new Set();
        for (const size of [1, 2, 3, 5, 1000]) {
            const body = new ReadableStream({start(controller) {
                for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
                controller.close();
            }});
            const events = [];
            for await (const data of serverEvents(body)) events.push(data);
            results.add(JSON.stringify(events));
        }
        return Array.from(results, (r) => JSON.parse(r));
    }""", text)  # fmt: skip
    assert found == [["one", "two", "a\nb", "你好🙂", "last"]]
