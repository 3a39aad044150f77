"""Decoding of the Routing Transformer: new tokens against stored members of their centroid, by loops; local heads; in pieces."""

import pytest
import torch

from regard import Causal, RegardError, attend, get
from regard.zoo.sparse.routing_transformer import RoutingAttention


def by_hand(layer, x):
    """Token by token, head by head."""
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
    out, alone = torch.zeros_like(q), 0
    width = q.shape[-1]
    for b in range(len(x)):
        for h in range(layer.heads):
            members = {}
            for i in range(x.shape[1]):
                if h >= layer.routed:
                    first = max(0, i - layer.window + 1)
                    p = (k[b, h, first : i + 1] @ q[b, h, i] / width**0.5).softmax(-1)
                    out[b, h, i] = p @ v[b, h, first : i + 1]
                    continue
                u = q[b, h, i] - q[b, h, i].mean()
                u = u / (u.square().mean() + 1e-5).sqrt()
                u = u / u.norm()
                own = int((layer.centroids[h] @ u).argmax())
                stored = members.setdefault(own, [])
                alone += not stored
                read = stored or [(u, v[b, h, i])]
                keys, values = (torch.stack(y) for y in zip(*read, strict=True))
                out[b, h, i] = (keys @ u / width**0.5).softmax(-1) @ values
                stored.append((u, v[b, h, i]))
    assert alone < len(x) * layer.routed * x.shape[1] / 2 or layer.centroids.shape[1] > 3
    return layer.out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("routed, window", [(2, 4), (1, 1), (4, 3)])
def test_routing_transformer_steps_by_loops(routed, window):
    layer, x = RoutingAttention(32, 4, 3, routed=routed, window=window).double().eval(), torch.randn(2, 13, 32, dtype=torch.float64)
    truth, whole = by_hand(layer, x), layer.step(x)[0]
    assert torch.allclose(whole, truth, atol=1e-10)
    for cuts in ((5, 1, 1, 6), (1,) * 13, (2, 11)):
        state, outs = None, []
        for piece in x.split(cuts, 1):
            out, state = layer.step(piece, state)
            outs.append(out)
            assert state.near_k.shape[2] <= window - 1 and not out.requires_grad
        assert torch.allclose(torch.cat(outs, 1), truth, atol=1e-10) and state.keys.shape[2] == 13


def test_routing_transformer_where_all_share_a_cluster_a_step_is_what_forward_gives():
    """One centroid, all members: both read every earlier token, in any head."""
    layer, x = RoutingAttention(16, 2, 1, members=9, routed=1).double().eval(), torch.randn(1, 9, 16, dtype=torch.float64)
    assert torch.allclose(layer.step(x)[0], layer(x)[0], atol=1e-10)


@pytest.mark.parametrize("clusters, members", [(3, None), (2, 4)])
def test_routing_transformer_layer_has_the_clusters_it_is_told(clusters, members):
    """As the mechanism itself with those clusters and members, its heads' outputs side by side."""
    layer, x = RoutingAttention(16, 2, clusters, members=members, routed=2).double().eval(), torch.randn(1, 12, 16, dtype=torch.float64)
    q, _, v = layer.split(x)
    told = get("routing-transformer", clusters=clusters, members=-(-12 // clusters) if members is None else members, shared=True)
    out = attend(q, q, v, told, mask=Causal(), centroids=layer.centroids)
    assert torch.allclose(layer(x)[0], layer.out(out.transpose(1, 2).flatten(2)), atol=1e-12)


def test_routing_transformer_both_ways_has_no_steps():
    with pytest.raises(RegardError, match="causal=True"):
        RoutingAttention(16, 2, 2, causal=False).step(torch.randn(1, 3, 16))
