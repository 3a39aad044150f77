"""Checks of policies made of several calls: Delta Attention, PBS-Attn, SampleAttention, HyperAttention."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ...algebra import Causal, Chosen, Sinks, Weighted, Window, bind
from ...algebra.blocks import probabilities
from ...algebra.permute import by_value
from ...catalog import get
from ...engine import attend
from ...mechanisms.selected.hyper import angular_order, exact, gray_rank, hyper_attention, merged
from ...mechanisms.selected.pbs import order_of, pbs_plan
from ...mechanisms.selected.sampleattention import column_set, cra
from .. import naive
from ..planted import local_and_columns, relative_error
from ..verification import check
from .selected import qkv, s_attend, selection_of

F64 = torch.float64
SPARSE = Weighted(mask=Causal() & (Window(64) | Sinks(4)))


@check("delta-attention", "stride 1 is dense causal attention", below=1e-12, control="stride 64")
def _() -> tuple[float, float]:
    q, k, v = qkv(400)
    truth = attend(q, k, v, mask=Causal())
    outs = [attend(q, k, v, get("delta-attention", sparse=SPARSE, stride=stride)) for stride in (1, 64)]
    return naive.gap(outs[0], truth), naive.gap(outs[1], truth)


@check(
    "delta-attention",
    "three sparse mechanisms, L = 1000, stride 64: equals the index formula, row by row",
    below=1e-12,
    control="rows recomputed, not held",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(1000)
    dense = attend(q, k, v, mask=Causal())
    own = other = 0.0
    for sparse in (SPARSE, get("hip", mask_k=128, sinks=4, window=32), get("moba", block_size=64, top_k=2)):
        s = attend(q, k, v, sparse, mask=Causal())
        head = 1000 - (1000 % 64 + 128)
        truth = torch.stack(
            [dense[:, :, i] if i >= head else s[:, :, i] + dense[:, :, i // 64 * 64] - s[:, :, i // 64 * 64] for i in range(1000)], 2
        )
        outs = [attend(q, k, v, get("delta-attention", sparse=sparse, stride=64, mode=mode)) for mode in ("delta", "recompute")]
        own, other = max(own, naive.gap(outs[0], truth)), max(other, naive.gap(outs[1], truth))
    return own, other


def cosine_to_dense(mode: str, stride: int) -> float:
    """Mean cosine to the dense output over the corrected rows of planted local heads, three of them."""
    found = []
    for seed in range(3):
        q, k, v = local_and_columns(1024, 24, seed)
        truth = attend(q, k, v, mask=Causal())
        out = attend(q, k, v, get("delta-attention", sparse=SPARSE, stride=stride, mode=mode))
        found.append(float(torch.cosine_similarity(out, truth, -1)[:, :, :880].mean()))
    return sum(found) / 3


@check(
    "delta-attention",
    "planted local heads, stride 16: cosine to the dense rows, above the sparse ones' by",
    above=0.05,
    control="rows recomputed, not held",
)
def _() -> tuple[float, float]:
    base = cosine_to_dense("sparse-only", 16)
    return cosine_to_dense("delta", 16) - base, cosine_to_dense("recompute", 16) - base


@check("delta-attention", "the cosine grows as the stride falls 64, 16, 4, 1: falls", below=0, control="strides rising")
def _() -> tuple[float, float]:
    found = [cosine_to_dense("delta", stride) for stride in (64, 16, 4, 1)]
    return tuple(float(sum(b < a for a, b in pairwise(order))) for order in (found, found[::-1]))  # type: ignore[return-value]


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


@check(
    "sampleattention",
    "alpha = 1 is dense causal attention, and 0.999999 nearly so by window and columns",
    below=1e-4,
    control="alpha = 0.8",
)
def _() -> tuple[float, float]:
    q, k, v = local_and_columns(512)
    truth = attend(q, k, v, mask=Causal())
    outs = [attend(q, k, v, get("sampleattention", alpha=alpha, row_ratio=1.0)) for alpha in (1.0, 1 - 1e-6, 0.8)]
    exact_gap = naive.gap(outs[0], truth)
    return exact_gap * 1e6 + naive.gap(outs[1], truth), naive.gap(outs[2], truth)


@check(
    "sampleattention",
    "planted head: least of mean CRA over all rows minus alpha, alpha 0.8, 0.9, 0.95",
    above=-0.03,
    control="window alone",
)
def _() -> tuple[float, float]:
    q, k, _ = local_and_columns()
    near = torch.arange(1024)[:, None] - torch.arange(1024) < 82
    own = [float(cra(q, k, column_set(q * 40**-0.5, k, alpha, 0.05, 82)[..., None, :] | near).mean()) - alpha for alpha in (0.8, 0.9, 0.95)]
    return min(own), float(cra(q, k, near).mean()) - 0.8


@check(
    "sampleattention",
    "planted head at alpha 0.95: relative error, falling with alpha",
    below=0.12,
    control="a window of 1.7 times the density",
)
def _() -> tuple[float, float]:
    q, k, v = local_and_columns()
    truth = attend(q, k, v, mask=Causal())
    errors = [relative_error(attend(q, k, v, get("sampleattention", alpha=alpha)), truth) for alpha in (0.8, 0.9, 0.95)]
    kept = column_set(q * 40**-0.5, k, 0.95, 0.05, 82)[..., None, :] | (torch.arange(1024)[:, None] - torch.arange(1024) < 82)
    size = int(1.7 * float((kept & torch.ones(1024, 1024, dtype=torch.bool).tril()).double().sum()) / 1024)
    window = relative_error(attend(q, k, v, mask=Causal() & Window(size)), truth)
    return errors[2] if errors == sorted(errors, reverse=True) else math.inf, window


@check(
    "sampleattention",
    "columns equal a loop, and the output attention over window and columns",
    below=1e-10,
    control="columns of the last rows alone",
)
def _() -> tuple[float, float]:
    q, k, v = local_and_columns(300, 8)
    window, rows = round(0.08 * 300), [round(x) for x in torch.linspace(19, 299, 15).tolist()]

    def columns(rows: list[int]) -> list[int]:
        mass, near = [0.0] * 300, 0.0
        for i in rows:
            p = (k[0, 0, : i + 1] @ q[0, 0, i] / math.sqrt(40)).softmax(0).tolist()
            for j, x in enumerate(p):
                if i - j < window:
                    near += x
                else:
                    mass[j] += x
        chosen: list[int] = []
        for j in sorted(range(300), key=lambda j: -mass[j]):
            if near >= 0.95 * len(rows):
                break
            near += mass[j]
            chosen.append(j)
        return chosen

    def output(chosen: list[int]) -> Tensor:
        at = torch.arange(300)
        keep = (at[:, None] - at < window) | torch.isin(at, torch.tensor(chosen, dtype=torch.long))
        return s_attend(q, k, v, (keep & (at <= at[:, None]))[None])

    own = attend(q, k, v, get("sampleattention"))
    return naive.gap(own, output(columns(rows))), naive.gap(own, output(columns(list(range(285, 300)))))


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
