"""openglm.chat: text in and out, blanks, conversations that outgrow the context, scores, and what cannot be loaded."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import openglm
from openglm.chat import ChatModel, Generated
from openglm.config import GLMConfig
from openglm.model.batch import ForwardBatch, prompt_layout
from openglm.model.checkpoint import CheckpointMeta, read_config, save_checkpoint
from openglm.model.init import init_weights
from openglm.model.transformer import Transformer
from openglm.tokenizer import Tokenizer
from openglm.types import Grammar, Message


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> ChatModel:
    return openglm.load(tiny_checkpoint, device="cpu")


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


# -------------------------------------------------------------------- generate


def test_generate_continues_behind_gmask_and_sop(model: ChatModel) -> None:
    special = model.tokenizer.special_ids
    text = model.generate("The quick", temperature=0, max_new_tokens=8)
    ids = [special["[gMASK]"], special["<sop>"], *model.tokenizer.encode("The quick")]
    assert text.token_ids == model.generate(ids, temperature=0, max_new_tokens=8).token_ids
    assert text == text.text == model.tokenizer.decode(text.token_ids)
    assert isinstance(text, Generated) and len(text.logprobs) == len(text.token_ids)
    # The name of a special token in a text is text.
    assert special["[MASK]"] not in model.tokenizer.encode("[MASK]")


def test_streamed_text_is_the_whole_text(model: ChatModel) -> None:
    for seed in range(4):
        stream = model.stream_text("北京", seed=seed, max_new_tokens=30, temperature=1.3)
        assert "".join(stream) == model.tokenizer.decode(stream.result().token_ids)


def test_the_same_seed_gives_the_same_text(model: ChatModel) -> None:
    first, again, other = (model.generate("The", seed=s, temperature=1.5) for s in (1, 1, 2))
    assert first == again != other
    assert len({model.generate("The", temperature=1.5) for _ in range(3)}) == 3


def test_defaults_come_from_the_checkpoint(model: ChatModel) -> None:
    params = model._params([7], {}, {})
    assert (params.temperature, params.max_new_tokens, params.stop_ids) == (0.9, 24, (7,))
    assert model._params([7], {}, {"temperature": 0.1, "seed": None}).temperature == 0.1
    special = model.tokenizer.special_ids
    assert {special["<eop>"], special["<|endoftext|>"], special["<|user|>"]} <= set(model.text_stops())


def test_unknown_sampling_options_name_the_nearest(model: ChatModel) -> None:
    with pytest.raises(ValueError, match="'temprature'.*did you mean 'temperature'"):
        model.generate("x", temprature=1)
    with pytest.raises(ValueError, match="top_p must be in"):
        model.generate("x", top_p=0)


def test_a_prompt_longer_than_the_context_names_both_numbers(model: ChatModel) -> None:
    with pytest.raises(ValueError, match="[0-9]+ tokens but the context holds 128.*shorten"):
        model.generate("fox jumps 1234567 " * 60)


# -------------------------------------------------------------------- fill


def test_fill_puts_every_answer_in_its_place(model: ChatModel) -> None:
    text = "The capital [MASK] France is [sMASK] of course [gMASK]"
    for options in ({}, {"temperature": 1.2, "seed": 3}, {"n_beams": 2}):
        result = model.fill(text, max_new_tokens=6, **options)
        assert len(result.blanks) == len(result.candidates) == len(result.finish_reasons) == 3
        if "\ufffd" not in result.text:  # halves of characters may join across a blank's edge
            expected = text
            for blank, mask in zip(result.blanks, ("[MASK]", "[sMASK]", "[gMASK]"), strict=True):
                expected = expected.replace(mask, blank, 1)
            assert result.text == expected
        assert all(len(c) == options.get("n_beams", 1) for c in result.candidates)
        assert [c[0][0] for c in result.candidates] == list(result.blanks)
        assert all(c[i][1] >= c[i + 1][1] for c in result.candidates for i in range(len(c) - 1))


def test_fill_gives_the_model_words_as_the_tokenizer_cuts_them(
    model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space before a blank is not left alone in front of the mask, and the text keeps it whatever the answer."""
    seen: list[list[int]] = []
    whole = model.engine.generate

    def spy(ids: list[int], params: object) -> object:
        seen.append(list(ids))
        return whole(ids, params)  # type: ignore[arg-type]

    monkeypatch.setattr(model.engine, "generate", spy)
    result = model.fill("The [MASK] fox", max_new_tokens=3)
    special, encode = model.tokenizer.special_ids, model.tokenizer.encode
    assert seen == [[*encode("The"), special["[MASK]"], *encode(" fox"), special["<sop>"]]]
    assert result.text.startswith("The ") and result.text.endswith(" fox")


def test_fill_says_what_is_missing(model: ChatModel) -> None:
    with pytest.raises(ValueError, match=r"no blank: put \[MASK\]") as caught:
        model.fill("nothing to fill")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="either n_beams or a temperature"):
        model.fill("a [MASK]", n_beams=2, temperature=0.5)


# -------------------------------------------------------------------- chat


def test_chat_equals_its_stream_and_the_engine(model: ChatModel) -> None:
    messages = turns("What is the capital of France?")
    events = list(model.stream(messages, seed=5))
    assert [e.finish_reason is not None for e in events] == [False] * (len(events) - 1) + [True]
    ids = [i for e in events for i in e.token_ids]
    prompt = model.require_format().render([Message("user", messages[0]["content"])]).ids
    params = model._params(model.require_format().stop_ids, {}, {"seed": 5})
    assert tuple(ids) == model.engine.generate(prompt, params).token_ids
    answer = model.chat(messages, seed=5)
    assert answer.role == "assistant" and answer.content == "".join(e.text for e in events)


def test_bad_messages_name_the_field(model: ChatModel) -> None:
    with pytest.raises(ValueError, match=r"messages\[1\].role"):
        model.chat([{"role": "user", "content": "x"}, {"role": "robot", "content": "y"}])
    with pytest.raises(ValueError, match="a tool needs"):
        model.chat(turns("x"), tools=[{"type": "function"}])


def test_old_turns_are_left_out_with_a_notice(model: ChatModel) -> None:
    notices: list[str] = []
    model = ChatModel(model.engine, model.tokenizer, model.chat_format, model.meta)
    model.notify = notices.append
    long = "one two three four five six seven eight nine ten"
    system = {"role": "system", "content": "Be brief."}
    messages = [system, *turns(long, long, long, long, long, long, "And now?")]
    seen: list[list[int]] = []
    stream = model.engine.stream
    model.engine.stream = lambda ids, params: seen.append(list(ids)) or stream(ids, params)  # type: ignore
    try:
        model.chat(messages, max_new_tokens=4)
    finally:
        del model.engine.stream
    fitting = [
        prompt
        for n in (0, 2, 4, 6)
        if len(
            prompt := model.require_format().render([Message.from_dict(m) for m in [system, *messages[1 + n :]]]).ids
        )
        + 4
        <= 128
    ]
    assert seen == fitting[:1], "the most recent turns that fit, and the system message"
    assert len(notices) == 1 and "oldest messages left out" in notices[0] and "128" in notices[0]
    assert "\n" not in notices[0]


def test_a_last_message_that_never_fits_is_an_error(model: ChatModel) -> None:
    with pytest.raises(ValueError, match="the last message makes a prompt of .* context holds 128.*shorten"):
        model.chat(turns("hello", "hi", "1234567 people " * 40))


# -------------------------------------------------------------------- scores


def test_logits_are_those_of_the_model(model: ChatModel) -> None:
    special = model.tokenizer.special_ids
    ids = [5, 6, special["[MASK]"], 7, special["<sop>"], 8, 9]
    got = model.logits(ids)
    assert got.shape == (7, 640) and got.dtype == np.float32
    layout = prompt_layout(ids, model.engine.config, special)
    assert layout.positions(0, 7).tolist() == [[0, 1, 2, 3, 2, 2, 2], [0, 0, 0, 0, 1, 2, 3]]
    batch = ForwardBatch(torch.tensor([ids]), layout.positions(0, 7)[:, None], context=layout.context(7)[None])
    with torch.no_grad():
        expected = model.engine.model.logits(model.engine.model(batch))[0]
    assert np.allclose(got, expected.numpy(), atol=1e-5)
    # Context is seen in both directions, the answer is not.
    changed = model.logits([5, 6, special["[MASK]"], 10, special["<sop>"], 8, 11])
    assert np.abs(changed[0] - got[0]).max() > 1e-4
    assert np.array_equal(model.logits([5, 6, special["[MASK]"], 7, special["<sop>"], 8, 11])[:6], got[:6])


def test_perplexity_equals_a_plain_loop(model: ChatModel) -> None:
    text = "The quick brown fox jumps over the lazy dog. 北京是中华人民共和国的首都。" * 6
    got = model.perplexity(text, window=40, stride=13)
    ids, special = model.tokenizer.encode(text), model.tokenizer.special_ids
    total = 0.0
    for t, target in enumerate(ids):
        start = next(s for s in range(0, len(ids), 13) if s + 38 > t)
        row = model.logits([special["[gMASK]"], special["<sop>"], *ids[start:t]])[-1].astype(np.float64)
        row = row[: model.tokenizer.vocab_size]
        total -= row[target] - math.log(np.exp(row).sum())
    assert got["tokens"] == len(ids)
    assert got["nll_per_token"] == pytest.approx(total / len(ids), rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)
    with pytest.raises(ValueError, match="empty"):
        model.perplexity("")


# -------------------------------------------------------------------- loading


def test_random_weights_of_a_preset_take_ids_and_no_text() -> None:
    model = openglm.load("random:glm-4-9b?n_layers=1&dim=64&ffn_dim=64&vocab_size=100&n_heads=2", device="cpu")
    assert model.logits([1, 2, 3]).shape == (3, 100)
    assert len(model.generate([1, 2], max_new_tokens=5).token_ids) == 5
    for call in (lambda: model.generate("x"), lambda: model.fill("x [MASK]"), lambda: model.perplexity("x")):
        with pytest.raises(ValueError, match="no tokenizer") as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no chat format"):
        model.chat(turns("x"))


def test_dtypes_and_devices(tiny_checkpoint: Path) -> None:
    model = openglm.load(tiny_checkpoint, device="cpu", dtype="bfloat16")
    assert model.engine.model.embed.weight.dtype == torch.bfloat16
    assert model.logits([1, 2, 3]).dtype == np.float32
    with pytest.raises(ValueError, match="unknown dtype 'int3'"):
        openglm.load(tiny_checkpoint, dtype="int3")
    with pytest.raises(ValueError, match="device 'warp'"):
        openglm.load(tiny_checkpoint, device="warp")
    with pytest.raises(ValueError, match="'cuda:99' is not there"):
        openglm.load(tiny_checkpoint, device="cuda:99")


@pytest.mark.parametrize(
    "reference,words",
    [
        ("no/such/folder", "no model at no/such/folder"),
        ("glm-4-9b", "random:glm-4-9b"),
        ("random:glm-4-9c", "did you mean 'glm-4-9b'"),
        ("random:glm-4-9b?n_layer=2", "did you mean 'n_layers'"),
        (Path(__file__), "is a file but no .gguf"),
        (Path(__file__).parent, "no checkpoint"),
    ],
)
def test_references_that_name_no_model(reference: str | Path, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        openglm.load(reference)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def _cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _lose_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "damage,words",
    [(_cut_short, "cut short"), (_flip_a_byte, "does not match its sha256"), (_lose_the_tokenizer, "missing")],
)
def test_damaged_checkpoints_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    damage(folder)
    with pytest.raises(ValueError, match=words) as caught:
        openglm.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = GLMConfig(
        vocab_size=64, dim=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, ffn_dim=16, max_seq_len=16
    )
    meta = CheckpointMeta(special_ids=tiny_tokenizer.special_ids, tokenizer="bpe")
    save_checkpoint(tmp_path / "small", init_weights(Transformer(config)), config, meta, tiny_tokenizer.files)
    with pytest.raises(ValueError, match=r"tokenizer has \d+ ids but the model's vocabulary holds 64"):
        openglm.load(tmp_path / "small", device="cpu")
    config = dataclasses.replace(config, vocab_size=640)
    meta = dataclasses.replace(meta, special_ids={"[MASK]": 1})
    save_checkpoint(tmp_path / "other", init_weights(Transformer(config)), config, meta, tiny_tokenizer.files)
    with pytest.raises(ValueError, match="disagree on special ids"):
        openglm.load(tmp_path / "other", device="cpu")


def test_a_base_model_does_not_chat(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config, meta = read_config(tiny_checkpoint)
    files = {p.name: p.read_bytes() for p in tiny_checkpoint.glob("tokenizer*")}
    meta = dataclasses.replace(meta, chat_format=None)
    save_checkpoint(tmp_path / "base", init_weights(Transformer(config)), config, meta, files)
    model = openglm.load(tmp_path / "base", device="cpu")
    with pytest.raises(ValueError, match="no chat format.*use generate or fill"):
        model.stream(turns("x"))
    assert json.loads((tmp_path / "base" / "config.json").read_text())["chat_format"] is None


# -------------------------------------------------------------------- stop strings and grammars


def test_a_stop_string_ends_the_text_wherever_tokens_are_cut(model: ChatModel) -> None:
    whole = model.generate("The quick", temperature=0, max_new_tokens=24)
    assert len(whole) > 12
    for start, end in ((3, 5), (4, 9), (6, 7), (len(whole) - 2, len(whole))):
        stop = whole[start:end]
        cut = model.generate("The quick", temperature=0, max_new_tokens=24, stop_strings=[stop, "never there"])
        assert cut == whole[: whole.index(stop)] and cut.finish_reason == "stop"
        assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
    assert not model.engine.has_work
    kept = model.generate("The quick", temperature=0, max_new_tokens=24, stop_strings=[whole[-3:] + "\0"])
    assert kept == whole and kept.finish_reason == whole.finish_reason  # what was held back is given in the end


def test_a_stop_string_ends_a_reply(model: ChatModel) -> None:
    whole = model.chat(turns("Hello"), temperature=0, max_new_tokens=24).content
    stop = whole[len(whole) // 2 :][:3]
    events = list(model.stream(turns("Hello"), temperature=0, max_new_tokens=24, stop_strings=(stop,)))
    assert "".join(e.text for e in events) == whole[: whole.index(stop)] and events[-1].finish_reason == "stop"


def test_text_is_held_to_a_grammar(model: ChatModel) -> None:
    pytest.importorskip("xgrammar")
    grammar = Grammar("regex", "[a-z]{4}-[0-9]{3}")
    for seed in range(5):
        text = model.generate("The", seed=seed, temperature=1.5, max_new_tokens=40, grammar=grammar)
        assert re.fullmatch("[a-z]{4}-[0-9]{3}", text) and text.finish_reason == "stop"
