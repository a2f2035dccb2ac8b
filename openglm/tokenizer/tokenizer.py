"""The tokenizer: one class over every released vocabulary, with special ids that ordinary text can never produce.

    python -m openglm tokenizer train corpus.txt --vocab-size 16384 --out tokenizer/

The specials are not in any library's vocabulary, or are kept out of matching: only `encode_marked` and the callers
that write ids themselves (chat formats, objectives) can produce them.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from openglm.tokenizer.backend import SPECIALS, Backend
from openglm.tokenizer.bpe import MODEL_FILE, gpt2_json, load_json, load_own
from openglm.tokenizer.detect import (
    CHINESE_FILE,
    CONFIG_FILE,
    ICE_FILE,
    MERGES_FILE,
    RELEASE_FILES,
    SP_FILE,
    VOCAB_FILE,
    settle,
)
from openglm.tokenizer.gguf import open_gguf
from openglm.tokenizer.patterns import SPLIT
from openglm.tokenizer.sentencepiece import IceTokenizer, SentencePiece
from openglm.tokenizer.tiktoken import Tiktoken, parse_ranks

__all__ = ["CONFIG_FILE", "MODEL_FILE", "RELEASE_FILES", "SPECIALS", "Detokenizer", "Tokenizer", "write_file"]

SENTENCE_ENDS = tuple(".!?。！？…\n")
CLOSERS = "\"'”’」』)）]】》"
# An undecodable byte of the input, in the form that the "surrogateescape" error handler gives it.
ESCAPED_BYTES = re.compile("([\udc80-\udcff]+)")
# kind -> vocabulary files; of several alternatives, those that are there.
KIND_FILES = {
    "bpe": (MODEL_FILE,),
    "json": (MODEL_FILE,),
    "tiktoken": (SP_FILE,),
    "sentencepiece": (SP_FILE, CHINESE_FILE),
    "icetk": (ICE_FILE,),
    "gpt2": (VOCAB_FILE, MERGES_FILE),
}


class Tokenizer:
    """Ids of text and text of ids.

    kind: how the vocabulary is stored. "bpe": `openglm tokenizer train`; "json": a released tokenizer.json;
    "tiktoken": GLM-4, CodeGeeX4; "sentencepiece": ChatGLM2/3, CodeGeeX2, the Chinese GLM; "icetk": GLM-130B,
    ChatGLM-6B; "gpt2": the English GLM. vocab_size: number of ids, specials included, without the rows by which
    models pad their tables. n_text_ids: ids below it are the vocabulary's own.
    special_ids: name -> id; the roles of `SPECIALS` have these names whatever the files call them.
    prefix_ids: what the released tokenizer puts in front of every sequence: [gMASK] <sop>, a begin token, or nothing.
    files: name -> content; what `save` writes.  fingerprint: sha256 (hex) of the files' content.
    """

    def __init__(self, files: Mapping[str, bytes], *, roles: bool | None = None) -> None:
        """From the content of the tokenizer's files, by name: ours, or those of a release (see `detect`).

        roles: whether a ChatGLM2/3 vocabulary has ChatGLM3's role tokens, if the files are not to decide.
        Raises ValueError if they are not a tokenizer.
        """
        if not files.keys() & set(RELEASE_FILES):
            raise ValueError(f"not a tokenizer: {MODEL_FILE} is missing; make one with `openglm tokenizer train`")
        own, config = _own_files(files, roles)
        self._set_up(_open(own, config), lambda: own, config)

    def _set_up(self, backend: Backend, files: Callable[[], dict[str, bytes]], config: Mapping[str, Any]) -> None:
        self._backend = backend
        self._make_files = files
        self.kind: str = config["kind"]
        self.special_ids: dict[str, int] = config["special_ids"]
        self.prefix_ids: tuple[int, ...] = tuple(config.get("prefix_ids") or ())
        self.n_text_ids = _n_text_ids(backend, self.kind, self.special_ids)
        self.vocab_size = max([self.n_text_ids, *(i + 1 for i in self.special_ids.values())])

    @cached_property
    def files(self) -> dict[str, bytes]:
        return self._make_files()

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, content in self.files.items():
            digest.update(f"{name} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    # -- text to ids ------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, dummy_prefix: bool = True) -> list[int]:
        """Ids of ordinary text. A special's name in it is text like any other.

        dummy_prefix=False: without the space that SentencePiece vocabularies put in front of each encoded text.
        """
        try:
            return self._backend.encode(text, dummy_prefix)
        except (TypeError, UnicodeError):  # lone surrogates, which are not UTF-8: keep their three bytes
            return self.encode_bytes(text.encode("utf-8", "surrogatepass"), dummy_prefix=dummy_prefix)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        try:
            return self._backend.encode_batch(texts)
        except (TypeError, UnicodeError):
            return [self.encode(text) for text in texts]

    def encode_bytes(self, data: bytes, *, dummy_prefix: bool = True) -> list[int]:
        """Ids of any bytes; `decode_bytes` gives them back exactly. Bytes that are not UTF-8 become one id each.

        A vocabulary without ids for bytes (the Chinese GLM's) has U+FFFD in their place.
        """
        byte_ids = self._backend.byte_ids
        if byte_ids is None:
            return self.encode(data.decode("utf-8", "replace"), dummy_prefix=dummy_prefix)
        ids: list[int] = []
        for i, piece in enumerate(ESCAPED_BYTES.split(data.decode("utf-8", "surrogateescape"))):
            if i % 2:
                ids += [byte_ids[ord(c) - 0xDC00] for c in piece]
            elif piece:
                ids += self.encode(piece, dummy_prefix=dummy_prefix and not ids)
        return ids

    def encode_marked(self, text: str, names: Sequence[str]) -> list[int]:
        """Ids of text in which each of the given special names stands for its id, e.g. ["[MASK]"]."""
        for name in names:
            if name not in self.special_ids:
                raise ValueError(f"no special token {name!r}; this tokenizer has {', '.join(self.special_ids)}")
        if not names:
            return self.encode(text)
        marks = re.compile("(" + "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True)) + ")")
        ids: list[int] = []
        for i, piece in enumerate(marks.split(text)):
            if i % 2:
                ids.append(self.special_ids[piece])
            elif piece:
                ids += self.encode(piece)
        return ids

    # -- ids to text ------------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], skip_special: bool = True, *, continues: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Specials are left out, or written as their names.

        The space that `encode` put in front of a text is dropped, as the released tokenizers do: of the first id, and
        for SentencePiece files of the first after each special. continues=True: the ids go on from others, so a space
        at their start is a space.
        """
        return self._joined(ids, skip_special, continues).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], *, continues: bool = False) -> bytes:
        """Exact bytes of ids, spaces dropped as in `decode`; specials give nothing."""
        return self._joined(ids, True, continues)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one id stands for, a space in front included; b"" for a special and for an id without a
        meaning. Raises ValueError for an id that does not exist.
        """
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"token id {id} is outside the tokenizer's {self.vocab_size} ids")
        return self._bytes[id]

    def sentence_end_ids(self) -> frozenset[int]:
        """Ids whose bytes end a sentence: . ! ? 。！？… (closing quotes and brackets may follow) or a newline."""
        ends = []
        for i, data in enumerate(self._bytes):
            text = data.decode("utf-8", "replace")
            if text.rstrip(CLOSERS).endswith(SENTENCE_ENDS):
                ends.append(i)
        return frozenset(ends)

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            write_file(folder / name, content)

    @classmethod
    def load(cls, folder: str | Path, *, roles: bool | None = None) -> Tokenizer:
        """Read the tokenizer in a folder: a tokenizer's own, a checkpoint's, token shards', or any released layout.

        roles: as for the constructor; `detect.has_roles` says what decides without it.
        """
        folder = Path(folder)
        files = {}
        for name in RELEASE_FILES:
            try:
                files[name] = (folder / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise ValueError(f"no tokenizer in {folder}: cannot read {name} ({error.strerror})") from error
        for name, content in files.items():
            if content.startswith(b"version https://git-lfs"):
                raise ValueError(f"{folder / name} is a pointer of Git LFS, not the file itself: run git lfs pull")
        if not files.keys() & _VOCABULARIES:
            raise ValueError(
                f"no tokenizer in {folder}: {MODEL_FILE} is missing; "
                "make one with `openglm tokenizer train`"
            )
        try:
            return cls(files, roles=roles)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> Tokenizer:
        """From the metadata of a GGUF file: "tokenizer.ggml.model", ".pre", ".tokens" and so on to plain values.

        Raises ValueError, naming it, for a field that is missing or a kind that is not read.
        """
        backend, files, config = open_gguf(fields)
        tokenizer = cls.__new__(cls)
        tokenizer._set_up(backend, lambda: {**files(), CONFIG_FILE: _config_bytes(config)}, config)
        return tokenizer

    @cached_property
    def _bytes(self) -> list[bytes]:
        """Bytes of each id."""
        table = list(self._backend.table)[: self.vocab_size]
        table += [b""] * (self.vocab_size - len(table))
        for i in self.special_ids.values():
            table[i] = b""
        return table

    @cached_property
    def _special_names(self) -> dict[int, bytes]:
        return {i: name.encode() for name, i in self.special_ids.items()}

    def _joined(self, ids: Iterable[int], skip_special: bool, continues: bool) -> bytes:
        spelling = Spelling(self, continues)
        if skip_special:
            return b"".join(spelling.feed(int(i)) for i in ids)
        names = self._special_names
        return b"".join(spelling.feed(int(i)) or names.get(int(i), b"") for i in ids)


class Spelling:
    """Bytes of ids that arrive one at a time, without the space that encoding put in front."""

    def __init__(self, tokenizer: Tokenizer, continues: bool) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._special = tokenizer._special_names
        self._prefix = tokenizer._backend.dummy_prefix
        self._per_segment = self._prefix and tokenizer._backend.per_segment
        self._at_start = self._prefix and not continues

    def feed(self, id: int) -> bytes:
        data = self._token_bytes(id)
        if self._at_start and data:
            self._at_start = False
            return data.removeprefix(b" ")
        if self._per_segment and id in self._special:
            self._at_start = True
        return data


class Detokenizer:
    """Text of ids that arrive one at a time. Whole characters only; the joined output equals `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False) -> None:
        """continues: the ids go on from a prompt, so a space at their start is kept (see `Tokenizer.decode`)."""
        self._new = lambda: Spelling(tokenizer, continues)
        self._spelling = self._new()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The characters that this id completes; "" for a special or while a character is still in pieces."""
        return self._decoder.decode(self._spelling.feed(id))

    def finish(self) -> str:
        """What is left: U+FFFD if the ids ended inside a character. The detokenizer is as new afterwards."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._spelling = self._new()
        return rest


_VOCABULARIES = frozenset(name for names in KIND_FILES.values() for name in names)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a vocabulary that `Tokenizer.load` would try to read."""
    return any((Path(folder) / name).is_file() for name in _VOCABULARIES)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _own_files(files: Mapping[str, bytes], roles: bool | None) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files that make up the tokenizer, and the parsed content of tokenizer_config.json, which says the kind."""
    config = _parse_config(files[CONFIG_FILE]) if CONFIG_FILE in files else {}
    if "kind" not in config:
        found, config = settle(files, roles)
        return {**found, CONFIG_FILE: _config_bytes(config)}, config
    present = {name: files[name] for name in KIND_FILES[config["kind"]] if name in files}
    if not present:
        missing = " or ".join(KIND_FILES[config["kind"]])
        raise ValueError(f"not a tokenizer: {missing} is missing; make one with `openglm tokenizer train`")
    return {**present, CONFIG_FILE: files[CONFIG_FILE]}, config


def _config_bytes(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _parse_config(content: bytes) -> dict[str, Any]:
    """tokenizer_config.json; without "kind" it is a release's, and `settle` reads it."""
    try:
        config = json.loads(content)
        kind = config.get("kind")
        if kind is None and "special_ids" not in config:
            return {}
        ids = {str(name): int(i) for name, i in config["special_ids"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{CONFIG_FILE} is damaged: it must hold {{"kind": "bpe", "special_ids": {{...}}}}') from error
    if kind not in KIND_FILES:
        raise ValueError(f"{CONFIG_FILE}: unknown tokenizer kind {kind!r}; this version reads {', '.join(KIND_FILES)}")
    return {**config, "special_ids": ids}


def _open(files: Mapping[str, bytes], config: Mapping[str, Any]) -> Backend:
    kind = config["kind"]
    if kind == "bpe":
        return load_own(files[MODEL_FILE])
    if kind == "json":
        return load_json(files[MODEL_FILE]).backend
    if kind == "gpt2":
        if not {VOCAB_FILE, MERGES_FILE} <= files.keys():
            raise ValueError(f"not a tokenizer: it needs both {VOCAB_FILE} and {MERGES_FILE}")
        return load_json(gpt2_json(files[VOCAB_FILE], files[MERGES_FILE], config["special_ids"])).backend
    if kind == "tiktoken":
        return Tiktoken(parse_ranks(files[SP_FILE]), config.get("split", SPLIT), config.get("matched"))
    if kind == "icetk":
        return IceTokenizer(files[ICE_FILE], int(config["id_offset"]))
    return SentencePiece(files[SP_FILE] if SP_FILE in files else files[CHINESE_FILE])


def _n_text_ids(backend: Backend, kind: str, special_ids: Mapping[str, int]) -> int:
    """Ids that the vocabulary defines. Our own files must hold the specials right behind them."""
    n = backend.n_ids
    if kind == "bpe" and sorted(special_ids.values()) != list(range(n, n + len(special_ids))):
        raise ValueError(
            f"{CONFIG_FILE}: special ids must be the {len(special_ids)} ids from {n} on; "
            f"it was written for another {MODEL_FILE}"
        )
    return n
