"""Layers and models: decoding, mixtures of layers, conversion, the systems that are layers of their own."""

from __future__ import annotations

import copy

import pytest
import torch

import regard
from regard import nn
from regard.nn.mixers import mixer, mixer_names
from regard.zoo.systems.mqa import pool_heads


@pytest.mark.parametrize("mechanism", ["softmax", "softpick", "gla", "deltanet", "hedgehog", "lightning-attention-2", "mqa"])
def test_decoder_generates_what_the_full_pass_predicts(mechanism):
    model = nn.Decoder(mechanism, dim=32, heads=2, layers=2).double().eval()
    prompt = torch.randint(0, 256, (2, 9))
    made = model.generate(prompt, 6)
    assert made.shape == (2, 15)
    with torch.no_grad():
        logits = model(made)
    assert torch.equal(logits[:, 8:-1].argmax(-1), made[:, 9:])


def test_layers_may_differ():
    model = nn.Decoder(["softmax", "cog-attention", "softmax"], layers=3, dim=32, heads=2)
    assert model(torch.randint(0, 256, (1, 7))).shape == (1, 7, 256)
    stack = nn.Decoder(nn.based_mixers(5, 32, 2), layers=5, dim=32).double().eval()
    tokens = torch.randint(0, 256, (1, 20))
    with torch.no_grad():
        whole, (first, states) = stack(tokens), stack.step(tokens[:, :7])
        rest = [first]
        for t in range(7, 20):
            out, states = stack.step(tokens[:, t : t + 1], states)
            rest.append(out)
    assert torch.allclose(torch.cat(rest, 1), whole, atol=1e-9)
    with pytest.raises(regard.RegardError, match="expected layers=2"):
        nn.Decoder(["softmax"], layers=2)


def test_multi_head_to_grouped_conversion():
    full, shared = nn.Attention(16, 4), nn.Attention(16, 4, kv_heads=2)
    with torch.no_grad():
        for name in ("q", "out"):
            getattr(shared, name).weight.copy_(getattr(full, name).weight)
        for name in ("k", "v"):
            getattr(shared, name).weight.copy_(pool_heads(getattr(full, name).weight, 4, 2))
    assert shared.k.weight.shape == (8, 16) and shared(torch.randn(1, 5, 16)).shape == (1, 5, 16)


def test_cross_attention():
    layer = nn.Attention(16, 2, "softpick", causal=False)
    assert layer(torch.randn(2, 5, 16), context=torch.randn(2, 9, 16)).shape == (2, 5, 16)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"pool": True}, {"conv": True}])
def test_soft_layer(options):
    layer = nn.SoftmaxFreeAttention(16, 2, (6, 4), **options)
    layer(torch.randn(2, 24, 16)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_agent_layer_on_odd_grids():
    for cls in (False, True):
        layer = nn.AgentAttention(16, 2, (5, 9), agents=9, cls=cls)
        layer(torch.randn(2, 45 + cls, 16)).sum().backward()
        assert all(p.grad is not None for name, p in layer.named_parameters() if cls or "cls" not in name)


def test_idw_classifier_learns_moons_and_can_be_patched():
    from sklearn.datasets import make_moons

    torch.manual_seed(0)
    x, y = make_moons(400, noise=0.1, random_state=0)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    model = nn.IDWClassifier(2, 32, 2)
    model.start_from(x[:200])
    optimizer = torch.optim.Adam(model.parameters(), 0.05, amsgrad=True)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[:200]), y[:200]).backward()
        optimizer.step()
    before = float((model(x[200:]).argmax(-1) == y[200:]).float().mean())
    assert before >= 0.97
    far = torch.tensor([4.0, 4.0])
    wrong = 1 - int(model(far[None]).argmax())
    model.augment(far, wrong)
    assert int(model(far[None]).argmax()) == wrong
    assert abs(float((model(x[200:]).argmax(-1) == y[200:]).float().mean()) - before) <= 0.01


def test_routing_layer_trains_and_moves_its_centroids():
    layer = nn.RoutingAttention(16, 4, 3, window=8)
    before = layer.centroids.clone()
    y, loss = layer(torch.randn(2, 20, 16))
    (y.square().mean() + loss).backward()
    assert all(p.grad is not None for p in layer.parameters()) and not torch.equal(layer.centroids, before)


@pytest.mark.parametrize("name", ["softmax", "gla", "ssmax", "lssar"])
def test_layers_are_made_where_and_as_asked(name):
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    plain = nn.Attention(16, 2, name)
    torch.manual_seed(0)
    wide = nn.Attention(16, 2, name, dtype=torch.float64)
    assert {x.dtype for x in wide.parameters()} == {torch.float64} and torch.get_default_dtype() == before
    assert wide.state_dict().keys() == plain.state_dict().keys() and wide(torch.randn(1, 5, 16).double()).dtype == torch.float64
    for layer in (nn.Attention(16, 2, name, device="meta"), nn.Decoder(name, dim=16, heads=2, device="meta")):
        assert {x.device.type for x in layer.parameters()} == {"meta"}
    with pytest.raises(regard.RegardError, match="floating dtype"):
        nn.Attention(16, 2, name, dtype=torch.int64)
    assert torch.get_default_dtype() == before


@pytest.mark.parametrize("name", mixer_names())
def test_every_layer_of_its_own_trains_in_a_decoder(name):
    """A layer that gives a cost beside its output leaves it in its block; copies carry none."""
    torch.manual_seed(0)
    length = 140  # beyond the chunks of those that carry something from one to the next
    layer = mixer(name, 16, 2, **({"length": length} if name == "super-attention" else {}))
    model = nn.Decoder([layer], dim=16, layers=1, vocab=11).train()
    logits = model(torch.randint(11, (2, length)))
    cost = model.blocks[0].cost
    assert logits.shape == (2, length, 11) and (cost is not None) == (name == "nats")
    (logits.square().mean() + (0 if cost is None else cost)).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters() if x.requires_grad)
    assert copy.deepcopy(model).blocks[0].cost is None
