"""The Transformer's own properties: counts, cache, masks, initialisation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from openglm.config import GLMConfig, RopeConfig, from_dict
from openglm.model.batch import ForwardBatch, prompt_layout
from openglm.model.cache import KVCache
from openglm.model.cost import n_parameters
from openglm.model.init import init_weights
from openglm.model.transformer import Transformer
from openglm.ops.attention import attention, attention_reference, visible
from openglm.ops.loss import linear_cross_entropy, linear_cross_entropy_reference
from openglm.presets import PRESETS, parse_preset, preset

SPECIAL = {"[MASK]": 90, "[gMASK]": 91, "<sop>": 92}
TINY = GLMConfig(vocab_size=97, dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=40, max_seq_len=64)
VARIANTS = {
    "causal": TINY,
    "partial": dataclasses.replace(TINY, rope=RopeConfig(fraction=0.5), sandwich=True),
    "prefix-1d": dataclasses.replace(TINY, mask="prefix", norm="layer", residual="normed", residual_alpha=6**0.5,
                                     mlp="geglu", linear_bias=True),
    "prefix-2d": dataclasses.replace(TINY, mask="prefix", rope=RopeConfig(axes=2), mlp="gelu", tie_embeddings=True),
}  # fmt: skip


def make(config: GLMConfig) -> Transformer:
    model = init_weights(Transformer(config), seed=3, std=0.2)
    return model.requires_grad_(False)


def hidden(model: Transformer, ids: list[int]) -> torch.Tensor:
    layout = prompt_layout(ids, model.config, SPECIAL)
    context = layout.context(len(ids))[None] if layout.n_context else None
    batch = ForwardBatch(torch.tensor([ids]), layout.positions(0, len(ids))[:, None], context=context)
    return model(batch)[0]


PROMPT = [5, 17, 90, 33, 8, 92, 41, 12, 77]


@pytest.mark.parametrize(
    ("name", "count"),
    [("chatglm-6b", 6_173_286_400), ("chatglm2-6b", 6_243_584_000), ("chatglm3-6b", 6_243_584_000),
     ("codegeex2-6b", 6_243_584_000), ("glm-4-9b", 9_399_951_360), ("codegeex4-9b", 9_399_951_360)],
)  # fmt: skip
def test_published_parameter_counts(name: str, count: int) -> None:
    model = Transformer(preset(name), device="meta")
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", list(PRESETS))
def test_cost_agrees_with_the_built_model(name: str) -> None:
    model = Transformer(PRESETS[name], device="meta")
    assert n_parameters(PRESETS[name]) == sum(p.numel() for p in model.parameters())
    assert from_dict(PRESETS[name].to_dict()) == PRESETS[name]


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_cached_decoding_equals_full_recomputation(variant: str) -> None:
    model = make(VARIANTS[variant])
    full = hidden(model, PROMPT)
    layout = prompt_layout(PROMPT, model.config, SPECIAL)
    cache = KVCache(model.config, 1, len(PROMPT))
    cuts = [0, 6, 7, len(PROMPT)]  # the whole prompt with <sop>, one token, then two at once
    for start, stop in zip(cuts, cuts[1:], strict=False):
        context = layout.context(stop)[None] if start == 0 and layout.n_context else None
        ids = torch.tensor([PROMPT[start:stop]])
        part = model(ForwardBatch(ids, layout.positions(start, stop)[:, None], context=context), cache)[0]
        torch.testing.assert_close(part, full[start:stop], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_who_sees_whom(variant: str) -> None:
    """Prefix: changing the last prompt token changes the first token's state. Causal: it does not."""
    model = make(VARIANTS[variant])
    last = PROMPT.index(92) - 1
    changed = PROMPT[:last] + [60] + PROMPT[last + 1 :]
    first, other = hidden(model, PROMPT)[0], hidden(model, changed)[0]
    assert torch.equal(first, other) == (model.config.mask == "causal")
    later = hidden(model, PROMPT[:-1] + [60])
    assert torch.equal(hidden(model, PROMPT)[:-1], later[:-1])  # what follows <sop> is hidden from all before it


def test_packed_segments_do_not_see_each_other() -> None:
    model = make(VARIANTS["prefix-2d"])
    a, b = [5, 17, 90, 92, 41], [33, 90, 8, 92, 12, 77, 3]
    parts = [prompt_layout(ids, model.config, SPECIAL) for ids in (a, b)]
    batch = ForwardBatch(
        torch.tensor([a + b + [0, 0]]),
        torch.cat([parts[0].positions(0, len(a)), parts[1].positions(0, len(b)), torch.zeros(2, 2).long()], 1)[:, None],
        torch.tensor([[0] * len(a) + [1] * len(b) + [-1] * 2]),
        torch.cat([parts[0].context(len(a)), parts[1].context(len(b)), torch.zeros(2).bool()])[None],
    )
    packed = model(batch)[0]
    torch.testing.assert_close(packed[: len(a)], hidden(model, a), rtol=0, atol=1e-5)
    torch.testing.assert_close(packed[len(a) : -2], hidden(model, b), rtol=0, atol=1e-5)
    assert packed.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_its_reference(masked: bool, dtype: torch.dtype) -> None:
    """Both fast paths (fused, and unfused for bf16 training), values and gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 24, 16, generator=generator).to(dtype).requires_grad_() for h in (6, 2, 2))
    mask = None
    if masked:
        segments = torch.arange(24).ge(10).long().expand(2, 24)
        context = torch.arange(24).lt(5).expand(2, 24)
        seen = visible(24, 0, segments, context)
        assert seen is not None
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    outputs = []
    for f in (attention, attention_reference):
        out = f(q, k, v, mask)
        outputs.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for ours, reference in zip(*outputs, strict=True):
        error = (ours.double() - reference.double()).norm() / reference.double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_linear_cross_entropy_equals_the_plain_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 24, generator=generator, requires_grad=True)
    weight = torch.randn(101, 24, generator=generator, requires_grad=True)
    targets = torch.randint(0, 101, (37,), generator=generator)
    weights = torch.rand(37, generator=generator)
    results = []
    for f in (linear_cross_entropy, linear_cross_entropy_reference):
        total, losses = f(hidden, weight, targets, weights, 10)
        results.append([total, losses, *torch.autograd.grad(total * 0.5, (hidden, weight))])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_deepnorm_initialisation() -> None:
    config = dataclasses.replace(VARIANTS["prefix-1d"], dim=256, n_heads=16, n_kv_heads=16, n_layers=8)
    model = init_weights(Transformer(config), seed=0, scheme="deepnorm")
    attention = model.layers[0].attn
    n = config.n_heads * config.head_dim
    xavier = (2 / (256 + 2 * n)) ** 0.5, (2 / (256 + n)) ** 0.5
    gain = (2 * 8) ** -0.5
    assert attention.qkv.weight[: 2 * n].std().item() == pytest.approx(xavier[1] * (n / n), rel=0.2)
    ratio = attention.qkv.weight[2 * n :].std() / attention.out.weight.std()
    assert ratio.item() == pytest.approx(1.0, rel=0.1)  # V and the output projection share gain and shape
    assert attention.out.weight.std().item() == pytest.approx(gain * xavier[1], rel=0.05)
    again = init_weights(Transformer(config), seed=0, scheme="deepnorm")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"n_kv_heads": 3}, "multiple of n_kv_heads"), ({"norm": "batch"}, "norm must be one of"),
     ({"dim": 0}, "positive integer"), ({"residual_alpha": 2.0}, "DeepNorm"),
     ({"n_layer": 2}, "did you mean 'n_layers'"),
     ({"rope": {"axes": 2}}, "mask='prefix'"), ({"rope": {"thta": 2}}, "did you mean 'theta'")],
)  # fmt: skip
def test_bad_configs(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        from_dict({**TINY.to_dict(), **values})


def test_preset_references() -> None:
    assert parse_preset("glm-4-9b?n_layers=4&norm_eps=1e-6").n_layers == 4
    assert parse_preset("glm-edge-1.5b?tie_embeddings=false&sandwich=true").sandwich
    with pytest.raises(ValueError, match="did you mean 'glm-4-9b"):
        preset("glm4-9b")
    with pytest.raises(ValueError, match="did you mean 'n_layers'"):
        parse_preset("glm-4-9b?n_layer=4")
