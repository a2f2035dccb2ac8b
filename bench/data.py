"""Our data preparation beside the plain batch API of `tokenizers`: MB/s of training, encoding and shard writing.

    python bench/data.py                     # table, then one JSON line; about a minute a repeat on two cores
    python bench/data.py my/*.jsonl.zst --megabytes 10 --repeats 5

A slice of the corpus, equal parts of every file, is written as one jsonl.zst. Both sides read it, train the same
vocabulary, encode it, and write 16-bit ids. The plain side is what one would write with the library alone: a loop over
the lines, `train_from_iterator`, `encode_batch` of a thousand texts at a time, `tofile`. Ours also checks every row,
removes duplicates, keeps an index and sums, and can be continued. Each run is a process of its own; the order
alternates. Megabytes are of text, 10^6 bytes of UTF-8.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = {"ours": "openglm", "plain": "tokenizers"}
TASKS = {"train": "tokenizer training", "encode": "encoding in memory", "prepare": "encoding and shard writing"}
CORPUS = ("train-en-00.jsonl.zst", "train-zh-00.jsonl.zst")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, help="jsonl.zst files with a field text")
    parser.add_argument("--megabytes", type=float, default=30, help="size of the slice")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--worker", nargs=2, metavar=("TASK", "NAME"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        task, name = args.worker
        print(json.dumps(work(task, name, args.folder, args.vocab_size)))
        return
    if not args.sources:
        corpus = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "corpus"
        args.sources = [corpus / name for name in CORPUS]
    if missing := [path for path in args.sources if not path.is_file()]:
        parser.error(f"{missing[0]}: no such file; name some .jsonl.zst files with a field text")
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


# The comparison ----------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Run everything in child processes, print the table and the JSON line."""
    n_bytes = write_slice(args.sources, folder / "slice.jsonl.zst", int(args.megabytes * 1e6))
    child(args, "set up", "ours", folder)  # the tokenizer that all other runs use
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {task: {name: [] for name in NAMES} for task in args.tasks}
    for repeat in range(args.repeats):
        for task in args.tasks:
            for name in sorted(NAMES, reverse=repeat % 2 == 1):
                print(f"repeat {repeat + 1}/{args.repeats}: {TASKS[task]}, {NAMES[name]} ...", file=sys.stderr)
                runs[task][name].append(child(args, task, name, folder))
    result: dict[str, Any] = {"bench": "data", "text_bytes": n_bytes, "cores": os.cpu_count(), "repeats": args.repeats}
    seconds = {name: 0.0 for name in NAMES}
    print(f"\n{n_bytes / 1e6:.1f} MB of text, {os.cpu_count()} cores, medians of {args.repeats}")
    print(f"{'':28}{'openglm MB/s':>14}{'tokenizers MB/s':>17}{'ratio':>8}{'peak MiB, ours / theirs':>26}")
    for task in args.tasks:
        medians = {name: statistics.median(r["seconds"] for r in runs[task][name]) for name in NAMES}
        peaks = {name: statistics.median(r["peak_rss_bytes"] for r in runs[task][name]) for name in NAMES}
        assert len({r["n_tokens"] for rs in runs[task].values() for r in rs}) == 1, "the two sides gave other tokens"
        if task != "encode":  # it is part of prepare
            seconds = {name: seconds[name] + medians[name] for name in NAMES}
        rates = {name: n_bytes / 1e6 / medians[name] for name in NAMES}
        ratio = medians["plain"] / medians["ours"]
        memory = f"{peaks['ours'] / 2**20:.0f} / {peaks['plain'] / 2**20:.0f}"
        print(f"{TASKS[task]:28}{rates['ours']:14.2f}{rates['plain']:17.2f}{ratio:8.2f}{memory:>26}")
        result[task] = {f"{name}_mb_s": round(rates[name], 3) for name in NAMES} | {"ratio": round(ratio, 3)}
        result[task] |= {f"{name}_peak_rss_bytes": int(peaks[name]) for name in NAMES}
    if {"train", "prepare"} <= set(args.tasks):
        result["end_to_end_ratio"] = round(seconds["plain"] / seconds["ours"], 3)
        print(f"{'end to end (train, prepare)':28}{'':31}{result['end_to_end_ratio']:8.2f}")
    print(json.dumps(result))


def child(args: argparse.Namespace, task: str, name: str, folder: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--worker", task, name, "--folder", str(folder)]
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    output = subprocess.run(
        [*command, "--vocab-size", str(args.vocab_size)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def write_slice(sources: list[Path], target: Path, n_bytes: int) -> int:
    """The same number of bytes of text from the start of each file. Returns how many there are in all."""
    import zstandard

    total = 0
    with open(target, "wb") as f, zstandard.ZstdCompressor(level=6).stream_writer(f) as out:
        for source in sources:
            taken = 0
            for line in plain_lines(source):
                taken += len(json.loads(line)["text"].encode())
                out.write(line)
                if taken >= n_bytes / len(sources):
                    break
            total += taken
    return total


# One run -----------------------------------------------------------------------------------------------------------


def work(task: str, name: str, folder: Path, vocab_size: int) -> dict[str, Any]:
    """Do one task with one side. Seconds are without imports and, for encoding in memory, without reading."""
    import numpy as np  # noqa: F401  (so that neither side's clock sees its import)
    import tokenizers  # noqa: F401

    import openglm.data.prepare  # noqa: F401

    side = {"ours": OURS, "plain": PLAIN}[name]["train" if task == "set up" else task]
    prepared: Any = None
    if task == "encode":
        prepared = [json.loads(line)["text"] for line in plain_lines(folder / "slice.jsonl.zst")]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        start = time.perf_counter()
        n_tokens = side(folder, folder if task == "set up" else Path(scratch), vocab_size, prepared)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "n_tokens": n_tokens, "peak_rss_bytes": peak}


def ours_train(folder: Path, out: Path, vocab_size: int, _: Any) -> int:
    from openglm.data.prepare import train_tokenizer

    return train_tokenizer(folder / "slice.jsonl.zst", vocab_size, out / "tokenizer").n_text_ids


def ours_encode(folder: Path, out: Path, vocab_size: int, texts: list[str]) -> int:
    from openglm.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "tokenizer")
    return sum(len(ids) for i in range(0, len(texts), 1000) for ids in tokenizer.encode_batch(texts[i : i + 1000]))


def ours_prepare(folder: Path, out: Path, vocab_size: int, _: Any) -> int:
    from openglm.data.prepare import prepare

    return prepare(folder / "slice.jsonl.zst", folder / "tokenizer", out / "shards").n_tokens


def plain_lines(path: Path) -> Iterator[bytes]:
    import zstandard

    with open(path, "rb") as f:
        yield from io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(f))


def plain_train(folder: Path, out: Path, vocab_size: int, _: Any) -> int:
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    from openglm.tokenizer.train import SPECIALS, untrained_bpe

    bpe = untrained_bpe()
    n_ids = vocab_size - len(SPECIALS)
    trainer = BpeTrainer(vocab_size=n_ids, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator((json.loads(line)["text"] for line in plain_lines(folder / "slice.jsonl.zst")), trainer)
    bpe.save(str(out / "plain.json"))
    return int(bpe.get_vocab_size())


def plain_encode(folder: Path, out: Path, vocab_size: int, texts: list[str]) -> int:
    import tokenizers

    bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    return sum(len(e.ids) for i in range(0, len(texts), 1000) for e in bpe.encode_batch(texts[i : i + 1000]))


def plain_prepare(folder: Path, out: Path, vocab_size: int, _: Any) -> int:
    from itertools import islice

    import numpy as np
    import tokenizers

    bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    texts = (json.loads(line)["text"] for line in plain_lines(folder / "slice.jsonl.zst"))
    n_tokens = 0
    with open(out / "plain.bin", "wb") as f:
        while batch := list(islice(texts, 1000)):
            for encoding in bpe.encode_batch(batch):
                ids = np.array(encoding.ids, np.uint16)
                ids.tofile(f)
                n_tokens += len(ids)
    return n_tokens


OURS = {"train": ours_train, "encode": ours_encode, "prepare": ours_prepare}
PLAIN = {"train": plain_train, "encode": plain_encode, "prepare": plain_prepare}


if __name__ == "__main__":
    main()
