"""Token shards: a folder of documents as token ids, memory-mapped.

tokens-00000.bin   ids, uint16 or uint32, little endian, one document after another, no specials
index-00000.npy    uint64, where each document ends within the shard
manifest.json      sizes, sha256 sums, vocabulary, sources and what was skipped; written last
tokenizer.json, tokenizer_config.json
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One shard of the manifest: file names, counts and sums."""

    tokens: str
    index: str
    n_tokens: int
    n_documents: int
    tokens_sha256: str
    index_sha256: str


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of the two id types that holds the vocabulary."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes shards one after another; a shard has its final name only once it is whole and on disk."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], first: int = 0) -> None:
        """first: number of the next shard."""
        self.folder = folder
        self.dtype = dtype
        self._number = first
        self._file: IO[bytes] | None = None
        self._sha = hashlib.sha256()
        self._ends: list[np.ndarray] = []
        self.n_tokens = 0  # in the shard that is being written

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their ids joined (n,), already of self.dtype, and the length of each."""
        assert ids.dtype == self.dtype and int(lengths.sum()) == len(ids)
        if self._file is None:
            self._file = open(self._tokens_path.with_suffix(".tmp"), "wb")
        self._ends.append(np.cumsum(lengths, dtype=np.uint64) + np.uint64(self.n_tokens))
        data = ids.tobytes()
        self._sha.update(data)
        self._file.write(data)
        self.n_tokens += len(ids)

    def finish(self) -> Shard:
        """Close the shard and give it its name."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        ends = np.concatenate(self._ends)
        index = self._tokens_path.with_name(f"index-{self._number:05d}.npy")
        with open(index.with_suffix(".tmp"), "wb") as f:
            np.save(f, ends)
            f.flush()
            os.fsync(f.fileno())
        os.replace(index.with_suffix(".tmp"), index)
        os.replace(self._tokens_path.with_suffix(".tmp"), self._tokens_path)
        shard = Shard(
            tokens=self._tokens_path.name,
            index=index.name,
            n_tokens=self.n_tokens,
            n_documents=len(ends),
            tokens_sha256=self._sha.hexdigest(),
            index_sha256=hashlib.sha256(index.read_bytes()).hexdigest(),
        )
        self._number += 1
        self._file, self._ends, self.n_tokens, self._sha = None, [], 0, hashlib.sha256()
        return shard

    def abandon(self) -> None:
        """Leave the unfinished shard and free its space."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                pass  # its buffer may not fit on the full disk either
            self._file = None
        for path in self.folder.glob("*.tmp"):
            path.unlink()

    @property
    def _tokens_path(self) -> Path:
        return self.folder / f"tokens-{self._number:05d}.bin"


def shards_to_json(shards: list[Shard]) -> list[dict[str, Any]]:
    """For the manifest."""
    return [asdict(s) for s in shards]


def shards_from_json(rows: list[dict[str, Any]]) -> list[Shard]:
    """From the manifest. Raises TypeError for other keys."""
    return [Shard(**row) for row in rows]


def read_json(path: Path) -> Any:
    """Content of a JSON file of ours; ValueError if it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); remove the folder and prepare it again") from error


def disk_error(folder: Path, error: OSError) -> ValueError:
    """One line for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ValueError(
            f"disk full while writing to {folder}: finished shards are kept; "
            "free some space and run the same command again to continue"
        )
    return ValueError(f"cannot write to {folder}: {error.strerror or error}")


class TokenDataset:
    """A prepared folder. Tokens are memory-mapped: a document is read from disk when it is looked at."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ValueError if the folder holds no finished shards, or a file has another size than it should."""
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise ValueError(
                f"{self.folder}: no {MANIFEST}, so no finished token shards; "
                "run `openglm data prepare` (again, if it was interrupted)"
            )
        self.manifest: dict[str, Any] = read_json(self.folder / MANIFEST)
        if self.manifest.get("version") != VERSION:
            raise ValueError(f"{self.folder}: shards of version {self.manifest.get('version')}, this reads {VERSION}")
        self._dtype = np.dtype("<u2" if self.manifest["dtype"] == "uint16" else "<u4")
        self.shards = shards_from_json(self.manifest["shards"])
        self.vocab_size: int = self.manifest["vocab_size"]
        self.special_ids: dict[str, int] = self.manifest["special_ids"]
        self.tokenizer_fingerprint: str = self.manifest["tokenizer_fingerprint"]
        self.sentence_ends = frozenset(self.manifest["sentence_ends"])
        self.n_documents = sum(s.n_documents for s in self.shards)
        self.n_tokens = sum(s.n_tokens for s in self.shards)
        self._first = np.cumsum([0] + [s.n_documents for s in self.shards])
        self._tokens = [self._map(s.tokens, s.n_tokens, lambda p: np.memmap(p, self._dtype, "r")) for s in self.shards]
        self._ends = [self._map(s.index, s.n_documents, lambda p: np.load(p, mmap_mode="r")) for s in self.shards]

    def __len__(self) -> int:
        return self.n_documents

    def lengths(self) -> np.ndarray:
        """Number of tokens of each document: (n_documents,) int64."""
        return np.concatenate([np.diff(ends, prepend=np.uint64(0)).astype(np.int64) for ends in self._ends])

    def document(self, i: int) -> np.ndarray:
        """Ids of one document: a read-only view, uint16 or uint32."""
        if not 0 <= i < self.n_documents:
            raise IndexError(f"document {i} of {self.n_documents}")
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        ends, j = self._ends[shard], i - int(self._first[shard])
        return self._tokens[shard][int(ends[j - 1]) if j else 0 : int(ends[j])]

    def verify(self) -> None:
        """Compare every file with its sha256 sum. Raises ValueError naming the first that differs."""
        for shard in self.shards:
            for name, wanted in ((shard.tokens, shard.tokens_sha256), (shard.index, shard.index_sha256)):
                if sha256_of(self.folder / name) != wanted:
                    raise ValueError(f"{self.folder / name}: sha256 differs from the manifest; prepare the data again")

    def _map(self, name: str, n: int, read: Callable[[Path], np.ndarray]) -> np.ndarray:
        path = self.folder / name
        try:
            array = read(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: missing or damaged ({error}); prepare the data again") from error
        if len(array) != n:
            raise ValueError(f"{path}: {len(array)} entries where the manifest says {n}; prepare the data again")
        return array


def sha256_of(path: Path) -> str:
    """Hex sum of a file's content."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
