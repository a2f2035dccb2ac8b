"""Keys and values in INT8: what they cost in perplexity, and how much more context fits.

    python bench/kv.py model.gguf [model.gguf ...]

Text is scored as the engine computes it: pieces of 256 tokens run one after the other through the runner and its pool,
so that every token but the first of a piece attends to keys and values that were stored, in float16 and then in INT8.

Prints a table in Markdown, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval" / "wikitext-2" / "valid.txt"
PIECE = 256  # tokens of a pass
POOL_BYTES = 1 << 30  # for the context that fits


def nll(model: Any, windows: list[list[int]], kv_dtype: str) -> float:
    """Mean negative log-likelihood (nats) of every token but the first of each window."""
    from openglm.engine import Chunk, Engine, EngineOptions

    options = EngineOptions(n_parallel=1, kv_dtype=kv_dtype, pool_tokens=len(windows[0]) + 16)
    engine = Engine(model.engine.model, model.engine.special_ids, model.engine.vocab_size, options)
    runner, total, n = engine.runner, 0.0, 0
    pages = list(range(runner.n_pages))
    for ids in windows:
        for start in range(0, len(ids) - 1, PIECE):
            piece = ids[start : start + PIECE]
            positions = torch.arange(start, start + len(piece))[None]
            logits = runner.run([Chunk(piece, start, positions, pages, 0, len(piece))])[:, : engine.vocab_size]
            wanted = torch.tensor(ids[start + 1 : start + len(piece) + 1])
            logits = logits[: len(wanted)]
            found = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)
            total -= float(found.double().sum())
            n += len(wanted)
    return total / n


def main() -> None:
    parser = argparse.ArgumentParser(description="INT8 keys and values: perplexity and context")
    parser.add_argument("models", nargs="+", help=".gguf files or checkpoint folders of causal models")
    parser.add_argument("--text", type=Path, default=TEXT, help="UTF-8 text to score")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16)
    o = parser.parse_args()
    import openglm
    from openglm.model.paged import PagedPool

    rows = []
    print("| model | perplexity, float16 | INT8 | cost | tokens in a GiB, float16 | INT8 | ratio |")
    print("|---|---|---|---|---|---|---|")
    for path in o.models:
        model = openglm.load(path, device="cpu")
        ids = model.tokenizer.encode(o.text.read_text(encoding="utf-8")[: 8 * o.window * o.windows])
        windows = [ids[i * o.window : (i + 1) * o.window] for i in range(o.windows)]
        assert len(windows[-1]) == o.window, f"{o.text} is too short"
        row: dict[str, Any] = {"model": Path(path).name, "tokens": o.windows * (o.window - 1)}
        for name, dtype in (("float16", torch.float16), ("int8", torch.int8)):
            row[f"perplexity_{name}"] = math.exp(nll(model, windows, name))
            row[f"fits_{name}"] = POOL_BYTES // PagedPool.bytes_per_token(model.engine.config, dtype)
        row["cost"] = row["perplexity_int8"] / row["perplexity_float16"] - 1
        row["fits_ratio"] = row["fits_int8"] / row["fits_float16"]
        rows.append(row)
        print(f"| {row['model']} | {row['perplexity_float16']:.4f} | {row['perplexity_int8']:.4f} | {row['cost']:+.3%} "
              f"| {row['fits_float16']:,} | {row['fits_int8']:,} | {row['fits_ratio']:.2f} |", flush=True)  # fmt: skip
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
