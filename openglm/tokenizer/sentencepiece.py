"""SentencePiece vocabularies: ChatGLM2/3 and CodeGeeX2, GLM-130B and ChatGLM-6B (icetk), the Chinese GLM, Llama files.

The `sentencepiece` library does the encoding. A model file is a protobuf message, and two messages joined are one
whose later fields win and whose lists are appended; so pieces are added and options changed by appending bytes.
Field numbers are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from openglm.tokenizer.backend import n_threads

if TYPE_CHECKING:
    import sentencepiece

METASPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNKNOWN_SURFACE = " \u2047 "  # what the library writes for the unknown piece

ICE_SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "<eod>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
NEWLINE, TAB, MAX_BLANK = "<n>", "<|tab|>", 80
N_IMAGE_IDS = 20000  # ids before the text's in GLM-130B and the first ChatGLM-6B: image codes, which they never use
_BLANK_RUN = re.compile(f" {{2,{MAX_BLANK}}}")
_ICE_TOKEN = re.compile(r"<\|blank_(\d+)\|>")


class SentencePiece:
    """A model file as it is. Control pieces are the library's: text never gives them, ids of them give no text.

    control: piece -> id of the control pieces.
    """

    per_segment = True

    def __init__(self, model: bytes) -> None:
        """Raises ValueError if the content is not a SentencePiece model."""
        self._model = model
        self._processor = _processor(model)
        self.n_ids = int(self._processor.get_piece_size())
        self.dummy_prefix = self._processor.normalize("a").startswith(METASPACE)

    def encode(self, text: str, dummy_prefix: bool = True) -> list[int]:
        text.encode()  # lone surrogates: UnicodeEncodeError instead of the library's own
        processor = self._processor if dummy_prefix or not self.dummy_prefix else self._unprefixed
        return processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if n_threads() == 1:
            return [self.encode(text) for text in texts]
        "".join(texts).encode()
        return self._processor.encode(list(texts), num_threads=n_threads())

    def id_of(self, piece: str) -> int | None:
        """Id of a piece; None if the vocabulary has no such piece."""
        i = int(self._processor.piece_to_id(piece))
        return i if self._processor.id_to_piece(i) == piece else None

    @cached_property
    def control(self) -> dict[str, int]:
        sp = self._processor
        return {sp.id_to_piece(i): i for i in range(self.n_ids) if sp.is_control(i)}

    @cached_property
    def table(self) -> list[bytes]:
        sp, table = self._processor, []
        for i in range(self.n_ids):
            if sp.is_control(i):
                table.append(b"")
            elif sp.is_byte(i):
                table.append(bytes([int(sp.id_to_piece(i)[3:5], 16)]))
            elif sp.is_unknown(i):
                table.append(UNKNOWN_SURFACE.encode())
            else:
                table.append(sp.id_to_piece(i).replace(METASPACE, " ").encode())
        return table

    @cached_property
    def byte_ids(self) -> list[int] | None:
        ids = [self.id_of(f"<0x{b:02X}>") for b in range(256)]
        found = [i for i in ids if i is not None and self._processor.is_byte(i)]
        return found if len(found) == 256 else None

    @cached_property
    def _unprefixed(self) -> sentencepiece.SentencePieceProcessor:
        """The same vocabulary without the dummy prefix."""
        return _processor(self._model + _message(3, _flag(3, False)))


class IceTokenizer:
    """icetk: newlines, tabs and runs of spaces have ids of their own, and ids may start behind 20000 image codes.

    The pieces that follow the trained ones (masks and other commands, tab, blanks, bytes) are appended where the file
    lacks them, as the original code does; the second release of ChatGLM-6B has them in the file.
    """

    per_segment = True

    def __init__(self, model: bytes, id_offset: int) -> None:
        """id_offset: added to every id of the model. Raises ValueError for content that is no such vocabulary."""
        sp = SentencePiece(model)
        if sp.id_of(NEWLINE) is None:
            raise ValueError(f"ice_text.model has no piece {NEWLINE!r}: it is not that of GLM-130B or ChatGLM-6B")
        if sp.id_of("[MASK]") is None:
            model += _ice_pieces()
            sp = SentencePiece(model)
        commands = {n for n in (*ICE_SPECIALS, "<unused_0>", "</s>", "<s>", "<pad>") if sp.id_of(n) is not None}
        if any(sp.id_of(name) in sp.encode(name) for name in commands):
            sp = SentencePiece(_as_control(model, commands))
        self._sp = sp
        self.dummy_prefix = sp.dummy_prefix
        self.id_offset = id_offset
        self.n_ids = sp.n_ids + id_offset
        self.special_ids = {name: i + id_offset for name, i in sp.control.items()}

    def encode(self, text: str, dummy_prefix: bool = True) -> list[int]:
        text = _ice_text(text)
        if dummy_prefix or not self.dummy_prefix:
            ids = self._sp.encode(text)
        else:  # the prefix goes to a newline in front, and both are dropped: the original's way
            ids = self._sp.encode(NEWLINE + text)[2:]
        return [i + self.id_offset for i in ids] if self.id_offset else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        batch = self._sp.encode_batch([_ice_text(text) for text in texts])
        return [[i + self.id_offset for i in ids] for ids in batch] if self.id_offset else batch

    @cached_property
    def table(self) -> list[bytes]:
        table = list(self._sp.table)
        for i, data in enumerate(table):
            if data[:1] == b"<":
                table[i] = _ice_bytes(data)
        return [b""] * self.id_offset + table

    @cached_property
    def byte_ids(self) -> list[int] | None:
        ids = self._sp.byte_ids
        return None if ids is None else [i + self.id_offset for i in ids]


def _ice_text(text: str) -> str:
    """Text with newlines, tabs and runs of 2 to 80 spaces (longest first) written as their pieces."""
    text = text.replace("\n", NEWLINE).replace("\t", TAB)
    return _BLANK_RUN.sub(lambda run: f"<|blank_{len(run[0])}|>", text)


def _ice_bytes(piece: bytes) -> bytes:
    """What a piece in angle brackets stands for."""
    text = piece.decode()
    if text in (NEWLINE, TAB):
        return b"\n" if text == NEWLINE else b"\t"
    blank = _ICE_TOKEN.fullmatch(text)
    return b" " * int(blank[1]) if blank else piece


def _ice_pieces() -> bytes:
    """The pieces that icetk's code appends to the trained ones, and the option that makes the byte pieces work."""
    spaces = (TAB, *(f"<|blank_{k}|>" for k in range(2, MAX_BLANK + 1)))
    pieces = [(name, 0.0, CONTROL) for name in ICE_SPECIALS] + [(name, 0.0, USER_DEFINED) for name in spaces]
    pieces += [(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256)]
    return b"".join(_piece(*p) for p in pieces) + _message(2, _flag(35, True))


# -- model files ----------------------------------------------------------------------------------------------------


def write_bpe_model(pieces: Sequence[tuple[str, float, int]], dummy_prefix: bool = True) -> bytes:
    """A BPE model file of (piece, score, type) in the order of ids: no normalisation, no squeezing of spaces.

    Pairs with the highest score merge first. Byte fallback is on if all 256 byte pieces are there.
    """
    byte_fallback = sum(kind == BYTE for _, _, kind in pieces) == 256
    trainer = _number(3, 2) + _number(4, len(pieces)) + _flag(35, byte_fallback)
    normalizer = _message(1, b"identity") + _flag(3, dummy_prefix) + _flag(4, False) + _flag(5, True)
    return b"".join(_piece(*p) for p in pieces) + _message(2, trainer) + _message(3, normalizer)


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    import sentencepiece

    if not model:  # the library would give a processor that was never initialised
        raise ValueError("not a SentencePiece model: the file is empty")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except Exception as error:  # RuntimeError or OSError, as the library's build has it
        raise ValueError(f"not a SentencePiece model, or a damaged one ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no reason given"])[0]


def _as_control(model: bytes, names: Collection[str]) -> bytes:
    """The model with the named pieces as control pieces, which text cannot give."""
    wanted = {name.encode() for name in names}
    out = []
    for number, start, end, payload in _fields(model):
        name = payload[2 : 2 + payload[1]] if number == 1 and payload[:1] == b"\x0a" else b""
        out.append(_piece(name.decode(), 0.0, CONTROL) if name in wanted else model[start:end])
    return b"".join(out)


def _fields(message: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(number, start, end, payload) of each length-delimited field, which is all that a model has at the top."""
    at = 0
    while at < len(message):
        start = at
        tag, at = read_number(message, at)
        if tag & 7 != 2:
            raise ValueError("not a SentencePiece model: unexpected field")
        size, at = read_number(message, at)
        at += size
        yield tag >> 3, start, at, message[at - size : at]


def read_number(message: bytes, at: int) -> tuple[int, int]:
    """(number, index behind it) of a protobuf varint that begins at `at`."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _flag(number: int, value: bool) -> bytes:
    return _number(number, int(value))


def _piece(text: str, score: float, kind: int) -> bytes:
    return _message(1, _message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
