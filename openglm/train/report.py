"""report.html of a run: one self-contained page from run.yaml and log.jsonl, of a finished run or a running one.

    python -c "from openglm.train.report import write_report; print(write_report('runs/out/tiny'))"

Plots are inline SVG (openglm/plot.py); nothing is fetched, nothing runs. What the log does not hold is left out.
"""

from __future__ import annotations

import html
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from openglm.plot import STYLE, Series, line_plot

__all__ = ["read_log", "write_report"]

Event = Mapping[str, Any]
KIND_NAMES = {
    "mask": "[MASK] spans", "smask": "[sMASK] sentences", "gmask": "[gMASK] continuation", "lm": "next token",
    "sft": "dialogue", "loss": "loss",
}  # fmt: skip
MAX_SAMPLES = 10  # samples shown of one prompt


def write_report(run_dir: str | Path) -> Path:
    """Write run_dir/report.html and return its path. ValueError when the folder holds no log of a run."""
    run_dir = Path(run_dir)
    page = _page(run_dir.resolve().name, read_log(run_dir / "log.jsonl"), _config_text(run_dir / "run.yaml"))
    path = run_dir / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(page)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return path


def read_log(path: Path) -> list[dict[str, Any]]:
    """Events of a log, a line cut short left out. ValueError when there is no file or no step in it."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot read the log ({error.strerror}); give the folder of a training run") from None
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    if not any(event.get("event") == "step" for event in events):
        raise ValueError(f"{path}: no training step is logged yet; write the report when the run has made one")
    return events


def _config_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# The page ---------------------------------------------------------------------------------------------------------


def _page(name: str, events: Sequence[Event], config: str) -> str:
    steps = [e for e in events if e.get("event") == "step"]
    reasons = {e.get("step"): str(e.get("reason", "")) for e in events if e.get("event") == "skip"}
    skipped: dict[float, str] = {
        e["step"]: f"step {e['step']} skipped: {reasons.get(e['step'], '')}".rstrip(": ")
        for e in steps if e.get("skipped") and "step" in e
    }  # fmt: skip
    planned = _planned(events)
    norms = [_column(steps, "grad_norm", "whole gradient", 0), _column(steps, "embed_grad_norm", "embedding", 1)]
    speed, use = _smooth(_column(steps, "tokens_per_s", "tokens/s", 0)), _smooth(_column(steps, "mfu", "MFU", 2))
    plots = [
        ("Loss", "Mean loss per target token in nats, by kind of training example. Lines: training, smoothed. Dots: "
         "held-out text that is never trained on, the same each time.",
         line_plot(_losses(steps, events), marks=skipped, label="loss by training step")),
        ("Gradient norm", "Length of the whole gradient before clipping, and of the embedding's part, which is the "
         "first to grow when a run becomes unstable. Logarithmic.",
         line_plot(norms, log=True, marks=skipped, label="gradient norm by training step")),
        ("Learning rate", "Warm-up, then decay.",
         line_plot([_column(steps, "lr", "learning rate", 0)], from_zero=True, label="learning rate")),
        ("Throughput", "Input tokens a second, padding not counted.",
         line_plot([speed], from_zero=True, label="tokens per second")),
        ("Model FLOP/s utilisation", "Arithmetic that the model needs per second, as a share of what a large matrix "
         "product reaches on this machine.",
         line_plot([use], from_zero=True, form=_percent, label="MFU")),
        ("Memory", "GiB of memory in use after each step, and the peak that was planned before the first.",
         line_plot(_memory(steps, planned), from_zero=True, label="memory in GiB")),
        ("Batch size", "Rows of one optimizer step.",
         line_plot([_column(steps, "batch_rows", "rows", 0)], from_zero=True, label="batch size")),
    ]  # fmt: skip
    figures = "".join(
        f"<figure><figcaption><h2>{title}</h2><p>{text}</p></figcaption>{plot}</figure>"
        for title, text, plot in plots if plot
    )  # fmt: skip
    config_block = (
        f"<details><summary>Run config, resolved</summary><pre>{html.escape(config)}</pre></details>" if config else ""
    )
    title = html.escape(name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Training run {title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1>Training run {title}</h1>{_totals(events, steps, skipped, planned)}"
        f'<div class="plots">{figures}</div>{_samples(events)}{_skips(skipped)}{config_block}</body></html>\n'
    )


def _column(steps: Iterable[Event], key: str, name: str, color: int) -> Series:
    """The values of one key by step; steps without it are left out."""
    pairs = [(e["step"], e[key]) for e in steps if isinstance(e.get(key), int | float) and "step" in e]
    return Series(name, [x for x, _ in pairs], [y for _, y in pairs], color)


def _smooth(s: Series) -> Series:
    """Exponential mean over about a fiftieth of the run; values that are not finite do not enter it."""
    keep = 1.0 - 1.0 / max(1.0, len(s.ys) / 50)
    mean, weight, ys = 0.0, 0.0, []
    for y in s.ys:
        if math.isfinite(y):
            mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        ys.append(mean / weight if weight and math.isfinite(y) else math.nan)
    return Series(s.name, s.xs, ys, s.color, s.style)


def _kinds(event: Event) -> dict[str, float]:
    """Losses by kind of a step or an evaluation; the one loss when it has no kinds."""
    losses = event.get("losses")
    if not isinstance(losses, Mapping) or not losses:
        losses = {"loss": event.get("loss")}
    return {kind: float(value) for kind, value in losses.items() if isinstance(value, int | float)}


def _losses(steps: Sequence[Event], events: Sequence[Event]) -> list[Series]:
    """Two series a kind: training, smoothed, and held out; the known kinds first."""
    evals = [e for e in events if e.get("event") == "eval"]
    order = list(KIND_NAMES)
    kinds = sorted({kind for e in (*steps, *evals) for kind in _kinds(e)}, key=lambda k: ([*order, k].index(k), k))
    out = []
    for color, kind in enumerate(kinds):
        name = KIND_NAMES.get(kind, kind)
        trained = [(e["step"], _kinds(e)[kind]) for e in steps if kind in _kinds(e) and not e.get("skipped")]
        out.append(_smooth(Series(name, [x for x, _ in trained], [y for _, y in trained], color % 6)))
        held_out = [(e["step"], _kinds(e)[kind]) for e in evals if kind in _kinds(e)]
        out.append(Series(f"{name}, held out", [x for x, _ in held_out], [y for _, y in held_out], color % 6, "points"))
    return out


def _memory(steps: Sequence[Event], planned: float | None) -> list[Series]:
    found = [_column(steps, "rss_bytes", "process", 0), _column(steps, "device_bytes", "GPU, peak", 1)]
    out = [Series(s.name, s.xs, [y / 2**30 for y in s.ys], s.color) for s in found]
    if planned is not None:
        ends = [steps[0].get("step", 0), steps[-1].get("step", 0)]
        out.append(Series("planned peak", ends, [planned / 2**30] * 2, 3, "level"))
    return out


def _planned(events: Iterable[Event]) -> float | None:
    """Planned peak of the last start or resume."""
    found = [e["planned_bytes"] for e in events if isinstance(e.get("planned_bytes"), int | float)]
    return float(found[-1]) if found else None


# Tables -----------------------------------------------------------------------------------------------------------


def _totals(
    events: Sequence[Event], steps: Sequence[Event], skipped: Mapping[float, str], planned: float | None
) -> str:
    last, end = steps[-1], [e for e in events if e.get("event") == "end"]
    state = "running, or killed" if not end else "finished" if end[-1].get("finished", True) else "stopped early"
    rows = [("State", state), ("Steps", _count(last.get("step"))), ("Tokens", _count(last.get("tokens")))]
    seconds = _wall_seconds(events)
    if seconds > 0:
        rows.append(("Wall time", _duration(seconds)))
        if isinstance(last.get("tokens"), int | float):
            rows.append(("Tokens a second over all", f"{last['tokens'] / seconds:,.0f}"))
    rss = [e["rss_bytes"] for e in steps if isinstance(e.get("rss_bytes"), int | float)]
    if rss:
        rows.append(("Memory, largest after a step", _bytes(max(rss))))
    if planned is not None:
        rows.append(("Memory, planned peak", _bytes(planned)))
    rows.append(("Skipped steps", _count(len(skipped))))
    resumes = sum(e.get("event") == "resume" for e in events)
    if resumes:
        rows.append(("Resumed", f"{resumes} times" if resumes > 1 else "once"))
    rows.append(("Machine", _machine(events)))
    cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
    return f"<table>{cells}</table>{_last_losses(_losses(steps, events))}"


def _last_losses(losses: Sequence[Series]) -> str:
    """Table of the last losses: a row a kind, training (smoothed) and held out."""

    def last(s: Series) -> str:
        found = [y for y in s.ys if math.isfinite(y)]
        return f"{found[-1]:.4f}" if found else "none yet"

    rows = "".join(
        f"<tr><th>{html.escape(train.name)}</th><td>{last(train)}</td><td>{last(held_out)}</td></tr>"
        for train, held_out in zip(losses[::2], losses[1::2], strict=True)
    )
    head = "<tr><th>last loss</th><th>training, smoothed</th><th>held out</th></tr>"
    return f'<table class="losses">{head}{rows}</table>'


def _wall_seconds(events: Iterable[Event]) -> float:
    """Time between events, the pauses before a resume left out."""
    total, before = 0.0, None
    for event in events:
        now = event.get("time")
        if not isinstance(now, int | float):
            continue
        if before is not None and event.get("event") not in ("start", "resume"):
            total += max(0.0, now - before)
        before = now
    return total


def _machine(events: Iterable[Event]) -> str:
    """What the run says it ran on, else the machine that writes the report."""
    for event in events:
        if isinstance(event.get("machine"), str):
            return str(event["machine"])
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    try:
        torch = f", torch {metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        torch = ""
    device = next((f", device {e['device']}" for e in events if "device" in e), "")
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}{torch}{device}"


def _samples(events: Sequence[Event]) -> str:
    """Samples by prompt, as training went on. A sample's `fills` are marked in its prompt, else `text` is shown."""
    groups: dict[str, list[Event]] = {}
    for e in events:
        if e.get("event") == "sample":
            groups.setdefault(str(e.get("prompt", "")), []).append(e)
    if not groups:
        return ""
    out = ["<section><h2>Samples as training went on</h2>"
           "<p>What the model of each step puts in the blanks of fixed prompts.</p>"]  # fmt: skip
    for prompt, samples in groups.items():
        shown = [samples[round(i)] for i in _spread(len(samples), MAX_SAMPLES)]
        rows = "".join(f"<tr><th>{_count(e.get('step'))}</th><td>{_filled(prompt, e)}</td></tr>" for e in shown)
        head = "<tr><th>step</th><td></td></tr>"
        out.append(f'<h3>{html.escape(prompt)}</h3><table class="samples">{head}{rows}</table>')
    return "".join(out) + "</section>"


def _spread(n: int, limit: int) -> list[int]:
    return list(range(n)) if n <= limit else [round(i * (n - 1) / (limit - 1)) for i in range(limit)]


def _filled(prompt: str, sample: Event) -> str:
    fills = sample.get("fills")
    if isinstance(fills, list) and fills:
        for name in ("[MASK]", "[sMASK]", "[gMASK]"):
            pieces = prompt.split(name)
            if len(pieces) == len(fills) + 1:
                marked = [f"<mark>{html.escape(str(fill))}</mark>" for fill in fills]
                tail = [html.escape(piece) for piece in pieces]
                return tail[0] + "".join(m + t for m, t in zip(marked, tail[1:], strict=True))
        return " · ".join(f"<mark>{html.escape(str(fill))}</mark>" for fill in fills)
    if "text" in sample:
        return html.escape(str(sample["text"]))
    rest = {key: value for key, value in sample.items() if key not in ("event", "step", "prompt", "time")}
    return html.escape(", ".join(f"{key}: {value}" for key, value in rest.items()))


def _skips(skipped: Mapping[float, str]) -> str:
    if not skipped:
        return ""
    lines = "".join(f"<li>{html.escape(text)}</li>" for text in list(skipped.values())[:200])
    more = f"<p>and {len(skipped) - 200} more</p>" if len(skipped) > 200 else ""
    return f"<details><summary>Skipped steps ({len(skipped)})</summary><ul>{lines}</ul>{more}</details>"


def _count(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) and math.isfinite(value) else "unknown"


def _bytes(value: float) -> str:
    return "0" if value == 0 else f"{value / 2**30:.3g} GiB" if value >= 2**30 else f"{value / 2**20:.4g} MiB"


def _percent(value: float) -> str:
    return f"{100 * value:.4g}%"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{s} s"
