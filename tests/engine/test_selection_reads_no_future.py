"""Under causality no output reads a later token: not in what selects under a causal mask, and not in the layers that select."""

from __future__ import annotations

import pytest
import torch
from samples import SMALL

import regard
from regard import Causal, RegardError, Window
from regard.zoo.sparse.dma import DynamicMaskAttention
from regard.zoo.sparse.landmark_attention import LandmarkAttention

LENGTH = 45
POLICIES = [
    "dhsa",
    "flexprefill",
    "hip",
    "proxyattn",
    "spargeattn",
    "delta-attention",
    "pbs-attn",
    "sampleattention",
    "hyperattention",
    "psa",
]
CHOOSE_BY_THE_PAST = ["moba", "powerattention", "sparse-transformer"]


def made(name):
    return regard.get(name, **SMALL.get(name, {}), **({"causal": True} if name in ("psa", "spargeattn") else {}))


def tensors():
    torch.manual_seed(0)
    return tuple(torch.randn(1, 2, LENGTH, 8, dtype=torch.float64) for _ in range(3))


@pytest.mark.parametrize("name", [*POLICIES, *CHOOSE_BY_THE_PAST])
def test_no_value_of_a_later_token(name):
    """Policies choose by looking at a whole prompt, by q and k; what is read never lies ahead, whatever is chosen: values show it."""
    q, k, v = tensors()
    base, read = regard.attend(q, k, v, made(name), mask=Causal()), []
    for j in range(0, LENGTH, 4):
        changed = v.clone()
        changed[:, :, j] += 100
        out = regard.attend(q, k, changed, made(name), mask=Causal())
        assert torch.allclose(out[:, :, :j], base[:, :, :j], atol=1e-12), j
        read.append(not torch.allclose(out[:, :, j:], base[:, :, j:], atol=1e-3))
    assert sum(read) > len(read) / 2  # what is changed is read by some query, mostly


@pytest.mark.parametrize("name", CHOOSE_BY_THE_PAST)
@pytest.mark.parametrize("mask", [None, Causal(), Causal() & Window(9)], ids=repr)
def test_no_later_token_at_all(name, mask):
    q, k, v = tensors()
    base = regard.attend(q, k, v, made(name), mask=mask)
    for j in range(1, LENGTH, 4):
        parts = [x.clone() for x in (q, k, v)]
        for x in parts:
            x[:, :, j] += 10
        assert torch.allclose(regard.attend(*parts, made(name), mask=mask)[:, :, :j], base[:, :, :j], atol=1e-12), j


@pytest.mark.parametrize("tail", ["counted", "repeated"])
def test_pooled_keys_are_read_from_their_last_member_on(tail):
    """PSA at given levels, against loops: also where the diagonal's block is pooled, and where the length is ragged."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 1, 21, 4, dtype=torch.float64) for _ in range(3))
    levels = torch.tensor([1, 2, 4, 8])[torch.randint(4, (1, 1, 3, 3))].tril()
    out = regard.attend(q, k, v, regard.get("psa", block_size=8, causal=True, tail=tail), levels=levels, mask=Causal())
    for i in range(21):
        scores, values = [], []
        for w in range(3):
            level = int(levels[0, 0, i // 8, w])
            for start in range(8 * w, 8 * w + 8, level) if level else ():
                members = [min(j, 20) for j in range(start, start + level)] if tail == "repeated" and level > 1 else []
                members = members or [j for j in range(start, start + level) if j < 21]
                if members and max(members) <= i:
                    scores.append(q[0, 0, i] @ k[0, 0, members].mean(0) / 2 + torch.tensor(float(len(members))).log())
                    values.append(v[0, 0, members].mean(0))
        wanted = torch.stack(scores).softmax(0) @ torch.stack(values) if scores else torch.zeros(4, dtype=torch.float64)
        assert torch.allclose(out[0, 0, i], wanted, atol=1e-7), i


LAYERS = {
    "ssa": lambda: regard.nn.SSAAttention(16, 2, block_size=8, top_k=2),
    "landmark": lambda: LandmarkAttention(16, 2, block=7),
    "dma": lambda: DynamicMaskAttention(16, 2, window=6),
    "dma, blocks": lambda: DynamicMaskAttention(16, 2, window=6, smooth=4),
    "dma, positive": lambda: DynamicMaskAttention(16, 2, mask="relu"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_read_no_later_token(name):
    torch.manual_seed(0)
    layer = LAYERS[name]().double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, LENGTH, 16, dtype=torch.float64)
    with torch.no_grad():
        base = layer(x)
        for j in range(1, LENGTH, 3):
            changed = x.clone()
            changed[:, j] += 3
            assert torch.allclose(layer(changed)[:, :j], base[:, :j], atol=1e-13), j


def test_masks_reach_both_streams_of_ssa():
    layer = LAYERS["ssa"]().double().train()
    x = torch.randn(1, 24, 16, dtype=torch.float64)
    ids = (torch.arange(24) // 11)[None]
    parts = [layer(x[:, a:b]) for a, b in ((0, 11), (11, 22), (22, 24))]
    assert torch.allclose(layer(x, mask=regard.Segments(), segments=ids), torch.cat(parts, 1), atol=1e-12)
    with pytest.raises(RegardError, match="context"):
        layer(x, x)


def test_blocks_kept_together_cannot_be_decoded():
    with pytest.raises(RegardError, match="smooth"):
        LAYERS["dma, blocks"]().step(torch.randn(1, 1, 16))
