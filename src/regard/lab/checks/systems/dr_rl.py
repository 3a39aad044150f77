"""Checks of dr-rl."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn, joined, split
from regard.lab.verification import check
from regard.nn.low_rank_scores import (
    energy_ratio,
    extended,
    factors,
    output_bound,
    score_bound,
    score_flops,
    spectral_norm,
    svd_basis,
    tail,
    warm_basis,
    weight_bound,
)
from regard.nn.rank_policy import RankPolicy, RankTraining, choose, rank_reward
from regard.zoo.systems.dr_rl import DynamicRankAttention


def cut(x: Tensor, rank: int, seen: Tensor | None = None) -> Tensor:
    """x's form of a rank by its own singular vectors, put together again (seen: by those of other rows)."""
    if seen is not None:
        v = torch.linalg.svd(seen)[2][..., :rank, :]
        return x @ v.mT @ v
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return u[..., :rank] @ torch.diag_embed(s[..., :rank]) @ v[..., :rank, :]


def by_hand(layer: DynamicRankAttention, x: Tensor, ranks: Tensor, keep: Tensor, seen: bool = True) -> Tensor:
    """Row by row, segment by segment, head by head. seen: causal directions are of the tokens before a segment, not of the segment too."""
    width, size, outs = layer.dim // layer.heads, layer.segment or x.shape[1], []
    for b in range(len(x)):
        tokens = x[b][keep[b]][None]  # padding behind
        q, k, v = (split(tokens @ one.weight.T + one.bias, layer.heads)[0] for one in (layer.q, layer.k, layer.v))
        row = torch.zeros(layer.heads, x.shape[1], width, dtype=x.dtype)
        for at in range(0, tokens.shape[1], size):
            stop = min(at + size, tokens.shape[1])
            end, r = (stop, int(ranks[b, at // size])) if layer.causal else (tokens.shape[1], int(ranks[b, at // size]))
            if layer.causal:
                past = at if seen else stop
                full = at < layer.ranks[-1] or r >= width
                qr, kr = (t if full else cut(t, r, t[:, :past]) for t in (q, k))
            else:
                qr, kr = (t if r >= width else cut(t, r) for t in (q, k))
            s = qr[:, at:stop] @ kr[:, :end].mT / width**0.5
            if layer.causal:
                s = s.masked_fill(torch.arange(end) > torch.arange(at, stop)[:, None], -torch.inf)
            row[:, at:stop] = s.softmax(-1) @ v[:, :end]
        outs.append(joined(row[None])[0])
    return torch.stack(outs) @ layer.out.weight.T + layer.out.bias


@check(
    "dr-rl",
    "a layer at ranks given a row and segment, both ways, ragged segments, padding: gap to scores of cut and multiplied queries and keys",
    below=1e-9,
    control="one rank fewer where it is not full",
)
def _() -> tuple[float, float]:
    own, other = [], []
    x, keep = torch.randn(3, 19, 12, dtype=F64), torch.arange(19) < torch.tensor([[19], [14], [10]])
    for causal in (False, True):
        layer = drawn(DynamicRankAttention(12, 2, (2, 3, 5), segment=7, causal=causal)).eval()
        ranks = torch.tensor([[2, 3, 5], [6, 2, 9], [4, 5, 2]])
        found = torch.where(keep[..., None], layer(torch.where(keep[..., None], x, torch.nan), keep=keep, ranks=ranks), 0.0)
        own.append(naive.gap(found, torch.where(keep[..., None], by_hand(layer, x, ranks, keep), 0.0)))
        fewer = torch.where(ranks < 6, ranks - 1, ranks)
        other.append(naive.gap(found, torch.where(keep[..., None], by_hand(layer, x, fewer, keep), 0.0)))
        whole = torch.full((3, 3), 6)
        own.append(naive.gap(layer(x[:1], ranks=whole[:1]), by_hand(layer, x[:1], whole, torch.ones_like(keep))))
    peeking = by_hand(layer, x, ranks, keep, seen=False)
    other.append(naive.gap(found, torch.where(keep[..., None], peeking, 0.0)))
    return max(own), min(other)


@check(
    "dr-rl",
    "with svd_gradient, values and gradients are those of a truncated SVD that is differentiated: gap",
    below=1e-8,
    control="directions without a gradient",
)
def _() -> tuple[float, float]:
    x, gaps = torch.randn(2, 9, 8, dtype=F64, requires_grad=True), []
    for through in (True, False):
        torch.manual_seed(3)
        layer = drawn(DynamicRankAttention(8, 2, (2, 3), svd_gradient=through)).eval()
        leaves = (x, layer.q.weight, layer.k.weight, layer.v.weight, layer.out.weight)
        truth = by_hand(layer, x, torch.tensor([[2], [3]]), torch.ones(2, 9, dtype=torch.bool))
        gaps.append(gap_with_gradients(layer(x, ranks=torch.tensor([[2], [3]])), truth, leaves))
    return gaps[0], gaps[1]


@check(
    "dr-rl",
    "scores of factors == scores of cut queries and keys, and at all directions the whole ones: gap",
    below=1e-9,
    control="rank 5 of 6",
)
def _() -> tuple[float, float]:
    q, k = torch.randn(3, 17, 8, dtype=F64), torch.randn(3, 11, 8, dtype=F64)
    vq, vk = svd_basis(q), svd_basis(k)

    def scores(r: int) -> Tensor:
        a, b = factors(q, k, vq.vectors[..., :r], vk.vectors[..., :r])
        return a @ b.mT

    own = max(naive.gap(scores(6), cut(q, 6) @ cut(k, 6).mT), naive.gap(scores(8), q @ k.mT))
    return own, naive.gap(scores(5), cut(q, 6) @ cut(k, 6).mT)


@check(
    "dr-rl",
    "200 draws of Q, K, V and two ranks: the worst change of scores, weights and outputs over its bound, and the tail's error times 1e10",
    below=1.0,
    control="bounds of the next smaller step",
)
def _() -> tuple[float, float]:
    worst, other = 0.0, 0.0
    for draw in range(200):
        g = torch.Generator().manual_seed(draw)
        n, m, d = (int(torch.randint(low, 24, (1,), generator=g)) for low in (4, 4, 5))
        q, k, v = (torch.randn(size, d, generator=g, dtype=F64) * torch.logspace(0, -1, d) for size in (n, m, m))
        a, b = sorted(int(r) for r in torch.randperm(min(n, m, d), generator=g)[:2] + 1)
        sq, sk = (torch.linalg.svdvals(t) for t in (q, k))
        sa, sb = (cut(q, r) @ cut(k, r).mT / d**0.5 for r in (a, b))
        pa, pb = sa.softmax(-1), sb.softmax(-1)
        ds, dp = (sa - sb).norm(), (pa - pb).norm()
        spectral = torch.linalg.matrix_norm(pa - pb, 2)
        bound = score_bound(sq, sk, d, b, a)
        bounds = (bound, weight_bound(ds), output_bound(spectral, v), score_bound(sq, sk, d, a), weight_bound(bound))
        changes = (ds, dp, (pa @ v - pb @ v).norm(), (sa - q @ k.mT / d**0.5).norm(), dp)
        worst = max(worst, *(float(c / x) for c, x in zip(changes, bounds, strict=True)))
        worst = max(
            worst,
            1e10 * abs(float(tail(sq, a, b) - (cut(q, a) - cut(q, b)).norm())),
            1e10 * abs(float(tail(sk, a) - (cut(k, a) - k).norm())),
        )
        if b - a > 1:
            other = max(other, float((cut(q, a) - cut(q, b)).norm() / tail(sq, a, b - 1)))
    return worst, other


@check(
    "dr-rl",
    "a basis grown or cut to another rank, and 40 warm steps from a drawn start == a fresh SVD: gap of projections and singular values",
    below=1e-8,
    control="one warm step",
)
def _() -> tuple[float, float]:
    x, own = torch.randn(3, 30, 10, dtype=F64) * torch.logspace(0, -3, 10, dtype=F64), []
    start = torch.linalg.qr(torch.randn(3, 10, 4, dtype=F64))[0]

    def gap(basis: object, r: int) -> float:
        _, s, v = torch.linalg.svd(x)
        truth, vectors, sigma = v[:, :r].mT @ v[:, :r], basis.vectors, basis.sigma  # type: ignore[attr-defined]
        return max(naive.gap(vectors @ vectors.mT, truth), naive.gap(sigma, s[:, :r]))

    for a, b in ((2, 6), (6, 3), (4, 10), (5, 5)):
        own.append(gap(extended(x, svd_basis(x, a), b), b))
    own.append(gap(warm_basis(x, start, 40), 4))
    return max(own), gap(warm_basis(x, start, 1), 4)


@check(
    "dr-rl",
    "power iterations by hand, the ratio of energy, FLOPs, the reward and the statistics: worst error",
    below=1e-9,
    control="one iteration fewer",
)
def _() -> tuple[float, float]:
    x, start = torch.randn(2, 7, 5, dtype=F64), torch.randn(2, 5, dtype=F64)
    truth = []
    for m, v in zip(x, start, strict=True):
        for _ in range(3):
            v = m.T @ (m @ v)
            v = v / v.norm()
        truth.append((m @ v).norm())
    s = torch.tensor([3.0, 2.0, 1.0], dtype=F64)
    layer = drawn(DynamicRankAttention(6, 2))
    numbers = [f(one.weight) for one in (layer.q, layer.k, layer.v) for f in (torch.mean, torch.var, torch.norm)]
    errors = [
        naive.gap(spectral_norm(x, start=start), torch.stack(truth)),
        abs(float(energy_ratio(s, 2)) - 13 / (14 + 1e-8)),
        abs(score_flops(5, 7, 3, 8) - 2 * (5 * 7 * 3 + 12 * 8 * 3 + 5 * 9)) + abs(score_flops(5, 7, 8, 8) - 2 * 5 * 7 * 8),
        abs(float(rank_reward(*torch.tensor([0.9, 0.5, 2.0], dtype=F64))) - (0.9 - 0.05 * 0.5 - 0.1 * 2)),
        naive.gap(layer.statistics(), torch.stack(numbers)),
    ]
    return max(errors), naive.gap(spectral_norm(x, 2, start), torch.stack(truth))


@check("dr-rl", "the policy's logits by hand, with padding and energy: gap", below=1e-9, control="without padding")
def _() -> tuple[float, float]:
    policy = drawn(RankPolicy(6, 5, energy=True)).eval()
    x, stats, last, energy = (
        torch.randn(2, 9, 6, dtype=F64),
        torch.randn(2, 9, dtype=F64),
        torch.tensor([4, 1]),
        torch.rand(2, 5, dtype=F64),
    )
    keep = torch.arange(9) < torch.tensor([[9], [5]])
    states = []
    for b in range(2):
        n = int(keep[b].sum())
        padded = F.pad(x[b, :n], (0, 0, 1, 1))
        taps = sum(padded[i : i + n] @ policy.conv.weight[:, :, i].T for i in range(3)) + policy.conv.bias
        parts = (taps.clamp_min(0).mean(0), policy.stats.weight @ stats[b] + policy.stats.bias, policy.memory.weight[last[b]])
        assert policy.energy is not None
        states.append(torch.cat(parts) + policy.energy.weight @ energy[b] + policy.energy.bias)
    h = torch.stack(states)
    for block in policy.encoder.layers:  # one token attends to itself alone
        attention = block.self_attn  # type: ignore[union-attr]
        value = h @ attention.in_proj_weight[256:].T + attention.in_proj_bias[256:]  # type: ignore[union-attr, index, operator]
        h = block.norm1(h + attention.out_proj(value))  # type: ignore[union-attr, operator]
        h = block.norm2(h + block.linear2(block.linear1(h).clamp_min(0)))  # type: ignore[union-attr, operator]
    first, last_layer = policy.head[0], policy.head[2]
    truth = (h @ first.weight.T + first.bias).clamp_min(0) @ last_layer.weight.T + last_layer.bias  # type: ignore[operator, union-attr]
    shapes = float((h.shape[1], first.out_features, block.linear1.out_features) != (128, 64, 256))  # type: ignore[union-attr]
    return naive.gap(policy(x, stats, last, keep, energy), truth) + shapes, naive.gap(policy(x, stats, last, None, energy), truth)


@check("dr-rl", "of 1000 choices, exploring half the time, those that are unsafe", below=0.5, control="nothing masked")
def _() -> tuple[float, float]:
    layer = drawn(DynamicRankAttention(8, 2, (1, 2, 3, 4), start=1, explore=0.5)).train()
    x = torch.randn(1000, 6, 8, dtype=F64)
    q, k = (split(x @ one.weight.T + one.bias, 2) for one in (layer.q, layer.k))
    sq, sk = torch.linalg.svdvals(q), torch.linalg.svdvals(k)

    def step(s: Tensor, r: int) -> Tensor:
        return (s[..., min(r, 2) : max(r, 2)] ** 2).sum(-1).sqrt()

    bounds = torch.stack([0.25 * (step(sq, r) * sk[..., 0] + sq[..., 0] * step(sk, r)).amax(1) for r in layer.ranks], 1)  # 1/2 / sqrt(4)
    limit = float(bounds[bounds > 0].detach().median())

    def unsafe(threshold: float) -> float:
        layer.threshold.fill_(threshold)
        layer(x)
        assert len(layer.chosen[:, 0].unique()) > 1
        assert naive.gap(layer.change[:, 0], bounds.gather(1, layer.chosen)[:, 0]) < 1e-9
        return float((bounds.gather(1, layer.chosen)[:, 0] > limit).sum())

    return unsafe(limit), unsafe(torch.inf)


@check(
    "dr-rl",
    "explored shares of equal logits and of sharp ones, and log-probabilities of safe ranks: worst error",
    below=0.05,
    control="without exploring",
)
def _() -> tuple[float, float]:
    logits, safe = torch.tensor([3.0, 0.0, 5.0, 0.0]).expand(4000, 4), torch.tensor([True, True, False, True]).expand(4000, 4)
    probs = torch.tensor([20.0855, 1.0, 0.0, 1.0]) / 22.0855

    def shares(explore: float) -> Tensor:
        choice = choose(logits, safe, explore)
        taught = choice.log_prob[choice.log_prob != 0]
        assert abs(len(taught) / 4000 - (1 - explore)) < 0.05 and naive.gap(choice.probs[0], probs) < 1e-4
        assert set(taught.exp().mul(1e3).round().unique().tolist()) <= {909.0, 45.0}
        return torch.bincount(choice.chosen, minlength=4) / 4000

    mixed = 0.6 * probs + 0.4 * torch.tensor([1.0, 1.0, 0.0, 1.0]) / 3
    own = max(naive.gap(shares(0.4), mixed), naive.gap(shares(0.0), probs), float((choose(logits, safe, greedy=True).chosen != 0).sum()))
    return own, naive.gap(shares(0.0), mixed)


class Deaf(RankTraining):
    """The control: fidelity is noise."""

    def rewards(self) -> Tensor:
        for layer in self.layers:
            layer.fidelity = torch.rand_like(layer.fidelity)
        return super().rewards()


BETA, GAIN, LR = 0.25, 7.0, 2e-4


@functools.cache
def bandit(heard: bool, seed: int = 0) -> tuple[float, float]:
    """400 updates of the policy alone on inputs of true rank 4 and 12 -> (mean rank for the second less the first, reward above the best constant rank's)."""
    torch.manual_seed(seed)
    layer = DynamicRankAttention(16, 1, (4, 8, 12, 16), segment=None, start=-1, bias=False)
    mixes = [GAIN * torch.randn(rank, 16) * rank**-0.5 for rank in (4, 12)]

    def draw(each: int) -> Tensor:
        return torch.cat([torch.randn(each, 64, len(mix)) @ mix for mix in mixes])

    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.startswith("policy"))
    optimizer = torch.optim.AdamW(layer.policy.parameters(), LR, fused=True)
    training = (RankTraining if heard else Deaf)(layer, optimizer=optimizer, weight=1.0, beta=BETA, gamma=0.0)
    for _ in range(400):
        layer(draw(8))
        training.step(torch.zeros(()))
    layer.explore, x = 0.0, draw(64)
    layer.policy.eval()
    true = RankTraining(layer, beta=BETA, gamma=0.0)
    constant = []
    with torch.no_grad():
        layer(x)
        chosen, own = torch.tensor(layer.ranks)[layer.chosen[:, 0]].float(), float(true.rewards().mean())
        for rank in layer.ranks:
            layer(x, ranks=torch.full((128, 1), rank))
            constant.append(float(rank_reward(layer.fidelity, layer.cost, layer.change, 1.0, BETA, 0.0).mean()))
    return float(chosen[64:].mean() - chosen[:64].mean()), own - max(constant)


@check(
    "dr-rl",
    "inputs of true rank 4 and 12, 400 updates: mean rank chosen for the second, less that for the first",
    above=4.0,
    control="fidelity replaced by noise",
)
def _() -> tuple[float, float]:
    return bandit(True)[0], bandit(False)[0]


@check("dr-rl", "the same run: mean reward above that of the best constant rank", above=0.01, control="fidelity replaced by noise")
def _() -> tuple[float, float]:
    return bandit(True)[1], bandit(False)[1]
