"""The native library: packing, products, attention and whole passes against PyTorch, for every instruction set here.

Those of 64-bit ARM run too, under an emulator, where there is a cross compiler (tests/arm_helpers.py).

    python -m pytest -q tests/test_native.py
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from openglm.config import GLMConfig, RopeConfig
from openglm.engine.native_runner import NativeRunner, runs_natively
from openglm.engine.runner import Burst, Chunk, Decoding, TorchRunner
from openglm.engine.sampler import Sampler
from openglm.model.gguf_types import TYPES, as_matrix, decode
from openglm.model.init import init_weights
from openglm.model.linear import PackedEmbedding, PackedLinear, QuantLinear, RowParts, quantised_linear
from openglm.model.transformer import Transformer
from openglm.ops import native
from openglm.ops.quant import QuantParts, QuantTensor, pack_int4
from openglm.types import SamplingParams
from tests import arm_helpers

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library was not built: no C++ compiler")

Form = tuple[int, int, bool, bool]  # bits, columns of a group (0: the row), minimum, whether six bits hold the values
FORMS: list[Form] = [
    (4, 32, True, False), (4, 32, False, False), (4, 64, True, False), (4, 0, False, False), (8, 32, False, False),
    (8, 16, False, True), (8, 16, False, False), (8, 32, False, True), (8, 0, False, False),
]  # fmt: skip


@pytest.fixture(scope="session")
def remotes(request: pytest.FixtureRequest) -> Iterator[dict[str, arm_helpers.RemoteLibrary]]:
    """Libraries that run under an emulator, of each instruction set of ARM on a CPU that has no better one."""
    if reason := arm_helpers.missing():
        pytest.skip(reason)
    folder = request.config.cache.mkdir("native_arm")
    made = {name: arm_helpers.RemoteLibrary(folder, cpu) for name, cpu in arm_helpers.CPUS.items()}
    yield made
    for remote in made.values():
        remote.close()


@pytest.fixture(params=[*native.describe().get("isas", []), *(f"emulated-{name}" for name in arm_helpers.CPUS)])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param.startswith("emulated-"):
        remote = request.getfixturevalue("remotes")[request.param.removeprefix("emulated-")]
        monkeypatch.setattr(native, "library", lambda: remote)
        yield request.param
        return
    before = native.describe()["isa"]
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


def test_the_best_instruction_set_is_chosen(remotes: dict[str, arm_helpers.RemoteLibrary]) -> None:
    assert list(remotes) == ["neon", "neon-dotprod", "neon-i8mm"]
    for i, (name, remote) in enumerate(remotes.items()):
        assert remote.og_isa_in_use().decode() == name
        assert [remote.og_isa(j) for j in range(i + 2)] == [*(n.encode() for n in list(remotes)[i::-1]), None]


def matrix(rows: int, columns: int, form: Form, seed: int = 0) -> QuantTensor:
    bits, group, minimum, six = form
    generator = torch.Generator().manual_seed(seed)
    top = 32 if six else 128
    if bits == 4:
        q = pack_int4(torch.randint(0, 16, (rows, columns), generator=generator))
    else:
        q = torch.randint(-top, top, (rows, columns), generator=generator, dtype=torch.int8)
    n_groups = columns // (group or columns)
    scale = (torch.rand(rows, n_groups, generator=generator) * 0.01 + 0.005).half()
    return QuantTensor(q, scale, (-7 * scale.float()).half() if minimum else None)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(16, 64), (21, 96)], ids=str)
def test_packing_loses_nothing(isa: str, form: Form, shape: tuple[int, int]) -> None:
    if form[1] and shape[1] % form[1]:
        pytest.skip("groups do not divide the row")
    weight = matrix(*shape, form)
    packed = native.pack(weight)
    assert packed.kind == (native.INT4 if form[0] == 4 else native.INT6 if form[3] else native.INT8)
    assert torch.allclose(packed.dequantise(), weight.dequantise(), atol=1e-7)
    assert torch.equal(packed.take(torch.tensor([3, 0, shape[0] - 1])), packed.dequantise()[[3, 0, -1]])
    with pytest.raises(IndexError):
        packed.take(torch.tensor([shape[0]]))


@pytest.mark.parametrize("type", ["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q6_K", "Q8_0"])
def test_packing_from_a_gguf_file_is_packing_what_was_unpacked(isa: str, type: str) -> None:
    """Bit for bit, whole matrices and parts of them, rows as they lie and in another order."""
    rows, columns, kind = 37, 512, TYPES[type]
    rng = np.random.default_rng(kind.id)
    blocks = rng.integers(0, 256, (rows * columns // kind.block, kind.n_bytes), dtype=np.uint8)
    halves = (rng.standard_normal((len(blocks), kind.n_bytes // 2)) / 100).astype(np.float16).view(np.uint8)
    for at in (0, 2, kind.n_bytes - 2):  # where scales may lie: numbers, and now and then a tiny or a huge one
        blocks[::2, at : at + 2] = halves[::2, :2]
    data = torch.from_numpy(blocks).flatten()
    order = torch.from_numpy(rng.permutation(rows))
    whole = as_matrix(type, data, (rows, columns), None)
    turned = as_matrix(type, data, (rows, columns), order)
    assert whole is not None and turned is not None and as_matrix("Q5_K", data, (rows, columns), None) is None
    unpacked = decode(type, data, (rows, columns))
    assert isinstance(unpacked, QuantTensor)
    part = whole.take_rows(3, 20), unpacked.take_rows(slice(3, 20))
    cases = [(whole, unpacked), (turned, unpacked.take_rows(order)), part]
    jobs = [(replace(matrix, mapped=False), matrix.empty()) for matrix, _ in cases]
    native.pack_gguf(jobs)
    for (_, packed), (_, weight) in zip(jobs, cases, strict=True):
        expected = native.pack(weight)
        assert packed.kind == expected.kind and torch.equal(packed.data, expected.data)
        assert torch.equal(packed.scale.view(torch.int16), expected.scale.view(torch.int16))
        if packed.minimum is not None and expected.minimum is not None:
            assert torch.equal(packed.minimum.view(torch.int16), expected.minimum.view(torch.int16))
        assert (packed.minimum is None) == (expected.minimum is None) == (type not in ("Q4_1", "Q4_K"))


class Rounded(nn.Module):
    """The definition in float64: activations rounded to INT8, 32 columns to a scale, times the dequantised matrix."""

    def __init__(self, weight: QuantTensor | QuantParts, bias: Tensor | None) -> None:
        super().__init__()
        self.bias, self.weight = bias, weight.dequantise().double()

    def forward(self, x: Tensor) -> Tensor:
        columns = x.shape[-1]
        padded = nn.functional.pad(x, (0, -columns % 32)).unflatten(-1, (-1, 32))
        top = padded.abs().amax(-1, keepdim=True)
        q = (padded * (127.0 / top.clamp(min=1e-30))).round()
        rounded = (q.double() * (top.double() / 127)).flatten(-2)[..., :columns]
        y = (rounded @ self.weight.T).float()
        return y if self.bias is None else y + self.bias


def quantised_model(config: GLMConfig, form: Form, mixed: bool) -> tuple[Transformer, Transformer]:
    """The same weights twice: packed for the library, and by definition."""
    ours, theirs = (init_weights(Transformer(config), seed=1, std=0.3) for _ in range(2))
    for model, packed in ((ours, True), (theirs, False)):
        for name, module in list(model.named_modules()):
            if not isinstance(module, nn.Linear) or name == "head":
                continue
            rows, columns = module.weight.shape
            one, weight = matrix(rows, columns, form, seed=len(name)), None
            if mixed and name.endswith("qkv"):
                split = config.n_heads * config.head_dim
                other = matrix(rows, columns, (8, 16, False, True), seed=3)
                weight = QuantParts((one.take_rows(slice(0, split)), other.take_rows(slice(split, None))))
            parent, _, child = name.rpartition(".")
            cut = config.ffn_dim if child == "up" and config.mlp != "gelu" else None
            layer = quantised_linear(weight or one, True, cut) if packed else Rounded(weight or one, module.bias)
            if packed:
                layer.bias = module.bias
            setattr(model.get_submodule(parent), child, layer)
    return ours.eval().requires_grad_(False), theirs.eval().requires_grad_(False)


SHAPE: dict[str, Any] = {
    "vocab_size": 72, "dim": 64, "n_layers": 1, "n_heads": 4, "head_dim": 16, "ffn_dim": 96, "max_seq_len": 256
}  # fmt: skip
CONFIGS = {
    "glm-4": GLMConfig(**SHAPE, n_kv_heads=2, rope=RopeConfig(fraction=0.5)),
    "0414": GLMConfig(**SHAPE, n_kv_heads=2, sandwich=True),
    "glm-130b": GLMConfig(**SHAPE, n_kv_heads=4, norm="layer", residual="normed", residual_alpha=2.0, mlp="geglu",
                          linear_bias=True, mask="prefix"),
    "chatglm-6b": GLMConfig(**SHAPE, n_kv_heads=4, norm="layer", residual="normed", residual_alpha=2.0, mlp="gelu",
                            linear_bias=True, rope=RopeConfig(axes=2), mask="prefix"),
}  # fmt: skip
WIDE = GLMConfig(**SHAPE | {"ffn_dim": 1600}, n_kv_heads=2)  # columns of several panels
ODD = GLMConfig(vocab_size=71, dim=60, n_layers=1, n_heads=3, n_kv_heads=1, head_dim=20, ffn_dim=100, max_seq_len=256)


def chunk(ids: list[int], start: int, axes: int, pages: list[int], n_logits: int, n_context: int = 0) -> Chunk:
    positions = torch.arange(start, start + len(ids)).expand(axes, -1)
    return Chunk(ids, start, positions, pages, n_context, n_logits)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[6], FORMS[5]], ids=str)
def test_a_pass_of_quantised_layers_equals_its_definition(isa: str, config: str, form: Form) -> None:
    ours, theirs = quantised_model(CONFIGS[config], form, mixed=True)
    assert runs_natively(ours) and isinstance(ours.layers[0].attn.qkv, RowParts)
    passes_are_equal(CONFIGS[config], ours, theirs)


@pytest.mark.parametrize("form", [FORMS[3], FORMS[8]], ids=str)
def test_sizes_that_fill_no_vector(isa: str, form: Form) -> None:
    passes_are_equal(ODD, *quantised_model(ODD, form, mixed=False))


def passes_are_equal(c: GLMConfig, ours: Transformer, theirs: Transformer) -> None:
    runners = NativeRunner(ours, 8, kv_dtype="float32"), TorchRunner(theirs, 8, kv_dtype="float32")
    ids = torch.randint(0, c.vocab_size, (37,), generator=torch.Generator().manual_seed(5)).tolist()
    n_context = 20 if c.mask == "prefix" else 0
    passes = [[chunk(ids, 0, c.n_axes, [2, 0, 5], 37, n_context)], [chunk([7], 37, c.n_axes, [2, 0, 5], 1)]]
    for each in passes:
        got, expected = (runner.run(each) for runner in runners)
        # A value that lies on a border of the rounding may fall to either side: nearly all are equal, none is far off.
        off = (got - expected).abs() / expected.std()
        assert off.max() < 0.1 and (off < 1e-3).float().mean() > 0.9


@pytest.mark.parametrize("c", [CONFIGS["glm-4"], ODD], ids=["even", "odd"])
@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16", "int8"])
def test_plain_layers_and_every_kind_of_cache(isa: str, kv_dtype: str, c: GLMConfig) -> None:
    model = init_weights(Transformer(c), seed=1, std=0.3).eval().requires_grad_(False)
    runners = NativeRunner(model, 16, kv_dtype=kv_dtype), TorchRunner(model, 16, kv_dtype=kv_dtype)
    assert abs(runners[0].kv_bytes - runners[1].kv_bytes) <= 0.01 * runners[1].kv_bytes
    ids = torch.randint(0, c.vocab_size, (150,), generator=torch.Generator().manual_seed(5)).tolist()
    pages = [3, 1, 4, 9, 5, 2, 6, 8, 7, 0]
    got, expected = (runner.run([chunk(ids, 0, 1, pages, 150)]) for runner in runners)
    assert (got - expected).abs().max() < 5e-3 and (got - expected).abs().median() < 1e-4
    got, expected = (runner.run([chunk([7], 150, 1, pages, 1)]) for runner in runners)
    assert (got - expected).abs().max() < 5e-3


@pytest.mark.parametrize("c", [CONFIGS["glm-4"], WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[4], FORMS[6]], ids=str)
def test_logits_do_not_depend_on_company_bit_for_bit(isa: str, form: Form, c: GLMConfig) -> None:
    ours, _ = quantised_model(c, form, mixed=True)
    ids = torch.randint(0, 72, (90,), generator=torch.Generator().manual_seed(5)).tolist()
    whole = NativeRunner(ours, 16).run([chunk(ids, 0, 1, [0, 1, 2, 3, 4, 5], 90)])
    pieces, runner, first = [], NativeRunner(ours, 16), 0
    for n in (1, 40, 3, 1, 30, 15):  # cut otherwise, with another sequence beside it
        other = chunk([5] * 6, 0, 1, [15], 6)
        pieces.append(runner.run([chunk(ids[first : first + n], first, 1, [9, 1, 7, 3, 4, 2], n), other])[:n])
        first += n
    assert torch.equal(torch.cat(pieces), whole)


def test_layers_alone_compute_what_unpacked_ones_do() -> None:
    weight = matrix(48, 64, FORMS[0])
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    packed = quantised_linear(weight, True)
    assert isinstance(packed, PackedLinear)
    assert torch.allclose(packed(x), QuantLinear(weight)(x), atol=1e-5)
    table = PackedEmbedding(native.pack(weight), torch.float32)
    assert torch.allclose(table(torch.tensor([[1, 2]])), weight.dequantise()[[1, 2]][None], atol=1e-7)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_logits_do_not_depend_on_threads(isa: str, n_threads: int) -> None:
    before = native.describe()["threads"]
    ours, _ = quantised_model(CONFIGS["glm-4"], FORMS[0], mixed=True)
    ids = torch.randint(0, 72, (300,), generator=torch.Generator().manual_seed(5)).tolist()

    def logits() -> Tensor:
        """Of a context, then of one token more beside the first one of another sequence."""
        runner, pages = NativeRunner(ours, 20), list(range(19))
        context = runner.run([chunk(ids, 0, 1, pages, 300)])
        return torch.cat([context, runner.run([chunk([7], 300, 1, pages, 1), chunk([5], 0, 1, [19], 1)])])

    expected = logits()
    native.set_threads(n_threads)
    try:
        assert native.describe()["threads"] == n_threads
        assert torch.equal(logits(), expected)
    finally:
        native.set_threads(before)
    with pytest.raises(ValueError, match="at least 1"):
        native.set_threads(0)


def test_a_nan_stays_with_its_sequence(isa: str) -> None:
    ours, _ = quantised_model(CONFIGS["glm-4"], FORMS[0], mixed=False)
    ours.embed.weight[5] = float("nan")
    good = chunk([1, 2, 3], 0, 1, [0], 1)
    alone = NativeRunner(ours, 4).run([good])
    runner = NativeRunner(ours, 4)
    both = runner.run([chunk([5, 2, 3, 4], 0, 1, [1], 1), good])
    assert both[0].isnan().all() and torch.equal(both[1], alone[0])
    assert torch.equal(runner.run([chunk([1, 2, 3], 0, 1, [1], 1)]), alone)  # over what it left in its page


@pytest.mark.parametrize("n", [1, 7, 67, 3000])
def test_drawing_equals_its_definition(isa: str, n: int) -> None:
    """Every filter, on peaked, flat and partly impossible rows; numbers on a border may fall to either side."""
    random = torch.Generator().manual_seed(n)
    for scale, top_k, top_p, min_p in ((0.1, 0, 1.0, 0.0), (3.0, 0, 0.8, 0.0), (1.0, 9, 1.0, 0.0), (1.0, 5, 0.7, 0.1),
                                       (9.0, 50, 0.9, 0.0), (2.0, 0, 1.0, 0.2), (0.01, 0, 0.99, 0.0)):  # fmt: skip
        row = torch.randn(n, generator=random) * scale
        row[torch.rand(n, generator=random) < 0.2] = -torch.inf
        row[n // 2] = scale
        assert native.pick(row, 0.0, top_k, top_p, min_p, 0.5) == int(row.argmax())
        for u in torch.rand(12, generator=random, dtype=torch.float64).tolist():
            near = {defined_pick(row, 0.7, top_k, top_p, min_p, u + d) for d in (-2e-5, -1e-6, 0.0, 1e-6, 2e-5)}
            assert native.pick(row, 0.7, top_k, top_p, min_p, u) in near


def defined_pick(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """By the book: sort everything, in float64."""
    values = row.double().numpy()
    weights = np.exp((values - values.max()) / temperature)
    order = np.lexsort((np.arange(len(weights)), -weights))[: top_k or None]
    kept = weights[order]
    keep = (kept.cumsum() - kept < top_p * kept.sum()) if top_p < 1.0 else kept >= 0.0
    order = order[keep & (kept >= min_p)]
    order = order if top_k or top_p < 1.0 else np.sort(order)
    mass = weights[order].cumsum()
    return int(order[min(np.searchsorted(mass, u * mass[-1], side="right"), len(order) - 1)])


def test_the_largest_of_equal_ones_is_the_first(isa: str) -> None:
    row = torch.zeros(2500)
    for ids in ([2499], [2499, 1030], [2499, 1030, 1029], [2499, 1030, 3]):
        row[ids] = 5.0
        assert native.pick(row, 0.0, 0, 1.0, 0.0, 0.5) == min(ids)


def test_a_burst_is_so_many_steps(isa: str) -> None:
    """Greedy and seeded sequences side by side, over borders of pages; one is done with a step of its own."""
    c = CONFIGS["chatglm-6b"]
    model, _ = quantised_model(c, FORMS[0], mixed=True)
    prompts = [[1, 2, 3, 4, 5], [6] * 14]
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.8, top_p=0.9, min_p=0.01)]
    positions = torch.stack([torch.arange(40), torch.arange(40) // 2])
    pages = [[4, 1, 6], [0, 5, 2]]

    def runner() -> tuple[NativeRunner, list[list[int]]]:
        made = NativeRunner(model, 8)
        both = zip(prompts, pages, strict=True)
        rows = made.run([Chunk(ids, 0, positions[:, : len(ids)], p, len(ids)) for ids, p in both])
        return made, [[int(row.argmax())] for row in rows]

    one, answers = runner()
    wanted: list[list[float]] = [[], []]
    samplers = [Sampler(replace(p, seed=2**63 + i), [], 70) for i, p in enumerate(params)]
    for n in range(20):
        both = zip(answers, [len(ids) + n for ids in prompts], pages, strict=True)
        rows = one.run([Chunk(a[-1:], at, positions[:, at : at + 1], p) for a, at, p in both])
        for sampler, row, answer, logprobs in zip(samplers, rows, answers, wanted, strict=True):
            drawn = sampler.draw(row)
            sampler.accept(drawn.token_id)
            answer.append(drawn.token_id)
            logprobs.append(drawn.logprob)
    several, firsts = runner()

    def burst(n: int, n_steps: int, seconds: float = 60.0, stop_ids: list[int] | None = None) -> Burst:
        return several.decode(
            [Decoding(a[n], len(ids) + n, positions, p, s.params, s.seed, n, stop_ids or [])
             for a, ids, p, s in zip(answers, prompts, pages, samplers, strict=True)], 70, n_steps, seconds
        )  # fmt: skip

    assert firsts == [a[:1] for a in answers]
    start, parts = time.perf_counter(), [burst(0, 9), burst(9, 5, 0.0), burst(10, 10)]
    assert [len(part.at) for part in parts] == [9, 1, 10]
    assert [[row[i] for part in parts for row in part.ids] for i in (0, 1)] == [a[1:] for a in answers]
    assert [[row[i] for part in parts for row in part.logprobs] for i in (0, 1)] == wanted
    times = [start, *sum([part.at for part in parts], []), time.perf_counter()]
    assert times == sorted(times)
    stop = answers[1][4]
    last = min(a[1:].index(stop) for a in answers if stop in a[1:])
    assert burst(0, 9, stop_ids=[69, stop]).ids == [[a[1 + n] for a in answers] for n in range(last + 1)]
    several.interrupt()
    assert [len(burst(0, 9).at), len(burst(0, 9).at)] == [1, 9]


def test_a_library_of_other_structures_is_not_used(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Longer(native.LayerStruct):
        _fields_ = [("one_more", ctypes.c_void_p)]

    monkeypatch.setattr(native, "LayerStruct", Longer)
    assert native.library.__wrapped__() is None
    assert "python -m openglm.ops.build" in capsys.readouterr().err


def test_without_the_library_the_same_is_said(tiny_checkpoint: Path) -> None:
    """As on a machine that has no C++ compiler."""
    command = [sys.executable, "-m", "openglm", "generate", str(tiny_checkpoint), "--prompt", "The history of the city"]
    command += ["--temperature", "0", "--max-new-tokens", "6"]
    said = [
        subprocess.run(command, env=os.environ | {"OPENGLM_NATIVE": n}, capture_output=True, text=True, timeout=120)
        for n in ("1", "0")
    ]
    assert [(done.returncode, done.stderr) for done in said] == [(0, ""), (0, "")]
    assert said[0].stdout == said[1].stdout != ""
