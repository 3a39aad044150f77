"""Checks of moh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.engine.meter import pairs_read
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.decoding import llama
from regard.lab.verification import check
from regard.zoo.systems.moh import MoHAttention, chosen, convert_moh


def by_hand(layer: MoHAttention, x: Tensor, again: bool = True) -> Tensor:
    """Tokens and heads in loops, W_O by slices. again=False: kept scores are not normalised again."""
    b, n, h, d, s = *x.shape[:2], layer.heads, layer.head_dim, layer.shared
    q, k, v = (t.view(b, n, h, d) for t in layer.qkv(x).split(h * d, -1))
    q, k = layer.q_norm(q), layer.k_norm(k)
    rows = []
    for row in range(b):
        for t in range(n):
            total = layer.out.bias.clone() if layer.out.bias is not None else torch.zeros(layer.dim, dtype=x.dtype)
            token, gates = x[row, t], [torch.ones((), dtype=x.dtype)] * h
            if layer.share is not None:
                gates[:s] = list(naive.softmax(layer.share.weight @ token) * s)
            if layer.route is not None:
                scores = naive.softmax(layer.route.weight @ token)
                best = scores.sort(descending=True).indices[: layer.routed].tolist()
                whole = sum(scores[i] for i in best) if again else 1.0
                gates[s:] = [scores[i] / whole * layer.routed if i in best else torch.zeros((), dtype=x.dtype) for i in range(h - s)]
            if layer.weigh is not None:
                a = 2 * naive.softmax(layer.weigh.weight @ token)
                gates = [g * a[0 if i < s else 1] for i, g in enumerate(gates)]
            for i in range(h):
                end = t + 1 if layer.causal else n
                p = naive.softmax(torch.stack([(q[row, t, i] * k[row, j, i]).sum() * d**-0.5 for j in range(end)]))
                total = total + gates[i] * (layer.out.weight[:, i * d : (i + 1) * d] @ (p @ v[row, :end, i]))
            rows.append(total)
    return torch.stack(rows).view(b, n, -1)


KINDS = (
    {"shared": 2, "routed": 1},
    {"shared": 1, "routed": 2, "causal": True},
    {"shared": 0, "routed": 3},
    {"shared": 4, "routed": 0, "qk_norm": True},
)


@check(
    "moh",
    "output and gradients equal loops over tokens and heads with slices of W_O",
    below=1e-10,
    control="kept scores not made to sum to one",
)
def _() -> tuple[float, float]:
    own, other = 0.0, []
    for options in KINDS:
        layer, x = MoHAttention(12, 4, qkv_bias=True, **options).double(), torch.randn(2, 5, 12, dtype=F64, requires_grad=True)
        leaves = (x, *layer.parameters())
        own = max(own, gap_with_gradients(layer(x), by_hand(layer, x), leaves))
        if layer.routed and layer.routed < layer.heads - layer.shared:
            other.append(naive.gap(layer(x), by_hand(layer, x, again=False)))
    return own, min(other)


@check("moh", "routers of zero that take all heads: plain attention, gates of exactly one", below=1e-12, control="one head fewer")
def _() -> tuple[float, float]:
    found = []
    for routed in (2, 1):
        torch.manual_seed(0)
        layer, x = MoHAttention(12, 4, shared=2, routed=routed).double(), torch.randn(2, 5, 12, dtype=F64)
        for router in (layer.route, layer.share, layer.weigh):
            assert router is not None
            router.weight.data.zero_()
        q, k, v = layer.qkv(x).unflatten(-1, (3, 4, 3)).permute(2, 0, 3, 1, 4)
        plain = layer.out(naive.attention(q, k, v, naive.softmax).transpose(1, 2).flatten(2))
        found.append(max(naive.gap(layer(x), plain), float((layer.gates(x) - 1).abs().max())))
    return found[0], found[1]


@check(
    "moh",
    "the skipping path: gap to the full one, and pairs read beyond (shared + routed) / heads of all",
    below=1e-10,
    control="the full path",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    def excess(skip: bool, causal: bool) -> float:
        torch.manual_seed(1)
        layer, x = MoHAttention(12, 4, shared=1, routed=1, skip=skip, causal=causal).double().eval(), torch.randn(2, 7, 12, dtype=F64)
        assert bool(((layer.gates(x) != 0).sum(-1) == 2).all())
        with pairs_read() as read:
            out = layer(x)
        few = naive.gap(out, by_hand(layer, x))
        return few + (0.0 if causal else max(0.0, read.read / (2 * 4 * 7 * 7) - 0.5))

    return max(excess(True, False), excess(True, True)), excess(False, False)


@check("moh", "balance loss: k for even routing, E for one head that takes all, by loops else", below=1e-12, control="the mean without E^2")
def _() -> tuple[float, float]:
    even = torch.eye(4, dtype=F64)[torch.tensor([[0, 1, 2, 3]])] * 0 + 0.25
    even = even + torch.eye(4, dtype=F64) * 1e-16
    one = torch.zeros(1, 6, 4, dtype=F64)
    one[..., 2] = 1
    scores = torch.rand(2, 5, 4, dtype=F64).softmax(-1)
    f, p = torch.zeros(4, dtype=F64), torch.zeros(4, dtype=F64)
    for row in scores.flatten(0, 1):
        f[row.sort(descending=True).indices[:2]] += 1 / 10
        p += row / 10
    found = [float(chosen(x, k)[1]) for x, k in ((even, 2), (one, 1), (scores, 2))]
    truth = [2.0, 4.0, float(16 * (f * p).mean())]
    return max(abs(a - b) for a, b in zip(found, truth, strict=True)), abs(found[2] - float((f * p).mean()))


@check(
    "moh",
    "a Llama without new parameters: outputs are those of heads zeroed one by one, the balance loss and slopes of gates by hand: gap",
    below=1e-6,
    control="all heads on",
)
def _() -> tuple[float, float]:
    model, ids = llama(heads=8, kv_heads=4, dim=64), torch.randint(1, 50, (2, 7))
    plain, kept, losses = model(ids, use_cache=False).logits, {}, []
    with convert_moh(model) as routing:
        found, loss = model(ids, use_cache=False).logits, routing.aux_loss
    handles = []
    for number, layer in enumerate(model.model.layers):

        def keep(module: Any, args: Any, q: Tensor, number: int = number) -> None:
            q = q.view(2, 7, 8, 8)
            mask, p_all, f_all = torch.zeros(2, 7, 8), torch.zeros(4), torch.zeros(4)
            for b in range(2):
                for t in range(7):
                    size = torch.stack([q[b, t, h].square().sum().sqrt() for h in range(4, 8)])
                    std = ((size - size.mean()).square().sum() / 3).sqrt()
                    p = naive.softmax(size / std)
                    best = p.sort(descending=True).indices[:2]
                    mask[b, t, :4] = mask[b, t, 4 + best] = 1
                    f_all[best] += 1 / 14
                    p_all += p.detach() / 14
            kept[number] = mask
            losses.append(16 * (f_all * p_all).mean())

        def zero(module: Any, args: tuple[Tensor, ...], number: int = number) -> tuple[Tensor, ...]:
            return ((args[0].view(2, 7, 8, 8) * kept[number][..., None]).view(2, 7, 64),)

        handles += [layer.self_attn.q_proj.register_forward_hook(keep), layer.self_attn.o_proj.register_forward_pre_hook(zero)]
    truth = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(model(ids, use_cache=False).logits, plain)
    own = max(naive.gap(found, truth), naive.gap(loss, torch.stack(losses).mean()))
    return own, naive.gap(plain, truth)
