"""The model around MiniMax-01's layers: its shapes, residual factors, probabilities in float32, and what is not to be served."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from regard import RegardError
from regard.lab.checks.shared.minimax import small
from regard.zoo.linear.minimax_01 import (
    Experts,
    MiniMaxBlock,
    MiniMaxConfig,
    MiniMaxLike,
    lasp_plus,
    lightning_packed,
    local_state,
    prefix_state,
)


def test_the_default_model_has_the_shapes_of_its_config() -> None:
    with torch.device("meta"):
        model = MiniMaxLike(MiniMaxConfig(layers=9, kv_heads=2, patch_dim=5))
    assert model.config.layer_types == ("lightning",) * 7 + ("softmax", "lightning")
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert found["embed.weight"] == found["head.weight"] == (256, 64) and found["norm.weight"] == (64,)
    assert [found[f"vision.{at}.weight"] for at in (0, 2)] == [(64, 5), (64, 64)]
    assert found["blocks.7.mixer.k.weight"] == found["blocks.7.mixer.v.weight"] == (32, 64)
    assert found["blocks.8.mixer.k.weight"] == found["blocks.8.mixer.gate.weight"] == (64, 64)
    assert found["blocks.0.mlp.router.weight"] == (4, 64) and "blocks.0.mlp.experts.3.gate.weight" in found
    assert found["blocks.0.mlp.experts.0.gate.weight"] == found["blocks.0.mlp.experts.0.up.weight"] == (96, 64)
    assert "blocks.7.mixer.gate.weight" not in found and not any(name.endswith("bias") and "vision" not in name for name in found)


@pytest.mark.parametrize(("layer", "factors"), [(0, (2.0, 0.2)), (3, (1.0, 0.1))])
def test_each_kind_of_layer_takes_its_own_residual_factors(layer: int, factors: tuple[float, float]) -> None:
    config = MiniMaxConfig(layers=4, period=4, alpha=(1.0, 2.0, 3.0), beta=(0.1, 0.2, 0.3), experts=1)
    assert MiniMaxBlock(config, layer).factors == (factors, (3.0, 0.3))


def test_probabilities_are_in_float32() -> None:
    model = small(experts=1)
    tokens = torch.randint(30, (1, 5))
    assert model(tokens).dtype == torch.float64
    half = model.bfloat16()
    logits = half(tokens)
    assert logits.dtype == torch.float32 and bool((logits != logits.bfloat16().float()).any())
    first, states = half.step(tokens)
    assert first.dtype == torch.float32 and len(states) == 4


def test_images_in_a_stream_stand_before_the_text() -> None:
    model = small(patch_dim=6, experts=1)
    tokens, patches = torch.randint(30, (2, 6)), torch.randn(2, 3, 6, dtype=torch.float64)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1, :2] = False
    whole = model(tokens, patches, keep)
    first, states = model.step(tokens[:, :4], None, patches, keep[:, :7])
    last, _ = model.step(tokens[:, 4:], states, keep=keep)
    assert whole.shape == (2, 9, 30)
    torch.testing.assert_close(torch.cat((first, last), 1)[keep], whole[keep])
    with pytest.raises(RegardError, match="patch_dim"):
        small()(tokens, patches)


def test_the_balance_of_a_model_is_the_mean_of_its_layers() -> None:
    model = small(experts=3)
    model(torch.randint(30, (2, 7)))
    each = [block.mlp.balance for block in model.blocks]  # type: ignore[union-attr]
    torch.testing.assert_close(model.balance, sum(each) / 4)  # type: ignore[arg-type]
    bare = small(experts=1)
    bare(torch.randint(30, (2, 7)))
    assert float(bare.balance) == 0


def test_the_least_room_is_one_token_and_unchosen_experts_are_free() -> None:
    torch.manual_seed(0)
    layer, x = Experts(8, 12, 3, 1, capacity=1e-3).double(), torch.randn(5, 8, dtype=torch.float64)
    best = (x @ layer.router.weight.T).argmax(-1)
    want = torch.zeros_like(x)
    for e in range(3):
        at = (best == e).nonzero()[:1, 0]
        want[at] = layer.experts[e](x[at])
    torch.testing.assert_close(layer(x), want)
    for top_k in (0, 4):
        with pytest.raises(RegardError, match=r"1 \.\. experts=3"):
            Experts(8, 12, 3, top_k)


@pytest.mark.parametrize("experts", [1, 2])
def test_cost_counts_one_mlp_and_no_more_experts_than_there_are(experts: int) -> None:
    config = MiniMaxConfig(dim=32, layers=1, heads=4, period=8, hidden=24, experts=experts, top_k=2)
    flops, state = MiniMaxLike(config).cost(1000)
    assert flops == 2 * (experts * 3 * 32 * 24 + 5 * 32 * 32) + 4 * 32 * 8 and state == 4 * 32 * 8
    assert MiniMaxLike(dataclasses.replace(config, layers=2)).cost(7) == (2 * flops, 2 * state)


def test_lasp_sends_states_alone() -> None:
    torch.manual_seed(0)
    slope = torch.tensor([0.1, 0.5], dtype=torch.float64)
    lengths = (4, 1, 6)
    shards = [tuple(torch.randn(2, 2, n, d, dtype=torch.float64) for d in (3, 3, 5)) for n in lengths]
    _, moved = lasp_plus(shards, slope)  # type: ignore[arg-type]
    assert moved == 2 * (2 * 2 * 3 * 5) * 8  # from two others, doubles
    states = [local_state(k, v, slope) for _, k, v in shards]
    for rank in range(3):
        want = torch.zeros(2, 2, 3, 5, dtype=torch.float64)
        for u in range(rank):
            k, v = shards[u][1:]
            for t in range(lengths[u]):
                behind = sum(lengths[u + 1 : rank]) + lengths[u] - 1 - t
                want += torch.exp(-slope * behind)[:, None, None] * k[:, :, t, :, None] * v[:, :, t, None]
        torch.testing.assert_close(prefix_state(states, lengths, rank, slope), want)
    with pytest.raises(RegardError, match="no shards"):
        lasp_plus([], slope)


@pytest.mark.parametrize("edges", [[0, 3, 7], [1, 3, 8], [0, 3, 3, 8], [0, 5, 3, 8], [[0, 8]]], ids=str)
def test_edges_that_are_none(edges: list[int]) -> None:
    q = torch.randn(1, 2, 8, 4)
    with pytest.raises(RegardError, match="from 0 to the length 8"):
        lightning_packed(q, q, q, torch.tensor([0.1, 0.2]), torch.tensor(edges))
    with pytest.raises(RegardError, match="a batch of 1"):
        lightning_packed(*[q.expand(2, -1, -1, -1)] * 3, torch.tensor([0.1, 0.2]), torch.tensor([0, 8]))


def test_embeddings_start_small() -> None:
    torch.manual_seed(0)
    model = MiniMaxLike()
    assert float(model.embed.weight.std()) == pytest.approx(0.02, rel=0.05) and isinstance(model.norm, nn.RMSNorm)
    assert {norm.eps for norm in model.modules() if isinstance(norm, nn.RMSNorm)} == {1e-6}
