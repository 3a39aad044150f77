"""Refusals and edges of querybank normalisation and norm loss."""

import copy

import pytest
import torch
from torch import nn

from regard import RegardError
from regard.zoo.vision.inverted_softmax import hubness, qb_norm, retrieval_metrics
from regard.zoo.vision.norm_loss import decoupled_norm, norm_loss, row_spread

S, BANK = torch.rand(6, 5), torch.rand(9, 5)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: qb_norm(S, BANK[:, :4]), id="inverted-softmax"),
        pytest.param(lambda: qb_norm(S[0], BANK), id="inverted-softmax"),
        pytest.param(lambda: qb_norm(S, BANK[:0]), id="inverted-softmax"),
        pytest.param(lambda: qb_norm(S.log() * float("inf"), BANK), id="inverted-softmax"),
        pytest.param(lambda: qb_norm(S, BANK, "softmax"), id="inverted-softmax"),
        pytest.param(lambda: qb_norm(S, BANK, k=6), id="inverted-softmax"),
        pytest.param(lambda: qb_norm(S, BANK, "csls", k=10), id="inverted-softmax"),
        pytest.param(lambda: qb_norm(S, BANK, "csls", beta=3.0), id="inverted-softmax"),
        pytest.param(lambda: qb_norm(S, BANK, "gc", k=3), id="inverted-softmax"),
        pytest.param(lambda: qb_norm(S, BANK, "is", k=3), id="inverted-softmax"),
        pytest.param(lambda: qb_norm(S, BANK, "gc", logs=True), id="inverted-softmax"),
        pytest.param(lambda: qb_norm(100 * S, BANK), id="inverted-softmax"),
        pytest.param(lambda: retrieval_metrics(S), id="inverted-softmax"),
        pytest.param(
            lambda: retrieval_metrics(S, torch.zeros(6, dtype=torch.long), keep=torch.zeros(6, dtype=torch.bool)), id="inverted-softmax"
        ),
        pytest.param(lambda: norm_loss(nn.LayerNorm(3)), id="norm-loss"),
        pytest.param(lambda: norm_loss([torch.ones(3)]), id="norm-loss"),
        pytest.param(lambda: decoupled_norm(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), nn.Linear(2, 2)), id="norm-loss"),
    ],
)
def test_refusals(call):
    with pytest.raises(RegardError, match="expected"):
        call()


def test_inverted_softmax_logarithms_stay_in_range_and_rank_alike():
    wide = qb_norm(100 * S, BANK, "is", logs=True)
    assert wide.isfinite().all() and (qb_norm(S, BANK, "is").argsort(1) == qb_norm(S, BANK, "is", logs=True).argsort(1)).all()


def test_inverted_softmax_leaves_untouched_rows_the_same_bits():
    s, bank = torch.randn(20, 8), torch.zeros(1, 8)
    bank[0, 3] = 1.0
    out = qb_norm(s, bank, beta=1.0)
    kept = s.argmax(1) != 3
    assert torch.equal(out[kept], s[kept]) and not torch.equal(out[~kept], s[~kept]) and kept.any() and (~kept).any()


def test_inverted_softmax_even_galleries_have_no_hubs_and_queries_may_be_left_out():
    assert hubness(torch.eye(5)) == 0
    found = retrieval_metrics(torch.eye(4), keep=torch.tensor([True, False, True, True]))
    assert found["R1"] == 100 and found["MedR"] == 1


def test_norm_loss_refuses_decay_beside_it_and_its_hook_ends():
    layer = nn.Linear(3, 2)
    with pytest.raises(RegardError, match="expected weight_decay=0"):
        decoupled_norm(torch.optim.AdamW(layer.parameters(), 0.1), layer)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    handle = decoupled_norm(optimizer, layer, 1.0)
    layer(torch.zeros(1, 3)).sum().backward()
    handle.remove()
    before = copy.deepcopy(layer.weight)
    optimizer.step()
    assert torch.equal(layer.weight, before)  # its gradient is zero


def test_norm_loss_of_zeros_is_finite_and_shared_weights_count_once():
    layer = nn.Linear(3, 2)
    layer.weight.data.zero_()
    norm_loss(layer).backward()
    assert layer.weight.grad.abs().max() == 0
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    decoupled_norm(optimizer, layer)
    optimizer.step()
    assert layer.weight.isfinite().all()
    twin = nn.Linear(3, 2)
    twin.weight = layer.weight
    assert float(norm_loss(nn.Sequential(layer, twin), 1.0).detach()) == 2 and list(row_spread(nn.Sequential(layer, twin))) == ["0.weight"]


def test_norm_loss_row_dimension_can_be_chosen():
    weight = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    assert float(norm_loss([weight], 1.0, row_dim=1)) == 16
    assert float(norm_loss([weight.half()], 1.0, row_dim=1)) == 16


def test_norm_loss_of_bare_tensors_is_of_their_rows():
    weights = [torch.randn(4, 6, 3), torch.randn(5, 2)]
    truth = sum(float((1 - row.flatten().norm()) ** 2) for weight in weights for row in weight)
    assert float(norm_loss(weights, 1.0)) == pytest.approx(truth, rel=1e-5)
    assert float(norm_loss(iter(weights), 0.5)) == pytest.approx(truth / 2, rel=1e-5)


def test_inverted_softmax_metrics_of_some_queries_and_hubness_by_hand():
    sims = torch.tensor([[0.1, 0.9, 0.3], [0.2, 0.8, 0.1], [0.3, 0.6, 0.5], [0.7, 0.1, 0.2]])
    truth = torch.tensor([1, 1, 0, 2])
    whole, some = retrieval_metrics(sims, truth), retrieval_metrics(sims, truth, torch.tensor([True, False, False, True]))
    assert whole["R1"] == 50 and some["R1"] == 50 and whole["MeanR"] == (1 + 1 + 3 + 2) / 4 and some["MeanR"] == 1.5
    counts = [1, 3, 0]  # how often an item comes first
    mean = sum(counts) / 3
    spread = (sum((c - mean) ** 2 for c in counts) / 3) ** 0.5
    assert hubness(sims) == pytest.approx(sum((c - mean) ** 3 for c in counts) / 3 / spread**3)
    assert hubness(torch.eye(3)) == 0


def rows_of(layer):
    """Views of the rows of a layer's weight, one an output unit."""
    if isinstance(layer, nn.ConvTranspose2d):
        return [part[:, o] for part in layer.weight.chunk(layer.groups) for o in range(layer.weight.shape[1])]
    return list(layer.weight)


def test_norm_loss_decoupled_draws_every_kind_of_row_with_the_rate_of_its_group():
    layers = nn.ModuleList(
        [nn.Linear(3, 2), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ConvTranspose2d(4, 3, 2)]
    )
    idle = nn.Linear(3, 2)
    rates = [0.1, 0.2, 0.3, 0.4, 0.5]
    groups = [{"params": layer.parameters(), "lr": rate} for layer, rate in zip([*layers, idle], rates, strict=True)]
    optimizer = torch.optim.SGD(groups, 0.1)
    decoupled_norm(optimizer, nn.ModuleList([*layers, idle]), 0.7)
    for p in layers.parameters():
        p.grad = torch.zeros_like(p)
    kept = [[row.detach().clone() for row in rows_of(layer)] for layer in layers]
    biases, still = [layer.bias.detach().clone() for layer in layers], idle.weight.detach().clone()
    optimizer.step()
    for layer, before, rate, bias in zip(layers, kept, rates, biases, strict=False):
        for row, old in zip(rows_of(layer), before, strict=True):
            size = float(old.flatten().norm())
            torch.testing.assert_close(row.detach(), old - rate * 2 * 0.7 * (size - 1) * old / size)
        assert torch.equal(layer.bias, bias)
    assert torch.equal(idle.weight, still)  # without a gradient it takes no part in the step


def test_norm_loss_spread_of_rows():
    layers = nn.ModuleList([nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.MultiheadAttention(4, 2)])
    found = row_spread(layers)
    assert list(found) == ["0.weight", "1.weight", "2.in_proj_weight", "2.out_proj.weight"]
    for name, rows in {
        "0.weight": rows_of(layers[0]),
        "1.weight": rows_of(layers[1]),
        "2.in_proj_weight": layers[2].in_proj_weight,
    }.items():
        sizes = [float(row.detach().flatten().norm()) for row in rows]
        mean = sum(sizes) / len(sizes)
        std = (sum((size - mean) ** 2 for size in sizes) / len(sizes)) ** 0.5
        assert found[name] == pytest.approx({"min": min(sizes), "mean": mean, "max": max(sizes), "std": std}, rel=1e-4)
    apart = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    assert list(row_spread(apart)) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert row_spread([torch.ones(2, 4)], row_dim=1)["0"]["max"] == pytest.approx(2**0.5)
