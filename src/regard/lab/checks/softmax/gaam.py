"""Checks of gaam."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.softmax.gaam import GaussianAdaptiveAttention, importance_factor


def gaussian_loop(x: Tensor, layer: GaussianAdaptiveAttention, padding: float | None, mixture: bool = True) -> Tensor:
    """The paper's formula, an entry at a time, for x (n,)."""
    size, out = len(x) // layer.heads, x.clone()
    for h in range(layer.heads):
        at = range(h * size, (h + 1) * size if h < layer.heads - 1 else len(x))
        values = [0.0 if float(x[i]) == padding else float(x[i]) for i in at]
        mean = sum(values) / len(values)
        sigma = math.sqrt(sum((y - mean) ** 2 for y in values) / (len(values) - 1) + layer.eps)
        weights = []
        for y in (float(x[i]) for i in at):  # padding weighs by what it is, around statistics that count it as 0
            terms = []
            for delta, c in zip(layer.delta[h].tolist(), layer.c[h].tolist(), strict=True):
                z = (y - mean - delta) / sigma
                terms.append(math.exp(-z * z / (2 * c * c)) / math.sqrt(2 * math.pi * c * c))
            weights.append(math.prod(terms) if mixture else sum(terms))
        total = max(sum(weights), layer.eps)
        for i, y, w in zip(at, values, weights, strict=True):
            out[i] = x[i] if float(x[i]) == padding else y * w / total
    return out


@check("gaam", "equals a loop, 11 entries in 4 heads with padding", below=1e-12, control="Gaussians added, not multiplied")
def _() -> tuple[float, float]:
    layer = GaussianAdaptiveAttention(-1, 4, 2, padding_value=-9.0).double()
    nn.init.normal_(layer.delta)
    x = torch.randn(11, dtype=F64)
    x[[2, 10]] = -9.0
    return tuple(naive.gap(layer(x), gaussian_loop(x, layer, -9.0, product)) for product in (True, False))  # type: ignore[arg-type, return-value]


def weights_of_layer(layer: GaussianAdaptiveAttention, x: Tensor) -> Tensor:
    return layer(x, return_weights=True)[1]  # type: ignore[return-value]


@check(
    "gaam",
    "weights sum to one in each chunk, do not change under x -> 3 x + 2, and two Gaussians are the product of two maps",
    below=1e-6,
    control="offsets of 1: not invariant",
)
def _() -> tuple[float, float]:
    x = torch.randn(3, 12, dtype=F64)
    two = GaussianAdaptiveAttention(-1, 3, 2).double()
    w = weights_of_layer(two, x)
    sums = naive.gap(w.unflatten(-1, (3, 4)).sum(-1), torch.ones(3, 3))
    moved = naive.gap(weights_of_layer(two, 3 * x + 2), w)
    singles = [GaussianAdaptiveAttention(-1, 3, 1).double() for _ in range(2)]
    for at, one in enumerate(singles):
        one.c.data.copy_(two.c[:, at : at + 1])
    product = torch.stack([weights_of_layer(one, x) for one in singles]).prod(0).unflatten(-1, (3, 4))
    split = naive.gap((product / product.sum(-1, keepdim=True)).flatten(-2), w)
    nn.init.ones_(two.delta)
    return max(sums, moved, split), naive.gap(weights_of_layer(two, 3 * x + 2), weights_of_layer(two, x))


@check("gaam", "importance factors span exactly [0, 1] (distance of their ends)", below=0.0, control="the average weights themselves")
def _() -> tuple[float, float]:
    w = weights_of_layer(GaussianAdaptiveAttention(-1, 3, 2).double(), torch.randn(50, 12, dtype=F64))
    factor, mean = importance_factor(w), w.detach().mean(0)
    return tuple(abs(float(x.min())) + abs(float(x.max()) - 1) for x in (factor, mean))  # type: ignore[return-value]


@check("gaam", "gradients of offsets and widths: gradcheck (1)", above=1.0, control="widths detached")
def _() -> tuple[float, float]:
    layer = GaussianAdaptiveAttention(-1, 2, 2).double()
    x = torch.randn(2, 7, dtype=F64)

    def passes(detach: bool) -> float:
        def run(delta: Tensor, c: Tensor) -> Tensor:
            names = {"delta": delta, "c": c.detach() + 0 * c if detach else c}
            return torch.func.functional_call(layer, names, (x,))  # type: ignore[no-any-return]

        leaves = tuple(p.detach().requires_grad_() for p in (layer.delta, layer.c))
        return float(torch.autograd.gradcheck(run, leaves, raise_exception=False))

    return passes(False), passes(True)
