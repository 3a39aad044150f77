"""Checks of pbs-attn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal, Chosen, bind
from regard.algebra.blocks import probabilities
from regard.algebra.permute import by_value
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import qkv, selection_of
from regard.lab.verification import check
from regard.zoo.sparse.pbs_attn import order_of, pbs_plan


@check("pbs-attn", "threshold 1 is dense causal attention, L = 1000, and gradients", below=1e-12, control="threshold 0.3")
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(1000))
    truth = attend(q, k, v, mask=Causal())
    seed = torch.randn_like(truth)
    expected = (truth, *torch.autograd.grad((truth * seed).sum(), (q, k, v)))
    gaps = []
    for threshold in (1.0, 0.3):
        out = attend(q, k, v, get("pbs-attn", threshold=threshold, block_size=32, segment=128))
        gaps.append(max(naive.gap(a, b) for a, b in zip((out, *torch.autograd.grad((out * seed).sum(), (q, k, v))), expected, strict=True)))
    return gaps[0], gaps[1]


@check(
    "pbs-attn", "tokens of later segments change nothing before them, blocks held fixed", below=1e-12, control="keys sorted across segments"
)
def _() -> tuple[float, float]:
    q, k, v = qkv(512)
    late_k, late_v = k.clone(), v.clone()
    late_k[:, :, 256:], late_v[:, :, 256:] = torch.randn(1, 2, 256, 8, dtype=F64), torch.randn(1, 2, 256, 8, dtype=F64)

    def run(k: Tensor, v: Tensor, segment: int) -> Tensor:
        order = by_value(torch.arange(512, dtype=F64).expand(1, 2, -1) % 37, segment)
        return attend(
            q,
            order.apply(k),
            order.apply(v),
            mask=torch.ones(512, 512, dtype=torch.bool).tril() if segment > 256 else order.order[:, :, None] <= torch.arange(512)[:, None],
        )

    return tuple(naive.gap(run(late_k, late_v, s)[:, :, :256], run(k, v, s)[:, :, :256]) for s in (128, 512))  # type: ignore[return-value]


def heavy(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 1, 1024, 32, dtype=F64, generator=generator) for _ in range(2))
    direction = torch.nn.functional.normalize(torch.randn(32, dtype=F64, generator=generator), dim=0)
    q = q + 5 * direction
    k[:, :, torch.randperm(1024, generator=generator)[:48]] += 6 * direction
    return q, k


def far_density(q: Tensor, k: Tensor, permute: bool) -> tuple[float, float]:
    """(density outside own segments, mass captured) at threshold 0.9, blocks of 32, segments of 256."""
    order = order_of(q / math.sqrt(32), k, 32, 256).order if permute else torch.arange(1024).expand(1, 1, -1)
    sorted_k = k.gather(2, order[..., None].expand_as(k))
    plan = Chosen(bind(pbs_plan, threshold=0.9, block_size=32, segment=256))
    keep = selection_of(plan, q, sorted_k, since=order[:, :, None]).keep
    u, w = torch.arange(32)[:, None] // 8, torch.arange(32) // 8
    pairs = keep.repeat_interleave(32, -2).repeat_interleave(32, -1)
    causal = order[:, :, None] <= torch.arange(1024)[:, None]
    p = probabilities(q @ sorted_k.transpose(-1, -2) / math.sqrt(32), causal)
    return float(keep[..., w < u].double().mean()), float((p * pairs).sum(-1).mean())


@check(
    "pbs-attn",
    "48 heavy keys: density outside own segments over the unpermuted one's, at captured mass >= 0.95",
    below=0.75,
    control="not permuted",
)
def _() -> tuple[float, float]:
    ratios = []
    for seed in range(3):
        q, k = heavy(seed)
        (own, mass), (plain, _) = far_density(q, k, True), far_density(q, k, False)
        ratios.append(own / plain if mass >= 0.95 else math.inf)
    return max(ratios), 1.0


@check("pbs-attn", "the inverse permutation restores keys exactly", below=0, control="applied twice")
def _() -> tuple[float, float]:
    q, k, _ = qkv(300)
    order = order_of(q, k, 32, 64)
    return naive.gap(order.invert(order.apply(k)), k), naive.gap(order.apply(order.apply(k)), k)
