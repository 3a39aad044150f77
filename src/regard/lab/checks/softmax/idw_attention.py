"""Checks of idw-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.zoo.softmax.idw_attention import IDWClassifier


@check("idw-attention", "softmax(-log d) == (1/d) / sum 1/d, d = eps + |q - k|^2", below=1e-12, control="negative distance")
def _() -> tuple[float, float]:
    q, k, v = qkv(21)
    k[:, :, 3] = q[:, :, 4]  # a key on top of a query
    truth = naive.attention(q, k, v, lambda d: (1 / d) / (1 / d).sum(), score=lambda a, c: 1e-3 + ((a - c) ** 2).sum())
    return naive.gap(attend(q, k, v, "idw-attention"), truth), naive.gap(attend(q, k, v, get("idw-attention", link="negative")), truth)


@check("idw-attention", "as eps -> 0 a query on a key reads that key's value", below=1e-6, control="dot-product attention")
def _() -> tuple[float, float]:
    _, k, v = qkv(21)
    return naive.gap(attend(k, k, v, get("idw-attention", eps=1e-9)), v), naive.gap(attend(k, k, v, "softmax"), v)


def moons(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two interleaved half circles of `count` points each with noise, and which of them a point belongs to."""
    generator = torch.Generator().manual_seed(seed)
    angle = math.pi * torch.rand(2 * count, generator=generator)
    label = torch.arange(2 * count) % 2
    x = torch.stack((torch.cos(angle), torch.sin(angle)), -1)
    x = torch.where(label[:, None] == 1, torch.tensor([1.0, 0.5]) - x, x)
    return x + 0.08 * torch.randn(x.shape, generator=generator), label


@check(
    "idw-attention",
    "two moons, 32 prototypes, held-out accuracy >= 0.97: prototypes whose largest value is the class of the nearest point, a point turned by hand",
    above=0.9,
    control="dot products",
)
def _() -> tuple[float, float]:
    x, label = moons(200, 0)
    held, truth = moons(200, 1)

    def agreement(link: str) -> float:
        torch.manual_seed(0)
        model = IDWClassifier(2, 32, 2, link=link)
        model.start_from(x)
        optimizer = torch.optim.Adam(model.parameters(), 0.1, amsgrad=True)
        for _ in range(300):
            loss = nn.functional.cross_entropy(model(x), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy = float((model(held).argmax(-1) == truth).double().mean())
        nearest = label[torch.cdist(model.keys.detach(), x).argmin(-1)]
        agree = float((model.values.argmax(-1) == nearest).double().mean())
        odd = torch.tensor([0.0, -1.5])  # off both moons
        wanted = 1 - int(model(odd[None]).argmax())
        if link == "log":
            model.augment(odd, wanted)
        turned = link != "log" or int(model(odd[None]).argmax()) == wanted
        kept = abs(float((model(held).argmax(-1) == truth).double().mean()) - accuracy) <= 0.01
        return agree if link != "log" or (accuracy >= 0.97 and turned and kept) else 0.0

    return agreement("log"), agreement("dot")
