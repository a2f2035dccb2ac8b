"""What we write, read by llama.cpp and transformers: ids, stop ids, chat, logits and greedy text of each architecture.

llama.cpp runs where llama-cpp-python can be imported: in this interpreter, or in the one that OPENGLM_LLAMA_PYTHON
names. The models are tiny and know a few sentences by heart, so that rounding turns no token.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import openglm
from bench.export import (
    PROMPTS,
    SHAPES,
    TEXTS,
    TYPES,
    ask_peer,
    gguf_rows,
    greedy,
    hf_row,
    tiny_tokenizer,
    train_tiny,
    write_gguf,
)
from openglm.config import GLMConfig, RopeConfig
from openglm.convert import convert
from openglm.loading import Reference, open_reference
from openglm.model.checkpoint import CheckpointMeta, save_checkpoint
from openglm.model.gguf_tokenizer import gguf_tokenizer_fields
from openglm.model.init import init_weights
from openglm.model.transformer import Transformer
from openglm.tokenizer import Tokenizer
from tests.tokenizer_helpers import SAMPLES, train_sentencepiece

CONFIG = GLMConfig(
    vocab_size=1, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=32, max_seq_len=64,
    rope=RopeConfig(fraction=0.5),
)  # fmt: skip


@pytest.fixture(scope="session")
def llama_python() -> str:
    if importlib.util.find_spec("llama_cpp"):
        return sys.executable
    if "OPENGLM_LLAMA_PYTHON" not in os.environ:
        pytest.skip("needs llama-cpp-python, here or in the interpreter that OPENGLM_LLAMA_PYTHON names")
    return os.environ["OPENGLM_LLAMA_PYTHON"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("export")
    return {shape: train_tiny(folder / shape, shape, tiny_tokenizer()) for shape in SHAPES}


def check(row: dict[str, Any]) -> None:
    assert row["same_ids"] == row["texts"] and row["stop_ids"] and row["rendered"] is True
    assert row["same"] == row["tokens"], f"continuations part where our float32 prefers ours by {row['gaps']} nats"
    assert row["logits"] < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_reads_our_gguf(shape: str, models: dict[str, Path], llama_python: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    rows = gguf_rows(models[shape], llama_python, tmp_path)
    assert [row["format"] for row in rows] == [f"GGUF {type}" for type in TYPES]
    for row in rows:
        check(row)


def test_half_precision_continues_as_the_model_did(models: dict[str, Path], tmp_path: Path) -> None:
    """Ours, unconverted, and ours from the file: with the test above, llama.cpp continues as the model unconverted."""
    for shape, source in models.items():
        write_gguf(source, tmp_path / f"{shape}.gguf", "F16")
        before, after = (openglm.load(path, device="cpu") for path in (source, tmp_path / f"{shape}.gguf"))
        for prompt in PROMPTS:
            ids = before.tokenizer.encode(prompt)
            assert greedy(before, ids) == greedy(after, ids)


def vocabularies(shared_data: Path) -> dict[str, Tokenizer]:
    bpe = tiny_tokenizer()
    fields = gguf_tokenizer_fields(bpe)
    cut = {pre: Tokenizer.from_gguf({**fields, "tokenizer.ggml.pre": pre}) for pre in ("qwen2", "smollm", "gpt-2")}
    pieces = {
        f"sentencepiece-{dummy}": Tokenizer({"tokenizer.model": train_sentencepiece(
            model_type="bpe", byte_fallback=True, add_dummy_prefix=dummy)}) for dummy in (True, False)
    }  # fmt: skip
    return {"bpe": bpe, "chatglm3": Tokenizer.load(shared_data / "tokenizers" / "chatglm3"), **cut, **pieces}


def untrained(folder: Path, tokenizer: Tokenizer, **fields: Any) -> Reference:
    config = replace(CONFIG, vocab_size=tokenizer.vocab_size, **fields)
    meta = CheckpointMeta(tokenizer.special_ids, (2,), None, tokenizer.kind)
    save_checkpoint(folder, init_weights(Transformer(config), seed=1), config, meta, tokenizer.files)
    return open_reference(folder)


def test_llama_cpp_cuts_text_as_we_do(shared_data: Path, llama_python: str, tmp_path: Path) -> None:
    texts, request, ours = [*TEXTS, *SAMPLES], [], []
    for name, tokenizer in vocabularies(shared_data).items():
        path = tmp_path / f"{name}.gguf"
        convert(untrained(tmp_path / name, tokenizer), path, "gguf")
        request.append({"path": str(path), "texts": texts, "prompts": [], "messages": [], "float32": False})
        ours.append([tokenizer.encode(text) for text in texts])
    replies, _ = ask_peer(llama_python, request, tmp_path)
    for asked, reply, ids in zip(request, replies, ours, strict=True):
        assert reply["ids"] == ids, asked["path"]


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_our_folder(shape: str, models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the test extra: transformers")
    check(hf_row(models[shape], tmp_path))
    config, generation = (
        json.loads((tmp_path / "hf" / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    special = tiny_tokenizer().special_ids
    stops = [special[name] for name in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    assert generation["eos_token_id"] == config["eos_token_id"] == stops
    assert generation["top_p"] == 0.9 and generation["do_sample"] is True
    # transformers would cut text as Qwen2 does, whatever tokenizer.json says, if it were told qwen2.
    assert config["model_type"] == {"chatglm": "glm", "qwen2": "glm"}.get(shape, shape)


def test_transformers_reads_a_qwen2_with_its_own_way_to_cut_text(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the test extra: transformers")
    fields = gguf_tokenizer_fields(tiny_tokenizer())
    tokenizer = Tokenizer.from_gguf({**fields, "tokenizer.ggml.pre": "qwen2"})
    convert(untrained(tmp_path / "ours", tokenizer, rope=RopeConfig()), tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "qwen2"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == tokenizer.encode(text)
