"""Long contexts: needles found in a long text, and memory and time by the length of the context.

    python bench/longcontext.py needle model.gguf --lengths 2048 8192 [--yarn 2]
    python bench/longcontext.py memory --lengths 8192 32768 131072 --plot memory.svg

needle: in a text of each length and language, five sentences at different depths name five numbers; each is asked for.
The text is read once: the four later questions find it in the prefix cache. --yarn lengthens the context that the model
was trained on by a factor.
memory: each length in a process of its own. As computing the keys and values of a very long text takes hours (attention
is quadratic), the first 512 tokens and the last 16 are run, and some tokens of an answer, as the engine runs them; what
lies between is random numbers, written straight into the pool. `--whole` computes everything.

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

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXTS = {"en": DATA / "eval" / "wikitext-2" / "valid.txt", "zh": DATA / "corpus" / "val-zh.jsonl.zst"}
SENTENCES = {"en": ("The secret number of {} is", " {}."), "zh": ("{}的秘密数字是", "{}。")}
CITIES = {"en": ("Paris", "Cairo", "Lima", "Oslo", "Tokyo"), "zh": ("巴黎", "开罗", "利马", "奥斯陆", "东京")}
DEPTHS, NUMBERS = (0.05, 0.25, 0.5, 0.75, 0.95), (48213, 70956, 15387, 92604, 36871)
STEP, LAST = 512, 16  # tokens of a pass, and of the last one where not all are run
N_DECODE = 4
PRESET = "random:glm-edge-1.5b?quantize=int4"


# -------------------------------------------------------------------- needles


def needle(o: argparse.Namespace) -> dict[str, Any]:
    from openglm.engine import Engine, EngineOptions

    model = lengthened(o.model, o.yarn)
    old, rows = model.engine, []
    print("| text | tokens | found at depth " + " | ".join(f"{depth:.0%}" for depth in DEPTHS)
          + " | first answer, s | later ones, s | peak, MiB |\n|" + "---|" * 10)  # fmt: skip
    for length, language in ((length, language) for length in o.lengths for language in o.languages):
        options = EngineOptions(n_parallel=1, pool_tokens=length + 256, kv_dtype=o.kv_dtype)
        model.engine = Engine(old.model, old.special_ids, old.vocab_size, options)
        haystack = haystack_of(model, language, length)
        found, seconds = [], []
        for city, number in zip(CITIES[language], NUMBERS, strict=True):
            question = model.tokenizer.encode("\n\n" + SENTENCES[language][0].format(city))
            start = time.perf_counter()
            answer = model.generate([*haystack, *question], temperature=0.0, max_new_tokens=10)
            seconds.append(time.perf_counter() - start)
            found.append(str(number) in answer)
        row = {"text": language, "tokens": len(haystack), "found": found, "first_s": round(seconds[0], 1)}
        row["later_s"] = round(sum(seconds[1:]) / (len(seconds) - 1), 2)
        row["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        rows.append(row)
        print(f"| {language} | {row['tokens']:,} | " + " | ".join("yes" if x else "no" for x in found)
              + f" | {row['first_s']} | {row['later_s']} | {row['peak_mib']:,} |", flush=True)  # fmt: skip
    return {"model": Path(o.model).name, "yarn": o.yarn, "rows": rows}


def lengthened(path: str, factor: float) -> Any:
    """The ChatModel of a checkpoint, its context made longer by YaRN where the factor is above 1."""
    import dataclasses

    from openglm.chat import ChatModel
    from openglm.engine import Engine
    from openglm.loading import default_dtype, open_reference, pick_device
    from openglm.model.load import load_weights

    found, cpu = open_reference(Path(path)), pick_device("cpu")
    opened, config = found.opened, found.opened.config
    if factor > 1.0:
        rope = dataclasses.replace(config.rope, yarn_factor=factor, yarn_context=config.max_seq_len)
        config = dataclasses.replace(config, max_seq_len=int(factor * config.max_seq_len), rope=rope)
        opened = dataclasses.replace(opened, config=config)
    model = load_weights(opened, cpu, default_dtype(opened, cpu), packed=True)
    assert found.tokenizer is not None, "a needle is text"
    engine = Engine(model, found.meta.special_ids or found.tokenizer.special_ids, found.tokenizer.vocab_size)
    return ChatModel(engine, found.tokenizer, found.chat_format, found.meta)


def haystack_of(model: Any, language: str, length: int) -> list[int]:
    """Ids of a text in that language, as many as fit with the needles and a question into `length`."""
    from openglm.data.sources import expand_sources, texts_of

    encode, (start, end) = model.tokenizer.encode, SENTENCES[language]
    needles = [encode(f"\n\n{start.format(city)}{end.format(number)}\n\n")
               for city, number in zip(CITIES[language], NUMBERS, strict=True)]  # fmt: skip
    n_text = length - sum(map(len, needles)) - 32
    text, n_wanted = "", 8 * n_text
    for document in texts_of(expand_sources(TEXTS[language]), "text", None):
        text += document + "\n\n"
        if len(text) >= n_wanted:
            break
    ids = encode(text[:n_wanted])[:n_text]
    assert len(ids) == n_text, "the text is too short"
    for depth, sentence in sorted(zip(DEPTHS, needles, strict=True), reverse=True):
        at = int(depth * n_text)
        ids[at:at] = sentence
    return ids


# -------------------------------------------------------------------- memory


def memory(o: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    print("| tokens | weights | keys and values | the rest | peak, MiB | last 16 tokens, s | next token, ms |")
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

    if whole:
        pieces = [run(start, STEP) for start in range(0, length, STEP)]
    else:
        run(0, STEP)
        fill(runner, STEP, length - LAST)
        pieces = [run(length - LAST, LAST)]
    tokens = sorted(run(length + i, 1) for i in range(N_DECODE))
    mib = 1024 * 1024
    return {
        "tokens": length, "weights_mib": weight_bytes(model) / mib, "kv_mib": runner.kv_bytes / mib,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "last_s": pieces[-1],
        "prefill_s": sum(pieces) if whole else None, "token_ms": 1e3 * tokens[N_DECODE // 2],
    }  # fmt: skip


def fill(runner: Any, start: int, stop: int) -> None:
    """Random keys and values for tokens start to stop - 1 of every layer."""
    import torch

    pages = slice(start // runner.page_size, stop // runner.page_size)
    random = torch.randn(runner._keys[0, 0].shape, generator=torch.Generator().manual_seed(0))
    if runner._keys.dtype == torch.int8:
        random = (random * 15).round().clamp(-63, 63) * 2  # even numbers: the code of the least scale
    for tensor in (runner._keys, runner._values):
        tensor[:, pages] = random.to(tensor.dtype)


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
    find.add_argument("--languages", nargs="+", choices=list(TEXTS), default=list(TEXTS))
    find.add_argument("--yarn", type=float, default=1.0, help="factor on the model's context")
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
