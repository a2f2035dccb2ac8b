"""What training will see of a file: tokens, ids, loss mask and positions, in colour.

    python -m openglm data check chat.jsonl --model out/model

Chat files are rendered as for fine-tuning, text files and token shards corrupted as for pre-training. `collect`
gathers the facts (JSON-able), `show` prints them, `check` does both.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
from numpy.typing import NDArray

from openglm.config import GLMConfig
from openglm.data.chat import ChatOptions, load_chat
from openglm.data.example import Example, causal_example
from openglm.data.infill import InfillParams, SpecialIds, infill
from openglm.data.lines import open_lines, read_lines
from openglm.data.shards import MANIFEST, TokenDataset
from openglm.data.sources import RowReader, expand_sources, report_problem
from openglm.data.stream import MIN_TOKENS, philox
from openglm.formats import ChatFormat, get_format
from openglm.tokenizer import Tokenizer
from openglm.types import IGNORE

__all__ = ["check", "collect", "show"]

GREY, GREEN, MAGENTA = "90", "32", "35"
SHOWN_TOKENS = 96  # window of a text example


def check(
    file: str | Path, tokenizer: Tokenizer, chat_format: ChatFormat | None, config: GLMConfig, limit: int = 3,
    out: TextIO | None = None,
) -> dict[str, int]:  # fmt: skip
    """Print the first `limit` examples of a file; returns the counts of `collect`."""
    value = collect(file, tokenizer, chat_format, config, limit)
    show(value, out)
    counts: dict[str, int] = value["counts"]
    return counts


def collect(
    file: str | Path, tokenizer: Tokenizer, chat_format: ChatFormat | None, config: GLMConfig, limit: int = 3
) -> dict[str, Any]:
    """The first `limit` examples of a chat file, a text file or a folder of token shards, and counts of the whole.

    chat_format: None stands for "glm-4". Returns {"file", "type": "chat" | "text" | "shards", "counts": {...},
    "examples": [{"where", "kind", "ids", "tokens", "targets", "target_tokens", "positions", "context"}]}.
    Raises ValueError for an unreadable file, or a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"--limit must be at least 1, not {limit}")
    path = Path(file)
    if (path / MANIFEST).is_file():
        kind = "shards"
        named, counts = _shards(path, tokenizer, config, limit)
    elif _is_chat(path):
        kind = "chat"
        named, counts = _chat(path, tokenizer, chat_format or get_format("glm-4", tokenizer), config, limit)
    else:
        kind = "text"
        named, counts = _text(path, tokenizer, config, limit)
    examples = [_describe(where, example, tokenizer) for where, example in named]
    return {"file": str(path), "type": kind, "counts": dict(counts), "examples": examples}


def _chat(
    path: Path, tokenizer: Tokenizer, chat_format: ChatFormat, config: GLMConfig, limit: int
) -> tuple[list[tuple[str, Example]], Counter[str]]:
    prefix = config.mask == "prefix"
    options = ChatOptions(row_len=config.max_seq_len, prefix=prefix, frozen=prefix and config.n_axes == 2)
    loaded = load_chat([path], tokenizer, chat_format, options)
    return [(f"{path}, example {i + 1}", loaded[i]) for i in range(min(limit, len(loaded)))], loaded.counts


def _is_chat(path: Path) -> bool:
    """Whether one of the leading rows of a jsonl file is a conversation, and none before it a text."""
    sources = expand_sources([path])
    if sources[0].kind != "jsonl":
        return False
    with open(sources[0].path, "rb") as raw:
        for line in islice(read_lines(open_lines(raw, sources[0].path)), 100):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and ("messages" in row or "text" in row):
                return "messages" in row
    return False


def _text(
    path: Path, tokenizer: Tokenizer, config: GLMConfig, limit: int
) -> tuple[list[tuple[str, Example]], Counter[str]]:
    counts: Counter[str] = Counter()
    found: list[tuple[str, NDArray[Any]]] = []
    for source in expand_sources([path]):
        for row in RowReader(source):
            counts["rows"] += 1
            if row.text is None:
                report_problem(source, row, counts["malformed"])
                counts["malformed"] += 1
            elif len(found) < limit and len(ids := tokenizer.encode(row.text)) >= MIN_TOKENS:
                found.append((f"{source.path}:{row.number}", np.array(ids)))
    if not found:
        raise ValueError(f"{path}: empty corpus: no row of at least {MIN_TOKENS} tokens")
    return list(_corrupted(found, tokenizer, config)), counts


def _shards(
    path: Path, tokenizer: Tokenizer, config: GLMConfig, limit: int
) -> tuple[list[tuple[str, Example]], Counter[str]]:
    dataset = TokenDataset(path)
    if dataset.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{path} was prepared with another tokenizer than the model's: prepare the data again")
    numbers = np.flatnonzero(dataset.lengths() >= MIN_TOKENS)[:limit].tolist()
    documents = [(f"{path}, document {i}", dataset.document(i)) for i in numbers]
    counts = Counter(documents=dataset.n_documents, tokens=dataset.n_tokens)
    return list(_corrupted(documents, tokenizer, config)), counts


def _corrupted(
    documents: Sequence[tuple[str, NDArray[Any]]], tokenizer: Tokenizer, config: GLMConfig
) -> Iterator[tuple[str, Example]]:
    """The beginning of each document, in turn as [MASK], [gMASK] and [sMASK] sample; as it is for causal models."""
    scheme: Literal["2d", "1d"] = "2d" if config.n_axes == 2 else "1d"
    sentence_ends = np.zeros(tokenizer.vocab_size, np.bool_)
    sentence_ends[list(tokenizer.sentence_end_ids())] = True
    for number, (where, document) in enumerate(documents):
        window = document[:SHOWN_TOKENS]
        if config.mask == "causal":
            yield where, causal_example(window)
            continue
        yield where, infill(
            window, ("mask", "gmask", "smask")[number % 3], philox(number, 0, 0, 0),
            SpecialIds.from_names(tokenizer.special_ids), InfillParams(positions=scheme),
            ends_document=len(window) == len(document), sentence_ends=sentence_ends,
        )  # fmt: skip


def _describe(where: str, example: Example, tokenizer: Tokenizer) -> dict[str, Any]:
    targets = example.targets.tolist()
    return {
        "where": where,
        "kind": example.kind,
        "ids": example.ids.tolist(),
        "tokens": [_token_text(i, tokenizer) for i in example.ids.tolist()],
        "targets": targets,
        "target_tokens": [None if i == IGNORE else _token_text(i, tokenizer) for i in targets],
        "positions": example.positions.tolist(),
        "context": example.context.tolist(),
        "special_ids": sorted(tokenizer.special_ids.values()),
    }


def _token_text(token: int, tokenizer: Tokenizer) -> str:
    """A special's name, a token's text, or its bytes as <E4> where they are half a character."""
    for name, special in tokenizer.special_ids.items():
        if token == special:
            return name
    data = tokenizer.token_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in data)


def show(value: dict[str, Any], out: TextIO | None = None) -> None:
    """Print what `collect` gathered. Colours only on a terminal, and not where NO_COLOR is set."""
    out = out if out is not None else sys.stdout
    colours = out.isatty() and "NO_COLOR" not in os.environ
    for example in value["examples"]:
        _show_example(example, colours, out)
    print(", ".join(f"{n} {name.replace('_', ' ')}" for name, n in value["counts"].items() if n), file=out)


def _show_example(example: dict[str, Any], colours: bool, out: TextIO) -> None:
    def paint(text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if colours and colour else text

    specials = set(example["special_ids"])
    ids, targets, tokens = example["ids"], example["targets"], example["tokens"]
    n_targets = sum(t != IGNORE for t in targets)
    print(f"{example['where']} ({example['kind']}): {len(ids)} tokens, {n_targets} targets", file=out)
    text = []
    for i, (token, target) in enumerate(zip(ids, targets, strict=True)):
        learned = i > 0 and targets[i - 1] == token
        colour = GREEN if learned else GREY if example["context"][i] else ""
        text.append(paint(tokens[i], MAGENTA if token in specials else colour))
        if target != IGNORE and (i + 1 == len(ids) or ids[i + 1] != target):  # a target that is never an input
            text.append(paint(example["target_tokens"][i], MAGENTA if target in specials else GREEN))
    print("".join(text), file=out)
    print(f"{'#':>5} {'id':>7} {'position':>8} {'block':>5} {'':8} {'token':20} predicts", file=out)
    for i, token in enumerate(ids):
        position, block = (row[i] for row in example["positions"])
        context = example["context"][i]
        cell = f"{_quoted(tokens[i], token in specials):20}"
        cell = paint(cell, MAGENTA if token in specials else GREY if context else "")
        target = example["target_tokens"][i]
        special = targets[i] in specials
        predicts = "" if target is None else paint(_quoted(target, special), MAGENTA if special else GREEN)
        role = "context" if context else "target" if target is not None else ""
        print(f"{i:>5} {token:>7} {position:>8} {block:>5} {role:8} {cell} {predicts}".rstrip(), file=out)
    print(file=out)


def _quoted(text: str, special: bool) -> str:
    return text if special else repr(text)
