"""DR-RL: what its checks do not hold: gradients, joint training, warm starts, sharing, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from regard import RegardError
from regard.algebra import Causal, Padding
from regard.nn import Decoder
from regard.nn.low_rank_scores import energy_ratio, extended, spectral_norm, svd_basis, warm_basis
from regard.nn.rank_policy import RankPolicy, RankTraining, choose, rank_reward
from regard.zoo.systems.dr_rl import DynamicRankAttention


def model(depth=1, **options) -> Decoder:
    torch.manual_seed(0)
    layers = [DynamicRankAttention(16, 2, (2, 4, 6), segment=6, causal=True, **options) for _ in range(depth)]
    return Decoder(layers, vocab=12, dim=16, layers=depth)


def test_joint_training_learns_the_task_and_the_policy():
    lm = model()
    training = RankTraining(lm, lr=2e-2)
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    losses = []
    for step in range(20):
        start = torch.randint(12, (8, 1), generator=torch.Generator().manual_seed(step))
        ids = (start + torch.arange(13)) % 12
        loss, reward = training.step(F.cross_entropy(lm(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))
        losses.append(loss)
        assert -5 < reward < 1
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in lm.named_parameters())
    assert training.layers[0].explore == pytest.approx(0.1 * 0.995**20)
    assert not (training.layers[0].decided[:, 0]).any() and training.layers[0].decided[:, 1:].all()
    assert torch.allclose(training.layers[0].fidelity[:, 0], torch.ones(8))
    lm.eval()
    assert torch.allclose(lm(ids[:, :9]), lm(ids)[:, :9], atol=1e-5)


def test_policy_loss_by_hand():
    torch.manual_seed(0)
    layer = DynamicRankAttention(8, 2, (1, 2, 4), segment=3, explore=0.0, start=2, dropout=0.0).double()
    training = RankTraining(layer, lr=0.0, weight=0.5, alpha=0.9, beta=0.2, gamma=0.05, momentum=0.8, decay=0.5)
    layer.threshold.fill_(100.0)
    base = None
    for _ in range(3):
        layer.zero_grad()
        x = torch.randn(4, 7, 8, dtype=torch.float64)
        layer(x)
        r = 0.9 * layer.fidelity - 0.2 * layer.cost - 0.05 * layer.change
        assert torch.equal(r, rank_reward(layer.fidelity, layer.cost, layer.change, 0.9, 0.2, 0.05))
        used = float(r.mean()) if base is None else base
        truth = torch.autograd.grad(-(layer.log_prob * (r - used)).mean() * 0.5, layer.policy.head[2].weight, retain_graph=True)[0]
        training.step(torch.zeros(()))
        assert torch.allclose(layer.policy.head[2].weight.grad, truth, rtol=1e-5)
        assert layer.q.weight.grad is None or not layer.q.weight.grad.any()  # rewards teach the policy alone
        base = float(r.mean()) if base is None else 0.8 * base + 0.2 * float(r.mean())
        assert training.baseline == pytest.approx(base)
    assert float(layer.threshold) == 12.5 and copy.deepcopy(layer).log_prob is None


def test_fidelity_and_cost_are_of_the_choice():
    torch.manual_seed(0)
    layer = DynamicRankAttention(8, 2, (1, 2), segment=4).double()
    x, keep = torch.randn(3, 9, 8, dtype=torch.float64), torch.arange(9) < torch.tensor([[9], [6], [3]])
    out = layer(x, keep=keep)
    ranks = torch.tensor(layer.ranks)[layer.chosen]
    assert torch.allclose(out, layer(x, keep=keep, ranks=ranks))
    whole = layer(x, keep=keep, ranks=torch.full((3, 3), 4))
    near = F.cosine_similarity(whole, layer(x, keep=keep, ranks=ranks), dim=-1)
    for i, (a, b) in enumerate(((0, 4), (4, 8), (8, 9))):
        there = keep[:, a:b].double()
        truth = (near[:, a:b] * there).sum(1) / there.sum(1).clamp_min(1)
        assert torch.allclose(layer.fidelity[:, i].double(), truth, atol=1e-6)
        n, r = b - a, ranks[:, i].double()
        assert torch.allclose(layer.cost[:, i].double(), (n * 9 * r + (n + 9) * 4 * r + n * r**2) / (n * 9 * 4), rtol=1e-6)
    assert not layer.decided.any()


def test_warm_starts_follow_slow_directions():
    torch.manual_seed(0)
    mix = torch.randn(8, 8, dtype=torch.float64) * torch.logspace(0, -3, 8, dtype=torch.float64)
    cold = DynamicRankAttention(8, 1, (2, 3), segment=16, causal=True).double().eval()
    warm = DynamicRankAttention(8, 1, (2, 3), segment=16, causal=True, iterations=8).double().eval()
    warm.load_state_dict(cold.state_dict())
    x, ranks = torch.randn(2, 64, 8, dtype=torch.float64) @ mix, torch.full((2, 4), 3)
    gap = (cold(x, ranks=ranks) - warm(x, ranks=ranks)).abs().max()
    assert 0 < gap < 1e-3
    warm.iterations = 1
    assert (cold(x, ranks=ranks) - warm(x, ranks=ranks)).abs().max() > gap


def test_gradients_with_given_directions():
    torch.manual_seed(0)
    layer = DynamicRankAttention(8, 2, (2, 3), segment=4, causal=True).double().eval()
    x, ranks = torch.randn(2, 8, 8, dtype=torch.float64), torch.tensor([[4, 2], [4, 3]])
    parameters = (layer.v.weight, layer.out.weight)  # directions do not hang on these

    def run(v, out):
        return torch.func.functional_call(layer, {"v.weight": v, "out.weight": out}, (x,), {"ranks": ranks})

    assert torch.autograd.gradcheck(run, parameters)


def test_a_policy_may_be_shared_and_reads_energy():
    policy = RankPolicy(16, 3, energy=True)
    lm = model(2, policy=policy)
    lm(torch.randint(12, (2, 20)))
    assert len({id(m) for m in lm.modules() if isinstance(m, RankPolicy)}) == 1
    with pytest.raises(RegardError, match="energy is None"):
        policy(torch.randn(1, 4, 16), torch.randn(1, 9), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_anywhere_empty_and_half(causal):
    torch.manual_seed(0)
    layer = DynamicRankAttention(16, 2, (2, 4), segment=4, causal=causal).eval()
    x = torch.randn(2, 11, 16)
    keep = torch.ones(2, 11, dtype=torch.bool)
    keep[0, :3] = False
    keep[1] = False
    bad = torch.where(keep[..., None], x, torch.nan)
    assert layer(bad, mask=Padding(), keep=keep).isfinite().all()
    assert torch.allclose(layer(bad, keep=keep), layer(x, keep=keep))
    assert layer.train()(x[:0]).shape == (0, 11, 16) and layer(x[:, :0]).shape == (2, 0, 16)
    assert layer(x[:1]).shape == (1, 11, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).isfinite().all()
    assert layer.half().eval()(x.half()).isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 15},
        {"ranks": ()},
        {"ranks": (4, 2)},
        {"ranks": (0, 2)},
        {"start": 3},
        {"segment": 0},
        {"iterations": -1},
        {"explore": 1.5},
        {"threshold": -1.0},
        {"threshold": float("nan")},
        {"svd_gradient": True, "causal": True},
        {"svd_gradient": True, "iterations": 1},
    ],
)
def test_options_are_refused(options):
    with pytest.raises(RegardError, match="expected"):
        DynamicRankAttention(**{"dim": 16, "heads": 2, "ranks": (2, 4), **options})


def test_calls_are_refused():
    layer, x = DynamicRankAttention(16, 2, (2, 4), segment=4), torch.randn(2, 9, 16)
    for given in ({"mask": Causal()}, {"mask": Padding()}, {"ranks": torch.ones(2, 2).long()}, {"ranks": torch.zeros(2, 3).long()}):
        with pytest.raises(RegardError, match="expected"):
            layer(x, **given)
    with pytest.raises(RegardError, match="finite"):
        layer(torch.full_like(x, torch.nan))
    with pytest.raises(RegardError, match="coincide"):
        DynamicRankAttention(16, 2, (2, 4), svd_gradient=True)(x[:, :1].expand(2, 9, 16))
    with pytest.raises(RegardError, match="safe"):
        choose(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(RegardError, match="explore"):
        choose(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), explore=2.0)
    with pytest.raises(RegardError, match="divide"):
        RankPolicy(16, 3, heads=3)
    with pytest.raises(RegardError, match="expected"):
        RankTraining(torch.nn.Linear(2, 2))
    with pytest.raises(RegardError, match="expected"):
        RankTraining(layer, decay=0.0)
    basis = svd_basis(x, 3)
    for call in (lambda: svd_basis(x, 0), lambda: extended(x, basis, 0), lambda: spectral_norm(x, -1)):
        with pytest.raises(RegardError, match="expected"):
            call()
    for start, iterations in ((torch.randn(2, 5, 3), 1), (basis.vectors, 0)):
        with pytest.raises(RegardError, match="expected"):
            warm_basis(x, start, iterations)
    assert energy_ratio(torch.zeros(3), 2) == 0 and float(spectral_norm(torch.zeros(3, 2))) == 0


@pytest.mark.parametrize("iterations", [0, 2])
def test_the_policy_reads_how_much_energy_each_rank_keeps(iterations):
    """Of all the singular values there are where the SVD is exact, else of those that subspace iteration follows."""
    torch.manual_seed(0)
    layer, seen = DynamicRankAttention(8, 2, (1, 2), segment=4, causal=True, energy=True, iterations=iterations).double().eval(), []
    layer.policy.register_forward_pre_hook(lambda module, args: seen.append(args[4]))
    x = torch.randn(2, 8, 8, dtype=torch.float64)
    layer(x)
    truth = torch.zeros(2, 2, dtype=torch.float64)
    for one in (layer.q, layer.k):
        s = torch.linalg.svdvals(one(x)[:, :4].unflatten(-1, (2, 4)).transpose(1, 2)).square()[..., : None if iterations == 0 else 2]
        truth += torch.stack([(s[..., :rank].sum(-1) / s.sum(-1)).mean(1) for rank in (1, 2)], -1) / 2
    assert len(seen) == 1 and torch.allclose(seen[0], truth, atol=1e-6)
