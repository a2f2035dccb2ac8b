"""Long contexts: needles found in a long text, and memory and time by the length of the context.

    python bench/longcontext.py needle model.gguf --lengths 2048 8192
    python bench/longcontext.py memory --lengths 8192 32768 131072 --plot memory.svg

needle: in a text of each length, five sentences at different depths name five numbers; each is asked for. The text is
read once: the four later questions find it in the prefix cache.
memory: each length in a process of its own. As computing the keys and values of a very long text takes hours (attention
is quadratic), those of all but the last 512 tokens are random numbers, written straight into the pool; then the
last piece of the prompt and some tokens of the answer are run, as the engine runs them. `--whole` computes everything.

Prints a table in Markdown, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval" / "wikitext-2" / "valid.txt"
NEEDLES = [(0.05, "Paris", 48213), (0.25, "Cairo", 70956), (0.5, "Lima", 15387), (0.75, "Oslo", 92604),
           (0.95, "Tokyo", 36871)]  # fmt: skip
STEP = 512  # tokens of a pass
N_DECODE = 8
PRESET = "random:glm-edge-1.5b?quantize=int4"


# -------------------------------------------------------------------- needles


def needle(o: argparse.Namespace) -> dict[str, Any]:
    import openglm
    from openglm.engine import Engine, EngineOptions

    model = openglm.load(o.model, device="cpu")
    old, rows = model.engine, []
    print("| tokens | found at depth " + " | ".join(f"{depth:.0%}" for depth, _, _ in NEEDLES)
          + " | first answer, s | later ones, s |\n|" + "---|" * 8)  # fmt: skip
    for length in o.lengths:
        options = EngineOptions(n_parallel=1, pool_tokens=length + 256, kv_dtype=o.kv_dtype)
        model.engine = Engine(old.model, old.special_ids, old.vocab_size, options)
        haystack = haystack_of(model, o.text.read_text(encoding="utf-8"), length)
        found, seconds = [], []
        for _, city, number in NEEDLES:
            question = model.tokenizer.encode(f"\n\nThe secret number of {city} is")
            start = time.perf_counter()
            answer = model.generate([*haystack, *question], temperature=0.0, max_new_tokens=10)
            seconds.append(time.perf_counter() - start)
            found.append(str(number) in answer)
        row = {"tokens": len(haystack), "found": found, "first_s": round(seconds[0], 1)}
        row["later_s"] = round(sum(seconds[1:]) / (len(seconds) - 1), 2)
        rows.append(row)
        print(f"| {row['tokens']:,} | " + " | ".join("yes" if x else "no" for x in found)
              + f" | {row['first_s']} | {row['later_s']} |", flush=True)  # fmt: skip
    return {"model": Path(o.model).name, "rows": rows}


def haystack_of(model: Any, text: str, length: int) -> list[int]:
    """Ids of the text, as many as fit with the needles and a question into `length`."""
    encode = model.tokenizer.encode
    needles = [(depth, encode(f"\n\nThe secret number of {city} is {number}.\n\n")) for depth, city, number in NEEDLES]
    n_text = length - sum(len(ids) for _, ids in needles) - 32
    ids = encode(text[: 8 * n_text])[:n_text]
    assert len(ids) == n_text, "the text is too short"
    for depth, sentence in sorted(needles, reverse=True):
        at = int(depth * n_text)
        ids[at:at] = sentence
    return ids


# -------------------------------------------------------------------- memory


def memory(o: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    print("| tokens | weights | keys and values | the rest | peak, MiB | last 512 tokens, s | next token, ms |")
    print("|---|---|---|---|---|---|---|")
    for length in o.lengths:
        command = [sys.executable, __file__, "one", o.reference, str(length), str(o.kv_dtype), str(int(o.whole))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{length} tokens failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        rest = row["peak_mib"] - row["weights_mib"] - row["kv_mib"]
        print(f"| {length:,} | {row['weights_mib']:,.0f} | {row['kv_mib']:,.0f} | {rest:,.0f} | {row['peak_mib']:,.0f} "
              f"| {row['last_s']:.2f} | {row['token_ms']:.0f} |", flush=True)  # fmt: skip
    if o.plot is not None:
        write_plot(o.plot, rows)
    return {"reference": o.reference, "rows": rows}


def one(reference: str, length: int, kv_dtype: str | None, whole: bool) -> dict[str, Any]:
    import torch

    import openglm
    from openglm.engine import Chunk, Engine, EngineOptions
    from openglm.model.load import weight_bytes

    sign = "&" if "?" in reference else "?"
    model = openglm.load(f"{reference}{sign}max_seq_len={length + STEP}", device="cpu").engine.model
    options = EngineOptions(n_parallel=1, pool_tokens=length + STEP, kv_dtype=kv_dtype)
    runner: Any = Engine(model, {}, options=options).runner
    pages = list(range(runner.n_pages))

    def run(start: int, n: int) -> float:
        ids = [(7 * i) % 1000 for i in range(n)]
        begin = time.perf_counter()
        runner.run([Chunk(ids, start, torch.arange(start, start + n)[None], pages, 0, 1)])
        return time.perf_counter() - begin

    first = 0 if whole else length - STEP
    fill(runner, first)
    pieces = [run(start, STEP) for start in range(first, length, STEP)]
    tokens = sorted(run(length + i, 1) for i in range(N_DECODE))
    mib = 1024 * 1024
    return {
        "tokens": length, "weights_mib": weight_bytes(model) / mib, "kv_mib": runner.kv_bytes / mib,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "last_s": pieces[-1],
        "prefill_s": sum(pieces) if whole else None, "token_ms": 1e3 * tokens[N_DECODE // 2],
    }  # fmt: skip


def fill(runner: Any, n_tokens: int) -> None:
    """Random keys and values for the first n_tokens of every layer, a page at a time."""
    import torch

    n_pages = n_tokens // runner.page_size
    random = torch.randn(runner._keys[0, 0].shape, generator=torch.Generator().manual_seed(0))
    if runner._keys.dtype == torch.int8:
        random = (random * 30).round().clamp(-127, 127)
        for scales in runner._scales:
            scales[:, :n_pages] = 1 / 30
    for tensor in (runner._keys, runner._values):
        tensor[:, :n_pages] = random.to(tensor.dtype)


def write_plot(path: Path, rows: list[dict[str, Any]]) -> None:
    from openglm.plot import Series, line_plot, svg_file

    xs = [row["tokens"] for row in rows]
    series = [
        Series("peak memory of the process, MiB", xs, [row["peak_mib"] for row in rows]),
        Series("weights, keys and values, MiB", xs, [row["weights_mib"] + row["kv_mib"] for row in rows], 1, "level"),
    ]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(svg_file(line_plot(series, from_zero=True, x_name="tokens of context"), series))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        reference, length, kv_dtype, whole = sys.argv[2:]
        print(json.dumps(one(reference, int(length), None if kv_dtype == "None" else kv_dtype, whole == "1")))
        return
    parser = argparse.ArgumentParser(description="long contexts: needles, memory and time")
    verbs = parser.add_subparsers(dest="verb", required=True)
    find = verbs.add_parser("needle", help="numbers found in a long text")
    find.add_argument("model", help="a .gguf file or a checkpoint folder of a causal model")
    find.add_argument("--text", type=Path, default=TEXT, help="UTF-8 text to hide them in")
    find.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    measure = verbs.add_parser("memory", help="peak memory by length, of random weights")
    measure.add_argument("--reference", default=PRESET)
    measure.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    measure.add_argument("--whole", action="store_true", help="compute the whole prompt")
    measure.add_argument("--plot", type=Path, help="where to write the plot, as SVG")
    for verb in (find, measure):
        verb.add_argument("--kv-dtype", help="float16, bfloat16, float32 or int8; none given: the model's")
    o = parser.parse_args()
    print(json.dumps(needle(o) if o.verb == "needle" else memory(o)))


if __name__ == "__main__":
    main()
