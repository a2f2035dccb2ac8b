"""Endless, resumable streams of packed rows: every row is a pure function of (seed, state).

A `Source` is a finite supply of numbered units, each giving one or a few Examples as a pure function of
(epoch, unit). `PackedStream` walks each source in an order shuffled anew every epoch, keeps the sources' shares of
tokens where they should be, and packs the examples into rows. Its state is a few numbers and the keys of the
examples waiting in the packer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from openglm.data.example import Example, Rows, causal_example, collate
from openglm.data.infill import InfillParams, SpecialIds, infill
from openglm.data.pack import Key, Packer
from openglm.types import IGNORE

__all__ = [
    "Documents", "ExampleSource", "InfillSource", "LMSource", "PackedStream", "RowStream", "Source", "check_mix",
    "philox",
]  # fmt: skip

MIN_TOKENS = 8  # shorter documents, and shorter ends of documents, are skipped


class RowStream(Protocol):
    """Every source of training rows."""

    def next_rows(self, batch_size: int) -> Rows:
        """The next batch_size packed rows; loops over epochs for ever."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Small and JSON-able; a stream built with the same arguments continues from it exactly."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Documents(Protocol):
    """What a source of text needs of a corpus; `TokenDataset` has it."""

    @property
    def n_documents(self) -> int: ...
    @property
    def sentence_ends(self) -> frozenset[int]: ...
    def lengths(self) -> NDArray[Any]: ...
    def document(self, index: int) -> NDArray[Any]: ...


class Source(Protocol):
    """A finite supply of units; unit i of epoch e gives the same examples every time."""

    def __len__(self) -> int: ...
    def examples(self, epoch: int, unit: int) -> list[Example]: ...


def philox(seed: int, tag: int, epoch: int, index: int) -> np.random.Generator:
    """A generator that depends on these four numbers only. Different numbers never share a stream: seed and tag are
    the key of the block cipher, epoch and index its upper counter words.
    """
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, tag], np.uint64)
    counter = np.array([0, 0, epoch, index], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


class _Windows:
    """Documents cut into windows of `size` tokens, `stride` apart. Documents and rests under MIN_TOKENS are skipped."""

    def __init__(self, documents: Documents, size: int, stride: int | None = None) -> None:
        self.documents, self.size, self.stride = documents, size, stride or size
        self.lengths = np.asarray(documents.lengths(), np.int64)
        counts = np.maximum(0, -(-(self.lengths - MIN_TOKENS + 1) // self.stride))
        self.ends = np.cumsum(counts)
        usable = int(self.lengths[counts > 0].sum())
        if usable < size:
            raise ValueError(
                f"empty corpus: {usable} tokens in documents of at least {MIN_TOKENS} tokens, fewer than one row needs "
                f"({size}); add text or use shorter rows"
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, unit: int) -> tuple[NDArray[np.int32], bool]:
        """Window of text tokens, and whether it reaches the end of its document."""
        document = int(np.searchsorted(self.ends, unit, side="right"))
        first = int(self.ends[document - 1]) if document else 0
        start = (unit - first) * self.stride
        stop = min(start + self.size, int(self.lengths[document]))
        return self.documents.document(document)[start:stop].astype(np.int32), stop == int(self.lengths[document])


class InfillSource:
    """Blank infilling over a corpus.

    row_len: rows that the examples must fit in. mix: share of the text by kind ("gmask", "mask", "smask", "lm").
    A unit is a window that fills a row. One drawn as [MASK] or [sMASK] is cut into windows of mask_window tokens,
    default row_len // 4, as GLM-130B puts four 512-token windows in a row of 2048.
    """

    def __init__(
        self, documents: Documents, row_len: int, special_ids: Mapping[str, int], *, vocab_size: int,
        mix: Mapping[str, float] | None = None, params: InfillParams | None = None, mask_window: int | None = None,
        seed: int = 0, tag: int = 0,
    ) -> None:  # fmt: skip
        self.specials = SpecialIds.from_names(special_ids)
        self.params = params or InfillParams()
        self.kinds, self.thresholds = _mix_table(mix or {"gmask": 0.7, "mask": 0.3})
        if row_len < 4 * MIN_TOKENS:
            raise ValueError(f"row_len must be at least {4 * MIN_TOKENS} for blank infilling, not {row_len}")
        self.windows = _Windows(documents, row_len - 2)  # [gMASK] <sop> text: one id more than the text, or two at ends
        self.mask_window = mask_window or row_len // 4
        if not MIN_TOKENS <= self.mask_window <= row_len // 2:
            raise ValueError(f"mask_window must be between {MIN_TOKENS} and row_len / 2 = {row_len // 2}")
        self.seed, self.tag = seed, tag
        self.sentence_ends = np.zeros(vocab_size, np.bool_)
        self.sentence_ends[list(documents.sentence_ends)] = True

    def __len__(self) -> int:
        return len(self.windows)

    def examples(self, epoch: int, unit: int) -> list[Example]:
        rng = philox(self.seed, self.tag, epoch, unit)
        window, ends = self.windows[unit]
        kind = self.kinds[int(np.searchsorted(self.thresholds, rng.random(), side="right"))]
        if kind in ("gmask", "lm"):
            return [infill(window, kind, rng, self.specials, self.params, ends_document=ends)]
        n_pieces = -(-len(window) // self.mask_window)
        bounds = np.linspace(0, len(window), n_pieces + 1).round().astype(np.int64)
        return [
            infill(window[start:stop], kind, rng, self.specials, self.params, ends_document=ends,
                   sentence_ends=self.sentence_ends)
            for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
        ]  # fmt: skip


class LMSource:
    """Plain causal language modelling: windows of text, targets shifted by one, no special tokens."""

    def __init__(self, documents: Documents, row_len: int) -> None:
        # One token of overlap, so that the first token of a later window is predicted too, by the window before.
        self.windows = _Windows(documents, row_len + 1, stride=row_len)

    def __len__(self) -> int:
        return len(self.windows)

    def examples(self, epoch: int, unit: int) -> list[Example]:
        return [causal_example(self.windows[unit][0])]


class ExampleSource:
    """Ready examples, one a unit: dialogues, instructions."""

    def __init__(self, examples: Sequence[Example]) -> None:
        if not len(examples):
            raise ValueError("no training examples: every row was empty, too long or malformed; see the counts above")
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def examples(self, epoch: int, unit: int) -> list[Example]:
        return [self._examples[unit]]


class PackedStream:
    """Rows from one or several sources, each with its share of the tokens.

    shares: one positive number a source, any scale; default equal. The next unit always comes from the source that is
    furthest behind its share of input tokens, so that shares hold exactly in the long run whatever the lengths.
    n_open: rows the packer holds open.
    """

    def __init__(
        self, sources: Sequence[Source], row_len: int, pad_id: int, *, shares: Sequence[float] | None = None,
        seed: int = 0, n_open: int = 32,
    ) -> None:  # fmt: skip
        self.sources, self.row_len, self.pad_id, self.seed, self.n_open = list(sources), row_len, pad_id, seed, n_open
        self.shares = list(shares) if shares is not None else [1.0] * len(self.sources)
        if len(self.shares) != len(self.sources) or not self.sources or min(self.shares) <= 0:
            raise ValueError(f"{len(self.sources)} sources need as many positive shares, not {self.shares}")
        self._packer = Packer(row_len, n_open, MIN_TOKENS)
        self._epoch = [0] * len(self.sources)
        self._cursor = [0] * len(self.sources)
        self._tokens = [0] * len(self.sources)  # input tokens drawn so far
        self._order = lru_cache(maxsize=2 * len(self.sources))(self._shuffled)

    def next_rows(self, batch_size: int) -> Rows:
        rows: list[list[Example]] = []
        while len(rows) < batch_size:
            row = self._packer.pop()
            if row is None:
                self._draw()
            else:
                rows.append(row)
        return collate(rows, self.row_len, self.pad_id)

    def _draw(self) -> None:
        """Draw one unit of the source that is most behind and hand its examples to the packer."""
        s = min(range(len(self.sources)), key=lambda i: self._tokens[i] / self.shares[i])
        unit = int(self._order(s, self._epoch[s])[self._cursor[s]])
        for key, example in self._examples(s, self._epoch[s], unit):
            self._tokens[s] += len(example)
            self._packer.add(key, example)
        self._cursor[s] += 1
        if self._cursor[s] == len(self.sources[s]):
            self._epoch[s], self._cursor[s] = self._epoch[s] + 1, 0

    def _shuffled(self, source: int, epoch: int) -> NDArray[np.int64]:
        # A tag that no source uses for its samples, so that order and content are independent.
        return philox(self.seed, (1 << 32) + source, epoch, 0).permutation(len(self.sources[source]))

    def _examples(self, source: int, epoch: int, unit: int) -> Iterator[tuple[Key, Example]]:
        for piece, example in enumerate(self.sources[source].examples(epoch, unit)):
            if len(example) <= self.row_len and (example.targets != IGNORE).any():
                yield (source, epoch, unit, piece), example

    def state_dict(self) -> dict[str, Any]:
        keys = self._packer.keys()
        return {
            "seed": self.seed,
            "row_len": self.row_len,
            "n_open": self.n_open,
            "n_units": [len(source) for source in self.sources],
            "epoch": list(self._epoch),
            "cursor": list(self._cursor),
            "tokens": list(self._tokens),
            **{name: [[list(key) for key in row] for row in rows] for name, rows in keys.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; ValueError when it was saved with other data, row length or seed."""
        here = self.state_dict()
        for name in ("seed", "row_len", "n_open", "n_units"):
            if state.get(name) != here[name]:
                raise ValueError(
                    f"the saved data state has {name} {state.get(name)}, this run {here[name]}: "
                    "resume with the data and settings of that run, or start a new one"
                )
        self._epoch, self._cursor, self._tokens = (list(state[name]) for name in ("epoch", "cursor", "tokens"))
        drawn: dict[tuple[int, int, int], dict[Key, Example]] = {}

        def rebuild(keys: Sequence[Sequence[int]]) -> list[tuple[Key, Example]]:
            row = []
            for source, epoch, unit, piece in keys:
                unit_key = (source, epoch, unit)
                if unit_key not in drawn:
                    drawn[unit_key] = dict(self._examples(*unit_key))
                key: Key = (source, epoch, unit, piece)
                row.append((key, drawn[unit_key][key]))
            return row

        self._packer.restore([rebuild(row) for row in state["open"]], [rebuild(row) for row in state["ready"]])


def _mix_table(mix: Mapping[str, float]) -> tuple[list[str], NDArray[np.float64]]:
    """Kinds and the borders between their shares on [0, 1)."""
    kinds = check_mix(mix)
    shares = np.array([float(mix[kind]) for kind in kinds])
    return kinds, np.cumsum(shares)[:-1] / shares.sum()


def check_mix(mix: Mapping[str, float]) -> list[str]:
    """The kinds of a mix with a share above 0; ValueError for unknown ones. Shares need not add up to one."""
    known = ("gmask", "mask", "smask", "lm")
    for kind, share in mix.items():
        if kind not in known:
            raise ValueError(f"unknown kind {kind!r} in mix; known: {', '.join(known)}")
        if not share >= 0.0:
            raise ValueError(f"mix.{kind} must be 0 or more, not {share}")
    kinds = [kind for kind in known if mix.get(kind, 0.0) > 0.0]
    if not kinds:
        raise ValueError("mix needs at least one kind with a share above 0")
    return kinds
