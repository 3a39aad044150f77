"""Centroids that follow causal layers and queries alone, and the layer's heads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from regard.zoo.sparse.routing_transformer import RoutingAttention, assigned, commitment_loss, random_units, update_centroids

WIDE = torch.float64


def directions(x: torch.Tensor, norm: bool = True) -> torch.Tensor:
    if norm:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return x / x.norm(dim=-1, keepdim=True)


def moved(mu: torch.Tensor, tokens: list[torch.Tensor], decay: float, form: str) -> torch.Tensor:
    """One head's centroids (k, D) after tokens (n, D) of each kind."""
    out = mu.clone()
    for c in range(len(mu)):
        own = [t for x in tokens for t in directions(x, form == "paper") if int((mu @ t).argmax()) == c]
        if own:
            total = torch.stack(own).sum(0)
            if form == "port":
                out[c] = decay * mu[c] + (1 - decay) * total / total.norm()
            else:
                at = decay * mu[c] + (1 - decay) / 2 * total
                out[c] = at / at.norm()
    return out


@pytest.mark.parametrize("form", ["paper", "port"])
@pytest.mark.parametrize("with_keys", [False, True])
def test_centroids_follow_the_tokens_of_a_whole_batch(form: str, with_keys: bool) -> None:
    torch.manual_seed(0)
    mu = directions(torch.randn(2, 4, 6, dtype=WIDE), False)
    q, k = torch.randn(2, 3, 2, 7, 6, dtype=WIDE).unbind(0)
    found = update_centroids(mu, q, k if with_keys else None, 0.8, form)
    for h in range(2):
        tokens = [x[:, h].flatten(0, 1) for x in ((q, k) if with_keys else (q,))]
        torch.testing.assert_close(found[h], moved(mu[h], tokens, 0.8, form))
    torch.testing.assert_close(update_centroids(mu, q, k), update_centroids(mu, q, k, 0.999, "paper"))
    picks = assigned(mu, q)
    assert picks.shape == (3, 2, 7, 4) and bool((picks.sum(-1) == 1).all()) and picks.dtype == WIDE


@pytest.mark.parametrize("form", ["paper", "port"])
def test_commitment_by_hand(form: str) -> None:
    torch.manual_seed(0)
    mu, x = directions(torch.randn(2, 4, 6, dtype=WIDE), False), torch.randn(3, 2, 5, 6, dtype=WIDE, requires_grad=True)
    tokens = directions(x, form == "paper")
    total = sum(
        (tokens[b, h, t] - mu[h, int((mu[h] @ tokens[b, h, t]).argmax())]).square().sum()
        for b in range(3)
        for h in range(2)
        for t in range(5)
    )
    truth = 0.3 * total / x.numel()
    found = commitment_loss(mu, x, 0.3, form)
    torch.testing.assert_close(found, truth)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (found, truth)))
    torch.testing.assert_close(commitment_loss(mu, x, form=form), found / 3000)


@pytest.mark.parametrize("causal", [True, False])
def test_training_moves_the_centroids_of_routed_heads_by_what_they_route(causal: bool) -> None:
    torch.manual_seed(0)
    layer, x = RoutingAttention(12, 3, 2, routed=2, causal=causal, decay=0.7).double(), torch.randn(2, 9, 12, dtype=WIDE)
    before = layer.centroids.clone()
    q, k, _ = (y.unflatten(-1, (3, 4)).transpose(1, 2)[:, :2].detach() for y in (x @ layer.qkv.weight.T).chunk(3, -1))
    loss = layer(x)[1]
    for h in range(2):
        kinds = [y[:, h].flatten(0, 1) for y in (q, q if causal else k)]
        torch.testing.assert_close(layer.centroids[h], moved(before[h], kinds, 0.7, "paper"))
    torch.testing.assert_close(loss, commitment_loss(before, q))  # of the centroids that attended
    assert "centroids" in layer.state_dict() and not layer.centroids.requires_grad


def test_every_head_may_route_and_first_centroids_are_directions() -> None:
    torch.manual_seed(0)
    layer = RoutingAttention(8, 2, 3, routed=2).eval()
    assert layer(torch.randn(2, 6, 8))[0].shape == (2, 6, 8) and layer.routed == 2 and RoutingAttention(8, 2, 3).routed == 1
    for made in (layer.centroids, random_units(SimpleNamespace(heads=2, head_dim=4), 3)):
        assert made.shape == (2, 3, 4)
        torch.testing.assert_close(made.norm(dim=-1), torch.ones(2, 3))
