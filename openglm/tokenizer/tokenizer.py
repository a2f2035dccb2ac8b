"""The tokenizer: byte-level BPE with special ids that ordinary text can never produce.

    python -m openglm tokenizer train corpus.txt --vocab-size 16384 --out tokenizer/

The specials are not in the library's vocabulary at all: their ids follow it, and only `encode_marked` and the callers
that write ids themselves (chat formats, objectives) can produce them.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openglm.tokenizer.bytes import bytes_of_symbol, symbol_of_byte

if TYPE_CHECKING:
    import tokenizers

SPECIALS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
MODEL_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

SENTENCE_ENDS = tuple(".!?。！？…\n")
CLOSERS = "\"'”’」』)）]】》"
# An undecodable byte of the input, in the form that the "surrogateescape" error handler gives it.
ESCAPED_BYTES = re.compile("([\udc80-\udcff]+)")


class Tokenizer:
    """Ids of text and text of ids.

    kind: how the vocabulary is stored; "bpe" is a byte-level BPE `tokenizer.json` of the `tokenizers` library.
    vocab_size: number of ids, specials included; the specials come after the text tokens.
    special_ids: name -> id.  fingerprint: sha256 (hex) of the files' content.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """From the content of the tokenizer's files, by name. Raises ValueError if they are not a tokenizer."""
        for name in (MODEL_FILE, CONFIG_FILE):
            if name not in files:
                raise ValueError(f"not a tokenizer: {name} is missing; make one with `openglm tokenizer train`")
        self.files = {name: files[name] for name in (MODEL_FILE, CONFIG_FILE)}
        config = _parse_config(self.files[CONFIG_FILE])
        self.kind: str = config["kind"]
        self.special_ids: dict[str, int] = config["special_ids"]
        self._bpe = _load_bpe(self.files[MODEL_FILE])
        self.n_text_ids = self._bpe.get_vocab_size()
        if sorted(self.special_ids.values()) != list(range(self.n_text_ids, self.n_text_ids + len(self.special_ids))):
            raise ValueError(
                f"{CONFIG_FILE}: special ids must be the {len(self.special_ids)} ids from {self.n_text_ids} on; "
                f"it was written for another {MODEL_FILE}"
            )
        self.vocab_size = self.n_text_ids + len(self.special_ids)
        digest = hashlib.sha256()
        for name, content in self.files.items():
            digest.update(f"{name} {len(content)}\n".encode() + content)
        self.fingerprint = digest.hexdigest()

    # -- text to ids ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text. A special's name in it is text like any other."""
        try:
            return self._bpe.encode(text, add_special_tokens=False).ids
        except TypeError:  # the library refuses lone surrogates, which are not UTF-8: keep their three bytes
            return self.encode_bytes(text.encode("utf-8", "surrogatepass"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        try:
            return [e.ids for e in self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:
            return [self.encode(text) for text in texts]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes; `decode_bytes` gives them back exactly. Bytes that are not UTF-8 become one id each."""
        ids: list[int] = []
        for i, piece in enumerate(ESCAPED_BYTES.split(data.decode("utf-8", "surrogateescape"))):
            if i % 2:
                ids += [self._byte_ids[ord(c) - 0xDC00] for c in piece]
            elif piece:
                ids += self.encode(piece)
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

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Specials are left out, or written as their names."""
        if skip_special:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        names = {i: name.encode() for name, i in self.special_ids.items()}
        return b"".join(names.get(int(i)) or self.token_bytes(i) for i in ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Exact bytes of ids; specials give nothing."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one id stands for; b"" for a special. Raises ValueError for an id that does not exist."""
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"token id {id} is outside the tokenizer's {self.vocab_size} ids")
        return self._bytes[id] if id < self.n_text_ids else b""

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
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer in a folder (a tokenizer's own, a checkpoint's, or a folder of token shards)."""
        folder = Path(folder)
        files = {}
        for name in (MODEL_FILE, CONFIG_FILE):
            try:
                files[name] = (folder / name).read_bytes()
            except OSError as error:
                raise ValueError(
                    f"no tokenizer in {folder}: cannot read {name} ({error.strerror}); "
                    "make one with `openglm tokenizer train`"
                ) from error
        try:
            return cls(files)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    @cached_property
    def _bytes(self) -> list[bytes]:
        """Bytes of each text id."""
        table = [b""] * self.n_text_ids
        for symbol, i in self._bpe.get_vocab().items():
            table[i] = bytes_of_symbol(symbol)
        return table

    @cached_property
    def _byte_ids(self) -> list[int]:
        """Id of each single byte."""
        vocab: dict[str, int] = self._bpe.get_vocab()
        return [vocab[symbol_of_byte(b)] for b in range(256)]


class Detokenizer:
    """Text of ids that arrive one at a time. Whole characters only; the joined output equals `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The characters that this id completes; "" for a special or while a character is still in pieces."""
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """What is left: U+FFFD if the ids ended inside a character. The detokenizer is as new afterwards."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def write_file(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _parse_config(content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content)
        kind, special_ids = config["kind"], config["special_ids"]
        ids = {str(name): int(i) for name, i in special_ids.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{CONFIG_FILE} is damaged: it must hold {{"kind": "bpe", "special_ids": {{...}}}}') from error
    if kind != "bpe":
        raise ValueError(f'{CONFIG_FILE}: unknown tokenizer kind {kind!r}; this version reads "bpe"')
    return {"kind": kind, "special_ids": ids}


def _load_bpe(content: bytes) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        bpe = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{MODEL_FILE} is damaged ({error}); make the tokenizer again") from error
    # The library would let added tokens match inside ordinary text; ours has none.
    if bpe.get_vocab_size() != bpe.get_vocab_size(with_added_tokens=False):
        raise ValueError(f"{MODEL_FILE} holds added tokens; only tokenizers made by `openglm tokenizer train` are read")
    bytes_present = sum(bpe.token_to_id(symbol_of_byte(b)) is not None for b in range(256))
    if bytes_present < 256:
        raise ValueError(f"{MODEL_FILE} holds {bytes_present} of the 256 single bytes, so it cannot encode any text")
    return bpe
