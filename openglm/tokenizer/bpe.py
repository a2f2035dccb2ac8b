"""`tokenizer.json` files of the `tokenizers` library: byte-level BPE, and BPE written in SentencePiece's manner.

Special added tokens are taken out of the file before the library sees it, so no text can match them. Added tokens that
are not special (such as <tool_call>) match as in the library.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, repeat
from operator import add, le, lt
from typing import TYPE_CHECKING, Any

from openglm.tokenizer.backend import SPECIALS, Backend, canonical_name
from openglm.tokenizer.bytes import bytes_of_symbol, bytes_of_symbols, symbol_of_byte
from openglm.tokenizer.sentencepiece import METASPACE
from openglm.tokenizer.tiktoken import Tiktoken

if TYPE_CHECKING:
    import tokenizers

MODEL_FILE = "tokenizer.json"
JsonDict = dict[str, Any]
N_PROBES = 1000


class Bpe:
    """The library's tokenizer with the bytes of its vocabulary. matched: id -> content of the added tokens in it."""

    per_segment = False

    def __init__(self, tokenizer: tokenizers.Tokenizer, byte_level: bool = True, prefix: bool = False) -> None:
        self._bpe = tokenizer
        self._byte_level = byte_level
        self.dummy_prefix = prefix
        self.n_ids = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, dummy_prefix: bool = True) -> list[int]:
        bpe = self._bpe if dummy_prefix or not self.dummy_prefix else self._unprefixed
        return bpe.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def table(self) -> list[bytes]:
        vocab: dict[str, int] = self._bpe.get_vocab(with_added_tokens=False)
        added = {i: token.content for i, token in self._bpe.get_added_tokens_decoder().items()}
        table = [b""] * self.n_ids
        for piece, i in vocab.items():
            table[i] = _byte_level_bytes(piece) if self._byte_level else _metaspace_bytes(piece)
        for i, content in added.items():
            table[i] = content.encode()
        return table

    @cached_property
    def byte_ids(self) -> list[int] | None:
        name = symbol_of_byte if self._byte_level else "<0x{:02X}>".format
        ids = [i for b in range(256) if (i := self._bpe.token_to_id(name(b))) is not None]
        return ids if len(ids) == 256 else None

    @cached_property
    def _unprefixed(self) -> tokenizers.Tokenizer:
        """The same vocabulary without the space in front."""
        config = json.loads(self._bpe.to_str())
        for part in _parts(config.get("normalizer")):
            if part["type"] == "Prepend":
                part["prepend"] = ""
        for part in _parts(config.get("pre_tokenizer")):
            if part["type"] == "Metaspace":
                part["prepend_scheme"] = "never"
        return _from_json(config)


@dataclass(frozen=True)
class JsonTokenizer:
    """A tokenizer.json taken apart. special_ids: canonical name -> id. prefix_ids: what its post-processor puts in
    front of every text, such as a begin token.
    """

    backend: Backend
    special_ids: dict[str, int]
    prefix_ids: tuple[int, ...]


def load_own(content: bytes) -> Backend:
    """A vocabulary made by `openglm tokenizer train`: byte-level, without added tokens. ValueError for any other."""
    config = parse_json(content)
    # The library would let added tokens match inside ordinary text; ours has none.
    if config.get("added_tokens"):
        raise ValueError(f"{MODEL_FILE} holds added tokens; only tokenizers made by `openglm tokenizer train` are read")
    bytes_present = sum(symbol_of_byte(b) in config["model"]["vocab"] for b in range(256))
    if bytes_present < 256:
        raise ValueError(f"{MODEL_FILE} holds {bytes_present} of the 256 single bytes, so it cannot encode any text")
    return _backend(config)


def parse_json(content: bytes) -> JsonDict:
    """A tokenizer.json as a dictionary. Raises ValueError if it is damaged or not BPE."""
    try:
        config = json.loads(content)
        kind = config["model"]["type"] if "type" in config["model"] else "BPE"
        vocab, merges = config["model"]["vocab"], config["model"]["merges"] if kind == "BPE" else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MODEL_FILE} is damaged ({type(error).__name__}: {error}); copy it again") from error
    if kind != "BPE" or not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError(f"{MODEL_FILE}: the vocabulary is of the kind {kind!r}; only BPE is read")
    return config


def load_json(content: bytes | JsonDict) -> JsonTokenizer:
    """Any released tokenizer.json, or one taken from a GGUF file. Raises ValueError for one that cannot be read."""
    config = parse_json(content) if isinstance(content, bytes) else content
    _is_byte_level(config)
    model, added = config["model"], config.get("added_tokens") or []
    special = {t["content"]: int(t["id"]) for t in added if _is_special(t)}
    prefix_ids = _prefix_ids(config.get("post_processor"))
    config = {**config, "post_processor": None, "padding": None, "truncation": None}
    config["added_tokens"] = [t for t in added if not _is_special(t)]
    vocab = {piece: i for piece, i in model["vocab"].items() if piece not in special}
    vocab.update({t["content"]: int(t["id"]) for t in config["added_tokens"]})  # else the library would number anew
    config["model"] = {**model, "vocab": vocab, "merges": _merges_without(model["merges"], model["vocab"], special)}
    if model.get("unk_token") in special:
        config["model"]["unk_token"] = None
    return JsonTokenizer(_backend(config), {canonical_name(name): i for name, i in special.items()}, prefix_ids)


def gpt2_json(vocab: bytes, merges: bytes, special: Mapping[str, int]) -> JsonDict:
    """tokenizer.json from GPT-2's two files. special: name -> id, inside the vocabulary or after it."""
    try:
        table = {str(piece): int(i) for piece, i in json.loads(vocab).items()}
        lines = merges.decode("utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"vocab.json or merges.txt is damaged ({error}); copy them again") from error
    return byte_level_json(table, pairs, None, [added_token(i, name, True) for name, i in special.items()])


def byte_level_json(
    vocab: Mapping[str, int],
    merges: Sequence[str] | Sequence[Sequence[str]],
    splits: Sequence[str] | None,
    added: Sequence[JsonDict],
    whole_words: bool = False,
) -> JsonDict:
    """tokenizer.json of a byte-level vocabulary cut by regular expressions in turn, or as GPT-2 does for None."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": splits is None}
    cuts = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        for split in splits or ()
    ]
    model = {"type": "BPE", "ignore_merges": whole_words, "vocab": vocab, "merges": merges}
    return {
        "version": "1.0",
        "added_tokens": list(added),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }


def added_token(id: int, content: str, special: bool) -> JsonDict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": id, "content": content, **flags}


def _backend(config: JsonDict) -> Backend:
    """tiktoken where it gives the same ids, since it is several times faster; else the `tokenizers` library."""
    fast = tiktoken_of(config)
    if fast is not None:
        return Tiktoken(*fast)
    return Bpe(_from_json(config), _is_byte_level(config), _has_prefix(config))


def _from_json(config: JsonDict) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(config, ensure_ascii=False))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{MODEL_FILE} cannot be read ({error}); copy it again") from error


def _is_special(token: JsonDict) -> bool:
    """Flagged so, or one of the family's roles and masks: some files forget the flag."""
    return bool(token.get("special")) or canonical_name(token["content"]) in SPECIALS


def _merges_without(merges: Sequence[Any], vocab: Mapping[str, int], special: Mapping[str, int]) -> Sequence[Any]:
    """Merges that do not make or use a special token's piece."""
    if not any(name in vocab for name in special):
        return merges
    pairs = (m if isinstance(m, list | tuple) else m.split(" ") for m in merges)
    return [[a, b] for a, b in pairs if a not in special and b not in special and a + b not in special]


def _parts(part: JsonDict | None) -> Iterator[JsonDict]:
    """A component of the file, or those of a sequence."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for key in ("normalizers", "pretokenizers", "decoders", "processors"):
            for inner in part.get(key) or ():
                yield from _parts(inner)
    else:
        yield part


def _is_byte_level(config: JsonDict) -> bool:
    kinds = {part["type"] for part in _parts(config.get("decoder"))}
    if "ByteLevel" in kinds:
        return True
    if kinds & {"ByteFallback", "Metaspace", "Replace"}:
        return False
    found = ", ".join(sorted(kinds)) or "missing"
    raise ValueError(f"{MODEL_FILE}: decoder {found}; byte-level and metaspace vocabularies are read")


def _has_prefix(config: JsonDict) -> bool:
    """Whether a space goes in front of every text and decoding takes it away again."""
    if _is_byte_level(config):
        return False
    prepends = any(p["type"] == "Prepend" and p["prepend"] == METASPACE for p in _parts(config.get("normalizer")))
    return prepends or any(
        p["type"] == "Metaspace" and p.get("prepend_scheme", "always") != "never"
        for p in _parts(config.get("pre_tokenizer"))
    )


def _prefix_ids(post_processor: JsonDict | None) -> tuple[int, ...]:
    ids: list[int] = []
    for part in _parts(post_processor):
        if part["type"] != "TemplateProcessing":
            continue
        for item in part["single"]:
            if "SpecialToken" not in item:
                break
            ids += part["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    return tuple(ids)


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes_of_symbol(piece)
    except ValueError:  # an entry that is not written in the alphabet is never the product of text
        return piece.encode()


def _metaspace_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(METASPACE, " ").encode()


def tiktoken_of(config: JsonDict) -> tuple[dict[bytes, int], str, dict[str, int]] | None:
    """What `Tiktoken` takes, if that does the same as this file; else None.

    tiktoken merges the pair that makes the token of the lowest id. A trained BPE does the same if its merges make
    their tokens in the order of the ids, from bytes and earlier tokens, and every entry is a byte or made so. That
    each token falls into its merge's two halves, which training implies, is checked on a sample.
    """
    split = _split_of(config)
    added = [t for t in config.get("added_tokens") or () if not _is_special(t)]
    if split is None or any(t[flag] for t in added for flag in ("single_word", "lstrip", "rstrip")):
        return None
    matched = {t["content"]: int(t["id"]) for t in added}
    ranks = _ranks_of(config["model"], matched)
    return None if ranks is None else (ranks, split, matched)


def _split_of(config: JsonDict) -> str | None:
    parts = list(_parts(config.get("pre_tokenizer")))
    if config.get("normalizer") is not None or len(parts) != 2 or [p["type"] for p in parts] != ["Split", "ByteLevel"]:
        return None
    split, level = parts
    plain = split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]
    return split["pattern"]["Regex"] if plain and not level["add_prefix_space"] and not level["use_regex"] else None


def _ranks_of(model: JsonDict, matched: Mapping[str, int]) -> dict[bytes, int] | None:
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    vocab: dict[str, int] = model["vocab"]
    if any(piece in vocab for piece in matched):
        vocab = {piece: i for piece, i in vocab.items() if piece not in matched}
    ranks = _table_of(vocab)
    single = [ranks.get(bytes([b]), -1) for b in range(256)]
    halves = _halves(model["merges"])
    if halves is None or min(single) < 0 or len(ranks) != len(vocab):
        return None
    left, right = halves
    try:  # whole columns at a time: files hold hundreds of thousands of merges
        made = list(map(vocab.__getitem__, map(add, left, right)))
        from_left, from_right = map(vocab.__getitem__, left), map(vocab.__getitem__, right)
        earlier = all(map(lt, from_left, made)) and all(map(lt, from_right, made))
    except KeyError:
        return None
    in_order = all(map(le, made, islice(made, 1, None))) and (not made or made[0] > max(single))
    if not earlier or not in_order or len(vocab) != 256 + len(set(made)):
        return None
    for k in range(0, len(made), max(1, len(made) // N_PROBES)):
        token = bytes_of_symbol(left[k] + right[k])
        parts = ["".join(map(symbol_of_byte, part)) for part in _merged(token, ranks, ranks[token])]
        merges = range(bisect_left(made, made[k]), bisect_right(made, made[k]))  # all that make this token
        if not any(parts == [left[j], right[j]] for j in merges):
            return None
    return ranks


def _table_of(vocab: Mapping[str, int]) -> dict[bytes, int]:
    """Bytes -> id of a byte-level vocabulary."""
    try:
        return dict(zip(bytes_of_symbols(list(vocab)), vocab.values(), strict=True))
    except ValueError:  # an entry is not written in the alphabet
        return {_byte_level_bytes(piece): i for piece, i in vocab.items()}


def _halves(merges: Sequence[Any]) -> tuple[list[str], list[str]] | None:
    """The left and the right halves of all merges, written as "a b" or as pairs; None if one is not two halves."""
    if set(map(type, merges)) == {str}:
        if set(map(str.count, merges, repeat(" "))) != {1}:
            return None
        flat = " ".join(merges).split(" ")
    else:
        pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
        if any(len(pair) != 2 for pair in pairs):
            return None
        flat = list(chain.from_iterable(pairs))
    return flat[::2], flat[1::2]


def _merged(token: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """The parts of a token after all merges below its own rank, lowest rank first."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 1:
        rank, at = min((ranks.get(a + b, limit), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)))
        if rank >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
