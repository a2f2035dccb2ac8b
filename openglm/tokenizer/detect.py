"""Which tokenizer a released folder holds. What decides is the files' content, never the folder's name.

    files present                                    kind
    ice_text.model                                   icetk: GLM-130B, ChatGLM-6B
    tokenizer.model, lines of "base64 rank"          tiktoken: GLM-4, CodeGeeX4
    tokenizer.model otherwise                        sentencepiece: ChatGLM2, ChatGLM3, CodeGeeX2, or Llama's
    cog-pretrain.model                               sentencepiece of the Chinese GLM
    tokenizer.json of a ChatGLM2/3 vocabulary        sentencepiece, rebuilt from the pieces
    tokenizer.json otherwise                         json
    vocab.json and merges.txt                        gpt2: GLM of 2021

Everything found is written into tokenizer_config.json beside what it held before, so a saved tokenizer needs no
detection: kind, special_ids, prefix_ids, and id_offset for icetk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from openglm.tokenizer.backend import ROLES, canonical_name
from openglm.tokenizer.bpe import MODEL_FILE, JsonDict, gpt2_json, load_json, parse_json
from openglm.tokenizer.sentencepiece import (
    BYTE,
    CONTROL,
    N_IMAGE_IDS,
    NORMAL,
    UNKNOWN,
    IceTokenizer,
    SentencePiece,
    write_bpe_model,
)
from openglm.tokenizer.tiktoken import looks_like_ranks, parse_ranks

CONFIG_FILE = "tokenizer_config.json"
ICE_FILE, SP_FILE, CHINESE_FILE = "ice_text.model", "tokenizer.model", "cog-pretrain.model"
VOCAB_FILE, MERGES_FILE, ADDED_FILE = "vocab.json", "merges.txt", "added_tokens.json"
CODE_FILE = "tokenization_chatglm.py"
# All that detection looks at.
RELEASE_FILES = (
    CONFIG_FILE, ICE_FILE, SP_FILE, CHINESE_FILE, MODEL_FILE, VOCAB_FILE, MERGES_FILE, ADDED_FILE, CODE_FILE,
    "config.json", "generation_config.json",
)  # fmt: skip

GLM4_SPECIALS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES,
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
CHATGLM2_SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
GPT2_SPECIALS = ("<sop>", "<eop>", "[CLS]", "[MASK]", "[SEP]", "[UNK]", "[gMASK]", "[sMASK]", "[dBLOCK]")
# None: an id that is not used. The first of these is the end of text and the padding.
CHINESE_SPECIALS = (
    "<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNK]", None, "<sop>", "<eop>", "[sMASK]", "[gMASK]",
)  # fmt: skip


def settle(files: Mapping[str, bytes], roles: bool | None = None) -> tuple[dict[str, bytes], JsonDict]:
    """Vocabulary files, and the content of tokenizer_config.json that says how to read them.

    roles: whether a ChatGLM2/3 vocabulary has the role tokens of ChatGLM3; None: see `has_roles`.
    Raises ValueError if there is no tokenizer in the files.
    """
    before = _json_file(files, CONFIG_FILE)
    if ICE_FILE in files:
        found, config = _ice(files, before)
    elif SP_FILE in files and looks_like_ranks(files[SP_FILE]):
        found, config = _tiktoken(files, before)
    elif SP_FILE in files:
        found, config = _chatglm(files, files[SP_FILE], before, roles)
    elif CHINESE_FILE in files:
        found, config = _chinese(files)
    elif MODEL_FILE in files:
        found, config = _json(files, before, roles)
    elif VOCAB_FILE in files and MERGES_FILE in files:
        found, config = _gpt2(files)
    else:
        known = ", ".join((MODEL_FILE, SP_FILE, ICE_FILE, VOCAB_FILE))
        raise ValueError(f"no tokenizer: none of {known} is there")
    return found, {**before, **config}


def has_roles(files: Mapping[str, bytes], config: JsonDict) -> bool:
    """Whether a ChatGLM2/3 vocabulary is followed by role tokens. The first of these that speaks decides:

    1. the role tokens in tokenizer_config.json: in added_tokens_decoder, or in the chat template;
    2. tokenization_chatglm.py, read as text and never run: whether it holds `<|observation|>`;
    3. config.json or generation_config.json: a list of end tokens (ChatGLM3 has three, ChatGLM2 one), or the
       release that config.json says it was made from (_name_or_path).
    Without any of these there are none.
    """
    added = {str(t.get("content")) for t in (config.get("added_tokens_decoder") or {}).values()}
    if added & set(ROLES) or ROLES[1] in str(config.get("chat_template") or ""):
        return True
    if CODE_FILE in files:
        return ROLES[3].encode() in files[CODE_FILE]
    for name in ("generation_config.json", "config.json"):
        ends = _json_file(files, name).get("eos_token_id")
        if isinstance(ends, list) and len(ends) > 1:
            return True
    return "chatglm3" in str(_json_file(files, "config.json").get("_name_or_path", "")).lower()


Found = tuple[dict[str, bytes], JsonDict]


def _ice(files: Mapping[str, bytes], before: JsonDict) -> Found:
    offset = _ice_offset(files, before)
    return {ICE_FILE: files[ICE_FILE]}, {
        "kind": "icetk",
        "id_offset": offset,
        "special_ids": IceTokenizer(files[ICE_FILE], offset).special_ids,
        "prefix_ids": [],
    }


def _ice_offset(files: Mapping[str, bytes], before: JsonDict) -> int:
    """20000 for GLM-130B and the first ChatGLM-6B, 0 for the second (v1.1), which dropped the image codes.

    num_image_tokens in tokenizer_config.json says it; else the mask's id in config.json; else its rows, which
    the longer ids need; without these files it is GLM-130B.
    """
    if "num_image_tokens" in before:
        return int(before["num_image_tokens"])
    config = _json_file(files, "config.json")
    if not config:
        return N_IMAGE_IDS
    base = IceTokenizer(files[ICE_FILE], 0)
    named = config.get("gmask_token_id")
    if named in (base.special_ids["[gMASK]"], base.special_ids["[gMASK]"] + N_IMAGE_IDS):
        return int(named) - base.special_ids["[gMASK]"]
    return N_IMAGE_IDS if int(config.get("vocab_size", 0)) >= base.n_ids + N_IMAGE_IDS else 0


def _tiktoken(files: Mapping[str, bytes], before: JsonDict) -> Found:
    n = 1 + max(parse_ranks(files[SP_FILE]).values())
    special = {name: n + i for i, name in enumerate(GLM4_SPECIALS)} | _added(before, n)
    return {SP_FILE: files[SP_FILE]}, {
        "kind": "tiktoken",
        "special_ids": special,
        "prefix_ids": [special["[gMASK]"], special["<sop>"]],
    }


def _added(config: JsonDict, start: int) -> dict[str, int]:
    """Specials that tokenizer_config.json lists, from id `start` on."""
    listed = {canonical_name(str(t["content"])): int(i) for i, t in (config.get("added_tokens_decoder") or {}).items()}
    return {name: i for name, i in listed.items() if i >= start}


def _chatglm(files: Mapping[str, bytes], model: bytes, before: JsonDict, roles: bool | None) -> Found:
    """ChatGLM2/3 and CodeGeeX2, whose specials follow the pieces; or a plain model such as Llama's, without any."""
    sp = SentencePiece(model)
    special = {canonical_name(name): i for name, i in sp.control.items()}
    if sp.byte_ids is not None:  # nothing is unknown then; the released code pads with this piece
        special |= {"<unk>": 0} if sp.id_of("<unk>") == 0 else {}
    prefix: list[int] = []
    if roles is not None or _is_chatglm(files, before):
        names = CHATGLM2_SPECIALS + (ROLES if (has_roles(files, before) if roles is None else roles) else ())
        special |= {name: sp.n_ids + i for i, name in enumerate(names)}
        prefix = [special["[gMASK]"], special["<sop>"]]
    special |= {name: i for name, i in _added(before, sp.n_ids).items() if roles is not False or name not in ROLES}
    return {SP_FILE: model}, {"kind": "sentencepiece", "special_ids": special, "prefix_ids": prefix}


def _is_chatglm(files: Mapping[str, bytes], before: JsonDict) -> bool:
    model_type = _json_file(files, "config.json").get("model_type")
    return "ChatGLMTokenizer" in str(before.get("tokenizer_class")) or model_type == "chatglm" or CODE_FILE in files


def _chinese(files: Mapping[str, bytes]) -> Found:
    n = SentencePiece(files[CHINESE_FILE]).n_ids
    special = {name: n + i for i, name in enumerate(CHINESE_SPECIALS) if name is not None}
    special |= {canonical_name(name): int(i) for name, i in _json_file(files, ADDED_FILE).items()}
    return {CHINESE_FILE: files[CHINESE_FILE]}, {"kind": "sentencepiece", "special_ids": special, "prefix_ids": []}


def _gpt2(files: Mapping[str, bytes]) -> Found:
    """The end of text is in the vocabulary; the other specials follow it."""
    n = len(_json_file(files, VOCAB_FILE))
    special = {name: n + i for i, name in enumerate(GPT2_SPECIALS)}
    special |= {canonical_name(name): int(i) for name, i in _json_file(files, ADDED_FILE).items()}
    end = _json_file(files, VOCAB_FILE).get("<|endoftext|>")
    special |= {"<|endoftext|>": int(end)} if end is not None else {}
    load_json(gpt2_json(files[VOCAB_FILE], files[MERGES_FILE], special))
    kept = {VOCAB_FILE: files[VOCAB_FILE], MERGES_FILE: files[MERGES_FILE]}
    return kept, {"kind": "gpt2", "special_ids": special, "prefix_ids": []}


def _json(files: Mapping[str, bytes], before: JsonDict, roles: bool | None) -> Found:
    parsed = parse_json(files[MODEL_FILE])
    if (roles is not None or _is_chatglm(files, before)) and parsed["model"].get("byte_fallback"):
        return _chatglm(files, _pieces_of(parsed), before, roles)
    if CONFIG_FILE not in files and not parsed.get("added_tokens"):
        raise ValueError(f"cannot read {CONFIG_FILE} (No such file or directory)")
    loaded = load_json(parsed)
    return {MODEL_FILE: files[MODEL_FILE]}, {
        "kind": "json",
        "special_ids": loaded.special_ids,
        "prefix_ids": list(loaded.prefix_ids),
    }


def _pieces_of(parsed: JsonDict) -> bytes:
    """The SentencePiece model that a tokenizer.json was made from: pieces were learnt in the order of their ids."""
    control = {str(t["content"]) for t in parsed.get("added_tokens") or () if t.get("special")}
    pieces: list[tuple[str, float, int]] = []
    for piece, i in sorted(parsed["model"]["vocab"].items(), key=lambda item: item[1]):
        if i != len(pieces):
            raise ValueError(f"{MODEL_FILE}: id {len(pieces)} has no piece, so it is not a SentencePiece vocabulary")
        kind = BYTE if len(piece) == 6 and piece.startswith("<0x") else CONTROL if piece in control else NORMAL
        pieces.append((piece, -float(i), UNKNOWN if piece == parsed["model"]["unk_token"] else kind))
    return write_bpe_model(pieces, dummy_prefix='"Prepend"' in json.dumps(parsed.get("normalizer")))


def _json_file(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"{name} is damaged ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is damaged: it must hold a JSON object")
    return value
