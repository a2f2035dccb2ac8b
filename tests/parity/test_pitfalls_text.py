"""The family's silent errors, put in one by one: rounding, refusals, text and chat.

    python -m pytest -q tests/parity/test_pitfalls_text.py

See test_pitfalls.py. Of number 11 the padding id is left out: padding is hidden here, so its id means nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

import openglm.model.opened as opened_module
import openglm.tokenizer.detect as detect_module
import openglm.tokenizer.sentencepiece as sentencepiece_module
from openglm.formats import Part, get_format
from openglm.formats.base import BaseFormat
from openglm.formats.codegeex import CodeGeex4Format
from openglm.formats.glm4 import Glm4Format, GlmZ1Format
from openglm.formats.roles import RoleFormat
from openglm.formats.rounds import ChatGlm2Format, ChatGlm6bFormat, RoundsFormat
from openglm.model.load import build_transformer
from openglm.model.opened import open_model
from openglm.model.transformer import Transformer, make_norm
from openglm.model.weights import FAMILIES, export_weights
from openglm.ops.attention import attention
from openglm.ops.quant import QuantTensor
from openglm.ops.rope import inverse_frequencies, rope_angles
from openglm.presets import preset
from openglm.quant import QuantSpec, quantise
from openglm.tokenizer import Tokenizer
from openglm.tokenizer.sentencepiece import IceTokenizer
from openglm.types import Message
from tests.parity.test_golden import ATOL, Golden, engine_of
from tests.parity.test_pitfalls import difference
from tests.test_formats_golden import as_messages
from tests.test_tokenizer_sentencepiece import extended, original_text
from tests.tokenizer_helpers import train_sentencepiece

# -------------------------------------------------------------------- rounding


def test_5_scores_beyond_half_precision() -> None:
    """The factor of the layer keeps scores of half precision finite; ours are sums in float32, and need none."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 128).half() for _ in range(3))
    q, k = q * 200, k * 200
    scores = (q.double() @ k.double().mT) / 128**0.5
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    exact = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.double()
    assert scores.max() > torch.finfo(torch.float16).max and difference(attention(q, k, v, None), exact) < 2e-3
    wrong = (q @ k.mT / 128**0.5).masked_fill(hidden, -torch.inf).float().softmax(-1) @ v.float()
    assert difference(wrong, exact) == torch.inf


def test_12_angles_of_long_positions() -> None:
    """Half precision, in which ChatGLM-6B and ChatGLM2 count, has no 2049. Our tables are float32 in every model."""
    positions = torch.tensor([[[2049, 4099, 8193]]])
    model = Transformer(preset("glm-nano", n_layers=1, vocab_size=8, rope=preset("chatglm2-6b").rope)).bfloat16()
    found = model._angles(positions)
    assert found is not None
    exact = (positions[0].double()[..., None] / 10000 ** (torch.arange(0, 32, 2).double() / 32)).cos()[:, :, None]
    assert found[0].dtype == torch.float32 and difference(found[0], exact) < 2e-3
    frequencies = inverse_frequencies(32, 10000.0)
    for wrong in (rope_angles(positions.half(), frequencies), rope_angles(positions, frequencies.bfloat16().float())):
        assert difference(wrong[0], exact) > 0.1


def norm_cast_first(x: Tensor, weight: Tensor) -> Tensor:
    """Hugging Face's order: round, then multiply by the weight."""
    h = x.float()
    return (h * (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).to(x.dtype) * weight


def norm_variance_rounded(x: Tensor, weight: Tensor) -> Tensor:
    """CodeGeeX2's bfloat16."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_13_norms_round_once(dtype: torch.dtype) -> None:
    """As the released code of ChatGLM3 and GLM-4 does; the golden sets in float32 do not show the order."""
    torch.manual_seed(0)
    norm = make_norm(preset("chatglm3-6b")).to(dtype)
    norm.weight.data = weight = (torch.rand(4096) + 0.5).to(dtype)
    x = (3 * torch.randn(8, 4096)).to(dtype)
    d = x.double()
    exact = d * (d.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    unit = torch.finfo(dtype).eps / 2  # one rounding to nearest

    def error(y: Tensor) -> float:
        return float(((y.double() - exact) / exact).abs().max().detach())

    assert error(norm(x)) < 1.01 * unit
    for wrong in (norm_cast_first, norm_variance_rounded):
        assert error(wrong(x, weight)) > 1.5 * unit


def test_18_half_rounds_to_even(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our INT4 of GLM-130B's weights is the original's, bit for bit."""
    folder = shared_data / "golden" / "glm-130b"
    packed, _ = engine_of(folder / "mp1-int4")
    plain, _ = engine_of(folder / "mp1")

    def n_other() -> int:
        n = 0
        for name, theirs in packed.weights():
            if isinstance(theirs, QuantTensor):
                weight = plain.get(name)
                assert isinstance(weight, Tensor)
                ours = quantise(weight, QuantSpec(4, None, symmetric=True))
                n += int((ours.q != theirs.q).sum()) + int((ours.scale != theirs.scale).sum())
        return n

    assert n_other() == 0
    monkeypatch.setattr(Tensor, "round_", lambda t: t.copy_(t.sign() * (t.abs() + 0.5).floor()))
    assert n_other() > 10


# -------------------------------------------------------------------- not silent here


@pytest.mark.parametrize(("number", "checkpoint", "fields", "message"), [
    (2, "chatglm-6b", {"mlp": "geglu"}, "does not fit the config"),
    (15, "glm-4-9b", {"n_kv_heads": 4}, "does not fit the config"),
    (15, "glm-4-9b", {"n_kv_heads": 1}, "does not fit the config"),
    (15, "chatglm2-6b", {"n_kv_heads": 1}, "does not fit the config"),
    (17, "glm-130b/mp1", {"tie_embeddings": False}, "lacks the tensor lm_head"),
])  # fmt: skip
def test_the_tensors_contradict(
    shared_data: Path, number: int, checkpoint: str, fields: dict[str, Any], message: str
) -> None:
    opened, _ = engine_of(shared_data / "golden" / checkpoint)
    with pytest.raises(ValueError, match=message):
        build_transformer(replace(opened, config=replace(opened.config, **fields)))


def test_15_and_16_norms_and_biases_are_not_dropped(tmp_path: Path) -> None:
    """A folder of GLM-4-0414 opened as GLM-4 would lose two norms a layer; one without QKV bias has none to read."""
    values = {
        "model_type": "glm4", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "head_dim": 8, "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
    }  # fmt: skip
    config = preset("glm-4-32b-0414", vocab_size=40, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8,
                    ffn_dim=24, max_seq_len=32)  # fmt: skip
    exported = export_weights(FAMILIES["hf-glm4"], config, Transformer(config).state_dict())
    tensors = {name: weight.contiguous() for name, weight in exported if isinstance(weight, Tensor)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values))
    opened = open_model(tmp_path)
    assert opened.config == config and len(build_transformer(opened).state_dict()) == len(tensors) - 2  # Q K V are one
    with pytest.raises(ValueError, match="lacks the tensor .*q_proj.bias"):
        build_transformer(replace(opened, config=replace(config, qkv_bias=True)))
    (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": "glm"}))
    with pytest.raises(ValueError, match="no use for: .*post_mlp_layernorm"):
        open_model(tmp_path)


def test_24_tables_of_frequencies_may_be_there_or_not(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shared_data / "golden" / "chatglm-6b"
    opened, _ = engine_of(folder)
    held = set(opened.source.names())
    kept = {name: opened.source.get(name) for name in held if not name.endswith("inv_freq")}
    assert len(kept) == len(held) - opened.config.n_layers
    torch.save(kept, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    golden = Golden(folder)
    _, engine = engine_of(tmp_path)
    assert difference(engine.logits(golden.ids("gmask")), golden.array("gmask", "logits")) <= ATOL
    monkeypatch.setattr(opened_module, "ignorable", lambda name, config: name == "lm_head.weight")
    open_model(tmp_path)
    with pytest.raises(ValueError, match="no use for: .*inv_freq"):
        open_model(folder)


# -------------------------------------------------------------------- text: claims, and what breaks each


@dataclass(frozen=True)
class Texts:
    """What claims are made about. glm: the real vocabulary of ChatGLM2 and ChatGLM3. ice: of icetk's kind."""

    renderings: Any
    glm: Tokenizer
    tiny: Tokenizer
    ice_model: bytes
    ice: sentencepiece.SentencePieceProcessor


@pytest.fixture(scope="session")
def texts(shared_data: Path, tiny_tokenizer: Tokenizer) -> Texts:
    path = shared_data / "golden" / "chat-chatglm3" / "renderings.json"
    model = train_sentencepiece(model_type="unigram", pad_id=3, user_defined_symbols=["<n>"])
    return Texts(
        json.loads(path.read_text(encoding="utf-8")),
        Tokenizer.load(shared_data / "tokenizers" / "chatglm3", roles=True), tiny_tokenizer,
        model, sentencepiece.SentencePieceProcessor(model_proto=extended(model)),
    )  # fmt: skip


SIX = {"</s>": 2, "[MASK]": 130000, "[gMASK]": 130001, "[sMASK]": 130002, "<sop>": 130004, "<eop>": 130005}
NAMES = "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|>".split()
FOUR = {name: 151329 + i for i, name in enumerate(NAMES)}


def characters(special_ids: dict[str, int]) -> Any:
    """A tokenizer with the released special ids, whose text ids are characters: for vocabularies not to be had."""
    return SimpleNamespace(special_ids=special_ids, encode=lambda text: [ord(c) for c in text])


def said(*texts: str) -> list[Message]:
    """A conversation, the user's turn first."""
    return [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


def ids(*parts: int | str) -> list[int]:
    return [i for part in parts for i in ([part] if isinstance(part, int) else map(ord, part))]


Claim = Callable[[Texts], tuple[object, object]]  # ours, theirs


def chatglm2(t: Texts) -> tuple[object, object]:
    cases, chat_format = t.renderings["chatglm2_prompts"], get_format("chatglm2", t.glm)
    rows = [[*(text for pair in case["history"] for text in pair), case["query"]] for case in cases]
    return [chat_format.render(said(*row)).ids for row in rows], [case["input_ids"] for case in cases]


def chatglm3(t: Texts) -> tuple[object, object]:
    cases, chat_format = t.renderings["conversations"], get_format("chatglm3", t.glm)
    return [chat_format.render(*as_messages(case)).ids for case in cases], [case["input_ids"] for case in cases]


def chatglm6(t: Texts) -> tuple[object, object]:
    chat_format = get_format("chatglm-6b", characters(SIX))
    return [chat_format.render(m).ids for m in (said("你好"), said("你好", "你好！", "再见"))], [
        ids("你好", 130001, 130004),
        ids("[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：再见\n答：", 130001, 130004),
    ]


def prompt(name: str, end: str) -> Claim:
    """A role format's prompt, which ends with `end` after <|assistant|>."""

    def claim(t: Texts) -> tuple[object, object]:
        rendered = get_format(name, characters(FOUR)).render(said("你好"))
        return rendered.ids, ids(151331, 151333, 151336, "\n你好", 151337, end)

    return claim


def stops(t: Texts) -> tuple[object, object]:
    six, four = (get_format(n, characters(s)) for n, s in (("chatglm-6b", SIX), ("glm-4", FOUR)))
    two, three = (get_format(name, t.glm) for name in ("chatglm2", "chatglm3"))
    found = [130005 in six.stop_ids, *(set(f.stop_ids) for f in (two, three, four))]
    return found, [True, {2}, {2, 64795, 64797}, {151329, 151336, 151338}]


def plain(t: Texts) -> tuple[object, object]:
    cases = t.renderings["plain"]
    return [t.glm.encode(case["text"]) for case in cases], [case["ids"] for case in cases]


def ice(t: Texts) -> tuple[object, object]:
    """Preprocessing and offset of both releases against the library, with the dummy prefix and without."""
    first = Tokenizer({"ice_text.model": t.ice_model})
    second = Tokenizer({"ice_text.model": t.ice_model, "tokenizer_config.json": b'{"num_image_tokens": 0}'})
    ours: list[object] = [first.special_ids["[MASK]"], second.special_ids["[MASK]"]]
    n = t.ice.piece_to_id("[MASK]")
    theirs: list[object] = [n + 20000, n]
    for text in ("The quick fox", "def f(x):\n\treturn  x", " " * 163 + "你好\n\n"):
        for dummy in (True, False):
            slim = t.ice.encode(original_text(text)) if dummy else t.ice.encode("<n>" + original_text(text))[2:]
            ours += [tokenizer.encode(text, dummy_prefix=dummy) for tokenizer in (first, second)]
            theirs += [[i + 20000 for i in slim], slim]
    return ours, theirs


def injected(t: Texts) -> tuple[object, object]:
    """The special ids that a conversation of all special names holds: those of its own turns."""
    special, evil = t.glm.special_ids, "".join(t.glm.special_ids)
    found = [i for i in get_format("chatglm3", t.glm).render(said(evil, evil, evil)).ids if i in special.values()]
    turns = "[gMASK] <sop> <|user|> <|assistant|> <|user|> <|assistant|>".split()
    return found, [special[name] for name in turns]


def reply(t: Texts) -> tuple[object, object]:
    """What is read back of an answer."""
    parser = get_format("glm-4", t.tiny).parser()
    for i in [*t.tiny.encode("\n"), *t.tiny.encode("你好"), t.tiny.special_ids["<|user|>"]]:
        parser.feed(i)
    parser.finish()
    return parser.message.content, "你好"


def targets(t: Texts) -> tuple[object, object]:
    rendered = get_format("glm-4", characters(FOUR)).render(said("你好", "你好！"), add_generation_prompt=False)
    return [i for i, m in zip(rendered.ids, rendered.loss_mask, strict=True) if m], ids("\n你好！", 151336)


def parts(change: Callable[[list[Part]], list[Part]]) -> Callable[[pytest.MonkeyPatch], None]:
    right = RoleFormat.parts
    return lambda patch: patch.setattr(RoleFormat, "parts", lambda *a: change(right(*a)))


def joined(given: list[Part]) -> list[Part]:
    """Neighbouring texts encoded as one."""
    out: list[Part] = []
    for part in given:
        if out and isinstance(part.content, str) and isinstance(out[-1].content, str):
            part = Part(out.pop().content + part.content)
        out.append(part)
    return out


def half_width(format: RoundsFormat, rounds: Sequence[tuple[str, str]]) -> str:
    return RIGHT_PROMPT(format, rounds).replace("：", ":")


def parsed(tokenizer: Tokenizer, text: str, dummy_prefix: bool = True) -> list[int]:
    """Names of specials in a text taken for specials."""
    return tokenizer.encode_marked(text, list(tokenizer.special_ids)) if "<|" in text else RIGHT_ENCODE(tokenizer, text)


def put(where: object, name: str, value: object) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(where, name, value)


RIGHT_PROMPT, RIGHT_SYNTAX = RoundsFormat._prompt, Glm4Format.syntax
RIGHT_ENCODE, RIGHT_ICE = Tokenizer.encode, IceTokenizer.encode
LAST, FIRST = ChatGlm6bFormat._around, ChatGlm2Format._around
CLAIMS: list[tuple[int, str, Claim, Callable[[pytest.MonkeyPatch], None]]] = [
    (8, "gMASK sop in front", chatglm6, put(ChatGlm6bFormat, "_around", FIRST)),
    (8, "gMASK sop behind", chatglm2, put(ChatGlm2Format, "_around", LAST)),
    (8, "no prefix, ChatGLM3", chatglm3, parts(lambda p: p[2:])),
    (8, "no prefix, GLM-4", prompt("glm-4", ""), parts(lambda p: p[2:])),
    (8, "stops at eos alone", stops, put(BaseFormat, "_ends", lambda f, *names: (f._id[names[0]],))),
    (8, "stops at eop", stops, put(ChatGlm2Format, "end", "<eop>")),
    (8, "stops at eos", stops, put(ChatGlm6bFormat, "end", "</s>")),
    (9, "from 0", chatglm2, put(ChatGlm2Format, "first_round", 0)),
    (9, "one newline", chatglm2, put(ChatGlm2Format, "gap", "\n")),
    (9, "half-width colon", chatglm2, put(ChatGlm2Format, "_prompt", half_width)),
    (9, "from 1", chatglm6, put(ChatGlm6bFormat, "first_round", 1)),
    (9, "two newlines", chatglm6, put(ChatGlm6bFormat, "gap", "\n\n")),
    (9, "round around the first turn", chatglm6, put(ChatGlm6bFormat, "_prompt", RIGHT_PROMPT)),
    *[(10, f"no dummy prefix, {claim.__name__}", claim,
       put(Tokenizer, "encode", lambda self, text, dummy_prefix=True: RIGHT_ENCODE(self, text, dummy_prefix=False)))
      for claim in (plain, chatglm2, chatglm3)],
    (10, "segments joined", chatglm3, parts(joined)),
    (10, "no preprocessing", ice, put(sentencepiece_module, "_ice_text", lambda text: text)),
    (10, "shortest blanks first", ice, put(sentencepiece_module, "MAX_BLANK", 2)),
    (10, "dummy prefix not undone", ice,
     put(IceTokenizer, "encode", lambda self, text, dummy_prefix=True: RIGHT_ICE(self, text))),
    (11, "slim ids", ice, put(detect_module, "_ice_offset", lambda files, before: 0)),
    (11, "ids behind images", ice, put(detect_module, "_ice_offset", lambda files, before: 20000)),
    (21, "header is a target", targets, parts(lambda p: [Part(c, t or c == 151337) for c, t in p])),
    (21, "stop token is none", targets, parts(lambda p: [Part(c, t and isinstance(c, str)) for c, t in p])),
    (22, "newline in the prompt", prompt("glm-4", ""), put(Glm4Format, "opening", "\n")),
    (22, "no newline, Z1", prompt("glm-z1", "\n<think>\n"), put(GlmZ1Format, "opening", "")),
    (22, "no newline, CodeGeeX4", prompt("codegeex4", "\n"), put(CodeGeex4Format, "opening", "")),
    (22, "newline kept", reply, put(Glm4Format, "syntax", lambda f, tools: replace(RIGHT_SYNTAX(f, tools), lead=()))),
    (23, "specials of a text parsed", injected, put(Tokenizer, "encode", parsed)),
]  # fmt: skip


@pytest.mark.parametrize(("number", "what", "claim", "mistake"), CLAIMS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_mistake_changes_the_ids(
    texts: Texts, number: int, what: str, claim: Claim, mistake: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ours, theirs = claim(texts)
    assert ours == theirs
    mistake(monkeypatch)
    ours, theirs = claim(texts)
    assert ours != theirs
