"""Checks of artificial-entanglement."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.verification import check
from regard.zoo.systems.artificial_entanglement import MPSAdapter, attention_entanglement, entanglement_profile, no_hair, page


def by_hand(m: Tensor, legs: list[int], square: bool = True) -> Tensor:
    """Eigenvalues of reduced density matrices, summed entry by entry over the legs that are traced out."""
    psi = (m / m.norm()).reshape(legs)
    found = []
    for cut in range(1, len(legs)):
        left = list(itertools.product(*(range(n) for n in legs[:cut])))
        rho = torch.stack([torch.stack([(psi[a] * psi[b]).sum() for b in left]) for a in left])
        p = torch.linalg.eigvalsh(rho).clamp_min(0)
        p = p if square else p.sqrt() / p.sqrt().sum()
        found.append(-(p * p.clamp_min(1e-300).log()).sum())
    return torch.stack(found)


@check(
    "artificial-entanglement",
    "bits, a shape of prime factors and legs by choice: gap to traced-out density matrices",
    below=1e-10,
    control="singular values, not their squares",
)
def _() -> tuple[float, float]:
    own, other = 0.0, []
    for shape, rows, cols, legs in (
        ((4, 8), None, None, [2, 2, 2, 2, 2]),
        ((6, 5), None, None, [2, 3, 5]),
        ((8, 4), [4, 2], [4], [4, 2, 4]),
    ):
        m = torch.randn(shape, dtype=F64)
        own = max(own, naive.gap(entanglement_profile(m, rows, cols), by_hand(m, legs)))
        other.append(naive.gap(entanglement_profile(m, rows, cols), by_hand(m, legs, square=False)))
    batch = torch.randn(2, 3, 8, 8, dtype=F64)
    one = torch.stack([torch.stack([by_hand(m, [8, 8])[0] for m in row]) for row in batch])
    return max(own, naive.gap(attention_entanglement(batch), one)), min(other)


@check(
    "artificial-entanglement",
    "BA of rank 4 in 64 dimensions: the lower of the maxima beside the middle, less the middle (a valley)",
    above=0.5,
    control="a full matrix",
)
def _() -> tuple[float, float]:
    low, full = torch.randn(64, 4, dtype=F64) @ torch.randn(4, 64, dtype=F64), torch.randn(64, 64, dtype=F64)
    profiles = [entanglement_profile(m) for m in (low, full)]
    assert float(profiles[0][5]) <= math.log(4) + 1e-9
    return tuple(float(min(s[:5].max(), s[6:].max()) - s[5]) for s in profiles)


@check(
    "artificial-entanglement",
    "Gaussian 64 x 64: distance of the middle, the largest, from log 64 - 1/2",
    below=0.03,
    control="a matrix of rank 16",
)
def _() -> tuple[float, float]:
    s = entanglement_profile(torch.randn(64, 64, dtype=F64))
    assert int(s.argmax()) == 5 and page(64, 64) == math.log(64) - 0.5 and page(4, 16) == page(16, 4) == math.log(4) - 0.125
    low = entanglement_profile(torch.randn(64, 16, dtype=F64) @ torch.randn(16, 64, dtype=F64))
    return abs(float(s[5]) - page(64, 64)), abs(float(low[5]) - page(64, 64))


@check(
    "artificial-entanglement",
    "product states share nothing, scaling and turning one side change nothing: gap",
    below=1e-9,
    control="turning across the cut",
)
def _() -> tuple[float, float]:
    bits = [torch.randn(2, dtype=F64) for _ in range(8)]
    product = bits[0]
    for bit in bits[1:]:
        product = torch.outer(product, bit).flatten()
    m, turn = torch.randn(16, 16, dtype=F64), torch.linalg.qr(torch.randn(16, 16, dtype=F64))[0]
    middle = entanglement_profile(m)[3]
    own = max(
        float(entanglement_profile(product.view(16, 16)).abs().max()), naive.gap(entanglement_profile(7 * m), entanglement_profile(m))
    )
    own = max(own, naive.gap(entanglement_profile(turn @ m)[3], middle), naive.gap(entanglement_profile(m @ turn)[3], middle))
    across = torch.linalg.qr(torch.randn(256, 256, dtype=F64))[0] @ m.flatten()
    return own, naive.gap(entanglement_profile(across.view(16, 16))[3], middle)


@check(
    "artificial-entanglement",
    "an MPS adapter: outputs and gradients equal sums over bonds, index by index, and nothing at first",
    below=1e-11,
    control="cores in the other order",
)
def _() -> tuple[float, float]:
    base, x = nn.Linear(12, 8).double(), torch.randn(3, 12, dtype=F64, requires_grad=True)
    layer = MPSAdapter(base, 3, alpha=0.7)
    assert torch.equal(layer(x), base(x)) and [tuple(core.shape) for core in layer.cores] == [(1, 2, 2, 3), (3, 2, 2, 3), (3, 2, 3, 1)]
    for core in layer.cores:
        core.data.normal_()
    o, i = (2, 2, 2), (2, 2, 3)

    def entry(a: tuple[int, ...], b: tuple[int, ...], flip: bool) -> Tensor:
        total = torch.ones(1, 1, dtype=F64)
        for j in range(3):
            k = a[2 - j] if flip else a[j]
            total = total @ layer.cores[j][:, k, b[j]]
        return 0.7 * total[0, 0]

    def whole(flip: bool) -> Tensor:
        rows = itertools.product(*(range(n) for n in o))
        return torch.stack([torch.stack([entry(a, b, flip) for b in itertools.product(*(range(n) for n in i))]) for a in rows])

    own = gap_with_gradients(layer(x), base(x) + x @ whole(False).T, (x, *layer.cores))
    assert sum(p.numel() for p in layer.cores) == 12 + 36 + 18
    return own, naive.gap(layer(x), base(x) + x @ whole(True).T)


@check("artificial-entanglement", "an MPS of bond 3 at its own cuts: largest entropy beyond log 3", below=1e-9, control="a full matrix")
def _() -> tuple[float, float]:
    layer = MPSAdapter(nn.Linear(32, 32).double(), 3)
    for core in layer.cores:
        core.data.normal_()

    def beyond(m: Tensor) -> float:
        paired = m.view(2, 2, 2, 2, 2, 2, 2, 2, 2, 2).permute(0, 5, 1, 6, 2, 7, 3, 8, 4, 9).reshape(32, 32)  # legs (o_j, i_j) side by side
        return float(entanglement_profile(paired, [4, 4, 2], [2, 4, 4])[[0, 1, 3]].max()) - math.log(3)

    a, b = layer.update().detach(), torch.randn(32, 32, dtype=F64)
    found = no_hair([a], [b], (torch.rand(1, 2, 8, 8), torch.rand(1, 2, 8, 8)))
    assert abs(found["internal"] - float((entanglement_profile(a) - entanglement_profile(b)).abs().mean())) < 1e-12
    assert set(found) == {"internal", "internal_scale", "external", "external_scale"}
    return beyond(a), beyond(b)
