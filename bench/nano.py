"""GLM-nano on held-out text beside n-gram models of the same training text: perplexity and filling blanks.

    python bench/nano.py                                  # after runs/nano.sh; a few minutes on two cores
    python bench/nano.py --model out/nano/pretrain/model --blanks 100 --perplexity-tokens 50000

The baselines count exactly the windows of text that the runs of --run drew, by replaying their data streams: a unigram
model and an interpolated modified Kneser-Ney 5-gram model (bench/ngram.py) for each language. Every system scores the
same windows of at most 510 held-out tokens, each from its first token on, the model with [gMASK] <sop> in front.

Blanks: one blank in a window of 64 tokens. "exact" counts answers that are the hidden tokens and nothing else. The
model sees both sides, fills greedily and has to stop by itself; the other rows are told how many tokens are missing.
The 5-gram fills from the left context, or ("both sides") picks the candidate that is likeliest with what follows.

Prints tables in Markdown, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python bench/nano.py` without an installation

from bench.blanks import (
    BLANKS,
    Blank,
    Scores,
    accuracy,
    both_sides_answers,
    left_answers,
    model_answers,
    sample_blanks,
)  # fmt: skip
from bench.ngram import KneserNey

if TYPE_CHECKING:
    from openglm.data.example import Example
    from openglm.data.shards import TokenDataset
    from openglm.engine import Engine
    from openglm.tokenizer import Tokenizer

IntArray = NDArray[np.int64]
LANGUAGES = ("en", "zh")


# -------------------------------------------------------------------------------------------- text


class Recorder:
    """A source of training examples that keeps the windows of text they were made from."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.seen: list[IntArray] = []

    def __len__(self) -> int:
        return len(self.source)

    def examples(self, epoch: int, unit: int) -> list[Example]:
        self.seen.append(np.asarray(self.source.windows[unit][0], np.int64))
        return self.source.examples(epoch, unit)


def training_windows(run: Path, tokenizer: Tokenizer) -> list[IntArray]:
    """The windows of text that an infilling run drew, from its resolved config, by drawing them again."""
    from tqdm import tqdm

    from openglm.data.stream import PackedStream
    from openglm.model.checkpoint import read_config
    from openglm.train.config import load_config, model_config
    from openglm.train.objectives import OBJECTIVES

    config = load_config(run)
    if config.objective != "infill" or config.batch_warmup is not None:
        raise ValueError(f"{run}: not a blank-infilling run of constant batch; give the run.yaml of the pre-training")
    entry = OBJECTIVES[config.objective]
    data = entry.parse_data(config.data)
    start = config.init_from
    shape = read_config(start)[0] if start is not None else model_config(config.model or {})
    stream = entry.build_stream(data, shape, tokenizer, config.row_len, config.seed, "train")
    assert isinstance(stream, PackedStream)
    recorders = [Recorder(source) for source in stream.sources if hasattr(source, "windows")]
    stream.sources = [*recorders, *stream.sources[len(recorders) :]]
    for _ in tqdm(range(config.steps), desc="training text", unit="step", delay=2, leave=False):
        stream.next_rows(config.batch_rows)
    return [window for recorder in recorders for window in recorder.seen]


def chinese_tokens(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """(vocab,) True for tokens that hold a Chinese character, or bytes of one."""
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    return np.array([any(0xE4 <= byte <= 0xE9 for byte in piece) for piece in pieces])


def by_language(windows: Sequence[IntArray], chinese: NDArray[np.bool_]) -> dict[str, list[IntArray]]:
    """Chinese where at least a fifth of the tokens are (pages on programming hold much English)."""
    found: dict[str, list[IntArray]] = {lang: [] for lang in LANGUAGES}
    for window in windows:
        found["zh" if chinese[window].mean() >= 0.2 else "en"].append(window)
    return found


def held_out_windows(data: TokenDataset, size: int, n_tokens: int, seed: int) -> list[IntArray]:
    """Windows of at most `size` tokens, not overlapping, in random order, until there are n_tokens (0: all)."""
    places = [(d, start) for d, length in enumerate(data.lengths()) for start in range(0, int(length) - 1, size)]
    windows: list[IntArray] = []
    total = 0
    for i in np.random.default_rng(seed).permutation(len(places)):
        document, start = places[i]
        windows.append(data.document(document)[start : start + size].astype(np.int64))
        total += len(windows[-1])
        if n_tokens and total >= n_tokens:
            break
    return windows


# -------------------------------------------------------------------------------------------- perplexity


def model_nll(engine: Engine, windows: Sequence[IntArray], rows: int = 8) -> float:
    """Summed nats of all tokens of the windows, each behind [gMASK] <sop>."""
    import torch
    from tqdm import tqdm

    from openglm.model.batch import ForwardBatch, prompt_layout

    special = engine.special_ids
    head = [special["[gMASK]"], special["<sop>"]]
    ordered = sorted(windows, key=len)  # little padding
    total = 0.0
    for first in tqdm(range(0, len(ordered), rows), desc="perplexity", unit="batch", delay=2, leave=False):
        batch = ordered[first : first + rows]
        width = len(batch[-1])
        ids = torch.zeros(len(batch), len(head) + width, dtype=torch.int64)
        for row, window in enumerate(batch):  # padding comes last: no token before it sees it
            ids[row, : len(head) + len(window)] = torch.from_numpy(np.concatenate([head, window]))
        layout = prompt_layout(head, engine.config, special)
        positions = layout.positions(0, ids.shape[1])[:, None].expand(-1, len(batch), -1)
        with torch.inference_mode():
            # One token of context sees what causal attention sees.
            hidden = engine.model(ForwardBatch(ids, positions).to(engine.device))
            for row, window in enumerate(batch):
                logits = engine.model.logits(hidden[row, len(head) - 1 : len(head) - 1 + len(window)])
                targets = torch.from_numpy(window).to(engine.device)
                total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return total


def perplexity_row(nll: float, n_tokens: int, n_bytes: int) -> dict[str, float]:
    per_token = nll / n_tokens
    return {
        "nll_per_token": per_token,
        "perplexity": math.exp(per_token),
        "bits_per_byte": nll / math.log(2) / n_bytes,
    }


# -------------------------------------------------------------------------------------------- report


def compare_perplexity(
    engine: Engine, unigram: KneserNey, ngram: KneserNey, windows: Sequence[IntArray], tokenizer: Tokenizer
) -> dict[str, dict[str, float]]:
    n_tokens = sum(map(len, windows))
    n_bytes = len(tokenizer.decode_bytes(np.concatenate(list(windows)).tolist()))
    losses = {
        "GLM-nano": model_nll(engine, windows),
        "5-gram": -float(ngram.log_probs(windows).sum()),
        "unigram": -float(unigram.log_probs(windows).sum()),
    }
    return {name: perplexity_row(nll, n_tokens, n_bytes) for name, nll in losses.items()}


def compare_blanks(
    engine: Engine, unigram: KneserNey, ngram: KneserNey, blanks: Sequence[Blank]
) -> dict[str, Scores]:  # fmt: skip
    free, told = model_answers(engine, blanks)
    return {
        "GLM-nano": accuracy(blanks, free),
        "GLM-nano, length told": accuracy(blanks, told),
        "5-gram, both sides": accuracy(blanks, both_sides_answers(ngram, blanks)),
        "5-gram, left": accuracy(blanks, left_answers(ngram, blanks)),
        "unigram": accuracy(blanks, left_answers(unigram, blanks)),
    }


def tables(result: Mapping[str, Any]) -> Iterator[str]:
    """The report in Markdown, line by line."""
    both = [result["perplexity"][lang] for lang in LANGUAGES]
    yield "| held-out text | " + " | ".join(
        f"{lang}: nats/token | {lang}: perplexity | {lang}: bits/byte" for lang in LANGUAGES
    ) + " |"  # fmt: skip
    yield "|---" * 7 + "|"
    for name in both[0]:
        cells = [
            f"{r[name]['nll_per_token']:.3f} | {r[name]['perplexity']:.1f} | {r[name]['bits_per_byte']:.3f}"
            for r in both
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"
    kinds = list(BLANKS)
    yield ""
    yield (
        "| blanks, exact (first token), % | "
        + " | ".join(f"{lang}: {kind}" for lang in LANGUAGES for kind in kinds)
        + " |"
    )
    yield "|---" * (1 + 2 * len(kinds)) + "|"
    for name in result["blanks"]["en"][kinds[0]]:
        scores = [result["blanks"][lang][kind][name] for lang in LANGUAGES for kind in kinds]
        yield f"| {name} | " + " | ".join(f"{100 * s['exact']:.1f} ({100 * s['first']:.1f})" for s in scores) + " |"


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything, as one JSON-able object."""
    from openglm.chat import ChatModel
    from openglm.data.shards import TokenDataset

    began = time.perf_counter()
    chat = ChatModel.load(args.model)
    engine, tokenizer = chat.engine, chat.tokenizer
    folders = {"en": args.val_en, "zh": args.val_zh}
    data = {lang: TokenDataset(folder) for lang, folder in folders.items()}
    for lang, dataset in data.items():
        if dataset.tokenizer_fingerprint != tokenizer.fingerprint:
            raise ValueError(f"{folders[lang]} was prepared with another tokenizer than the model's: prepare it again")
    drawn = [window for run in args.run for window in training_windows(run, tokenizer)]
    train = by_language(drawn, chinese_tokens(tokenizer))
    result: dict[str, Any] = {"train_tokens": {}, "held_out_tokens": {}, "perplexity": {}, "blanks": {}}
    for lang in LANGUAGES:
        unigram = KneserNey.train(train[lang], tokenizer.vocab_size, 1)
        ngram = KneserNey.train(train[lang], tokenizer.vocab_size, 5)
        result["train_tokens"][lang] = sum(map(len, train[lang]))
        say(f"{lang}: 5-gram of {result['train_tokens'][lang]:,} tokens, {time.perf_counter() - began:.0f} s")
        windows = held_out_windows(data[lang], args.window - 2, args.perplexity_tokens, args.seed)
        result["held_out_tokens"][lang] = sum(map(len, windows))
        result["perplexity"][lang] = compare_perplexity(engine, unigram, ngram, windows, tokenizer)
        say(f"{lang}: perplexity, {time.perf_counter() - began:.0f} s")
        result["blanks"][lang] = {}
        for kind in BLANKS:
            blanks = sample_blanks(data[lang], kind, args.blanks, args.seed, tokenizer)
            result["blanks"][lang][kind] = compare_blanks(engine, unigram, ngram, blanks)
        say(f"{lang}: blanks, {time.perf_counter() - began:.0f} s")
    return result | {"n_blanks": args.blanks, "window": args.window, "seconds": time.perf_counter() - began}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; default: the bundled model")
    parser.add_argument(
        "--run", type=Path, nargs="+", help="configs of its pre-training, in order",
        default=[Path("out/nano/pretrain/run.yaml"), Path("out/nano/pretrain2/run.yaml")],
    )
    parser.add_argument("--val-en", type=Path, default=Path("out/nano/shards-val-en"))
    parser.add_argument("--val-zh", type=Path, default=Path("out/nano/shards-val-zh"))
    parser.add_argument("--perplexity-tokens", type=int, default=200_000, help="held-out tokens a language, 0 = all")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window, [gMASK] <sop> included")
    parser.add_argument("--blanks", type=int, default=500, help="blanks of each kind and language")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        result = measure(args, lambda line: print(line, file=sys.stderr))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(tables(result)))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
