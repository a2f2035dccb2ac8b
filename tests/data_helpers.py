"""What the tests of data preparation share: documents, files of every kind, and a comparison of folders."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import zstandard

from openglm.data.shards import TokenDataset
from openglm.tokenizer import Tokenizer

WORDS = "the quick brown fox fills one blank and reads 北京 世界 你好 人工智能 空白 2024 model text.".split()


def documents(n: int, first: int = 0, n_words: int = 12) -> list[str]:
    """n different short texts."""
    return [
        f"{i}: " + " ".join(WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(n_words)) + "\n"
        for i in range(first, first + n)
    ]


def write_jsonl(path: Path, texts: Sequence[str], extra: Sequence[bytes] = ()) -> Path:
    """texts as rows, then raw lines; compressed by the end of the name."""
    lines = [json.dumps({"text": t}, ensure_ascii=False).encode() for t in texts]
    data = b"".join(line + b"\n" for line in [*lines, *extra])
    if path.name.endswith(".zst"):
        half = len(data) // 2  # two frames, as appending gives
        data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    elif path.name.endswith(".gz"):
        data = gzip.compress(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def texts_in(folder: Path) -> list[str]:
    """The documents of a prepared folder, decoded."""
    data, tokenizer = TokenDataset(folder), Tokenizer.load(folder)
    return [tokenizer.decode(data.document(i).tolist()) for i in range(data.n_documents)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}
