"""The run report: what the log holds is on the page, escaped, and what it does not hold does not break it."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from openglm.plot import Series, line_plot, number
from openglm.train.progress import RunLog
from openglm.train.report import write_report


def write_log(folder: Path, events: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
    return folder


def step(number: int, **values: Any) -> dict[str, Any]:
    return {
        "event": "step", "step": number, "tokens": 1000 * number, "loss": 9.0 / number,
        "losses": {"gmask": 9.0 / number, "mask": 8.0 / number}, "grad_norm": 1.5, "embed_grad_norm": 0.25, "lr": 3e-4,
        "batch_rows": 8, "tokens_per_s": 2500.0, "mfu": 0.3, "rss_bytes": 2**30, "skipped": False,
        "time": 1e9 + 2.0 * number, **values,
    }  # fmt: skip


def full_run() -> list[dict[str, Any]]:
    steps = [step(i) for i in range(1, 21)]
    steps[9] = step(10, loss=math.nan, losses={}, grad_norm=math.inf, skipped=True)
    return [
        {"event": "start", "step": 0, "time": 1e9, "device": "cpu", "planned_bytes": 3 * 2**30},
        *steps,
        {"event": "skip", "step": 10, "reason": "loss is not finite"},
        {"event": "eval", "step": 20, "tokens": 20000, "loss": 0.5, "losses": {"gmask": 0.6125, "mask": 0.4}},
        {
            "event": "sample",
            "step": 20,
            "prompt": "Paris is the [MASK] of [MASK].",
            "fills": ["<b>capital</b>", "法国"],
        },
        {"event": "sample", "step": 20, "prompt": "Once [gMASK]", "text": "<script>alert(1)</script> & more"},
        {"event": "end", "step": 20, "finished": True, "time": 1e9 + 40},
    ]


def plots(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]


def test_everything_in_the_log_is_on_the_page(tmp_path: Path) -> None:
    run = write_log(tmp_path / "my-run", full_run())
    (run / "run.yaml").write_text("objective: infill  # <mine>\nsteps: 20\n")
    path = write_report(run)
    assert path == run / "report.html"
    page = path.read_text(encoding="utf-8")
    for title in ("Loss", "Gradient norm", "Learning rate", "Throughput", "utilisation", "Memory", "Batch size"):
        assert re.search(f"<h2>[^<]*{title}</h2>", page), title
    assert len(plots(page)) == 7
    assert "Training run my-run" in page
    assert "objective: infill  # &lt;mine&gt;" in page
    assert "<td>finished</td>" in page and "<td>20,000</td>" in page and "<td>40 s</td>" in page
    assert "<td>3 GiB</td>" in page  # the planned peak
    assert "<td>0.6125</td>" in page  # held-out loss of a kind
    assert "step 10 skipped: loss is not finite" in page
    assert "[gMASK] continuation, held out: 0.6125 at step 20" in page  # hover title of an evaluation


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    page = write_report(write_log(tmp_path, full_run())).read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|<img|<iframe|url\(|@import|https?://", page)
    assert not list(tmp_path.glob("*.tmp"))


def test_samples_are_escaped_and_their_blanks_marked(tmp_path: Path) -> None:
    page = write_report(write_log(tmp_path, full_run())).read_text(encoding="utf-8")
    assert "Paris is the <mark>&lt;b&gt;capital&lt;/b&gt;</mark> of <mark>法国</mark>." in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page


def test_missing_fields_and_damaged_lines_are_left_out(tmp_path: Path) -> None:
    write_log(tmp_path, [{"event": "step", "step": 1, "loss": 2.0}, {"event": "step"}, {"event": "step", "step": 2}])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('[1, 2]\n{"event": "step", "step": 3, "lo')
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert len(plots(page)) == 1 and "<h2>Loss</h2>" in page
    assert "running, or killed" in page


def test_a_log_without_steps_is_one_line_of_advice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the log"):
        write_report(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="no training step is logged yet"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_pauses_before_a_resume_are_not_wall_time(tmp_path: Path) -> None:
    events = [{"event": "start", "step": 0, "time": 0.0}, step(1, time=10.0),
              {"event": "resume", "step": 1, "time": 5000.0}, step(2, time=5007.0)]  # fmt: skip
    page = write_report(write_log(tmp_path, events)).read_text(encoding="utf-8")
    assert "<th>Wall time</th><td>17 s</td>" in page and "<th>Resumed</th><td>once</td>" in page


def test_it_reads_what_the_run_log_writes(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for index in (1, 2):
        entry = step(index)
        log.write(entry.pop("event"), entry)
    log.close()
    assert len(plots(write_report(tmp_path).read_text(encoding="utf-8"))) == 7


def test_a_line_ends_where_its_values_say() -> None:
    svg = line_plot([Series("loss", [0, 50, 100], [10.0, 5.0, 0.0])])
    root = ElementTree.fromstring(svg[: svg.index("</svg>") + 6])
    (line,) = [p for p in root.iter("path") if "line" in p.get("class", "")]
    points = [tuple(map(float, p.split())) for p in line.get("d", "")[1:].split("L")]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2 and x1 - x0 == pytest.approx(x2 - x1)
    assert y0 < y1 < y2 and y1 - y0 == pytest.approx(y2 - y1)  # SVG's y grows downwards
    ticks = {t.text: float(t.get("y", "")) - 4 for t in root.iter("text") if t.get("text-anchor") == "end"}
    assert ticks["10"] == pytest.approx(y0) and ticks["0"] == pytest.approx(y2)


def test_a_logarithmic_axis_spaces_decades_evenly_and_drops_zeros() -> None:
    svg = line_plot([Series("norm", [0, 1, 2, 3], [0.0, 0.01, 1.0, 100.0])], log=True)
    root = ElementTree.fromstring(svg[: svg.index("</svg>") + 6])
    (line,) = [p for p in root.iter("path") if "line" in p.get("class", "")]
    ys = [float(p.split()[1]) for p in line.get("d", "")[1:].split("L")]
    assert len(ys) == 3 and ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)


def test_a_long_line_keeps_its_peaks() -> None:
    ys = [1.0] * 50_000
    ys[31_337] = 7.0
    svg = line_plot([Series("norm", range(len(ys)), ys)])
    assert len(svg) < 20_000
    root = ElementTree.fromstring(svg[: svg.index("</svg>") + 6])
    (line,) = [p for p in root.iter("path") if "line" in p.get("class", "")]
    heights = [float(p.split()[1]) for p in line.get("d", "")[1:].split("L")]
    assert max(heights) - min(heights) > 100


@pytest.mark.parametrize("ys", [[], [math.nan, math.inf]])
def test_nothing_to_draw_is_no_plot(ys: list[float]) -> None:
    assert line_plot([Series("loss", range(len(ys)), ys)]) == ""


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (3e-4, "3e-4"), (0.00015, "1.5e-4"), (2.5, "2.5"), (12000, "12k"), (1.5e6, "1.5M")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [-3.0, -3.0], [1e-12, 1e12]])
@pytest.mark.parametrize("log", [False, True])
def test_odd_ranges_are_drawn(values: list[float], log: bool) -> None:
    svg = line_plot([Series("x", range(len(values)), values)], log=log)
    assert "nan" not in svg and "inf" not in svg
    assert bool(svg) == (not log or max(values) > 0)
