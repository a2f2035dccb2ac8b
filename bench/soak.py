"""2,000 requests of every kind through one engine: memory stays flat, pages come back, answers are the solo ones.

    python bench/soak.py model.gguf [--plot memory.svg]     # without a model: the bundled one

24 requests are open at any time, over a pool that is too small for them, so that requests are preempted. Among them:
greedy and seeded ones, penalties, stop strings, grammars, streams closed or dropped at a random moment, and requests
that must be refused (prompt over the pool, id outside the vocabulary, schema that cannot be held to). Each that ends by
itself must equal the same request alone, on an engine without prefix cache; one that was cut off must be its beginning.

Prints a table, and one JSON line last. Exit code 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXT = Path(__file__).resolve().parents[1] / "docs"
N_OPEN = 24
CHECK_EVERY = 50  # finished requests between two looks at every page
SAMPLE_EVERY = 5  # and between two looks at the memory
FLAT_MIB = 8.0  # that the median of the last quarter may lie above that of the second one
SCHEMA = '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}}, \
"required": ["name", "age"], "additionalProperties": false}'


@dataclass
class Spec:
    """A request that gives the same answer whenever it is made."""

    kind: str
    prompt: list[int]
    sampling: dict[str, Any]
    answer: tuple[int, ...] = ()


@dataclass
class Open:
    """An unfinished request. left: pieces until it is cut off, None: never."""

    spec: Spec
    stream: Any
    pieces: Iterator[Any]
    left: int | None
    ids: list[int] = field(default_factory=list)


def resident_mib() -> float:
    """Memory of this process, of which file pages are no part."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:")) / 1024


def make_specs(model: Any, rng: random.Random) -> list[Spec]:
    from openglm.types import Grammar

    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(TEXT.glob("*.md")))
    ids = model.tokenizer.encode(text)
    head = ids[:48]  # some prompts begin alike
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "seeded": {"temperature": 0.9, "top_p": 0.9},
        "penalties": {"temperature": 0.7, "top_k": 40, "repetition_penalty": 1.2, "frequency_penalty": 0.4,
                      "top_logprobs": 5, "min_new_tokens": 4},
        "stop string": {"temperature": 0.8, "stop_strings": ("e", "的", "\n")},
        "regex": {"temperature": 1.0, "grammar": Grammar("regex", "[A-Z][a-z]{2,6} [0-9]{1,4}(\\.[0-9]+)?")},
        "JSON schema": {"temperature": 0.8, "grammar": Grammar("json_schema", SCHEMA)},
    }  # fmt: skip
    specs = []
    for number in range(48):
        kind = list(kinds)[number % len(kinds)]
        start, n = rng.randrange(len(ids) - 120), rng.randrange(4, 100)
        prompt = head * rng.randrange(2) + ids[start : start + n]
        specs.append(Spec(kind, prompt, {"max_new_tokens": rng.randrange(4, 33), "seed": number, **kinds[kind]}))
    return specs


def refused(model: Any, rng: random.Random) -> str:
    """A request that must raise a ValueError; its kind."""
    from openglm.types import Grammar

    engine = model.engine
    kinds: dict[str, tuple[list[int], dict[str, Any]]] = {
        "prompt over the pool": ([5] * (engine.describe()["pool_tokens"] + 1), {}),
        "id outside the vocabulary": ([5, engine.config.vocab_size], {}),
        "unsupported schema": ([5], {"grammar": Grammar("json_schema", '{"type": "object", "not": {"type": "null"}}')}),
    }
    kind = rng.choice(list(kinds))
    try:
        model.stream_text(kinds[kind][0], **kinds[kind][1])
    except ValueError:
        return kind
    raise AssertionError(f"not refused: {kind}")


class Soak:
    def __init__(self, model: Any, specs: list[Spec], n: int, rng: random.Random) -> None:
        self.model, self.specs, self.n, self.rng = model, specs, n, rng
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.finished = 0
        self.samples: list[tuple[int, float]] = []
        self.opened: list[Open] = []

    def run(self) -> None:
        started = 0
        while started < self.n or self.opened:
            while started < self.n and len(self.opened) < N_OPEN:
                started += 1
                if self.rng.random() < 0.05:
                    self.done(refused(self.model, self.rng))
                else:
                    self.open()
            self.advance(self.rng.choice(self.opened))

    def open(self) -> None:
        spec = self.rng.choice(self.specs)
        stream = self.model.stream_text(spec.prompt, **spec.sampling)
        left = self.rng.randrange(12) if self.rng.random() < 0.25 else None
        self.opened.append(Open(spec, stream, iter(stream), left))

    def advance(self, one: Open) -> None:
        if one.left == 0:
            self.opened.remove(one)
            self.cut(one)
            return
        if one.left is not None:
            one.left -= 1
        if next(one.pieces, None) is None:
            self.opened.remove(one)
            self.compare(one, one.stream.result().token_ids, whole=True)
            self.done(one.spec.kind)

    def cut(self, one: Open) -> None:
        got = one.stream.result().token_ids if one.stream._seen else ()
        self.compare(one, got, whole=False)
        kind = "closed" if self.rng.random() < 0.5 else "dropped"
        if kind == "closed":
            one.stream._steps.close()
        del one  # the stream with it: the engine learns of it at its next pass
        self.done(kind)

    def compare(self, one: Open, got: tuple[int, ...], whole: bool) -> None:
        wanted = one.spec.answer if whole else one.spec.answer[: len(got)]
        if got != wanted:
            self.wrong.append(f"{one.spec.kind}: {got} instead of {wanted}")

    def done(self, kind: str) -> None:
        self.counts[kind] += 1
        self.finished += 1
        if self.finished % CHECK_EVERY == 0:
            self.model.engine.check_integrity()
        if self.finished % SAMPLE_EVERY == 0:
            self.samples.append((self.finished, resident_mib()))


def main() -> None:
    parser = argparse.ArgumentParser(description="2,000 requests of every kind through one engine")
    parser.add_argument("model", nargs="?", help="a .gguf file or a checkpoint folder; none: the bundled model")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--pool-tokens", type=int, default=800)
    parser.add_argument("--plot", type=Path, help="where to write the memory over the requests, as SVG")
    o = parser.parse_args()
    import openglm
    from openglm.engine import Engine, EngineOptions
    from openglm.engine.grammar import Grammars

    model = openglm.load(o.model, device="cpu")
    rng = random.Random(0)
    specs = make_specs(model, rng)

    def engine(**options: Any) -> Engine:
        old, grammars = model.engine, Grammars(model.tokenizer)
        return Engine(old.model, old.special_ids, old.vocab_size, EngineOptions(**options), grammar_state=grammars)

    model.engine = engine(pool_tokens=o.pool_tokens, n_parallel=1, prefix_cache=False)
    for spec in specs:
        spec.answer = model.generate(spec.prompt, **spec.sampling).token_ids
    model.engine = engine(pool_tokens=o.pool_tokens, n_parallel=16, step_tokens=128)
    soak = Soak(model, specs, o.requests, rng)
    start = time.perf_counter()
    soak.run()
    seconds = time.perf_counter() - start
    gc.collect()
    model.engine.step()  # streams that were dropped last
    model.engine.check_integrity()
    sys.exit(report(soak, seconds, o.plot, Path(o.model).name if o.model else "the bundled model"))


def report(soak: Soak, seconds: float, plot: Path | None, name: str) -> int:
    shown = soak.model.engine.describe()
    memory = [mib for _, mib in soak.samples]
    quarter = len(memory) // 4
    grown = statistics.median(memory[-quarter:]) - statistics.median(memory[quarter : 2 * quarter])
    for kind, n in sorted(soak.counts.items()):
        print(f"{kind:<28}{n:>6}")
    for line in soak.wrong[:5]:
        print("WRONG", line)
    result = {
        "model": name, "requests": soak.finished, "seconds": round(seconds, 1), "wrong": len(soak.wrong),
        "memory_mib": round(statistics.median(memory), 1), "grown_mib": round(grown, 2), "kinds": dict(soak.counts),
        "preemptions": shown["n_preemptions"], "reused_tokens": shown["n_reused"], "passes": shown["n_passes"],
        "pages_lost": shown["n_pages"] - shown["n_pages_free"], "drawn": shown["n_drawn"],
    }  # fmt: skip
    if plot is not None:
        write_plot(plot, soak.samples)
    print(f"memory: {result['memory_mib']} MiB in the middle, {grown:+.2f} MiB from the second quarter to the last")
    print(json.dumps(result))
    good = not soak.wrong and not result["pages_lost"] and grown < FLAT_MIB and not soak.model.engine.has_work
    return 0 if good else 1


def write_plot(path: Path, samples: list[tuple[int, float]]) -> None:
    from openglm.plot import Series, line_plot, svg_file

    series = Series("memory of the process, MiB", [n for n, _ in samples], [mib for _, mib in samples])
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(svg_file(line_plot([series], from_zero=True, x_name="requests"), [series]))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


if __name__ == "__main__":
    main()
