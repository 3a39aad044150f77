"""Sizes that do not fit, and the plot."""

import pytest
import torch

import regard
from regard import taps
from regard.zoo.analysis.scan_snap import ScanRun, attention_on_tokens, scan_and_snap, scan_data


def test_bad_sizes_are_refused():
    with pytest.raises(regard.RegardError, match="low"):
        scan_data(low=0.0)
    with pytest.raises(regard.RegardError, match="length"):
        scan_and_snap(scan_data(), length=1)
    assert "<svg" in scan_and_snap(scan_data(), length=8, steps=4, batch=4, every=2).plot()


def test_shares_of_tokens_by_hand():
    data = scan_data(2, 2, common=2, more_common=1, distinct=3, common_weight=2.0, low=0.2)
    assert data.vocab == 2 + 2 + 4 * 3 and data.common.sum(1).tolist() == [3, 3]
    row = torch.zeros(16)
    row[[0, 1, 3]] = 2.0  # two of all, and the one of this last token
    row[4 + 3 * 2 : 4 + 3 * 3] = torch.tensor([0.2, 0.6, 1.0])
    assert torch.allclose(data.probabilities[1, 0], row / row.sum())
    counts, m, n = data.draw(50, 9, torch.Generator().manual_seed(0))
    assert (
        counts.shape == (50, 16) and set(counts.sum(1).tolist()) == {8.0} and bool((n // 2 == m).all()) and set(n.tolist()) == {0, 1, 2, 3}
    )
    assert not bool(counts[data.probabilities[m, n % 2] == 0].any())


@pytest.mark.parametrize("shuffled", [False, True])
def test_steps_of_both_matrices_by_hand(shuffled):
    data = scan_data(distinct=2, common=2, more_common=1)
    run = scan_and_snap(data, length=6, steps=3, batch=16, lr_y=0.7, lr_z=0.3, every=2, seed=4, shuffled=shuffled)
    generator, z, y = torch.Generator().manual_seed(4), torch.zeros(2, data.vocab), torch.zeros(4, data.vocab)
    kept, losses = [], []
    for _ in range(4):
        counts, m, n = data.draw(16, 6, generator)
        n = n[torch.randperm(16, generator=generator)] if shuffled else n
        kept.append(z.clone())
        z, y = z.requires_grad_(), y.requires_grad_()
        b = counts * z[m].exp()
        b = b / b.sum(1, keepdim=True)
        loss = -((b / b.norm(dim=1, keepdim=True)) @ y.T).log_softmax(1).gather(1, n[:, None]).mean()
        losses.append(float(loss))
        by_z, by_y = torch.autograd.grad(loss, (z, y))
        z, y = (z - 0.3 * by_z).detach(), (y - 0.7 * by_y).detach()
    assert run.steps == [0, 2, 3] and run.loss == pytest.approx([losses[at] for at in run.steps], rel=1e-5)
    assert all(torch.allclose(a, kept[at], atol=1e-6) for a, at in zip(run.z, run.steps, strict=True))


def test_what_a_run_says_by_hand():
    data = scan_data(2, 2, common=1, more_common=1, distinct=2)
    z = [torch.randn(2, data.vocab) for _ in range(3)]
    run = ScanRun(data, [0, 5, 9], z, [0.0] * 3)
    for last, following in ((0, 0), (1, 0), (1, 1)):
        p = data.probabilities[last, following]
        mass = [float((p * one[last].exp())[data.common[last]].sum() / (p * one[last].exp()).sum()) for one in z]
        assert run.common_mass(last, following).tolist() == pytest.approx(mass)
        strongest = max((t for t in range(data.vocab) if not data.common[last, t]), key=lambda t, p=p: float(p[t]))
        assert run.top(last, following).tolist() == pytest.approx([float(one[last, strongest]) for one in z])
    assert torch.equal(run.top(), run.top(0, 0)) and torch.equal(run.common_mass(), run.common_mass(0, 0))
    strongest = int(data.probabilities[0, 0].masked_fill(data.common[0], 0).argmax())

    def grown(*values):
        rows = [torch.zeros(2, data.vocab) for _ in values]
        for row, value in zip(rows, values, strict=True):
            row[0, strongest] = value
        return ScanRun(data, [10 * n for n in range(len(values))], rows, [0.0] * len(values))

    slow = grown(0, 0.2, 1, 3, 6, 6.2, 6.3, 6.3)
    # shares to the number: the value is there with it, and growth by just the share is not slow
    assert grown(0, 4, 6, 7, 8).phases(0.5) == (10, 30)
    assert slow.phases() == (20, 50) and slow.phases(0.02) == (10, 70) and grown(0, 0.1, 1, 3).phases() == (20, 30)


def test_attention_on_tokens_by_hand():
    pytest.importorskip("transformers")
    from regard.lab.checks.shared.decoding import llama

    model, ids = llama(10, sharp=2), torch.tensor([[1, 2, 2, 3], [4, 1, 5, 3], [1, 1, 6, 7]])
    found = attention_on_tokens(model, ids, 10, [1])
    with taps.read(model, "weights", layers=[1]) as seen:
        model(ids)
    w = seen["weights", 1][:, :, -1]
    for head in range(4):
        for m, rows in ((3, (0, 1)), (7, (2,))):
            for token in range(10):
                truth = sum(float(w[b, head, j]) for b in rows for j in range(4) if ids[b, j] == token) / len(rows)
                assert float(found[0, head, m, token]) == pytest.approx(truth, abs=1e-9)
    assert found.shape == (1, 4, 10, 10) and bool(found[:, :, [0, 1, 2]].isnan().all())
    assert attention_on_tokens(model, ids, 10).shape[0] == 2
