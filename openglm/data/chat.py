"""Chat data: files of OpenAI-style messages to training examples with a loss mask.

A row is one JSON object: `messages`, a list of {"role", "content", "tool_calls"}, and optionally `tools`. Files are
jsonl, jsonl.gz or jsonl.zst. Everything is tokenised once, in batches on all cores, and kept as flat arrays.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from openglm.data.example import Example, chat_example
from openglm.data.lines import open_lines, read_lines
from openglm.data.sources import Row, Source, expand_sources, report_problem
from openglm.formats import ChatFormat, Rendered, render_many
from openglm.tokenizer import Tokenizer
from openglm.types import Message, ToolSpec

__all__ = ["ChatExamples", "ChatOptions", "Conversation", "load_chat", "read_conversations"]

BATCH = 2048  # conversations tokenised at once


@dataclass(frozen=True)
class Conversation:
    """One row of a chat file. where: "file:line"."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    where: str = ""

    def in_share(self, share: float) -> bool:
        """Whether this conversation belongs to a fixed random share of all; equal conversations go together."""
        text = json.dumps([(m.role, m.content, [(c.name, c.arguments) for c in m.tool_calls]) for m in self.messages])
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < share * 2**64


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """row_len: tokens that an example may have. prefix: the model sees what is before <sop> in both directions.
    frozen: its positions stay at the [gMASK] from <sop> on (two position axes).

    overlong: "split" cuts a conversation that does not fit at its user turns into several, each with the system
    messages and tools in front; "newest" keeps the latest turns that fit.
    loss_weighting: "token", every target counts the same; "sequence", every example does (LongAlign).
    """

    row_len: int
    prefix: bool = False
    frozen: bool = False
    overlong: Literal["split", "newest"] = "split"
    loss_weighting: Literal["token", "sequence"] = "token"


def read_conversations(paths: Sequence[str | Path], counts: Counter[str] | None = None) -> Iterator[Conversation]:
    """The conversations of files, folders and globs, in order.

    A malformed row is reported with its file and line on stderr, counted as "malformed" and skipped. ValueError for a
    file that cannot be read, is no jsonl, or has no good row at all.
    """
    counts = counts if counts is not None else Counter()
    for source in expand_sources(paths):
        if source.kind != "jsonl":
            raise ValueError(f"{source.path}: chat data must be jsonl, jsonl.gz or jsonl.zst")
        good = 0
        for row in _rows(source):
            counts["rows"] += 1
            if isinstance(row, Conversation):
                good += 1
                yield row
            else:
                report_problem(source, row, counts["malformed"])
                counts["malformed"] += 1
        if not good:
            raise ValueError(f"{source.path}: no row holds a conversation (an object with a list 'messages')")


def _rows(source: Source) -> Iterator[Conversation | Row]:
    with open(source.path, "rb") as raw:
        for number, line in enumerate(read_lines(open_lines(raw, source.path)), 1):
            if line.isspace():
                continue
            try:
                yield _parse(line, f"{source.path}:{number}")
            except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
                yield Row(number, None, " ".join(str(error).split())[:200])


def _parse(line: bytes, where: str) -> Conversation:
    row = json.loads(line.decode("utf-8-sig"))
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("no list 'messages'")
    tools = row.get("tools") or []
    if not isinstance(tools, list):
        raise ValueError(f"'tools' must be a list, not {type(tools).__name__}")
    parsed = tuple(Message.from_dict(message, f"messages[{i}]") for i, message in enumerate(messages))
    return Conversation(parsed, tuple(ToolSpec.from_dict(tool) for tool in tools), where)


class ChatExamples(Sequence[Example]):
    """Examples in flat arrays; each is built when it is asked for. counts: what became of the rows."""

    def __init__(self, rendered: Sequence[Rendered], options: ChatOptions, sop: int, counts: Counter[str]) -> None:
        lengths = np.fromiter((len(r.ids) for r in rendered), np.int64, len(rendered))
        total = int(lengths.sum())
        self._ends = np.cumsum(lengths)
        self._ids = np.fromiter(chain.from_iterable(r.ids for r in rendered), np.int32, total)
        self._mask = np.fromiter(chain.from_iterable(r.loss_mask for r in rendered), np.bool_, total)
        self._options, self._sop, self.counts = options, sop, counts
        targets = np.fromiter((sum(r.loss_mask) for r in rendered), np.int64, len(rendered))
        self._weights: NDArray[np.float64] | None = None
        if options.loss_weighting == "sequence" and len(rendered):
            self._weights = targets.mean() / targets  # the mean token weight of an example is the same for all
        counts["examples"], counts["tokens"], counts["targets"] = len(rendered), total, int(targets.sum())

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        part = slice(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))
        ids = self._ids[part]
        n_context = int(np.argmax(ids == self._sop)) if self._options.prefix else 0
        weight = 1.0 if self._weights is None else float(self._weights[index])
        return chat_example(ids, self._mask[part], n_context, self._options.frozen, weight)

    def summary(self) -> str:
        """One line for people: what was made, and what was left out and why."""
        c = self.counts
        made = f"chat data: {c['examples']} examples, {c['tokens']} tokens, {c['targets']} of them targets"
        words = {
            "malformed": "malformed rows skipped",
            "cut": f"conversations over {self._options.row_len} tokens "
            + ("split at turns" if self._options.overlong == "split" else "cut to their newest turns"),
            "too_long": "single exchanges too long, dropped",
            "no_target": "rows without an answer dropped",
            "other_split": "rows of the other split left out",
        }
        return "; ".join([made, *(f"{c[key]} {text}" for key, text in words.items() if c[key])])


def load_chat(
    paths: Sequence[str | Path], tokenizer: Tokenizer, chat_format: ChatFormat, options: ChatOptions, *,
    held_out: float = 0.0, take_held_out: bool = False,
) -> ChatExamples:  # fmt: skip
    """Read, render and tokenise chat files.

    held_out: share of the conversations, chosen by their hash, kept from training; take_held_out: read that share
    instead of the rest. Prints the summary to stderr. Raises ValueError as `read_conversations` does.
    """
    from tqdm import tqdm

    counts: Counter[str] = Counter()
    conversations = read_conversations(paths, counts)
    kept: list[Rendered] = []
    with tqdm(desc="chat data", unit=" rows", file=sys.stderr, disable=None, leave=False) as bar:
        while batch := list(islice(conversations, BATCH)):
            bar.update(len(batch))
            if held_out:
                here = [c for c in batch if c.in_share(held_out) == take_held_out]
                counts["other_split"] += len(batch) - len(here)
                batch = here
            kept += _render_batch(batch, tokenizer, chat_format, options, counts)
    examples = ChatExamples(kept, options, tokenizer.special_ids.get("<sop>", -1), counts)
    print(examples.summary(), file=sys.stderr)
    return examples


def _render_batch(
    batch: Sequence[Conversation], tokenizer: Tokenizer, chat_format: ChatFormat, options: ChatOptions,
    counts: Counter[str],
) -> list[Rendered]:  # fmt: skip
    """Rendered conversations that fit and have a target; those that do not fit are cut at user turns."""
    limit = options.row_len + 1  # the last token is only a target

    def render(conversations: Sequence[Conversation]) -> list[Rendered]:
        return render_many(tokenizer, [chat_format.parts(c.messages, c.tools, False) for c in conversations])

    rendered = render(batch)
    long = [c for c, r in zip(batch, rendered, strict=True) if len(r.ids) > limit]
    rendered = [r for r in rendered if len(r.ids) <= limit]
    counts["cut"] += len(long)
    pieces = _cut(long, render, limit, options.overlong, counts) if long else []
    for piece in render(pieces):
        if len(piece.ids) <= limit:
            rendered.append(piece)
        else:
            counts["too_long"] += 1
    good = [r for r in rendered if any(r.loss_mask[1:])]
    counts["no_target"] += len(rendered) - len(good)
    return good


def _cut(
    conversations: Sequence[Conversation], render: Callable[[Sequence[Conversation]], list[Rendered]], limit: int,
    overlong: str, counts: Counter[str],
) -> list[Conversation]:  # fmt: skip
    """Conversations in pieces of whole exchanges; an exchange too long for a row by itself is left out and counted."""
    heads, exchanges, owner = [], [], []
    for number, c in enumerate(conversations):
        system, rest = _exchanges(c.messages)
        heads.append(replace(c, messages=system))
        exchanges += [Conversation(turn) for turn in rest]
        owner += [number] * len(rest)
    # Formats write turns one behind the other, so lengths add up; every piece is measured again when it is rendered.
    head_sizes = [len(r.ids) for r in render(heads)]
    empty = len(render([Conversation(())])[0].ids)
    sizes = [len(r.ids) - empty for r in render(exchanges)]
    mine: list[list[tuple[tuple[Message, ...], int]]] = [[] for _ in heads]
    for exchange, size, number in zip(exchanges, sizes, owner, strict=True):
        mine[number].append((exchange.messages, size))
    pieces: list[Conversation] = []
    for head, head_size, turns in zip(heads, head_sizes, mine, strict=True):
        room = limit - head_size
        groups = _groups(turns, room, overlong)
        counts["too_long"] += sum(size > room for _, size in turns) if overlong == "split" else int(not groups)
        pieces += [replace(head, messages=head.messages + group) for group in groups]
    return pieces


def _exchanges(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """The leading system messages, and the rest cut before every user message."""
    n_head = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    starts = [i for i in range(n_head, len(messages)) if i == n_head or messages[i].role == "user"]
    stops = [*starts[1:], len(messages)]
    return messages[:n_head], [messages[start:stop] for start, stop in zip(starts, stops, strict=True)]


def _groups(
    exchanges: Sequence[tuple[tuple[Message, ...], int]], room: int, overlong: str
) -> list[tuple[Message, ...]]:
    """Runs of exchanges that fit in `room` tokens: all of them, or only the newest run."""
    if overlong == "newest":
        taken: tuple[Message, ...] = ()
        for messages, size in reversed(exchanges):
            if size > room:
                break
            taken, room = messages + taken, room - size
        return [taken] if taken else []
    groups: list[tuple[Message, ...]] = []
    current: tuple[Message, ...] = ()
    free = room
    for messages, size in exchanges:
        if size > free:
            if current:
                groups.append(current)
            current, free = (), room
        if size <= room:
            current, free = current + messages, free - size
    return [*groups, current] if current else groups
