"""Checks of hyperattention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import qkv
from regard.lab.planted import relative_error
from regard.lab.verification import check
from regard.zoo.sparse.hyperattention import angular_order, exact, gray_rank, hyper_attention, merged


@check(
    "hyperattention",
    "one block of all keys is dense; causal with blocks of every sub-length is dense causal",
    below=1e-10,
    control="log-sum-exps ignored in the merge",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(256)
    dense, causal = attend(q, k, v), attend(q, k, v, mask=Causal())
    own = max(
        naive.gap(attend(q, k, v, get("hyperattention", block_size=256, min_length=1)), dense),
        naive.gap(attend(q, k, v, get("hyperattention", block_size=256, min_length=32), mask=Causal()), causal),
        naive.gap(attend(q, k, v, get("hyperattention", min_length=256), mask=Causal()), causal),
    )
    scaled = q / math.sqrt(8)
    parts = [
        exact(scaled[:, :, 128:], k[:, :, :128], v[:, :, :128]),
        exact(scaled[:, :, 128:], k[:, :, 128:], v[:, :, 128:], torch.ones(128, 128, dtype=torch.bool).tril()),
    ]
    assert naive.gap(merged(*parts)[0], causal[:, :, 128:]) < 1e-10
    return own, naive.gap((parts[0][0] + parts[1][0]) / 2, causal[:, :, 128:])


def planted_clusters(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=generator)

    centres = torch.nn.functional.normalize(draw(256, 32), dim=-1)
    means = draw(256, 32)
    labels_q, labels_k = (torch.arange(4096)[torch.randperm(4096, generator=generator)] % 256 for _ in range(2))
    q, k = (9 * centres[labels] + 0.1 * draw(4096, 32) for labels in (labels_q, labels_k))
    return q[None, None], k[None, None], (means[labels_k] + 0.5 * draw(4096, 32))[None, None]


def hyper_errors() -> tuple[float, float, float]:
    """Mean relative errors over 3 seeds: HyperAttention, as many sampled keys, unsorted blocks."""
    own, uniform, unsorted = [], [], []
    for seed in range(3):
        q, k, v = planted_clusters(seed)
        truth = attend(q, k, v, scale=1 / 3)
        own.append(relative_error(hyper_attention(q, k, v, block_size=64, samples=256, min_length=1, seed=seed, scale=1 / 3)[0], truth))
        drawn = torch.randint(4096, (320,), generator=torch.Generator().manual_seed(seed))
        uniform.append(relative_error(attend(q, k[:, :, drawn], v[:, :, drawn], scale=1 / 3), truth))
        blocks = [x.unflatten(2, (64, 64)).flatten(0, 2)[:, None] for x in (q, k, v)]
        unsorted.append(relative_error(attend(*blocks, scale=1 / 3).squeeze(1).unflatten(0, (1, 1, 64)).flatten(2, 3), truth))
    return sum(own) / 3, sum(uniform) / 3, sum(unsorted) / 3


@check(
    "hyperattention",
    "256 planted clusters, 4096 tokens: relative error over that of 320 uniformly sampled keys",
    below=0.55,
    control="blocks without the sort",
)
def _() -> tuple[float, float]:
    own, uniform, unsorted = hyper_errors()
    return own / uniform if own <= 0.35 else math.inf, unsorted / uniform


@check(
    "hyperattention",
    "neighbouring buckets differ in one bit: mean bits between codes of consecutive ranks",
    below=1.0,
    control="binary order",
)
def _() -> tuple[float, float]:
    bits = torch.tensor([[(code >> b) & 1 for b in range(7)] for code in range(128)], dtype=torch.bool)
    ordered = bits[gray_rank(bits).argsort()]
    return tuple(float((x[1:] != x[:-1]).double().sum(-1).mean()) for x in (ordered, bits))  # type: ignore[return-value]


@check(
    "hyperattention",
    "gradients with the hashes held fixed equal autograd of the merged softmax written out",
    below=1e-9,
    control="without log(N / m)",
)
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(64, 8, 1))
    out, _ = hyper_attention(q, k, v, block_size=16, samples=8, min_length=1, seed=3)
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(8, 7, generator=generator, dtype=F64)
    order_q, order_k = (angular_order(x.detach(), directions)[0, 0] for x in (q / math.sqrt(8), k))
    drawn = torch.randint(64, (1, 1, 8), generator=generator)[0, 0]

    def written(correction: float) -> Tensor:
        rows: dict[int, Tensor] = {}
        for place, i in enumerate(order_q.tolist()):
            near = [(int(order_k[j]), 0.0) for j in range(place // 16 * 16, place // 16 * 16 + 16)]
            far = [(int(order_k[j]), correction) for j in drawn.tolist() if j // 16 != place // 16]
            s = torch.stack([k[0, 0, j] @ q[0, 0, i] / math.sqrt(8) + extra for j, extra in near + far])
            rows[i] = s.softmax(0) @ v[0, 0, [j for j, _ in near + far]]
        return torch.stack([rows[i] for i in range(64)])[None, None]

    seed = torch.randn_like(out)

    def gap(truth: Tensor) -> float:
        pairs = zip(
            (out, *torch.autograd.grad((out * seed).sum(), (q, k, v), retain_graph=True)),
            (truth, *torch.autograd.grad((truth * seed).sum(), (q, k, v))),
            strict=True,
        )
        return max(naive.gap(a, b) for a, b in pairs)

    return gap(written(math.log(8.0))), gap(written(0.0))
