"""From text to token shards, and from text to a tokenizer.

    python -m openglm tokenizer train corpus/*.jsonl.zst --vocab-size 16384 --out tokenizer
    python -m openglm data prepare corpus/*.jsonl.zst --tokenizer tokenizer --out shards

The main thread reads, checks and removes duplicates; other threads encode (in Rust, without the interpreter's lock).
Work is committed shard by shard. A run that was killed continues after the last whole shard and ends with the same
bytes as one that was not: batches are cut by the text alone, and shards end where a batch ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openglm.data.encode import EncoderPool, n_cores
from openglm.data.progress import (
    DIGESTS,
    MALFORMED_LISTED,
    PROGRESS,
    Counts,
    Progress,
    check_same,
    locked,
    open_progress,
)
from openglm.data.shards import (
    MANIFEST,
    VERSION,
    ShardWriter,
    TokenDataset,
    disk_error,
    read_json,
    shards_to_json,
    token_dtype,
)
from openglm.data.sources import RowReader, Source, expand_sources, report_problem, texts_of
from openglm.tokenizer import Tokenizer
from openglm.tokenizer.tokenizer import write_file

BATCH_BYTES = 1 << 20  # text encoded at a time by one thread
SHARD_TOKENS = 1 << 24


@dataclass
class _Batch:
    """Documents to encode, and where in the sources the reader stands after them."""

    texts: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    counts: dict[int, Counts] = field(default_factory=dict)  # by number of the source
    n_bytes: int = 0
    source: int = 0
    row: int = 0
    bytes_read: int = 0  # of all files, for the progress bar


def train_tokenizer(
    sources: Sequence[str | Path] | str | Path,
    vocab_size: int,
    out: str | Path,
    *,
    sample_bytes: int | None = None,
    field: str = "text",
) -> Tokenizer:
    """Train a byte-level BPE of exactly vocab_size ids (specials included) and write it to the folder out.

    sample_bytes: read only about the first so many bytes of text of each file; give each language files of its own
    and this balances them. Raises ValueError for unusable sources and for text too poor for the vocabulary.
    """
    from tqdm import tqdm

    from openglm.tokenizer.train import train_bpe

    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder; choose another --out")
    if sample_bytes is not None and sample_bytes < 1:
        raise ValueError("--sample-bytes must be at least 1")
    texts = texts_of(expand_sources(sources), field, sample_bytes)
    tokenizer = train_bpe(tqdm(texts, desc="reading", unit=" documents", disable=None), vocab_size)
    try:
        tokenizer.save(out)
    except OSError as error:
        raise disk_error(out, error) from error
    return tokenizer


def prepare(
    sources: Sequence[str | Path] | str | Path,
    tokenizer_folder: str | Path,
    out: str | Path,
    *,
    workers: int | None = None,
    field: str = "text",
    shard_tokens: int = SHARD_TOKENS,
) -> TokenDataset:
    """Encode the documents of all sources into token shards in the folder out; exact duplicates are left out.

    workers: encoding threads (default: one per core).  field: of jsonl and parquet rows.  shard_tokens: a shard is
    closed once it holds this many. Needs about 150 bytes of memory per distinct document, for finding duplicates.
    Running it again continues an interrupted run. Raises ValueError, one line, for anything that the user can mend.
    """
    if workers is not None and workers < 1:
        raise ValueError("--workers must be at least 1")
    if shard_tokens < 1:
        raise ValueError("shard_tokens must be at least 1")
    tokenizer = Tokenizer.load(tokenizer_folder)
    files = expand_sources(sources)
    out = Path(out)
    settings = {
        "version": VERSION,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "field": field,
        "shard_tokens": shard_tokens,
        "batch_bytes": BATCH_BYTES,
        "sources": [asdict(f) for f in files],
    }
    with locked(out):
        if (out / MANIFEST).exists():
            check_same(settings, read_json(out / MANIFEST), out)
            for name in (PROGRESS, DIGESTS):  # left by a run that was killed at its very end
                (out / name).unlink(missing_ok=True)
            print(f"{out} is already prepared from these sources", file=sys.stderr)
            return TokenDataset(out)
        progress = open_progress(out, settings, len(files))
        run = _Run(out, tokenizer, files, settings, progress)
        run.go(workers or n_cores())
    return TokenDataset(out)


class _Run:
    """One run of `prepare`, from the committed state to the manifest."""

    def __init__(
        self, out: Path, tokenizer: Tokenizer, files: list[Source], settings: dict[str, Any], progress: Progress
    ) -> None:
        self.out = out
        self.tokenizer = tokenizer
        self.files = files
        self.settings = settings
        self.progress = progress
        self.field: str = settings["field"]
        self.writer = ShardWriter(out, token_dtype(tokenizer.vocab_size), first=len(progress.shards))
        self.new_digests: list[bytes] = []
        self.seen: set[bytes] = set()

    def go(self, workers: int) -> None:
        from tqdm import tqdm

        n_bytes = sum(f.size_bytes for f in self.files)
        bar = tqdm(total=n_bytes, desc="preparing", unit="B", unit_scale=True, disable=None)
        try:
            self._start()
            # Two batches in hand for each thread keep them busy and bound the memory.
            pending: deque[tuple[_Batch, Future[tuple[np.ndarray, np.ndarray]]]] = deque()
            with bar, EncoderPool(self.tokenizer, workers, self.writer.dtype) as pool:
                for batch in self._batches():
                    pending.append((batch, pool.submit(batch.texts)))
                    if len(pending) > 2 * workers:
                        self._write(*pending.popleft(), bar)
                while pending:
                    self._write(*pending.popleft(), bar)
            self._end()
        except BaseException:
            self.writer.abandon()
            raise

    # -- reading ----------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[_Batch]:
        """Batches of new documents from where the committed state ends."""
        batch = _Batch()
        bytes_before = sum(f.size_bytes for f in self.files[: self.progress.source])
        shown = sum(c.malformed for c in self.progress.counts)
        first = self.progress.source
        totals = Counts(**asdict(self.progress.counts[first])) if first < len(self.files) else Counts()
        for s in range(first, len(self.files)):
            reader = RowReader(self.files[s], self.field, skip=self.progress_row if s == first else 0)
            here = batch.counts.setdefault(s, Counts())
            for row in reader:
                if row.text is None:
                    report_problem(self.files[s], row, shown)
                    shown += 1
                self._take(row.number, row.text, row.problem, batch, here)
                if batch.n_bytes >= BATCH_BYTES:
                    batch.source, batch.row, batch.bytes_read = s, row.number, bytes_before + reader.position
                    totals.add(here)
                    yield batch
                    batch = _Batch()
                    here = batch.counts.setdefault(s, Counts())
            totals.add(here)
            _check_usable(self.files[s], totals)
            totals = Counts()
            bytes_before += self.files[s].size_bytes
            batch.source, batch.row, batch.bytes_read = len(self.files), 0, bytes_before
        yield batch

    def _take(self, number: int, text: str | None, problem: str, batch: _Batch, here: Counts) -> None:
        """Count a row; put its text into the batch if it is new."""
        here.rows += 1
        data = b""
        if text is not None:
            try:
                data = text.encode("utf-8")
            except UnicodeEncodeError:
                text, problem = None, "holds half of a surrogate pair"
        if text is None:
            here.malformed += 1
            if len(here.listed) < MALFORMED_LISTED:
                here.listed.append([number, problem])
        elif not text or text.isspace():
            here.empty += 1
        elif (digest := hashlib.blake2b(data, digest_size=16).digest()) in self.seen:
            here.duplicates += 1
        else:
            here.documents += 1
            self.seen.add(digest)
            batch.digests.append(digest)
            batch.texts.append(text)
            batch.n_bytes += len(data)

    # -- writing ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Bring the folder to the committed state."""
        self.progress_row = self.progress.row
        keep = {name for s in self.progress.shards for name in (s.tokens, s.index)}
        try:
            for path in [*self.out.glob("tokens-*"), *self.out.glob("index-*"), *self.out.glob("*.tmp")]:
                if path.name not in keep:
                    path.unlink()
            self._save_progress()  # first of all: it marks the folder as ours to continue in
            self.tokenizer.save(self.out)
            with open(self.out / DIGESTS, "ab") as f:
                f.truncate(16 * self.progress.n_digests)
            data = (self.out / DIGESTS).read_bytes()
        except OSError as error:
            raise disk_error(self.out, error) from error
        if len(data) != 16 * self.progress.n_digests:
            raise ValueError(f"{self.out / DIGESTS} is cut short; remove {self.out} and prepare the data again")
        self.seen = {data[i : i + 16] for i in range(0, len(data), 16)}

    def _write(self, batch: _Batch, encoded: Future[tuple[np.ndarray, np.ndarray]], bar: Any) -> None:
        ids, lengths = encoded.result()
        progress = self.progress
        for s, counts in batch.counts.items():
            progress.counts[s].add(counts)
        progress.source, progress.row = batch.source, batch.row
        self.new_digests += batch.digests
        try:
            if len(lengths):
                self.writer.add(ids, lengths)
            if self.writer.n_tokens >= self.settings["shard_tokens"]:
                self._commit()
        except OSError as error:
            raise disk_error(self.out, error) from error
        bar.update(batch.bytes_read - bar.n)

    def _commit(self) -> None:
        """Finish the shard, then record it."""
        self.progress.shards.append(self.writer.finish())
        with open(self.out / DIGESTS, "ab") as f:
            f.write(b"".join(self.new_digests))
            f.flush()
            os.fsync(f.fileno())
        self.progress.n_digests += len(self.new_digests)
        self.new_digests = []
        self._save_progress()

    def _save_progress(self) -> None:
        write_file(self.out / PROGRESS, self.progress.to_json(self.settings))

    def _end(self) -> None:
        """The last shard, the manifest, and away with the notes."""
        n_documents = sum(c.documents for c in self.progress.counts)
        if not n_documents:
            raise ValueError("empty corpus: the sources hold no text")
        if n_documents == 1 and self.progress.counts[0].rows > 1:
            print("warning: there is only one distinct document; all others repeat it", file=sys.stderr)
        try:
            if self.writer.n_tokens:
                self._commit()
            content = json.dumps(self._manifest(), ensure_ascii=False, indent=1)
            write_file(self.out / MANIFEST, content.encode())
            for name in (PROGRESS, DIGESTS):
                (self.out / name).unlink()
        except OSError as error:
            raise disk_error(self.out, error) from error

    def _manifest(self) -> dict[str, Any]:
        shards, counts = self.progress.shards, self.progress.counts
        sources = [asdict(f) | asdict(c) for f, c in zip(self.files, counts, strict=True)]
        names = ("rows", "documents", "duplicates", "empty", "malformed")
        return self.settings | {
            "dtype": self.writer.dtype.name,
            "vocab_size": self.tokenizer.vocab_size,
            "special_ids": self.tokenizer.special_ids,
            "sentence_ends": sorted(self.tokenizer.sentence_end_ids()),
            "n_tokens": sum(s.n_tokens for s in shards),
            "n_documents": sum(s.n_documents for s in shards),
            "totals": {name: sum(getattr(c, name) for c in counts) for name in names},
            "shards": shards_to_json(shards),
            "sources": sources,
        }


def _check_usable(source: Source, counts: Counts) -> None:
    """A file without one line is worth a warning; a file with lines none of which can be used is an error."""
    if counts.rows == 0:
        print(f"warning: {source.path} is empty", file=sys.stderr)
    elif not counts.documents + counts.duplicates:
        why = f": line {counts.listed[0][0]}: {counts.listed[0][1]}" if counts.listed else ""
        raise ValueError(
            f"{source.path}: none of its {counts.rows} rows holds usable text "
            f"({counts.malformed} malformed, {counts.empty} empty){why}"
        )
