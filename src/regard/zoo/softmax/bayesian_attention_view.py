"""Attention as inference: posterior marginals over which edge is active, and the expected message (id 260; Singh & Buckley, 2023).

    p(phi | x) ~ p(phi) prod_e exp(psi_e(x; phi)),   attention = E_{p(phi | x)}[v(x, phi)]
One categorical phi_i over keys a query gives softmax(psi_i + log prior_i); several coupled ones are enumerated.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from regard.catalog.registry import register
from regard.errors import RegardError

ENUMERABLE = 1 << 18


@register("bayesian-attention-view", kind="experiment")
def structural_attention(
    potentials: Tensor, values: Tensor, *, log_prior: Tensor | None = None, temperature: float = 1.0, over: str = "keys", hard: bool = False
) -> tuple[Tensor, Tensor]:
    """(messages, marginals) of independent edge variables: potentials psi (..., Lq, Lk), values (..., Lk, Dv).

    log_prior broadcasts to psi: uniform gives standard attention, one from distances a relative bias, -inf masks and sparse priors.
    temperature: noise; hard: the one most likely edge (MAP). over: "keys", each query has one edge (self- and cross-attention), or "queries",
    each key is assigned to one query, and a query's message is the mean of what it was assigned: slot attention's mixture step.
    """
    if over not in ("keys", "queries"):
        raise RegardError(f"over={over!r}; expected keys or queries")
    psi = potentials / temperature if log_prior is None else potentials / temperature + log_prior
    dim = -1 if over == "keys" else -2
    if bool((psi == -torch.inf).all(dim).any()):
        raise RegardError("some variable has no edge of positive prior; expected at least one finite entry")
    marginals = psi.softmax(dim)
    if hard:
        marginals = torch.zeros_like(psi).scatter(dim, psi.argmax(dim, keepdim=True), 1.0)
    mixing = marginals if over == "keys" else marginals / marginals.sum(-1, keepdim=True).clamp_min(torch.finfo(psi.dtype).tiny)
    return mixing @ values, marginals


def relative_prior(q_len: int, k_len: int, bias: Tensor) -> Tensor:
    """log prior (Lq, Lk) of a relative position bias: bias (2 reach + 1,) for i - j from -reach to reach, clipped there; queries stand at the
    end of the keys."""
    reach = len(bias) // 2
    apart = torch.arange(k_len - q_len, k_len)[:, None] - torch.arange(k_len)
    return bias[apart.clamp(-reach, reach) + reach]


def sparse_prior(edges: Tensor) -> Tensor:
    """log prior of a bool mask of possible edges: uniform on them, impossible elsewhere."""
    return torch.where(edges, -edges.sum(-1, keepdim=True).clamp_min(1).to(torch.get_default_dtype()).log(), float("-inf"))


def dot_product(q: Tensor, k: Tensor) -> Tensor:
    """psi = q.k / sqrt(D)."""
    return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Uniform prior over keys: self-attention, or cross-attention where keys belong to another set."""
    return structural_attention(dot_product(q, k), v)[0]


def relative_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """A prior over distances (`relative_prior`): softmax with a relative position bias."""
    return structural_attention(dot_product(q, k), v, log_prior=relative_prior(q.shape[-2], k.shape[-2], bias))[0]


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, edges: Tensor) -> Tensor:
    """A prior with zeros: edges (..., Lq, Lk) bool are possible."""
    return structural_attention(dot_product(q, k), v, log_prior=sparse_prior(edges))[0]


def hard_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The most likely edge alone."""
    return structural_attention(dot_product(q, k), v, hard=True)[0]


def slot_attention(x: Tensor, slots: Tensor, steps: int = 1) -> Tensor:
    """slots (S, D) -> the means of an isotropic Gaussian mixture over x (N, D) after `steps` of expectation-maximisation: each input has one
    edge, to a slot, and slots compete for it."""
    for _ in range(steps):
        slots = structural_attention(slots @ x.transpose(-1, -2) - slots.square().sum(-1, keepdim=True) / 2, x, over="queries")[0]
    return slots


def enumerate_joint(potentials: Tensor, coupling: Tensor | None = None, log_prior: Tensor | None = None) -> Tensor:
    """Marginals (Lq, Lk) by summing over every joint assignment of the queries' edges, Lk^Lq of them.

    coupling (Lq, Lk, Lq, Lk): psi of two queries' edges together, counted once for each pair of queries; without it the variables are
    independent and this equals softmax.
    """
    q_len, k_len = potentials.shape
    if k_len**q_len > ENUMERABLE:
        raise RegardError(f"{k_len}^{q_len} assignments; expected at most {ENUMERABLE}")
    psi = potentials if log_prior is None else potentials + log_prior
    rows, logs = list(itertools.product(range(k_len), repeat=q_len)), []
    for phi in rows:
        energy = sum((psi[i, j] for i, j in enumerate(phi)), psi.new_zeros(()))
        if coupling is not None:
            energy = energy + sum((coupling[a, phi[a], b, phi[b]] for a, b in itertools.combinations(range(q_len), 2)), psi.new_zeros(()))
        logs.append(energy)
    weight = torch.stack(logs).softmax(0)
    one_hot = torch.nn.functional.one_hot(torch.tensor(rows), k_len).to(psi.dtype)
    return torch.einsum("a,aij->ij", weight, one_hot)


def coupled_marginals(psi: Tensor, coupling: Tensor, sweeps: int = 1) -> Tensor:
    """Marginals of a chain of queries with pairwise potentials coupling (Lq - 1, Lk, Lk) between neighbours, by sum-product (exact)."""
    forward, backward = [psi[0]], [torch.zeros_like(psi[0])]
    for i in range(1, len(psi)):
        forward.append(psi[i] + torch.logsumexp(forward[-1][:, None] + coupling[i - 1], 0))
    for i in range(len(psi) - 2, -1, -1):
        backward.append(torch.logsumexp(coupling[i] + (psi[i + 1] + backward[-1])[None], 1))
    return (torch.stack(forward) + torch.stack(backward[::-1])).softmax(-1)


def energy(x: Tensor, k: Tensor, beta: float = 1.0) -> Tensor:
    """Implicit energy |x|^2 / 2 - log sum_j e^{beta x.k_j} / beta of each row: its gradient is E_{p(phi | x)} of the edges' gradients."""
    return x.square().sum(-1) / 2 - torch.logsumexp(beta * x @ k.transpose(-1, -2), -1) / beta


def iterate(x: Tensor, k: Tensor, beta: float = 1.0, steps: int = 1, rate: float = 1.0) -> Tensor:
    """Descend the energy: x <- x - rate (x - sum_j softmax(beta x.k_j) k_j). rate 1 is Hopfield's update, less predictive coding's."""
    for _ in range(steps):
        x = x - rate * (x - structural_attention(beta * x @ k.transpose(-1, -2), k)[0])
    return x


def mixture_step(x: Tensor, means: Tensor, variance: float = 1.0) -> Tensor:
    """One step of expectation-maximisation of an isotropic Gaussian mixture with equal weights: x (N, D), means (S, D) -> new means."""
    gap = (means[:, None] - x[None]).square().sum(-1)
    log = -gap / (2 * variance) - x.shape[-1] / 2 * math.log(2 * math.pi * variance)
    share = torch.exp(log - torch.logsumexp(log, 0))
    return share @ x / share.sum(-1, keepdim=True)
