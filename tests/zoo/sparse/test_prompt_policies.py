"""What every policy over blocks promises: a scale is a factor on the queries, queries after others read everything, and costs are counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.algebra.part import Sizes
from regard.zoo.sparse.seerattention import SeerAttention
from regard.zoo.sparse.ssa import SSAAttention

SMALL: dict[str, dict[str, Any]] = {
    "delta-attention": {"sparse": regard.get("moba", block_size=8, top_k=2), "stride": 4},
    "dhsa": {"budget": 24, "block_size": 8, "local": 8, "chunk": 4},
    "draftattention": {"grid": (2, 8, 8), "pool": (4, 4)},
    "flexprefill": {"gamma": 0.6, "block_size": 8, "min_budget": 8, "count_size": 8},
    "hip": {"mask_k": 16, "block_q": 8, "sinks": 2, "window": 4},
    "hyperattention": {"block_size": 16, "samples": 8, "min_length": 32},
    "moba": {"block_size": 8, "top_k": 2},
    "nabla": {"grid": (2, 8, 8), "patch": 4, "thr": 0.4},
    "neighborhood": {"shape": (128,), "kernel": 5},
    "pbs-attn": {"threshold": 0.4, "block_size": 8, "segment": 16},
    "powerattention": {"block_size": 8, "window_blocks": 1},
    "proxyattn": {"gamma": 0.5, "block_size": 8, "stride": 2},
    "psa": {"block_size": 16, "sample": 8},
    "sampleattention": {"alpha": 0.6},
    "spargeattn": {"theta": -1.0, "tau": 0.4, "block_q": 8, "block_k": 8},
    "sparse-transformer": {"stride": 8, "count": 2},
    "vmoba": {"grid": (2, 8, 8), "tile": (1, 4, 4), "layer": 2},
}
CAUSAL = {
    "delta-attention",
    "dhsa",
    "flexprefill",
    "hip",
    "moba",
    "pbs-attn",
    "powerattention",
    "proxyattn",
    "sampleattention",
    "sparse-transformer",
}
LONG = {"delta-attention": 200}  # its last 128 rows are dense
# Prompts this short are read whole.
SHORT = {"delta-attention": 100, "flexprefill": 16, "hip": 16, "hyperattention": 30, "pbs-attn": 16}


def inputs(length: int, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2))
    return 2 * q[:, :, length - (queries or length) :], k, v


@pytest.mark.parametrize("slug", SMALL)
def test_a_scale_is_a_factor_on_the_queries(slug: str) -> None:
    mechanism = regard.get(slug, **SMALL[slug])
    for length in (LONG.get(slug, 128), *([SHORT[slug]] if slug in SHORT else [])):
        q, k, v = inputs(length)
        mask = regard.Causal() if slug in CAUSAL else None
        scaled = regard.attend(q, k, v, mechanism, mask=mask, scale=0.9)
        torch.testing.assert_close(scaled, regard.attend(q * 0.9 * math.sqrt(8), k, v, mechanism, mask=mask))
        default = regard.attend(q, k, v, mechanism, mask=mask)
        torch.testing.assert_close(default, regard.attend(q, k, v, mechanism, mask=mask, scale=8**-0.5))
        assert float((default - scaled).abs().max()) > 1e-3


@pytest.mark.parametrize("slug", SMALL)
def test_the_choice_leaves_something_out(slug: str) -> None:
    """Else the other tests say nothing; and prompts this short leave out nothing."""
    mechanism, mask = regard.get(slug, **SMALL[slug]), regard.Causal() if slug in CAUSAL else None
    x = inputs(LONG.get(slug, 128))
    assert float((regard.attend(*x, mechanism, mask=mask) - regard.attend(*x, mask=mask)).abs().max()) > 1e-3
    if slug in SHORT:
        x = inputs(SHORT[slug])
        torch.testing.assert_close(regard.attend(*x, mechanism, mask=mask), regard.attend(*x, mask=mask))


@pytest.mark.parametrize("slug", ["flexprefill", "proxyattn", "sampleattention", "dhsa", "spargeattn"])
def test_prompts_after_others(slug: str) -> None:
    """A single query reads everything, and so do chunks of fewer queries than keys where the row says so."""
    settings = {**SMALL[slug], **({"decode": False} if slug == "dhsa" else {"causal": True} if slug == "spargeattn" else {})}
    mechanism = regard.get(slug, **settings)
    for count in (1, 20) if slug in ("flexprefill", "proxyattn", "sampleattention") else (1,):
        x = inputs(128, count)
        torch.testing.assert_close(regard.attend(*x, mechanism, mask=regard.Causal()), regard.attend(*x, mask=regard.Causal()))


def test_delta_attention_of_a_chunk() -> None:
    """Queries at the end of more keys: dense rows of their own places."""
    q, k, v = inputs(300, 260)
    mechanism = regard.get("moba", block_size=16, top_k=2)
    s, dense = (regard.attend(q, k, v, m, mask=regard.Causal()) for m in (mechanism, "softmax"))
    head = 260 - (260 % 32 + 128)
    rows = {
        "delta": [dense[:, :, i] if i >= head else s[:, :, i] + (dense - s)[:, :, i // 32 * 32] for i in range(260)],
        "recompute": [dense[:, :, i] if i >= head or i % 32 == 0 else s[:, :, i] for i in range(260)],
        "sparse-only": list(s.unbind(2)),
    }
    for mode, truth in rows.items():
        out = regard.attend(q, k, v, regard.get("delta-attention", sparse=mechanism, stride=32, mode=mode), mask=regard.Causal())
        torch.testing.assert_close(out, torch.stack(truth, 2))
    # a stride above 128: one more stride of rows is dense
    q, k, v = inputs(700)
    s, dense = (regard.attend(q, k, v, m, mask=regard.Causal()) for m in (mechanism, "softmax"))
    out = regard.attend(q, k, v, regard.get("delta-attention", sparse=mechanism, stride=200), mask=regard.Causal())
    head = 700 - (700 % 200 + 200)
    torch.testing.assert_close(out[:, :, head:], dense[:, :, head:])
    torch.testing.assert_close(out[:, :, head - 1], (s[:, :, head - 1] + (dense - s)[:, :, (head - 1) // 200 * 200]))


def test_delta_attention_streams_by_default() -> None:
    """4 first keys and a window of 2048: what the last of 2200 queries reads."""
    v = torch.eye(2200, dtype=torch.float32)[None, None]
    q = k = torch.zeros(1, 1, 2200, 8)
    mechanism = regard.get("delta-attention", mode="sparse-only")
    read = regard.attend(q, k, v, mechanism, mask=regard.Causal())[0, 0, -1].nonzero().flatten().tolist()
    assert read == [*range(4), *range(2200 - 2048, 2200)]


SIZES = Sizes(2, 4, 2, 300, 300, 16, 16)
COSTS: dict[str, tuple[dict[str, Any], float]] = {
    "flexprefill": ({"block_size": 20}, 2 * 2 * 4 * 16 * (20 * 300 + 15 * 15)),
    "hip": ({"mask_k": 64}, 2 * 2 * 4 * 16 * 150 * 2 * 64 * 3),
    "proxyattn": ({"block_size": 32, "stride": 4, "groups": 2}, 2 * 2 * 16 * (2 * 75 * 75 + 4 * 32 * 300)),
    "spargeattn": ({"block_q": 20, "block_k": 10}, 2 * 2 * 4 * 16 * 15 * 30),
    "moba": ({"block_size": 20}, 2 * 2 * 4 * 16 * 300 * 15),
}


@pytest.mark.parametrize("slug", COSTS)
def test_what_a_plan_says_the_choice_costs(slug: str) -> None:
    settings, cost = COSTS[slug]
    assert regard.get(slug, **settings).select.flops(SIZES) == cost


@pytest.mark.parametrize("slug", ["dhsa", "flexprefill", "proxyattn", "spargeattn"])
def test_a_single_query_that_reads_everything_chooses_at_no_cost(slug: str) -> None:
    mechanism = regard.get(slug, **SMALL[slug], **({"decode": False} if slug == "dhsa" else {}))
    assert mechanism.select.flops(Sizes(1, 4, 2, 1, 300, 16, 16)) == 0 < mechanism.select.flops(Sizes(1, 4, 2, 300, 300, 16, 16))


@pytest.mark.parametrize("slug", ["dhsa", "flexprefill", "proxyattn", "spargeattn"])
def test_choices_that_look_ahead_say_so(slug: str) -> None:
    mechanism = regard.get(slug, **SMALL[slug])
    assert mechanism.select.looks_ahead
    assert not regard.get("moba").select.looks_ahead


@pytest.mark.parametrize("slug", ["dhsa", "flexprefill", "hip", "proxyattn", "spargeattn"])
def test_each_prompt_of_a_padded_batch_chooses_alone(slug: str) -> None:
    """Padding in front of one prompt: its rows are those of a call of its own."""
    q, k, v = inputs(128)
    mechanism = regard.get(slug, **SMALL[slug])
    real = torch.arange(128) >= torch.tensor([[0], [32]])
    padded = regard.attend(q, k, v, mechanism, mask=regard.Causal() & regard.Padding(), keep=real)
    alone = regard.attend(q[1:, :, 32:], k[1:, :, 32:], v[1:, :, 32:], mechanism, mask=regard.Causal())
    torch.testing.assert_close(padded[1:, :, 32:], alone)


@pytest.mark.parametrize("training", [False, True])
def test_each_text_of_a_padded_batch_chooses_alone_in_ssa(training: bool) -> None:
    torch.manual_seed(0)
    layer = SSAAttention(16, 4, 2, block_size=4, top_k=2, rope=False).double().train(training)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    real = torch.arange(30) >= torch.tensor([[0], [7]])
    padded = layer(x, mask=regard.Padding(), keep=real)
    torch.testing.assert_close(padded[1:, 7:], layer(x[1:, 7:]))
    if training:  # both streams stay causal
        streams = layer.streams(*layer.heads_of(x, x, 0, None)[:3])
        changed = x.clone()
        changed[:, 20:] += 1
        for name, out in layer.streams(*layer.heads_of(changed, changed, 0, None)[:3]).items():
            torch.testing.assert_close(out[:, :, :20], streams[name][:, :, :20])


def test_seerattention_of_one_token_reads_it() -> None:
    q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
    for options in ({"threshold": 1.0}, {"ratio": 0.1}):
        torch.testing.assert_close(SeerAttention(4, 2, 8, width=8, block_size=4, **options)(q, k, v), v.repeat_interleave(2, 1))


@pytest.mark.parametrize("slug", ["hyperattention", "psa"])
def test_draws_come_from_the_seed_alone(slug: str) -> None:
    x = inputs(128)
    settings = {**SMALL[slug], **({"sample": 4} if slug == "psa" else {})}
    found = []
    for torch_seed, seed in ((0, 0), (5, 0), (0, 1)):
        torch.manual_seed(torch_seed)
        found.append(regard.attend(*x, regard.get(slug, **settings, seed=seed)))
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_psa_is_causal_only_where_it_is_made_so() -> None:
    x = inputs(128)
    with pytest.raises(regard.RegardError):
        regard.attend(*x, regard.get("psa", **SMALL["psa"]), mask=regard.Causal())
    past = regard.get("psa", **SMALL["psa"], causal=True)
    assert torch.equal(regard.attend(*x, past), regard.attend(*x, past, mask=regard.Causal()))
    changed = [y.clone() for y in x]
    changed[2][:, :, 100:] += 1
    torch.testing.assert_close(regard.attend(*changed, past)[:, :, :100], regard.attend(*x, past)[:, :, :100])


@pytest.mark.parametrize("scope", ["query_head", "head_global", "overall", "block"])
def test_vmoba_of_equal_scores_reads_everything(scope: str) -> None:
    """No block has a share, so no number of them lifts what is kept to the threshold."""
    q, k, v = inputs(128)
    out = regard.attend(torch.zeros_like(q), k, v, regard.get("vmoba", **SMALL["vmoba"], scope=scope))
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v).repeat_interleave(2, 1))


@pytest.mark.parametrize("every_row", [False, True])
def test_draftattention_leaves_a_head_s_best_entry(every_row: bool) -> None:
    q, k, v = inputs(64)
    mechanism = regard.get("draftattention", grid=(1, 8, 8), pool=(4, 4), sparsity=1.0, every_row=every_row)
    at = torch.arange(64).view(2, 4, 2, 4).permute(0, 2, 1, 3).flatten()  # patch by patch
    means = [x[:, :, at].unflatten(2, (4, 16)).mean(3) for x in (q, k.repeat_interleave(2, 1))]
    chart = (means[0] @ means[1].mT / 8**0.5).softmax(-1)
    keep = chart == (chart.amax(-1, keepdim=True) if every_row else chart.amax((-1, -2), keepdim=True))
    place = at.argsort() // 16
    seen = keep[:, :, place][..., place]
    assert int(keep.sum()) == 2 * 4 * (4 if every_row else 1)
    truth = torch.where(seen.any(-1, keepdim=True), regard.attend(q, k, v, mask=seen), 0.0)
    torch.testing.assert_close(regard.attend(q, k, v, mechanism), truth)
