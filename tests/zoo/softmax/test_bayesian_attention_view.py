"""Attention as inference: every constructor against loops, noise, priors, assignment, coupled edges, steps down the energy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from regard import RegardError
from regard.zoo.softmax import bayesian_attention_view as view


def posterior(psi: list[float], prior: list[float] | None = None) -> list[float]:
    weight = [math.exp(x + (0.0 if prior is None else prior[j])) for j, x in enumerate(psi)]
    return [w / sum(weight) for w in weight]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_posteriors_with_noise_and_priors() -> None:
    psi, v, prior = drawn(4, 6), drawn(6, 3), drawn(6)
    for temperature in (1.0, 0.4):
        for given in (None, prior):
            found, marginals = view.structural_attention(psi, v, log_prior=given, temperature=temperature)
            rows = [posterior([x / temperature for x in row], None if given is None else given.tolist()) for row in psi.tolist()]
            torch.testing.assert_close(marginals, torch.tensor(rows, dtype=torch.float64))
            torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64) @ v)


def test_each_key_chooses_a_query() -> None:
    psi, v = drawn(3, 5), drawn(5, 2)
    found, marginals = view.structural_attention(psi, v, over="queries")
    columns = torch.tensor([posterior(column) for column in psi.T.tolist()], dtype=torch.float64).T
    torch.testing.assert_close(marginals, columns)
    torch.testing.assert_close(found, columns / columns.sum(1, keepdim=True) @ v)
    hard, chosen = view.structural_attention(psi, v, over="queries", hard=True)
    assert torch.equal(chosen, torch.stack([psi.argmax(0) == i for i in range(3)]).double())
    for i in range(3):
        own = v[psi.argmax(0) == i]
        torch.testing.assert_close(hard[i], own.mean(0) if len(own) else torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("k_len", [5, 8])
def test_named_constructors(k_len: int) -> None:
    q, k, v = drawn(2, 5, 4), drawn(2, k_len, 4), drawn(2, k_len, 3)
    s = torch.tensor([[[float(a @ b) / 2 for b in keys] for a in queries] for queries, keys in zip(q, k, strict=True)], dtype=torch.float64)
    bias = drawn(7)
    near = torch.tensor(
        [[float(bias[min(max(i + k_len - 5 - j, -3), 3) + 3]) for j in range(k_len)] for i in range(5)], dtype=torch.float64
    )
    edges = torch.rand(5, k_len) > 0.5
    edges[:, 0] = True
    torch.testing.assert_close(view.softmax_attention(q, k, v), torch.exp(s) / torch.exp(s).sum(-1, keepdim=True) @ v)
    e = torch.exp(s + near)
    torch.testing.assert_close(view.relative_attention(q, k, v, bias), e / e.sum(-1, keepdim=True) @ v)
    e = torch.exp(s) * edges
    torch.testing.assert_close(view.sparse_attention(q, k, v, edges), e / e.sum(-1, keepdim=True) @ v)
    torch.testing.assert_close(view.sparse_prior(edges).exp().sum(-1).double(), torch.ones(5, dtype=torch.float64), atol=1e-6, rtol=0)
    best = torch.stack([v[b][s[b].argmax(-1)] for b in range(2)])
    torch.testing.assert_close(view.hard_attention(q, k, v), best)


def expectation_maximisation(x: Tensor, means: Tensor, variance: float) -> Tensor:
    share = torch.tensor([[math.exp(-float(((a - m) ** 2).sum()) / (2 * variance)) for a in x] for m in means], dtype=torch.float64)
    share = share / share.sum(0, keepdim=True)
    return share @ x / share.sum(1, keepdim=True)


def test_slots_are_steps_of_a_mixture() -> None:
    x, means = drawn(20, 3), drawn(4, 3)
    once = expectation_maximisation(x, means, 1.0)
    torch.testing.assert_close(view.slot_attention(x, means), once)
    torch.testing.assert_close(view.slot_attention(x, means, 2), expectation_maximisation(x, once, 1.0))
    torch.testing.assert_close(view.mixture_step(x, means), once)
    torch.testing.assert_close(view.mixture_step(x, means, 0.3), expectation_maximisation(x, means, 0.3))


@pytest.mark.parametrize(("beta", "steps", "rate"), [(1.0, 1, 1.0), (2.5, 3, 0.4)])
def test_steps_down_the_energy(beta: float, steps: int, rate: float) -> None:
    x, k = drawn(2, 3), drawn(5, 3)
    energy = [float((a @ a) / 2) - math.log(sum(math.exp(beta * float(a @ b)) for b in k)) / beta for a in x]
    torch.testing.assert_close(view.energy(x, k, beta), torch.tensor(energy, dtype=torch.float64))
    want = x
    for _ in range(steps):
        e = torch.exp(beta * want @ k.T)
        want = (1 - rate) * want + rate * (e / e.sum(-1, keepdim=True)) @ k
    given = {} if beta == 1.0 else {"beta": beta, "steps": steps, "rate": rate}
    torch.testing.assert_close(view.iterate(x, k, **given), want)  # type: ignore[arg-type]


def test_coupled_edges_by_summing_over_all_assignments() -> None:
    psi, coupling, prior = drawn(3, 4), drawn(3, 4, 3, 4), drawn(3, 4)
    for pairs, given in ((None, None), (coupling, None), (coupling, prior)):
        total, marginals = 0.0, torch.zeros(3, 4, dtype=torch.float64)
        for phi in itertools.product(range(4), repeat=3):
            log = sum(float(psi[i, j]) + (0.0 if given is None else float(given[i, j])) for i, j in enumerate(phi))
            log += 0.0 if pairs is None else sum(float(pairs[a, phi[a], b, phi[b]]) for a in range(3) for b in range(a + 1, 3))
            total += math.exp(log)
            for i, j in enumerate(phi):
                marginals[i, j] += math.exp(log)
        torch.testing.assert_close(view.enumerate_joint(psi, pairs, given), marginals / total)
    chain = torch.zeros(3, 4, 3, 4, dtype=torch.float64)
    chain[0, :, 1], chain[1, :, 2] = coupling[0, :, 1], coupling[1, :, 2]
    links = torch.stack([coupling[0, :, 1], coupling[1, :, 2]])
    torch.testing.assert_close(view.coupled_marginals(psi, links), view.enumerate_joint(psi, chain))


def test_says_what_is_wrong() -> None:
    psi, v = drawn(2, 3), drawn(3, 2)
    with pytest.raises(RegardError, match="keys or queries"):
        view.structural_attention(psi, v, over="slots")
    for over, hidden in (("keys", (0, slice(None))), ("queries", (slice(None), 1))):
        masked = psi.clone()
        masked[hidden] = -math.inf
        with pytest.raises(RegardError, match="no edge of positive prior"):
            view.structural_attention(masked, v, over=over)
        view.structural_attention(masked, v, over="queries" if over == "keys" else "keys")
    with pytest.raises(RegardError, match="at most 262144"):
        view.enumerate_joint(torch.zeros(19, 2))
    assert view.enumerate_joint(torch.zeros(1, 5)).shape == (1, 5)
