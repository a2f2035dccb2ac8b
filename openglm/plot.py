"""Line plots as inline SVG, drawn without a library: axes, round ticks, hover titles, a legend that wraps.

    from openglm.plot import Series, line_plot
    svg = line_plot([Series("loss", [1, 2, 3], [9.7, 8.1, 7.5])], label="loss by step")

Colours come from the page's CSS, STYLE: classes c0..c5, line, points, level, grid, axis, mark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["STYLE", "Series", "line_plot", "number", "svg_file"]

MAX_POINTS = 400  # points a line is drawn with
MAX_HOVER = 50  # points a line shows its value at
WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 32


@dataclass(frozen=True)
class Series:
    """One line or set of points. style: "line", "points", or "level" (dashed). Values that are not finite are gaps."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int = 0
    style: Literal["line", "points", "level"] = "line"


def line_plot(
    series: Sequence[Series], *, log: bool = False, from_zero: bool = False, marks: Mapping[float, str] | None = None,
    form: Callable[[float], str] | None = None, label: str = "", x_name: str = "step", whole: bool = True,
) -> str:  # fmt: skip
    """An <svg> with axes, ticks, hover titles and a legend under it; "" when no value is finite.

    log: logarithmic y, values of zero and below are gaps. marks: x -> hover text of a red stroke on the x axis.
    form: a y value as text. x_name: what x counts; whole: only whole numbers of it.
    """
    form = form or number
    points = [[(x, y) for x, y in zip(s.xs, s.ys, strict=True) if _drawable(y, log)] for s in series]
    ys = [y for line in points for _, y in line]
    if not ys:
        return ""
    marks = marks or {}
    xs = [x for line in points for x, _ in line] + list(marks)
    x_ticks = _ticks(min(xs), max(xs), 5, whole=whole)
    y_ticks = _log_ticks(min(ys), max(ys)) if log else _ticks(0.0 if from_zero else min(ys), max(ys), 5)
    x_low, x_high = x_ticks[0], max(max(xs), x_ticks[0] + 1) if whole else x_ticks[-1]
    # A logarithmic axis ends at the values, a linear one at the next round number.
    y_low, y_high = (min(ys), max(*ys, 1.01 * min(ys))) if log else (y_ticks[0], y_ticks[-1])
    y_ticks = [y for y in y_ticks if y_low <= y <= y_high]
    scale: Callable[[float], float] = math.log10 if log else float
    span = (scale(y_high) - scale(y_low)) or 1.0

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (scale(y) - scale(y_low)) / span * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">']
    for y in y_ticks:
        text = html.escape(form(y))
        parts.append(f'<path class="grid" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>'
                     f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{text}</text>')  # fmt: skip
    base = HEIGHT - BOTTOM
    parts.append(f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    for x in (x for x in x_ticks if x_low <= x <= x_high):
        parts.append(f'<path class="axis" d="M{px(x):.1f} {base}v4"/>'
                     f'<text x="{px(x):.1f}" y="{base + 17}" text-anchor="middle">{number(x)}</text>')  # fmt: skip
    unit = html.escape(x_name)
    parts.append(f'<text class="unit" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{unit}</text>')
    for s, line in zip(series, points, strict=True):
        parts.append(_draw(s, line, px, py, form, x_name))
    for x, text in marks.items():
        parts.append(f'<path class="mark" d="M{px(x):.1f} {base}v-10"><title>{html.escape(text)}</title></path>')
    legend = "".join(
        f'<span class="c{s.color} {s.style}"><i></i>{html.escape(s.name)}</span>'
        for s, line in zip(series, points, strict=True) if line
    )  # fmt: skip
    legend += '<span class="skip"><i></i>step skipped</span>' if marks else ""
    return "".join(parts) + f'</svg><p class="legend">{legend}</p>'


def svg_file(plot: str, series: Sequence[Series]) -> str:
    """What `line_plot` made of the series as the text of an .svg file: colours and legend inside, on white."""
    inner = plot[plot.index(">") + 1 : plot.index("</svg>")]
    names = "".join(
        f'<text x="{LEFT}" y="{HEIGHT + 16 + 16 * i}" class="name c{s.color}">{html.escape(s.name)}</text>'
        for i, s in enumerate(series)
    )
    height = HEIGHT + 8 + 16 * len(series)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{2 * WIDTH}">'
        f"<style>{_FILE_STYLE}</style><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>{inner}{names}</svg>\n"
    )


def _draw(
    s: Series, line: Sequence[tuple[float, float]], px: Callable[[float], float], py: Callable[[float], float],
    form: Callable[[float], str], x_name: str,
) -> str:  # fmt: skip
    """The strokes or dots of one series, with invisible discs that carry the hover titles of a line."""
    shown = line if s.style == "points" else _envelope(line, MAX_POINTS)
    out = []
    if s.style != "points" and shown:
        path = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in shown)
        out.append(f'<path class="c{s.color} {s.style}" d="M{path}"/>')
    dots = line if s.style == "points" else _thin(line, MAX_HOVER)
    kind = f"c{s.color} dot" if s.style == "points" else "hover"
    for x, y in dots:
        title = f"{s.name}: {form(y)} at {x_name} {number(x, exact=True)}"
        out.append(f'<circle class="{kind}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="{3 if s.style == "points" else 7}">'
                   f"<title>{html.escape(title)}</title></circle>")  # fmt: skip
    return "".join(out)


def _drawable(y: Any, log: bool) -> bool:
    return isinstance(y, int | float) and math.isfinite(y) and (y > 0 or not log)


def _thin(line: Sequence[tuple[float, float]], n: int) -> list[tuple[float, float]]:
    """At most n points, evenly chosen, the ends among them."""
    if len(line) <= n:
        return list(line)
    return [line[round(i * (len(line) - 1) / (n - 1))] for i in range(n)]


def _envelope(line: Sequence[tuple[float, float]], n: int) -> list[tuple[float, float]]:
    """At most about n points in which every peak and dip is still there: the extremes of n / 2 stretches."""
    if len(line) <= n:
        return list(line)
    size, out = len(line) / (n // 2), []
    for i in range(n // 2):
        part = line[round(i * size) : round((i + 1) * size)]
        out += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return out


def _ticks(low: float, high: float, n: int, whole: bool = False) -> list[float]:
    """About n round values from at or below `low` to at or above `high`."""
    if high <= low:
        high, low = high + (abs(high) * 0.1 or 1), low - (0 if whole else abs(low) * 0.1)
    step = (high - low) / n
    unit = 10.0 ** math.floor(math.log10(step))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= step * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between the values; with 2 and 5 between them where they span little."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if last - first <= 2:
        return [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    return [10.0**e for e in range(first, last + 1, -(-(last - first) // 6))]


def number(value: float, exact: bool = False) -> str:
    """Short text: 0.0003 -> 3e-4, 12000 -> 12k."""
    if value == 0:
        return "0"
    size = abs(value)
    if exact and value == int(value):
        return f"{value:,.0f}"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{unit}"
    if size < 1e-2:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5b6570;--line:#d9dee3;--page:#fff;--card:#f6f8fa;--hit:#fff3b0;
--c0:#0a66c2;--c1:#c2540a;--c2:#1a7f4b;--c3:#8b3fa8;--c4:#8a6d00;--c5:#b3365b;--bad:#d1242f}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa5b0;--line:#343b43;--page:#14171a;--card:#1c2024;
--hit:#5a4d00;--c0:#6cb2ff;--c1:#ff9d5c;--c2:#5fd096;--c3:#d09bf0;--c4:#e0c04c;--c5:#ff8fae;--bad:#ff7b72}}
body{margin:0 auto;padding:1rem;max-width:1100px;background:var(--page);color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",sans-serif}
h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:0}h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{margin:.2rem 0 .5rem;color:var(--soft)}h3,td,pre,li{overflow-wrap:anywhere;white-space:pre-wrap}
table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;padding:.25rem .6rem .25rem 0;
border-bottom:1px solid var(--line)}th{font-weight:500;color:var(--soft);width:min(12rem,40%)}.samples th{width:4rem}
td{font-variant-numeric:tabular-nums}mark{background:var(--hit);color:inherit;border-radius:3px;padding:0 2px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1rem;margin:1.2rem 0}
figure{margin:0;padding:.8rem;background:var(--card);border:1px solid var(--line);border-radius:8px;min-width:0;
display:flex;flex-direction:column}figcaption{flex:1}figcaption p{font-size:.85rem}
svg{display:block;width:100%;height:auto}svg text{font-size:12px;fill:var(--soft)}
path{fill:none;vector-effect:non-scaling-stroke}.grid{stroke:var(--line)}.axis{stroke:var(--soft)}
path.line{stroke-width:1.6;stroke-linejoin:round}path.level{stroke-width:1.6;stroke-dasharray:6 4}
.mark{stroke:var(--bad);stroke-width:2}.hover{fill:transparent}
.c0{stroke:var(--c0);--it:var(--c0)}.c1{stroke:var(--c1);--it:var(--c1)}.c2{stroke:var(--c2);--it:var(--c2)}
.c3{stroke:var(--c3);--it:var(--c3)}.c4{stroke:var(--c4);--it:var(--c4)}.c5{stroke:var(--c5);--it:var(--c5)}
.dot{fill:var(--card);stroke-width:1.6}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.85rem;margin:.4rem 0 0}
.legend i{display:inline-block;width:1.1rem;border-top:2px solid var(--it);margin-right:.4rem;vertical-align:middle}
.legend .level i{border-top-style:dashed}
.legend .points i{width:.45rem;height:.45rem;border:2px solid var(--it);border-radius:50%}
.legend .skip{--it:var(--bad)}.legend .skip i{width:0;height:.7rem;border:0;border-left:2px solid var(--it)}
.losses{margin-top:1rem}
details{margin:1rem 0}summary{cursor:pointer;font-weight:500}section{margin:1.5rem 0}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem;font-size:.85rem}
"""

_FILE_STYLE = """
text{font:12px system-ui,sans-serif;fill:#5b6570}path{fill:none}.grid{stroke:#d9dee3}.axis{stroke:#5b6570}
path.line{stroke-width:1.6;stroke-linejoin:round}path.level{stroke-width:1.6;stroke-dasharray:6 4}
.mark{stroke:#d1242f;stroke-width:2}.hover{fill:transparent;stroke:none}.dot{fill:#fff;stroke-width:1.6}
.c0{stroke:#0a66c2}.c1{stroke:#c2540a}.c2{stroke:#1a7f4b}.c3{stroke:#8b3fa8}.c4{stroke:#8a6d00}.c5{stroke:#b3365b}
text.name{stroke:none}text.c0{fill:#0a66c2}text.c1{fill:#c2540a}text.c2{fill:#1a7f4b}text.c3{fill:#8b3fa8}
text.c4{fill:#8a6d00}text.c5{fill:#b3365b}
"""
