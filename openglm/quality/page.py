"""The quality report as one self-contained page: figures, error by block, weights before and after.

    python -m pytest -q tests/test_quality.py
"""

from __future__ import annotations

import html
from pathlib import Path

from openglm.plot import STYLE, Series, line_plot
from openglm.quality.measure import Histogram, Quality

__all__ = ["write_report"]


def write_report(path: str | Path, quality: Quality) -> None:
    """Write the page; an existing one is replaced when the new one is complete."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(_page(quality), encoding="utf-8")
    temporary.replace(path)


def _page(q: Quality) -> str:
    title = html.escape(f"{q.converted} beside {q.source}")
    plots = [
        ("Error behind each block", "Distance of the hidden states from the source's, as a share of their length, over "
         "all texts.", _by_block([Series("hidden states", range(len(q.hidden_error)), q.hidden_error)])),
        ("Error of the weights", "Distance of each matrix from the source's, as a share of its length.",
         _by_block([Series(n, range(len(v)), v, i) for i, (n, v) in enumerate(q.weight_error.items())])
         if q.weight_error else ""),
        *((f"Weights of {h.name}", "Share of weights by value, over four standard deviations; the outermost bins hold "
           "what lies beyond.", _bars(h)) for h in q.histograms),
    ]  # fmt: skip
    figures = "".join(
        f"<figure><figcaption><h2>{html.escape(name)}</h2><p>{text}</p></figcaption>{plot}</figure>"
        for name, text, plot in plots if plot
    )  # fmt: skip
    note = "" if q.weight_error else (
        "<p>Scales were folded into norms and neighbouring matrices, so single matrices cannot be compared.</p>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body>'
        f'<h1>{title}</h1>{_table(q)}{note}<div class="plots">{figures}</div></body></html>\n'
    )


def _table(q: Quality) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(t.name)}</td><td>{t.tokens:,}</td><td>{t.source_perplexity:.3f}</td>"
        f"<td>{t.perplexity:.3f} ({100 * (t.perplexity / t.source_perplexity - 1):+.2f} %)</td>"
        f"<td>{t.kl_divergence:.5f}</td><td>{100 * t.top1_agreement:.1f} %</td></tr>"
        for t in q.texts
    )  # fmt: skip
    size = f"{q.source_bytes / 2**20:,.1f} MiB before, {q.n_bytes / 2**20:,.1f} MiB after"
    return (
        f"<p>{size} ({q.source_bytes / q.n_bytes:.2f} times as small).</p><table><tr><th>text</th><th>tokens</th>"
        "<th>perplexity before</th><th>after</th><th>KL divergence, nats a token</th><th>same top token</th></tr>"
        f"{rows}</table>"
    )


def _by_block(series: list[Series]) -> str:
    return line_plot(series, from_zero=True, label="relative error by block", x_name="block")


def _bars(h: Histogram) -> str:
    width = (h.high - h.low) / len(h.source)
    xs = [h.low + (i + 0.5) * width for i in range(len(h.source))]
    series = [Series("source", xs, h.source), Series("converted", xs, h.converted, 1)]
    return line_plot(series, from_zero=True, label=f"histogram of {h.name}", x_name="weight", whole=False)
