"""Conversion: out and back bit for bit, the original's own quantisation, killed and continued, and refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openglm.config import GLMConfig, RopeConfig
from openglm.convert import convert
from openglm.convert import plan as plan_module
from openglm.loading import Reference, open_reference
from openglm.model import gguf_write
from openglm.model.checkpoint import CheckpointMeta, save_checkpoint
from openglm.model.init import init_weights
from openglm.model.load import build_transformer, load_weights
from openglm.model.opened import OpenedModel, open_model
from openglm.model.transformer import Transformer
from openglm.model.writer import OutputFolder
from openglm.ops.quant import QuantTensor
from openglm.quant import QuantSpec, quantise
from openglm.tokenizer import Tokenizer

CAUSAL = GLMConfig(
    vocab_size=96, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=64, max_seq_len=64,
    rope=RopeConfig(fraction=0.5, theta=5e6),
)  # fmt: skip


def bare(path: Path) -> Reference:
    return Reference(open_model(path), None, None)


def assert_same(ours: OpenedModel, other: OpenedModel) -> None:
    """Equal configs and equal bits."""
    assert ours.config == other.config
    left, right = dict(ours.weights()), dict(other.weights())
    assert left.keys() == right.keys()
    for name, weight in left.items():
        found = right[name]
        if isinstance(weight, QuantTensor):
            assert isinstance(found, QuantTensor) and torch.equal(weight.q, found.q), name
            assert torch.equal(weight.scale, found.scale), name
        else:
            assert isinstance(found, torch.Tensor) and weight.dtype == found.dtype, name
            assert torch.equal(weight, found), name


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "causal"
    meta = CheckpointMeta({"<|user|>": 90}, (90,), generation={"temperature": 0.5, "top_p": 0.8})
    save_checkpoint(folder, init_weights(Transformer(CAUSAL), seed=1), CAUSAL, meta, dtype=torch.bfloat16)
    return folder


@pytest.mark.parametrize(("source", "format", "options"), [
    ("glm-130b/mp1", "openglm", {}), ("glm-130b/mp1-int4", "openglm", {}), ("glm-130b/mp2-int4", "openglm", {}),
    ("glm-130b/mp2", "sat", {"tp": 4}), ("glm-130b/mp1", "sat", {"tp": 2}), ("glm-130b/mp2-int4", "sat", {"tp": 2}),
    ("glm-10b/mp2", "sat", {"tp": 1}), ("glm-10b/mp1", "sat", {"tp": 4}), ("glm-10b/mp1", "openglm", {}),
    ("chatglm-6b", "openglm", {}), ("chatglm-6b/int8", "openglm", {}), ("chatglm2-6b/int4", "openglm", {}),
    ("chatglm2-6b", "hf", {}), ("codegeex2-6b", "hf", {}), ("glm-4-9b", "hf", {}),
    ("glm-130b/mp1-int4", "sat", {"tp": 4}), ("glm-130b/mp1-int8", "sat", {"tp": 2}),
    ("chatglm3-6b", "gguf", {}), ("glm-4-9b", "gguf", {"dtype": "bfloat16"}), ("chatglm2-6b", "gguf", {}),
])  # fmt: skip
def test_out_and_back_is_bit_identical(
    shared_data: Path, tmp_path: Path, source: str, format: Any, options: dict[str, Any]
) -> None:
    path, out = shared_data / "golden" / source, tmp_path / ("out.gguf" if format == "gguf" else "out")
    convert(bare(path), out, format, **options)
    assert_same(open_model(path), open_model(out))
    assert list(tmp_path.iterdir()) == [out]


def test_there_and_back_through_hugging_face(causal: Path, tmp_path: Path) -> None:
    convert(bare(causal), tmp_path / "hf", "hf")
    convert(bare(tmp_path / "hf"), tmp_path / "ours", "openglm")
    assert_same(open_model(causal), open_model(tmp_path / "ours"))
    meta = open_model(tmp_path / "ours").meta
    assert meta.stop_ids == (90,) and meta.generation == {"temperature": 0.5, "top_p": 0.8}


def test_what_hugging_face_has_no_place_for_travels(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """And generation defaults of every kind, also of a greedy model."""
    special = tiny_tokenizer.special_ids
    config = replace(CAUSAL, vocab_size=tiny_tokenizer.vocab_size)
    for generation in ({"temperature": 0.6, "min_p": 0.1, "top_k": 9, "max_new_tokens": 77, "presence_penalty": 0.5},
                       {"temperature": 0.0, "repetition_penalty": 1.1, "max_new_tokens": 5}):  # fmt: skip
        meta = CheckpointMeta(special, (special["<|user|>"],), "glm-4", tiny_tokenizer.kind, generation, {"steps": 3},
                              prompt_prefix=(special["<sop>"],))  # fmt: skip
        ours, hf = (tmp_path / f"{name}-{len(generation)}" for name in ("ours", "hf"))
        save_checkpoint(ours, init_weights(Transformer(config), seed=1), config, meta, tiny_tokenizer.files)
        convert(open_reference(ours), hf, "hf")
        wanted, found = open_reference(ours).meta, open_reference(hf).meta
        assert found == replace(wanted, tokenizer="json") and wanted.chat_format == "glm-4"


def test_gguf_keeps_what_stands_in_front_of_a_text(shared_data: Path, tmp_path: Path) -> None:
    """[gMASK] <sop>, which the format has one field for (the begin token), and a chat format of no template."""
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / "chatglm3")
    config = replace(CAUSAL, vocab_size=tokenizer.vocab_size, n_layers=1)
    meta = CheckpointMeta(tokenizer.special_ids, (2,), "chatglm3", tokenizer.kind, prompt_prefix=tokenizer.prefix_ids)
    save_checkpoint(tmp_path / "a", init_weights(Transformer(config), seed=1), config, meta, tokenizer.files)
    convert(open_reference(tmp_path / "a"), tmp_path / "a.gguf", "gguf", QuantSpec.parse("int8"))
    convert(open_reference(tmp_path / "a.gguf"), tmp_path / "b")
    convert(open_reference(tmp_path / "b"), tmp_path / "b.gguf", "gguf", QuantSpec.parse("int8"))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    found = open_reference(tmp_path / "b")
    assert found.tokenizer is not None and found.tokenizer.prefix_ids == tokenizer.prefix_ids == (64790, 64792)
    assert found.meta == open_reference(tmp_path / "a").meta


@pytest.mark.parametrize("kind", ["glm", "glm4", "llama", "qwen2"])
def test_transformers_loads_what_we_write(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the test extra: transformers")
    shapes: dict[str, dict[str, Any]] = {
        "glm": {"rope": RopeConfig(fraction=0.5)}, "glm4": {"rope": RopeConfig(fraction=0.5), "sandwich": True},
        "llama": {"qkv_bias": False, "rope": RopeConfig(yarn_factor=2.0, yarn_context=32)},
        "qwen2": {"tie_embeddings": True, "rope": RopeConfig(theta=1e6)},
    }  # fmt: skip
    config = GLMConfig(**(CAUSAL.to_dict() | shapes[kind]))
    model = init_weights(Transformer(config), seed=2, std=0.3)
    save_checkpoint(tmp_path / "ours", model, config, CheckpointMeta(stop_ids=(5,)))
    convert(bare(tmp_path / "ours"), tmp_path / "hf", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert theirs.config.model_type == kind and theirs.generation_config.eos_token_id == [5]
    ids = torch.arange(40)[None] % 96
    ours = build_transformer(open_model(tmp_path / "hf"), dtype=torch.float32)
    from openglm.engine import Engine

    logits = Engine(ours, {}).logits(ids[0].tolist())
    torch.testing.assert_close(logits, theirs(ids).logits[0].detach(), rtol=0, atol=5e-5)


@pytest.mark.parametrize(("source", "tp", "bits", "golden"), [
    ("mp1", 1, "int4", "mp1-int4"), ("mp1", 1, "int8", "mp1-int8"), ("mp1", 2, "int4", "mp2-int4"),
    ("mp2", 2, "int4", "mp2-int4"),
])  # fmt: skip
def test_quantising_shards_gives_the_original_tools_bytes(
    shared_data: Path, tmp_path: Path, source: str, tp: int, bits: str, golden: str
) -> None:
    folder = shared_data / "golden" / "glm-130b"
    convert(bare(folder / source), tmp_path / "out", "sat", QuantSpec.parse(bits, "row"), tp=tp)
    for rank in range(tp):
        name = f"mp_rank_{rank:02d}_model_states.pt"
        ours = torch.load(tmp_path / "out" / "0" / name, weights_only=True)["module"]
        theirs = torch.load(next((folder / golden).rglob(name)), weights_only=True)["module"]
        for key, tensor in theirs.items():
            if "inv_freq" not in key:
                assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize(("bits", "group"), [("int8", "32"), ("int4", "32"), ("int4", "row")])
def test_rounding_is_to_nearest(bits: str, group: str) -> None:
    """Against the definition in float64: no weight moves by more than half a step (and the scale's own rounding)."""
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(3))
    spec = QuantSpec.parse(bits, group, method="absmax")
    found = quantise(weight, spec)
    step = found.scale.double().repeat_interleave(found.group_size, 1)
    inside = (found.dequantise().double() - weight.double()).abs() <= 0.51 * step + 1e-3 * weight.abs().max()
    assert bool(inside.all())
    assert found.q.numel() * found.q.element_size() * 8 == weight.numel() * spec.bits


def test_quantised_checkpoint_runs_and_is_small(causal: Path, tmp_path: Path) -> None:
    spec = QuantSpec.parse("int4", embeddings="int4", head="int4")
    convert(bare(causal), tmp_path / "q", "openglm", spec)
    opened = open_model(tmp_path / "q")
    model = load_weights(opened, dtype=torch.float32)
    plain = build_transformer(open_model(causal), dtype=torch.float32)
    for name, weight in opened.weights():
        if isinstance(weight, QuantTensor):
            plain.get_parameter(name).data = weight.dequantise()
    from openglm.engine import Engine

    ids = [1, 5, 7, 9, 11]
    torch.testing.assert_close(Engine(model, {}).logits(ids), Engine(plain, {}).logits(ids), rtol=0, atol=1e-5)
    shapes = {name: tuple(w.shape) for name, w in opened.weights() if isinstance(w, QuantTensor)}
    assert len(shapes) == 2 + 4 * CAUSAL.n_layers  # embedding and head, and the four matrices of each block
    assert sum(n for _, kind, n in opened.stored() if kind == "int4") == sum(map(spec.n_bytes, shapes.values()))


def test_gguf_of_a_model_without_tokenizer_opens(causal: Path, tmp_path: Path) -> None:
    convert(bare(causal), tmp_path / "m.gguf", "gguf", dtype="bfloat16")
    found = open_reference(tmp_path / "m.gguf")
    assert found.tokenizer is None and found.opened.config == CAUSAL and found.meta.stop_ids == (90,)
    for name, weight in open_model(causal).weights():
        written = found.opened.get(name)
        assert isinstance(weight, torch.Tensor) and isinstance(written, torch.Tensor)
        assert torch.equal(written.to(torch.bfloat16), weight), name


# -------------------------------------------------------------------- killed


def _convert_and_die(source: str, target: str, after: int) -> None:
    """Convert in small shards; SIGKILL on the way to shard number `after`."""
    plan_module.SHARD_BYTES = 4096
    real = OutputFolder.write_shard

    def counted(self: OutputFolder, name: str, weights: Any, n: int) -> list[str]:
        if len(self.sums) == after:
            (self.folder / f"{name}.tmp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, name, weights, n)

    OutputFolder.write_shard = counted  # type: ignore[assignment, method-assign]
    convert(bare(Path(source)), target)


def test_a_killed_conversion_continues(causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    process = multiprocessing.get_context("spawn").Process(target=_convert_and_die, args=(str(causal), str(target), 3))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not target.exists()
    monkeypatch.setattr(plan_module, "SHARD_BYTES", 4096)
    opened: list[str] = []
    real = OpenedModel.get

    def noted(self: OpenedModel, name: str) -> Any:
        opened.append(name)
        return real(self, name)

    monkeypatch.setattr(OpenedModel, "get", noted)
    found = convert(bare(causal), target)
    assert found.continued and opened and "embed.weight" not in opened, "finished shards are not written again"
    assert (target / "model.safetensors.index.json").is_file()
    assert_same(open_model(causal), open_model(target))
    load_weights(open_model(target))  # the manifest holds


def test_what_another_conversion_left_is_not_mixed_in(causal: Path, tmp_path: Path) -> None:
    OutputFolder(tmp_path / "out", {"other": 1}).write_bytes("model.safetensors", b"another model")
    found = convert(bare(causal), tmp_path / "out")
    assert not found.continued
    assert_same(open_model(causal), open_model(tmp_path / "out"))


def _to_gguf_and_die(source: str, target: str, after: int, how: str) -> None:
    """Convert with a note of progress behind every weight; die on the way to weight number `after`."""
    real = gguf_write.GgufOutput.add

    def counted(self: gguf_write.GgufOutput, name: str, weight: Any) -> None:
        if len(self.done) == after:
            self._file.write(b"half" * 999)
            self._file.flush()
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt if how == "interrupted" else ValueError("bad")
        real(self, name, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_write, "NOTE_BYTES", 1)
        patch.setattr(gguf_write.GgufOutput, "add", counted)
        convert(bare(Path(source)), target, "gguf", QuantSpec.parse("int8"))


@pytest.mark.parametrize("how", ["killed", "interrupted", "refused"])
def test_a_killed_gguf_continues(how: str, causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = shutil.copytree(causal, tmp_path / "model"), tmp_path / "model" / "m.gguf"
    convert(bare(source), tmp_path / "whole.gguf", "gguf", QuantSpec.parse("int8"))
    if how == "killed":
        arguments = (str(source), str(target), 4, how)
        process = multiprocessing.get_context("spawn").Process(target=_to_gguf_and_die, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    else:
        with pytest.raises(KeyboardInterrupt if how == "interrupted" else ValueError):
            _to_gguf_and_die(str(source), str(target), 4, how)
    assert not target.exists()
    read: list[str] = []
    real = OpenedModel.get

    def noted(self: OpenedModel, name: str) -> Any:
        read.append(name)
        return real(self, name)

    monkeypatch.setattr(OpenedModel, "get", noted)
    found = convert(bare(source), target, "gguf", QuantSpec.parse("int8"))
    assert found.continued and len(read) == len(open_model(causal).names()) - 4 and "embed.weight" not in read
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not [p.name for p in source.iterdir() if p.name.startswith(".")], "nothing is left beside it"


@pytest.mark.parametrize("change", ["source", "options", "cut short"])
def test_a_killed_gguf_of_another_conversion_starts_over(change: str, causal: Path, tmp_path: Path) -> None:
    source, target = shutil.copytree(causal, tmp_path / "model"), tmp_path / "m.gguf"
    with pytest.raises(KeyboardInterrupt):
        _to_gguf_and_die(str(source), str(target), 4, "interrupted")
    options: dict[str, Any] = {"spec": QuantSpec.parse("int8")}
    if change == "source":
        os.utime(source / "model.safetensors", (1, 1))
    elif change == "options":
        options = {"dtype": "bfloat16"}
    else:
        os.truncate(tmp_path / ".m.gguf.partial", 1000)
    assert not convert(bare(source), target, "gguf", **options).continued
    convert(bare(source), tmp_path / "whole.gguf", "gguf", **options)
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


# -------------------------------------------------------------------- refused


@pytest.mark.parametrize(("source", "format", "options", "words"), [
    ("glm-130b/mp1", "hf", {}, "prefix-bidirectional mask"),
    ("glm-130b/mp1", "gguf", {}, "gguf"),
    ("glm-130b/mp1", "sat", {"tp": 3}, "4 heads do not divide among 3 ranks"),
    ("glm-130b/mp2-int4", "sat", {"tp": 4}, "was quantised for 2 ranks"),
    ("chatglm2-6b", "sat", {}, "only GLM-130B and the original GLM"),
    ("chatglm2-6b", "hf", {"spec": QuantSpec()}, "does not go with --format hf"),
    ("chatglm2-6b", "openglm", {"tp": 2}, "--tp goes with --format sat"),
    ("chatglm2-6b", "openglm", {"spec": QuantSpec(group=48)}, "groups of 48 do not divide"),
    ("glm-130b/mp1", "sat", {"spec": QuantSpec()}, "--group row"),
])  # fmt: skip
def test_refused(
    shared_data: Path, tmp_path: Path, source: str, format: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        convert(bare(shared_data / "golden" / source), tmp_path / "out", format, **options)
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


def test_a_vision_tower_is_not_lost_in_silence(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "golden" / "glm-4v-9b"
    tensors = {n: t for path in source.glob("*.safetensors") for n, t in load_file(path).items() if ".vision." in n}
    n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    for format in ("openglm", "hf", "gguf"):
        out = tmp_path / ("v.gguf" if format == "gguf" else format)
        with pytest.raises(ValueError, match=rf"{len(tensors)} tensors, {n_bytes:,} bytes.*--text-only"):
            convert(bare(source), out, format)
        assert not out.exists()
        found = convert(bare(source), out, format, dtype="bfloat16", text_only=True)
        assert (found.left_out, found.left_out_bytes) == (len(tensors), n_bytes) and n_bytes > 0
        assert_same(open_model(source), open_model(out))
    with pytest.raises(ValueError, match="has no vision tower"):
        convert(bare(tmp_path / "openglm"), tmp_path / "again", text_only=True)


@pytest.mark.parametrize("row", [0, 37])
def test_a_head_that_is_no_copy_of_the_embedding_is_not_lost_in_silence(tmp_path: Path, row: int) -> None:
    """Row 0 is among those that are compared when a checkpoint is opened, row 37 is not."""
    config = replace(CAUSAL, tie_embeddings=True, vocab_size=256)
    save_checkpoint(tmp_path / "ours", init_weights(Transformer(config), seed=1), config, CheckpointMeta())
    convert(bare(tmp_path / "ours"), tmp_path / "hf", "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    convert(bare(tmp_path / "hf"), tmp_path / "again", "hf")
    assert_same(open_model(tmp_path / "hf"), open_model(tmp_path / "again"))
    tensors["lm_head.weight"][row, 3] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match="lm_head.weight, which differs from the embedding"):
        convert(bare(tmp_path / "hf"), tmp_path / "lost", "hf")
    if row == 0:
        with pytest.raises(ValueError, match="lm_head.weight, which differs from the embedding"):
            open_model(tmp_path / "hf")


def test_a_tensor_that_is_not_of_our_model_is_refused(causal: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(causal, tmp_path / "model")
    save_file(load_file(folder / "model.safetensors") | {"extra.weight": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no use for: extra\.weight"):
        open_model(folder)


def test_an_existing_target_is_kept(causal: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        convert(bare(causal), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"


def test_stop_ids_and_special_ids_travel_with_shards(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "golden" / "glm-130b" / "mp1"
    convert(open_reference(source), tmp_path / "out", "sat")
    assert open_reference(tmp_path / "out").meta == open_reference(source).meta
    assert json.loads((tmp_path / "out" / "model_args.json").read_text())["special_ids"]["sop"] == 304
