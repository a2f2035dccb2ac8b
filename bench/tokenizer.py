"""Encoding speed on a vocabulary of GLM-4's kind, beside tiktoken and tokenizers on the same text, one thread each.

    python bench/tokenizer.py --text FILE.jsonl.zst ... [--model MODEL.gguf] [--vocab-size 32768] [--megabytes 3]

The vocabulary is that of a GGUF file cut by one regular expression (Qwen2's has 151 thousand tokens, as GLM-4's has),
cut GLM-4's way; without a file, one is trained on the text. Ids of all three must be equal. Each figure is the median
of eight runs, four of each of two tables, which take turns in both orders, since machines are noisy. Prints a table,
and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openglm.tokenizer import Tokenizer
from openglm.tokenizer.bytes import symbol_of_byte
from openglm.tokenizer.patterns import SPLIT
from openglm.tokenizer.tiktoken import parse_ranks, write_ranks
from openglm.tokenizer.train import train_bpe

RUNS = 4


def read_texts(path: Path, limit: int) -> list[str]:
    """Texts of a .jsonl.zst file, up to `limit` bytes."""
    import io

    import zstandard

    texts, size = [], 0
    with open(path, "rb") as f:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(f), encoding="utf-8"):
            texts.append(json.loads(line)["text"])
            size += len(texts[-1].encode())
            if size >= limit:
                break
    return texts


def rank_file(model: Path | None, texts: Sequence[str], vocab_size: int) -> bytes:
    """A tiktoken file: of a GGUF model, or of a vocabulary trained on the texts."""
    if model is not None:
        from gguf import GGUFReader

        fields = {name: field.contents() for name, field in GGUFReader(model).fields.items() if "tokenizer" in name}
        tokenizer = Tokenizer.from_gguf(fields)
        if tokenizer.kind != "tiktoken":
            raise SystemExit(f"{model}: its vocabulary is of the kind {tokenizer.kind}; give one such as Qwen2's")
        return tokenizer.files["tokenizer.model"]
    trained = train_bpe(texts, vocab_size)
    return write_ranks({trained.token_bytes(i): i for i in range(trained.n_text_ids)})


def library_of(ranks: dict[bytes, int]) -> Any:
    """The vocabulary in `tokenizers`: each token's merge is the last one that plain byte-pair encoding would do."""
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    from openglm.tokenizer.bpe import _merged

    symbols = {token: "".join(map(symbol_of_byte, token)) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            a, b = _merged(token, ranks, rank)
            merges.append((symbols[a], symbols[b]))
    library = Library(models.BPE({symbols[token]: i for token, i in ranks.items()}, merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), level])
    return library


def timed(make: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = make()
    return time.perf_counter() - start, value


def measure(encoders: Sequence[tuple[str, Callable[[str], list[int]]]], texts: Sequence[str]) -> dict[str, float]:
    """Megabytes a second of each name, after a first run that checks that all give the same ids."""
    ids = [[encode(text) for text in texts] for _, encode in encoders]
    assert all(other == ids[0] for other in ids), "ids differ"
    seconds: dict[str, list[float]] = {name: [] for name, _ in encoders}
    for run in range(RUNS):
        for name, encode in encoders[:: -1 if run % 2 else 1]:  # the first finds the texts less warm
            seconds[name].append(timed(lambda encode=encode: [encode(text) for text in texts])[0])  # type: ignore[misc]
    size = sum(len(text.encode()) for text in texts) / 1e6
    return {name: size / statistics.median(values) for name, values in seconds.items()}


def main(argv: Sequence[str] | None = None) -> int:
    import tiktoken

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help=".jsonl.zst files, a row each")
    parser.add_argument("--model", type=Path, help="GGUF file whose vocabulary to use")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--megabytes", type=float, default=3)
    o = parser.parse_args(argv)
    corpora = {path.name.split(".")[0]: read_texts(path, int(o.megabytes * 1e6)) for path in o.text}
    content = rank_file(o.model, [t for texts in corpora.values() for t in texts], o.vocab_size)

    def ours() -> tuple[str, Callable[[str], list[int]]]:
        return "openglm", Tokenizer({"tokenizer.model": content}).encode

    def peer() -> tuple[str, Callable[[str], list[int]]]:
        ranks = parse_ranks(content)
        encoding = tiktoken.Encoding("peer", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
        return "tiktoken", encoding.encode_ordinary

    # Of two equal tables the one that is made later was found some per cent faster, so each is made early and late.
    (load_s, one), (peer_load_s, two) = timed(ours), timed(peer)
    ranks = parse_ranks(content)
    library = library_of(ranks)
    third = "tokenizers", lambda text: library.encode(text, add_special_tokens=False).ids
    encoders = [one, two, peer(), ours(), third]
    names = list(dict.fromkeys(name for name, _ in encoders))
    rows = {name: measure(encoders, texts) for name, texts in corpora.items()}
    print(f"{len(ranks):,} ranks; loaded in {load_s:.2f} s (tiktoken {peer_load_s:.2f} s)")
    print(f"{'MB/s':16}" + "".join(f"{name:>12}" for name in names))
    for name, speeds in rows.items():
        print(f"{name:16}" + "".join(f"{speed:12.2f}" for speed in speeds.values()))
    print(json.dumps({"n_ranks": len(ranks), "load_s": load_s, "tiktoken_load_s": peer_load_s, "mb_per_s": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
