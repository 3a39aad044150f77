"""Checks of tcpa."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.planes import layer_norm
from regard.lab.checks.shared.vits import mlp_of, out_of, projected, scores, small_vit, tokens_by_hand
from regard.lab.verification import check
from regard.zoo.vision.tcpa import TCPA

OWN, SHARED = {"size": 4, "length": 2, "top": 2}, {"size": 5, "length": 3, "top": 1}


def made(**options: Any) -> TCPA:
    return TCPA(small_vit(2), 3, OWN, SHARED, dropout=0.0, **options).to(F64)


def seen_by_hand(net: TCPA, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """(B, 1 + N, P) prompts read by each token, one by one, and the matching loss."""
    sees, loss = torch.zeros(x.shape[0], x.shape[1], 8 + 15, dtype=torch.bool), torch.zeros((), dtype=F64)
    for own, pool, places, start in ((True, net.own, [0], 0), (False, net.shared, list(range(1, x.shape[1])), 8)):
        off = []
        for b in range(x.shape[0]):
            for t in places:
                cosines = [(x[b, t] @ key) / (x[b, t].norm() * key.norm()) for key in pool.keys[layer]]
                for j in sorted(range(pool.size), key=lambda j: -float(cosines[j]))[: 2 if own else 1]:
                    sees[b, t, start + j * pool.length : start + (j + 1) * pool.length] = True
                    off.append(1 - cosines[j])
        loss = loss + torch.stack(off).mean()
    return sees, loss


def by_hand(net: TCPA, images: Tensor, mask: str, fourier: bool = False) -> tuple[Tensor, Tensor]:
    x, total = tokens_by_hand(net.vit, images), torch.zeros((), dtype=F64)
    for layer, block in enumerate(net.vit.blocks):
        prompts = torch.cat((net.own.prompts[layer].reshape(-1, 16), net.shared.prompts[layer].reshape(-1, 16)))
        if fourier:
            prompts = torch.fft.fft(torch.fft.fft(prompts, dim=-1), dim=-2).real
        sees, loss = seen_by_hand(net, x, layer)
        total = total + loss
        full = torch.ones(*x.shape[:2], x.shape[1], dtype=torch.bool)
        sees = torch.cat((full[..., :1], sees, full[..., 1:]), -1)[:, None]
        y = layer_norm(torch.cat((x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]), 1), block.norm1, 1e-6)
        q, k, v = projected(block.attn, y)
        q = torch.cat((q[:, :, :1], q[:, :, 24:]), 2)
        s = scores(block.attn, q, k)
        p = s.masked_fill(~sees, -torch.inf).softmax(-1) if mask == "before" else s.softmax(-1) * (sees if mask == "after" else 1)
        x = x + out_of(block.attn, p @ v)
        x = x + mlp_of(block, x)
    return layer_norm(x, net.vit.norm, 1e-6)[:, 0] @ net.head.weight.T + net.head.bias, total


@check(
    "tcpa",
    "logits, matching losses and gradients, masks after and before the softmax and none, and with transformed prompts == token by token",
    below=1e-10,
    control="the mask on the other side of the softmax",
)
def _() -> tuple[float, float]:
    images, gaps = torch.randn(2, 3, 16, 16, dtype=F64), []
    for mask, fourier in (("after", False), ("before", False), ("none", False), ("after", True)):
        net = made(mask=mask, fourier=fourier)
        found, truth = net(images), by_hand(net, images, mask, fourier)
        leaves = tuple(p for p in net.parameters() if p.requires_grad)
        gaps.append(gap_with_gradients(found[0] + found[1], truth[0] + truth[1], leaves))
        gaps += [naive.gap(a, b) for a, b in zip(found, truth, strict=True)]
    return max(gaps), naive.gap(net(images)[0], by_hand(net, images, "before", True)[0])


@check(
    "tcpa",
    "weight on prompts outside a token's own, and rows that read another number of prompts than top x length",
    below=0.0,
    control="no mask",
)
def _() -> tuple[float, float]:
    images = torch.randn(2, 3, 16, 16, dtype=F64)

    def stray(mask: str) -> float:
        net = made(mask=mask)
        x = tokens_by_hand(net.vit, images)
        seen, _ = net.visible(x, 0)
        y = net.vit.blocks[0].norm1(torch.cat((x[:, :1], net.prompts(0, 2), x[:, 1:]), 1))
        q, k, _ = projected(net.vit.blocks[0].attn, y)
        p = net.weights(net.vit.blocks[0].attn, torch.cat((q[:, :, :1], q[:, :, 24:]), 2), k, seen)
        allowed, _ = seen_by_hand(net, x, 0)
        counts = (p[..., 1:24] > 0).sum(-1)
        wrong = (counts[:, :, 0] != 4).sum() + (counts[:, :, 1:] != 3).sum()
        return float((p[..., 1:24] * ~allowed[:, None]).abs().max() + wrong)

    return max(stray("after"), stray("before")), stray("none")


@check("tcpa", "gradient of the keys from the logits alone", below=0.0, control="from the matching loss")
def _() -> tuple[float, float]:
    net, images = made(), torch.randn(2, 3, 16, 16, dtype=F64)

    def felt(at: int) -> float:
        found = torch.autograd.grad(net(images)[at].sum(), (net.own.keys, net.shared.keys), allow_unused=True)
        return max(0.0 if g is None else float(g.abs().max()) for g in found)

    return felt(0), felt(1)
