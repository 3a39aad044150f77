"""Latent alignments: attention as a random variable, trained exactly, by bounds or by sampling (id 45; Deng et al., 2018).

z ~ p(z | x, h) = softmax(score),  y ~ p(y | x_z, h);   log p(y) = log sum_z p(z) p(y | x_z)
ELBO = E_q[log p(y | x_z)] - KL(q || p) <= log p(y),   q(z | x, h, y) from an inference network
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes

MODES = ("soft", "exact", "hard", "enumerate", "sample", "gumbel", "wake_sleep", "dirichlet")


class AlignmentScore(nn.Module):
    """h (N, D), memory (N, S, D) -> logits (N, S). kind: "additive", v.tanh(W h + U s), or "bilinear", h.W s."""

    def __init__(self, dim: int, kind: str = "additive"):
        super().__init__()
        if kind not in ("additive", "bilinear"):
            raise RegardError(f"kind={kind!r}; expected additive or bilinear")
        self.w = nn.Linear(dim, dim, bias=False)
        self.u = nn.Linear(dim, dim, bias=False) if kind == "additive" else None
        self.v = nn.Linear(dim, 1, bias=False) if kind == "additive" else None

    def forward(self, h: Tensor, memory: Tensor) -> Tensor:
        if self.u is None or self.v is None:
            return (self.w(h).unsqueeze(-2) * memory).sum(-1)
        return self.v(torch.tanh(self.w(h).unsqueeze(-2) + self.u(memory))).squeeze(-1)  # type: ignore[no-any-return]


class InferenceNetwork(nn.Module):
    """q(z | x, h, y): a bidirectional recurrent network over the memory, bilinear scores with an embedding of (h, y)."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.embed, self.read = nn.Embedding(classes, dim), nn.GRU(dim, dim, bidirectional=True, batch_first=True)
        self.query, self.key = nn.Linear(2 * dim, dim), nn.Linear(2 * dim, dim, bias=False)

    def forward(self, h: Tensor, memory: Tensor, y: Tensor) -> Tensor:
        query = self.query(torch.cat((h, self.embed(y)), -1))
        return (self.key(self.read(memory)[0]) * query.unsqueeze(-2)).sum(-1)  # type: ignore[no-any-return]


@dataclass
class Estimate:
    """loss (): what to minimise. log_likelihood (N,): its estimate of log p(y | x). alignment (N, S): the prior's weights."""

    loss: Tensor
    log_likelihood: Tensor
    alignment: Tensor


@register("variational-attention", kind="module")
class LatentAlignment(nn.Module):
    """One decoder step: h (N, dim), memory (N, S, dim), target y (N,) -> Estimate.

    mode: "soft" log p(y | E x_z); "exact" the marginal; "hard" REINFORCE on E_p[log p(y | x_z)]; "enumerate" and "sample" the ELBO, the latter by
    REINFORCE with soft attention as its baseline; "gumbel" a relaxed sample of q at `temperature`; "wake_sleep" `samples` weighted draws of q;
    "dirichlet" relaxed alignments, q and p Dirichlet of concentrations softplus(logits) + `floor`. baseline=False: REINFORCE without one.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        mode: str = "sample",
        *,
        score: str = "additive",
        samples: int = 1,
        temperature: float = 0.5,
        floor: float = 0.1,
        baseline: bool = True,
        leave_one_out: bool = False,
    ):
        super().__init__()
        self.dim = dim
        if mode not in MODES:
            raise RegardError(f"mode={mode!r}; expected one of {', '.join(MODES)}")
        self.mode, self.samples, self.temperature, self.floor, self.baseline = mode, samples, temperature, floor, baseline
        self.leave_one_out = leave_one_out
        self.prior, self.infer = AlignmentScore(dim, score), InferenceNetwork(dim, classes)
        self.join, self.out = nn.Linear(2 * dim, dim), nn.Linear(dim, classes)

    def emission(self, h: Tensor, context: Tensor, y: Tensor) -> Tensor:
        """log p(y | context, h): context (..., dim) with h and y broadcast over further dimensions."""
        h = h.view(*h.shape[:1], *(1,) * (context.dim() - 2), h.shape[-1]).expand_as(context)
        logits = self.out(torch.tanh(self.join(torch.cat((h, context), -1))))
        target = y.view(-1, *(1,) * (context.dim() - 2)).expand(logits.shape[:-1])
        return -F.cross_entropy(logits.movedim(-1, 1), target, reduction="none")

    @takes(h="batch dim", memory="batch items dim")
    def forward(self, h: Tensor, memory: Tensor, y: Tensor, mode: str | None = None) -> Estimate:
        """mode: another than the module's, for this call."""
        log_p = self.prior(h, memory).log_softmax(-1)
        p, mode = log_p.exp(), mode or self.mode
        found = getattr(self, f"estimate_{mode}")(h, memory, y, log_p)
        surrogate, value = found if isinstance(found, tuple) else (found, found)
        return Estimate(-surrogate.mean(), value, p)

    def soft(self, h: Tensor, memory: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        return self.emission(h, (weights.unsqueeze(-1) * memory).sum(-2), y)

    def estimate_soft(self, h: Tensor, memory: Tensor, y: Tensor, log_p: Tensor) -> Tensor:
        return self.soft(h, memory, y, log_p.exp())

    def estimate_exact(self, h: Tensor, memory: Tensor, y: Tensor, log_p: Tensor) -> Tensor:
        return torch.logsumexp(log_p + self.emission(h, memory, y), -1)

    def reinforced(self, h: Tensor, memory: Tensor, y: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """E_q[log p(y | x_z)] by samples: (surrogate whose gradient is the score function's, value)."""
        z = torch.multinomial(log_q.exp().detach(), self.samples, replacement=True)
        chosen = memory.gather(1, z.unsqueeze(-1).expand(-1, -1, memory.shape[-1]))
        gain = self.emission(h, chosen, y)
        base = self.soft(h, memory, y, log_p.exp()).detach()[:, None] if self.baseline else 0.0
        surrogate = gain + (gain.detach() - base) * log_q.gather(1, z)
        return surrogate.mean(1), gain.mean(1)

    def estimate_hard(self, h: Tensor, memory: Tensor, y: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        return self.reinforced(h, memory, y, log_p, log_p)

    def posterior(self, h: Tensor, memory: Tensor, y: Tensor) -> Tensor:
        return self.infer(h, memory, y).log_softmax(-1)  # type: ignore[no-any-return]

    def elbo(self, h: Tensor, memory: Tensor, y: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The bound, every alignment enumerated."""
        return (log_q.exp() * (self.emission(h, memory, y) - log_q + log_p)).sum(-1)

    def estimate_enumerate(self, h: Tensor, memory: Tensor, y: Tensor, log_p: Tensor) -> Tensor:
        return self.elbo(h, memory, y, log_p, self.posterior(h, memory, y))

    def estimate_sample(self, h: Tensor, memory: Tensor, y: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        log_q = self.posterior(h, memory, y)
        divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
        surrogate, value = self.reinforced(h, memory, y, log_p, log_q)
        return surrogate - divergence, value - divergence

    def estimate_gumbel(self, h: Tensor, memory: Tensor, y: Tensor, log_p: Tensor) -> Tensor:
        log_q = self.posterior(h, memory, y)
        relaxed = F.gumbel_softmax(log_q, self.temperature)
        return self.soft(h, memory, y, relaxed) - (log_q.exp() * (log_q - log_p)).sum(-1)

    def estimate_wake_sleep(self, h: Tensor, memory: Tensor, y: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        log_q = self.posterior(h, memory, y)
        z = torch.multinomial(log_q.exp().detach(), self.samples, replacement=True)
        chosen = memory.gather(1, z.unsqueeze(-1).expand(-1, -1, memory.shape[-1]))
        joint, proposal = log_p.gather(1, z) + self.emission(h, chosen, y), log_q.gather(1, z)
        log_w = (joint - proposal).detach()
        w = log_w.softmax(1)
        if self.leave_one_out and self.samples > 1:  # VIMCO: the others' mean in a sample's place
            whole = torch.logsumexp(log_w, 1, keepdim=True)
            others = (log_w.sum(1, keepdim=True) - log_w) / (self.samples - 1)
            swapped = log_w.unsqueeze(1).expand(-1, self.samples, -1).clone()
            swapped.diagonal(dim1=1, dim2=2).copy_(others)
            surrogate = (w * (joint - proposal)).sum(1) + ((whole - torch.logsumexp(swapped, -1)) * proposal).sum(1)
        else:
            surrogate = (w * (joint + proposal)).sum(1)
        value = torch.logsumexp(joint.detach() - proposal.detach(), 1) - torch.log(torch.tensor(float(self.samples)))
        return surrogate, value

    def estimate_dirichlet(self, h: Tensor, memory: Tensor, y: Tensor, log_p: Tensor) -> Tensor:
        concentrations = [F.softplus(x) + self.floor for x in (self.infer(h, memory, y), self.prior(h, memory))]
        q, p = (torch.distributions.Dirichlet(c) for c in concentrations)
        return self.soft(h, memory, y, q.rsample()) - torch.distributions.kl_divergence(q, p)

    @torch.no_grad()
    def predict(self, h: Tensor, memory: Tensor, top: int | None = None) -> Tensor:
        """log p(y) (N, classes), marginalised over all alignments or the `top` most likely ones."""
        log_p = self.prior(h, memory).log_softmax(-1)
        if top is not None:
            best = log_p.topk(min(top, log_p.shape[-1]), -1)
            log_p = best.values.log_softmax(-1)
            memory = memory.gather(1, best.indices.unsqueeze(-1).expand(-1, -1, memory.shape[-1]))
        context = torch.cat((h.unsqueeze(1).expand_as(memory), memory), -1)
        return torch.logsumexp(log_p.unsqueeze(-1) + self.out(torch.tanh(self.join(context))).log_softmax(-1), 1)
