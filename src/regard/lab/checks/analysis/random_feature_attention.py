"""Checks of random-feature-attention."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.analysis.random_feature_attention import RandomFeatureAttention, RandomFeatureMLP, drawn, sample_complexity_curve, target

D, N, HEADS = 6, 8, 600


def error(name: str, model: RandomFeatureAttention | RandomFeatureMLP, count: int = 400) -> float:
    train, test = drawn(name, count, D, N, seed=1), drawn(name, 800, D, N, seed=2)
    return sample_complexity_curve(model, train, test, [count]).errors[0]


@check(
    "random-feature-attention",
    "the layer by loops over heads and keys; drawn W have the stated mean and variance",
    below=1e-10,
    control="softmax in relu's place",
)
def _() -> tuple[float, float]:
    model = RandomFeatureAttention(3, 5, bias=1.0, dtype=F64)
    model.readout.copy_(torch.randn(20, dtype=F64))
    x0, x = torch.randn(2, 3, dtype=F64), torch.randn(2, 4, 3, dtype=F64)
    v, truth, soft = model.readout.view(5, 4), torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64)
    one = torch.ones(1, dtype=F64)
    for b in range(2):
        for m in range(5):
            scores = torch.stack([torch.cat((x0[b], one)) @ model.matrices[m] @ torch.cat((x[b, i], one)) for i in range(4)])
            reads = torch.stack([v[m] @ torch.cat((x[b, i], one)) for i in range(4)])
            truth[b] += (scores.clamp_min(0) * reads).sum() / 4
            soft[b] += scores.softmax(0) @ reads
    wide = [RandomFeatureAttention(4, 4000, bias=bias, dtype=F64).matrices for bias in (0.0, 1.0)]
    spread = max(abs(float(w.var(0).mean()) - s) for w, s in zip(wide, (1 / 4, 1 / 16), strict=True))
    middle = torch.diag(torch.tensor([1.0, 1, 1, 1, 0], dtype=F64))
    shifted = float((wide[1].mean(0) - middle).abs().max()) + float(wide[0].mean(0).abs().max())
    own = naive.gap(model(x0, x), truth) if spread < 0.01 and shifted < 0.1 else 1.0
    return own, naive.gap(model(x0, x), soft)


@check(
    "random-feature-attention", "f1, 400 examples: error over variance", below=0.1, control="the random-feature MLP of as many parameters"
)
def _() -> tuple[float, float]:
    return error("f1", RandomFeatureAttention(D, HEADS)), error("f1", RandomFeatureMLP(D, N, HEADS))


@check(
    "random-feature-attention",
    "f2, 1000 examples: error of the biased sampler over that of the unbiased one, itself below the MLP's",
    below=0.85,
    control="the biased sampler's variance without its mean",
)
def _() -> tuple[float, float]:
    plain, mlp = error("f2", RandomFeatureAttention(D, HEADS), 1000), error("f2", RandomFeatureMLP(D, N, HEADS), 1000)
    biased, narrow = (error("f2", RandomFeatureAttention(D, HEADS, bias=bias, std=0.25), 1000) for bias in (1.0, 0.0))
    return biased / plain if plain < 0.8 * mlp else 1.0, narrow / plain


@check("random-feature-attention", "keys permuted: change of a fitted attention's outputs", below=1e-10, control="the MLP's")
def _() -> tuple[float, float]:
    x0, x, y = drawn("f3", 60, D, N, dtype=F64)
    changes = []
    for model in (RandomFeatureAttention(D, 20, dtype=F64), RandomFeatureMLP(D, N, 20, dtype=F64)):
        model.fit(x0, x, y)
        changes.append(float((model(x0, x) - model(x0, x.flip(1))).abs().max()))
    return changes[0], changes[1]


@check("random-feature-attention", "ridge readout and targets against the normal equations and loops", below=1e-8, control="half the ridge")
def _() -> tuple[float, float]:
    x0, x, y = drawn("f1", 40, D, N, dtype=F64)
    model = RandomFeatureAttention(D, 6, dtype=F64)
    model.fit(x0, x, y, ridge=[0.3])
    phi = model.features(x0, x)

    def normal(strength: float) -> Tensor:
        return torch.linalg.solve(phi.T @ phi + strength * torch.eye(phi.shape[1], dtype=F64), phi.T @ y)

    b = torch.randn(D, dtype=F64)
    loops = {name: torch.zeros(40, dtype=F64) for name in ("f1", "f2", "f3")}
    for n in range(40):
        for i in range(N):
            along, near = float(x[n, i] @ b), float(x0[n] @ x[n, i])
            loops["f1"][n] += along**3 / N
            loops["f2"][n] += near**3 / N
            loops["f3"][n] += near**3 * along / N
    gaps = [naive.gap(target(name, x0, x, b, 3), truth) for name, truth in loops.items()]
    return max(*gaps, naive.gap(model.readout, normal(0.3))), naive.gap(model.readout, normal(0.15))
