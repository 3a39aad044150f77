"""HGF: a ternary layer with a gated correction of low rank in full precision (id 201; 2026).

y = BitLinear(x) + g B A x,  g = sigmoid(w x + b) a token or an output channel,  B = 0 and b < 0 at first
differential: O_h = (softmax(q1 k1 / sqrt d) - lambda softmax(q2 k2 / sqrt d)) V,  lambda = exp(lq1 lk1) - exp(lq2 lk2) + lambda_0,  (1 - lambda_0) RMSNorm(O_h)
There is no official code: the gate's granularity, its penalty and where corrections stand are this reading of the abstract. Not reproduced: language
models small enough for a processor show no gap between ternary and full precision beyond that between seeds; a tanh student does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import takes
from regard.nn.ternary import penalty, projection
from regard.tasks.text import Corpus
from regard.tasks.training import fit

CORRECTION = ("rank", "gate", "gate_bias")


@register("hgf", kind="module")
class HGFAttention(nn.Module):
    """x (B, N, dim) -> (B, N, dim), whose four projections are HGFLinear ("hgf"), BitLinear ("ternary") or nn.Linear ("full").

    differential: two maps a head, each of half its width, the second subtracted; depth: the layer's number from 0, for
    lambda_0 = 0.8 - 0.6 exp(-0.3 depth). rank, gate, gate_bias: of the corrections. norm_eps: of the norm of heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        mode: str = "hgf",
        rank: int | None = None,
        gate: str = "token",
        gate_bias: float = -2.0,
        differential: bool = False,
        depth: int = 0,
        causal: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        if heads < 1 or dim % heads or (differential and dim // heads % 2) or depth < 0:
            raise RegardError(
                f"dim={dim}, heads={heads}, depth={depth}: expected dim a multiple of heads (of 2 heads if differential), and depth from 0"
            )
        if mode != "hgf" and (rank, gate, gate_bias) != (None, "token", -2.0):
            raise RegardError(f"mode={mode!r} has no corrections; expected rank, gate and gate_bias left at their defaults, or mode='hgf'")
        self.dim, self.heads, self.causal = dim, heads, causal
        options = {"rank": rank, "gate": gate, "gate_bias": gate_bias} if mode == "hgf" else {}
        self.q, self.k, self.v, self.out = (projection(mode, dim, dim, **options) for _ in range(4))
        self.first = 0.8 - 0.6 * math.exp(-0.3 * depth)
        width = dim // heads
        self.lambdas = nn.Parameter(0.1 * torch.randn(4, width // 2)) if differential else None  # lq1, lk1, lq2, lk2
        self.head_norm = nn.RMSNorm(width, norm_eps) if differential else None

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        mask = Causal() if self.causal else None
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.lambdas is None or self.head_norm is None:
            o = attend(q, k, v, "softmax", mask=mask)
        else:
            q1, k1, q2, k2 = self.lambdas
            weight = torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + self.first
            (qa, qb), (ka, kb) = q.chunk(2, -1), k.chunk(2, -1)
            o = attend(qa, ka, v, "softmax", mask=mask) - weight.to(v.dtype) * attend(qb, kb, v, "softmax", mask=mask)
            o = (1 - self.first) * self.head_norm(o)
        return self.out(o.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class HGFDecoder(nn.Module):
    """ids (B, N) -> logits (B, N, vocab): pre-norm blocks of HGFAttention and a GELU MLP of 4 dim, all of one mode; learned positions.

    options: of HGFAttention; those of corrections are for mode "hgf" alone, and rest in the others."""

    def __init__(self, vocab: int, dim: int = 64, layers: int = 2, heads: int = 4, length: int = 64, mode: str = "hgf", **options: Any):
        super().__init__()
        own = {name: options[name] for name in CORRECTION if name in options} if mode == "hgf" else {}
        self.embed, self.places = nn.Embedding(vocab, dim), nn.Parameter(0.02 * torch.randn(length, dim))
        rest = {name: value for name, value in options.items() if name not in CORRECTION or mode == "hgf"}
        self.mixers = nn.ModuleList([HGFAttention(dim, heads, mode, depth=at, **rest) for at in range(layers)])
        self.mlps = nn.ModuleList(
            [nn.Sequential(projection(mode, dim, 4 * dim, **own), nn.GELU(), projection(mode, 4 * dim, dim, **own)) for _ in range(layers)]
        )
        self.norms = nn.ModuleList([nn.RMSNorm(dim) for _ in range(2 * layers + 1)])
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.dim() != 2 or ids.shape[1] > len(self.places):
            raise RegardError(f"ids {tuple(ids.shape)}; expected (B, N) of at most {len(self.places)} tokens")
        x = self.embed(ids) + self.places[: ids.shape[1]]
        for at, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer(self.norms[2 * at](x))
            x = x + mlp(self.norms[2 * at + 1](x))
        return self.head(self.norms[-1](x))  # type: ignore[no-any-return]


def recovered(ternary: float, own: float, full: float) -> float:
    """The share of the gap between ternary and full precision that is closed, of losses."""
    if ternary == full:
        raise RegardError(f"ternary={ternary}, full={full}: expected losses that differ")
    return (ternary - own) / (ternary - full)


TRAINED = {"full": ("full", False), "ternary": ("ternary", False), "hgf": ("hgf", False), "full differential": ("full", True)}


def losses(
    text: Corpus,
    steps: int,
    *,
    names: tuple[str, ...] = tuple(TRAINED),
    seed: int = 0,
    lr: float = 3e-3,
    batch: int = 16,
    length: int = 64,
    openness: float = 0.0,
    **sizes: Any,
) -> dict[str, float]:
    """Held-out nats a byte of models trained alike: "full", "ternary", "hgf" and "full differential", or those of `names`.

    openness: weight of the gates' penalty. sizes: of HGFDecoder.
    """
    if unknown := set(names) - set(TRAINED):
        raise RegardError(f"names: {', '.join(sorted(unknown))} unknown; expected of {', '.join(TRAINED)}")
    found = {}
    for name in names:
        mode, differential = TRAINED[name]
        torch.manual_seed(seed)
        model = HGFDecoder(256, mode=mode, differential=differential, length=length, **sizes)

        def cost(ids: Tensor, model: nn.Module = model, mode: str = mode) -> Tensor:
            own = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            return own + openness * penalty(model) if openness and mode == "hgf" else own

        fit(model, lambda generator: text.batch(batch, length, generator), cost, steps, lr=lr, seed=seed, optimizer="adamw")
        ids = text.held_out(length, 64)
        with torch.no_grad():
            found[name] = float(F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))
    return found
