"""Where text comes from: files, folders, globs and hub data sets, read as a stream of numbered rows.

txt, md            one document a file (a file over a mebibyte gives several, cut at blank lines)
jsonl[.gz|.zst]    one JSON object a line; the text is its field `text` (or another)
parquet            one row a document; needs pyarrow
hf:owner/name      a data set of the Hugging Face hub; needs datasets. hf:owner/name?split=train&config=en
"""

from __future__ import annotations

import glob
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import parse_qs

from openglm.data.lines import MAX_LINE_BYTES, open_lines, read_lines

SUFFIXES = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".parquet": "parquet",
}
PIECE_BYTES = 1 << 20  # a text file is cut into documents of about this size
TOO_LONG = f"line longer than {MAX_LINE_BYTES >> 20} MiB"
HEAD_BYTES = 1 << 16  # what is looked at to tell text from other things, and to recognise a file again


@dataclass(frozen=True)
class Source:
    """One file or data set. digest: of size and both ends of the file, to recognise it in a later run."""

    path: str
    kind: str  # "text" | "jsonl" | "parquet" | "hub"
    size_bytes: int
    digest: str


class Row(NamedTuple):
    """One document, or the reason why a row gives none. number: of the row or line in its source, from 1."""

    number: int
    text: str | None
    problem: str = ""


class RowReader:
    """Iterates over the rows of a source. position: how many bytes of the file have been read so far."""

    def __init__(self, source: Source, field: str = "text", skip: int = 0) -> None:
        """skip: leave out all rows with a number up to this one. Errors are raised while iterating."""
        self.source = source
        self._raw: IO[bytes] | None = None
        readers: dict[str, Callable[[], Iterator[Row]]] = {
            "text": self._read_text,
            "jsonl": self._read_jsonl,
            "parquet": self._read_parquet,
            "hub": self._read_hub,
        }
        self._field = field
        self._skip = skip
        self._rows = readers[source.kind]()

    def __iter__(self) -> Iterator[Row]:
        return self._rows

    @property
    def position(self) -> int:
        return 0 if self._raw is None or self._raw.closed else min(self._raw.tell(), self.source.size_bytes)

    def _read_text(self) -> Iterator[Row]:
        """Documents with the number of their last line; bad lines by their own number."""
        piece: list[str] = []
        size = number = 0
        with _open(self.source.path) as self._raw:
            for number, line in enumerate(read_lines(open_lines(self._raw, self.source.path)), 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError:
                    text = ""
                if not text or len(line) >= MAX_LINE_BYTES:
                    if number > self._skip:
                        yield Row(number, None, TOO_LONG if text else "not UTF-8")
                    continue
                piece.append(text)
                size += len(line)
                # Prefer to cut at a blank line, but do not grow for ever where there is none.
                if size >= PIECE_BYTES and (text.isspace() or size >= 2 * PIECE_BYTES):
                    if number > self._skip:
                        yield Row(number, "".join(piece))
                    piece, size = [], 0
            if piece and number >= self._skip:
                yield Row(number + 1, "".join(piece))

    def _read_jsonl(self) -> Iterator[Row]:
        with _open(self.source.path) as self._raw:
            for number, line in enumerate(read_lines(open_lines(self._raw, self.source.path)), 1):
                if number > self._skip and not line.isspace():
                    yield self._parse(number, line)

    def _parse(self, number: int, line: bytes) -> Row:
        if len(line) >= MAX_LINE_BYTES:
            return Row(number, None, TOO_LONG)
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            return Row(number, None, "not UTF-8")
        except json.JSONDecodeError as error:
            return Row(number, None, f"not JSON: {error.msg} (column {error.colno})")
        except RecursionError:
            return Row(number, None, "not JSON: nested too deeply")
        return self._text_of(number, row)

    def _text_of(self, number: int, row: Any) -> Row:
        field = self._field
        if not isinstance(row, dict):
            return Row(number, None, "not a JSON object")
        text = row.get(field)
        if isinstance(text, str):
            return Row(number, text)
        if field not in row:
            if "messages" in row:
                raise ValueError(
                    f"{self.source.path}, row {number}: holds chat messages, not text; they need no preparing: "
                    "look at them with `openglm data check` and train on them with objective sft"
                )
            return Row(number, None, f"no field {field!r} (has {', '.join(map(str, row)) or 'none'})")
        return Row(number, None, f"field {field!r} is {type(text).__name__}, not text")

    def _read_parquet(self) -> Iterator[Row]:
        parquet = _lazy("pyarrow.parquet", "pyarrow", "parquet files")
        with _open(self.source.path) as self._raw:
            try:
                table = parquet.ParquetFile(self._raw)
                names = table.schema_arrow.names
                if self._field not in names:
                    self._text_of(0, dict.fromkeys(names))  # chat messages have their own error
                    raise ValueError(f"{self.source.path}: no column {self._field!r}; it has {', '.join(names)}")
                number = 0
                for batch in table.iter_batches(batch_size=1024, columns=[self._field]):
                    first, number = number, number + batch.num_rows
                    if number <= self._skip:
                        continue
                    for i, text in enumerate(batch.column(0).to_pylist(), first + 1):
                        if i > self._skip:
                            yield self._text_of(i, {self._field: text})
            except (OSError, RuntimeError) as error:
                raise _unreadable(self.source.path, error) from error
            except ValueError as error:  # pyarrow's own errors are ValueErrors of several lines
                if type(error) is ValueError:
                    raise
                raise _unreadable(self.source.path, error) from error

    def _read_hub(self) -> Iterator[Row]:
        datasets = _lazy("datasets", "datasets", "hub data sets")
        name, _, query = self.source.path.removeprefix("hf:").partition("?")
        options = {key: values[-1] for key, values in parse_qs(query).items()}
        if unknown := set(options) - {"split", "config"}:
            raise ValueError(f"{self.source.path}: unknown option {min(unknown)!r}; there are split and config")
        try:
            rows = datasets.load_dataset(
                name, options.get("config"), split=options.get("split", "train"), streaming=True
            )
        except Exception as error:  # the library raises a dozen kinds
            raise _unreadable(self.source.path, error) from error
        for number, row in enumerate(rows, 1):
            if number > self._skip:
                yield self._text_of(number, row)


def expand_sources(sources: Sequence[str | Path] | str | Path) -> list[Source]:
    """The files meant by paths, folders (searched to the bottom), globs and hub ids, each once, in a fixed order.

    Every file is opened and its first bytes are looked at, so that a missing, unreadable or non-UTF-8 file is
    reported (ValueError) before any work is done.
    """
    if isinstance(sources, (str, Path)):
        sources = [sources]
    found: dict[str, Source] = {}
    for source in map(str, sources):
        if source.startswith("hf:"):
            found[source] = Source(source, "hub", 0, "")
            continue
        for path in _paths(source):
            if path not in found:
                found[path] = _probe(path)
    if not found:
        raise ValueError("no sources: name at least one file, folder, glob or hf:owner/name")
    return list(found.values())


def _paths(source: str) -> list[str]:
    path = Path(source)
    if path.is_dir():
        files = sorted(str(p) for p in path.rglob("*") if p.is_file() and _kind(p.name))
        if not files:
            raise ValueError(f"{source}: no {', '.join(SUFFIXES)} file in this folder")
        return files
    if not path.exists() and glob.has_magic(source):
        files = sorted(p for p in glob.glob(source, recursive=True) if Path(p).is_file())
        if not files:
            raise ValueError(f"{source}: no file matches this pattern")
        return files
    if not path.exists():
        raise ValueError(f"{source}: no such file or folder (hub data sets are written hf:owner/name)")
    return [source]


def _kind(name: str) -> str:
    return next((kind for suffix, kind in SUFFIXES.items() if name.lower().endswith(suffix)), "")


def _probe(path: str) -> Source:
    """Look at a file: can it be opened, is it text?"""
    kind = _kind(Path(path).name)
    if not kind:
        raise ValueError(f"{path}: unknown kind of file; readable are {', '.join(SUFFIXES)}")
    with _open(path) as raw:
        head = raw.read(HEAD_BYTES)
        size = raw.seek(0, 2)
        raw.seek(max(0, size - HEAD_BYTES))
        digest = hashlib.blake2b(b"%d\n" % size + head + raw.read(), digest_size=16).hexdigest()
        if kind != "parquet":
            raw.seek(0)
            _check_utf8(open_lines(raw, path).read(HEAD_BYTES), path)
    return Source(path, kind, size, digest)


def _check_utf8(head: bytes, path: str) -> None:
    """ValueError if most lines of the head of a file are not UTF-8, or if it holds NUL bytes."""
    lines = head.split(b"\n")
    if len(lines) > 1:
        lines.pop()  # it may be cut inside a character
    else:
        lines = [head[: max(0, len(head) - 3)] if len(head) == HEAD_BYTES else head]
    lines = [line for line in lines if line.strip()]
    bad = sum(not _is_utf8(line) for line in lines)
    if b"\0" in head or 2 * bad > len(lines):
        raise ValueError(f"{path}: not UTF-8 text; convert it first, e.g. `iconv -f GB18030 -t UTF-8`")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _open(path: str) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def _unreadable(path: str, error: BaseException) -> ValueError:
    return ValueError(f"{path}: cannot be read ({' '.join(str(error).split())[:200] or type(error).__name__})")


def _lazy(module: str, package: str, what: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{what} need the package {package}: `pip install openglm[data]`") from error


def report_problem(source: Source, row: Row, shown: int, limit: int = 5) -> None:
    """Tell of a row that was skipped on stderr; after `limit` of them only that there are more."""
    if shown < limit:
        print(f"skipped {source.path}, line {row.number}: {row.problem}", file=sys.stderr)
    elif shown == limit:
        print("more malformed lines are skipped silently; all are counted", file=sys.stderr)


def texts_of(sources: Iterable[Source], field: str, sample_bytes: int | None) -> Iterator[str]:
    """The text of all rows; of each source only about the first sample_bytes bytes of text."""
    shown = 0
    for source in sources:
        n_bytes = 0
        n_rows = 0
        for row in RowReader(source, field):
            n_rows += 1
            if row.text is None:
                report_problem(source, row, shown)
                shown += 1
                continue
            n_bytes += len(row.text.encode("utf-8", "surrogatepass"))
            yield row.text
            if sample_bytes is not None and n_bytes >= sample_bytes:
                break
        if n_rows and not n_bytes:
            raise ValueError(f"{source.path}: none of its {n_rows} rows holds text")
