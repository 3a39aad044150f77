"""Checks of comateformer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Padding
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.planes import image
from regard.lab.verification import check
from regard.zoo.vision.comateformer import CompositionalAttention, PairClassifier, comateformer


def weights(q: Tensor, k: Tensor, far_q: Tensor, far_k: Tensor, mean: Tensor | float = 0.0, factor: float = 1.0) -> Tensor:
    """Pair by pair, of one head: q (Lq, D), k (Lk, D)."""
    d, rows = q.shape[1], []
    for i in range(len(q)):
        row = []
        for j in range(len(k)):
            n = -(far_q[i] - far_k[j]).abs().sum() / math.sqrt(d) - mean
            row.append(factor * torch.tanh((q[i] * k[j]).sum() / math.sqrt(d)) / (1 + torch.exp(-n)))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@check(
    "comateformer",
    "values and gradients of the mechanism, single and doubled, own projections for N, padding, Lq != Lk == pair by pair",
    below=1e-11,
    control="softmax of E",
)
def _() -> tuple[float, float]:
    gaps, keep = [], torch.tensor([[True] * 5, [True, False, True, True, False]])
    for double, own in ((False, False), (True, False), (False, True)):
        width = 8 if own else 4
        q, k, v = image(2, 2, 3, width), image(2, 2, 5, width), image(2, 2, 5, 6)
        found = attend(q, k, v, comateformer(double, own), mask=Padding(), keep=keep)
        truth = torch.zeros(2, 2, 3, 6, dtype=F64)
        rows = []
        for b in range(2):
            for h in range(2):
                near, far = ((x[b, h, :, :4], x[b, h, :, 4:]) if own else (x[b, h], x[b, h]) for x in (q, k))
                w = weights(near[0], far[0], near[1], far[1], factor=2.0 if double else 1.0)
                rows.append((w * keep[b]) @ v[b, h])
        truth = torch.stack(rows).unflatten(0, (2, 2))
        gaps.append(gap_with_gradients(found, truth, (q, k, v)))
    plain = attend(q[..., :4], k[..., :4], v, mask=Padding(), keep=keep)
    return max(gaps), naive.gap(found, plain)


@check(
    "comateformer",
    "values and gradients of the layer: self and cross, padding, centred over visible pairs and not, own projections == by hand",
    below=1e-10,
    control="the mean of N over padding too",
)
def _() -> tuple[float, float]:
    gaps, other, keep = [], 0.0, torch.tensor([[True] * 5, [True, False, True, True, False]])
    for centre, own, cross in ((False, False, False), (True, False, True), (True, True, False)):
        layer, x = drawn(CompositionalAttention(8, 2, centre, own=own)), image(2, 5, 8)
        context = image(2, 5, 8) if cross else x

        def by_hand(
            masked: bool, layer: CompositionalAttention = layer, x: Tensor = x, context: Tensor = context, own: bool = own
        ) -> Tensor:
            rows = []
            for b in range(2):
                source = torch.where(keep[b][:, None], context[b], 0.0)
                q, k, v = (
                    x[b] @ layer.q.weight.T + layer.q.bias,
                    source @ layer.k.weight.T + layer.k.bias,
                    source @ layer.v.weight.T + layer.v.bias,
                )
                heads = []
                for h in range(2):
                    part = slice(4 * h, 4 * h + 4)
                    far = slice(8 + 4 * h, 12 + 4 * h) if own else part
                    seen = keep[b] if masked else torch.ones(5, dtype=torch.bool)
                    n = torch.stack([-(q[i, far] - k[j, far]).abs().sum() / 2 for i in range(5) for j in range(5) if seen[j]])
                    w = weights(q[:, part], k[:, part], q[:, far], k[:, far], n.mean() if layer.centre else 0.0)
                    heads.append((w * keep[b]) @ v[:, part])
                rows.append(torch.cat(heads, 1))
            return torch.stack(rows) @ layer.out.weight.T + layer.out.bias

        found = layer(x, context if cross else None, keep)
        gaps.append(gap_with_gradients(found, by_hand(True), (x, *layer.parameters())))
        other = naive.gap(found, by_hand(False)) if centre else other
    return max(gaps), other


@check(
    "comateformer",
    "turned sign of the query that enters E, equal vectors (tanh(E) / 2), and vectors far apart, off what they must give",
    below=1e-6,
    control="without the gate of N",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 1, 6, n, dtype=F64) for n in (8, 8, 3))
    turned = torch.cat((-q[..., :4], q[..., 4:]), -1)
    gaps = [naive.gap(attend(turned, k, v, comateformer(own=True)), -attend(q, k, v, comateformer(own=True)))]
    one = q[:, :, :1].expand(-1, -1, 6, -1)
    e = torch.tanh((one @ one.mT) * 8**-0.5)
    gaps.append(naive.gap(attend(one, one, v, comateformer()), e / 2 @ v))
    gaps.append(float(attend(q + 1e3, k, v, comateformer()).abs().max()))
    return max(gaps), naive.gap(torch.tanh(q @ k.mT * 8**-0.5) @ v, attend(q, k, v, comateformer()))


@check("comateformer", "error of learning v_1 - v_2 with one head, over the targets' variance", below=0.02, control="a softmax head")
def _() -> tuple[float, float]:
    def left(mechanism: object) -> float:
        torch.manual_seed(0)
        q, k, s = (nn.Parameter(torch.randn(*shape)) for shape in ((1, 1, 1, 8), (1, 1, 4, 8), (1,)))
        optimizer, generator = torch.optim.Adam([q, k, s], 3e-2), torch.Generator().manual_seed(0)
        for _ in range(300):
            v = torch.randn(64, 1, 4, 6, generator=generator)
            out = s * attend(q.expand(64, -1, -1, -1), k.expand(64, -1, -1, -1), v, mechanism)  # type: ignore[arg-type]
            loss = (out[:, 0, 0] - v[:, 0, 0] + v[:, 0, 1]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach()) / 2

    return left(comateformer()), left("softmax")


def pairs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """[class] a [between] b of 2 words each out of 4; b is a, or a with one word changed (label 1)."""
    a, label = torch.randint(4, (count, 2), generator=generator), torch.randint(2, (count,), generator=generator)
    at, step = torch.randint(2, (count,), generator=generator), torch.randint(1, 4, (count,), generator=generator)
    b = a.clone()
    b[torch.arange(count), at] = (a[torch.arange(count), at] + step * label) % 4
    mark = torch.full((count, 1), 4)
    return torch.cat((mark, a, mark + 1, b), 1), torch.tensor([0] * 4 + [1] * 2).expand(count, -1), label


@check(
    "comateformer",
    "accuracy of telling whether one of two words was changed, two centred layers, 250 steps (without centring none was learned in 300)",
    above=0.9,
    control="the attention's output set to zero",
)
def _() -> tuple[float, float]:
    def run(blind: bool) -> float:
        torch.manual_seed(0)
        net, generator = PairClassifier(6, 6, 32, 2, layers=2, double=True, centre=True), torch.Generator().manual_seed(0)
        for attention in net.attentions if blind else ():
            for p in attention.out.parameters():  # type: ignore[union-attr]
                nn.init.zeros_(p).requires_grad_(False)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 3e-3)
        for _ in range(50 if blind else 250):
            tokens, kinds, label = pairs(64, generator)
            optimizer.zero_grad()
            F.cross_entropy(net(tokens, kinds), label).backward()
            optimizer.step()
        with torch.no_grad():
            tokens, kinds, label = pairs(1000, generator)
            return float((net(tokens, kinds).argmax(1) == label).double().mean())

    return run(False), run(True)
