"""Checks of afa."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from regard.algebra import Causal, Rope
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn, joined, split
from regard.lab.verification import check
from regard.tasks.dynamics import oscillator
from regard.zoo.linear.afa import AdaptiveFilterAttention, adaptive_filter, anisotropic_reference, propagated


def filter_inputs(n: int = 16, d: int = 4, regular: bool = False) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor], Tensor]:
    q, k, v = (torch.randn(2, 2, n, d, dtype=torch.complex128) for _ in range(3))
    times = torch.arange(n, dtype=F64) if regular else torch.rand(2, n, dtype=F64).cumsum(-1)
    known = {name: torch.rand(2, dtype=F64) * 0.5 + 0.1 for name in ("mu", "sigma2", "eta2", "gamma2")}
    return (
        {
            **known,
            "omega": torch.randn(2, d, dtype=F64),
            "nu": torch.tensor([1.0, 3.0], dtype=F64),
            "tau2": torch.tensor([1.0, 2.0], dtype=F64),
        },
        (q, k, v),
        times,
    )


class Pairs(NamedTuple):
    """Outputs; of the pairs j <= i weights and propagated variances; log sums of precisions a row."""

    out: Tensor
    weights: Tensor
    variance: Tensor
    total: Tensor


def filter_truth(
    inputs: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, times: Tensor, robust: bool = True, fade_values: bool = True
) -> Pairs:
    """The filter pair by pair, with the flow e^{A dt} as a matrix exponential of the complex dynamics."""
    out, total = torch.zeros_like(v), q.real.new_zeros(q.shape[:3])
    weights, variances = (q.real.new_zeros(*q.shape[:3], q.shape[2]) for _ in range(2))
    d = q.shape[-1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            mu, nu, tau2 = inputs["mu"][h], inputs["nu"][h], inputs["tau2"][h]
            generator = torch.diag(torch.complex(-mu.expand(d), inputs["omega"][h]))
            for i in range(q.shape[2]):
                scores, values = [], []
                for j in range(i + 1):
                    dt = (times if times.dim() == 1 else times[b])[i] - (times if times.dim() == 1 else times[b])[j]
                    flow = torch.linalg.matrix_exp(generator * dt)
                    e2 = torch.exp(-2 * mu * dt)
                    variance = inputs["sigma2"][h] * (1 - e2) / (2 * mu) + inputs["eta2"][h] * e2 + inputs["gamma2"][h]
                    variances[b, h, i, j] = variance
                    residual = (q[b, h, i] - flow @ k[b, h, j]).abs().square().sum()
                    ratio = residual / (nu * d * variance)
                    scores.append(tau2 * (-torch.log(variance) - (torch.log1p(ratio) if robust else ratio)))
                    values.append(flow @ v[b, h, j] if fade_values else flow @ v[b, h, j] / torch.exp(-mu * dt))
                p = torch.softmax(torch.stack(scores), 0)
                weights[b, h, i, : i + 1] = p
                out[b, h, i] = (p[:, None] * torch.stack(values)).sum(0)
                total[b, h, i] = torch.stack(scores).exp().sum().log()
    return Pairs(out, weights, variances, total)


@check(
    "afa",
    "irregular times, Student's and Gaussian likelihood == |q - e^{A dt} k| by matrix exponentials, values carried",
    below=1e-10,
    control="values not faded",
)
def _() -> tuple[float, float]:
    inputs, qkv_, times = filter_inputs()
    own = [
        naive.gap(
            torch.view_as_real(adaptive_filter(*qkv_, times, robust=r, **inputs).output),
            torch.view_as_real(filter_truth(inputs, *qkv_, times, r).out),
        )
        for r in (True, False)
    ]
    other = torch.view_as_real(filter_truth(inputs, *qkv_, times, fade_values=False).out)
    return max(own), naive.gap(torch.view_as_real(adaptive_filter(*qkv_, times, **inputs).output), other)


@check("afa", "V solves dV/dt = -2 mu V + sigma^2 from eta^2: by finite differences", below=1e-6, control="decay mu in place of 2 mu")
def _() -> tuple[float, float]:
    mu, sigma2, eta2 = (torch.tensor(x, dtype=F64) for x in (0.3, 0.7, 0.2))
    zero, t, h = torch.zeros((), dtype=F64), torch.linspace(0.1, 5, 50, dtype=F64), 1e-5

    def v(t: Tensor) -> Tensor:
        return propagated(t, mu, sigma2, eta2, zero)[1]

    slope = (v(t + h) - v(t - h)) / (2 * h)
    start = abs(float(v(zero)) - 0.2)
    return max(start, naive.gap(slope, -2 * mu * v(t) + sigma2)), naive.gap(slope, -mu * v(t) + sigma2)


@check(
    "afa", "mu = sigma = 0, unit q and k, nu = 1e4, tau^2 = nu d V / 2: softmax of Re(q~* k~)", below=1e-4, control="without the rotation"
)
def _() -> tuple[float, float]:
    inputs, (q, k, v), times = filter_inputs(regular=True)
    q, k = (x / x.abs().square().sum(-1, keepdim=True).sqrt() for x in (q, k))
    zero, v0 = torch.zeros(2, dtype=F64), 0.5
    found = adaptive_filter(
        q,
        k,
        v,
        times,
        mu=zero,
        omega=inputs["omega"],
        sigma2=zero,
        eta2=zero + v0,
        gamma2=zero,
        nu=1e4,
        tau2=1e4 * 4 * v0 / 2,
        diagnostics=True,
    )

    def truth(omega: Tensor) -> Tensor:
        turn = torch.polar(torch.ones((), dtype=F64), -times[:, None] * omega[:, None])
        s = torch.einsum("bhid,bhjd->bhij", (q * turn).conj(), k * turn).real
        return s.masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf).softmax(-1)

    assert found.weights is not None
    return naive.gap(found.weights, truth(inputs["omega"])), naive.gap(found.weights, truth(0 * inputs["omega"]))


@check(
    "afa",
    "channels of one decay and noise each: the reference with a decay a channel == the isotropic form",
    below=1e-10,
    control="decays that differ",
)
def _() -> tuple[float, float]:
    inputs, (q, k, v), times = filter_inputs(regular=True)
    out = adaptive_filter(q, k, v, times, **{**inputs, "nu": 1.0, "tau2": 1.0}).output  # type: ignore[arg-type]

    def reference(spread: float) -> Tensor:
        wide = {name: inputs[name][:, None].expand(-1, 4) * (1 + spread * torch.arange(4)) for name in ("mu", "sigma2", "eta2", "gamma2")}
        return anisotropic_reference(q, k, v, times, omega=inputs["omega"], **wide)

    return naive.gap(torch.view_as_real(reference(0.0)), torch.view_as_real(out)), naive.gap(
        torch.view_as_real(reference(0.5)), torch.view_as_real(out)
    )


@check(
    "afa",
    "diagnostics at irregular times: weights, propagated variances and log sums of precisions == those of the pairs",
    below=1e-10,
    control="variances without the anchor noise",
)
def _() -> tuple[float, float]:
    inputs, (q, k, v), times = filter_inputs(n=9)
    found = adaptive_filter(q, k, v, times, diagnostics=True, **inputs)  # type: ignore[arg-type]
    assert found.weights is not None and found.total is not None and found.variance is not None
    truth = filter_truth(inputs, q, k, v, times)
    gaps = [naive.gap(found.weights, truth.weights), naive.gap(found.total, truth.total), naive.gap(found.variance.tril(), truth.variance)]
    told = adaptive_filter(q, k, v, times, diagnostics=True, mask=Causal(), **inputs)  # type: ignore[arg-type]
    assert told.weights is not None and told.total is not None
    gaps += [naive.gap(told.weights, truth.weights), naive.gap(told.total, truth.total)]
    return max(gaps), naive.gap((found.variance - inputs["gamma2"][:, None, None]).tril(), truth.variance)


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


@check(
    "afa",
    "the layer, gated and not, with learned or rotary frequencies and given times, and its prediction == their formulas by hand",
    below=1e-9,
    control="nu of one",
)
def _() -> tuple[float, float]:
    x, times, own, other = torch.randn(2, 7, 6, dtype=F64), torch.rand(2, 7, dtype=F64).cumsum(-1), [], math.inf
    for gated, kind, at in ((False, "learned", times), (True, "rope", None), (True, "learned", times[0])):
        layer = drawn(AdaptiveFilterAttention(6, 2, 4, context_len=12, frequencies=kind, gated=gated))
        mu = (1 - torch.sigmoid(layer.decay)) * 10 / 24 + 1e-5
        omega = 10000 ** (-torch.arange(4, dtype=F64) / 4).repeat(2, 1) if layer.turns is None else layer.turns * (10 * 2 * math.pi / 24)
        noises = {name: softplus(p) for name, p in (("sigma2", layer.process), ("eta2", layer.measured), ("gamma2", layer.anchor))}
        known = {"mu": mu, "omega": omega, **noises, "nu": softplus(layer.robustness), "tau2": softplus(layer.temperature) ** 2}
        q, k, v = (torch.complex(*split(y(x), 2).chunk(2, -1)) for y in (layer.q, layer.k, layer.v))
        place = torch.arange(7, dtype=F64) if at is None else at
        place = place.expand(2, -1) if place.dim() == 1 else place

        def out(o: Tensor, layer: AdaptiveFilterAttention = layer) -> Tensor:
            return layer.out(joined(torch.cat((o.real, o.imag), -1)))  # type: ignore[no-any-return]

        o, _, _, total = filter_truth(known, q, k, v, place)
        later = torch.exp(torch.complex(-mu[:, None].expand(2, 4), omega))[:, None]
        own.append(naive.gap(layer.predict(x, at), out(o * later)))
        prior = noises["sigma2"] / (2 * mu) + noises["gamma2"]  # the variance of a token carried for ever
        gate = 1 / (1 + torch.exp(-total) / prior[:, None])
        own.append(naive.gap(layer(x, at), out(o * gate[..., None] if gated else o)))
        same = filter_truth({**known, "nu": torch.ones(2, dtype=F64)}, q, k, v, place).out
        other = min(other, naive.gap(layer.predict(x, at), out(same * later)))
    start = AdaptiveFilterAttention(6, 2, 4, context_len=12, noise=0.3)
    values = ((start.process, 0.3), (start.measured, 0.3), (start.anchor, 0.3), (start.robustness, 1.0), (start.temperature, 1.0))
    own.append(float(max(abs(softplus(p.detach()) - value).max() for p, value in values) > 1e-6))
    return max(own), other


def filtering_error(kind: str, steps: int = 80) -> float:
    """Mean squared error of filtering a noisy damped oscillator, after a short run."""
    torch.manual_seed(0)
    n = 48
    if kind == "afa":
        layer: torch.nn.Module = AdaptiveFilterAttention(2, 1, 8, context_len=n)
    else:
        layer = torch.nn.ModuleDict({name: torch.nn.Linear(2, 16) for name in "qkv"} | {"out": torch.nn.Linear(16, 2)})
    rope = Rope()

    def run(x: Tensor) -> Tensor:
        if kind == "afa":
            return layer(x)  # type: ignore[no-any-return]
        q, k, v = (layer[name](x)[:, None] for name in "qkv")  # type: ignore[index]
        at = torch.arange(n)
        return layer["out"](attend(rope.rotate(q, at), rope.rotate(k, at), v, mask=Causal())[:, 0])  # type: ignore[index, no-any-return]

    optimiser = torch.optim.Adam(layer.parameters(), 1e-2)
    noisy, clean = oscillator(256, n, seed=0)
    for _ in range(steps):
        pick = torch.randint(256, (32,))
        loss = (run(noisy[pick]) - clean[pick]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    noisy, clean = oscillator(128, n, seed=1)
    with torch.no_grad():
        return float((run(noisy) - clean).square().mean())


@check(
    "afa",
    "filtering a noisy damped oscillator (noise of variance 0.25), 80 steps: mean squared error",
    below=0.03,
    control="causal softmax with RoPE",
)
def _() -> tuple[float, float]:
    return filtering_error("afa"), filtering_error("softmax")
