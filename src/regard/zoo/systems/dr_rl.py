"""DR-RL: a policy chooses, a layer and segment, how many directions of queries and keys the scores are made of (id 198; Erden, 2025).

S_r = Q V_q V_q^T V_k V_k^T K^T / sqrt(d),  O = softmax(S_r + mask) V;   R = alpha cos(O_full, O_r) - beta FLOPs(r) / FLOPs_full - gamma ||dA||_F
loss = L_LM - lambda log pi(a | s) (R - baseline);  rank r' is out of reach from r where the bound of ||dA||_F (r -> r') exceeds eps_t

The paper takes the SVD over all tokens, which reads ahead. Here causal attention takes directions, safety and the policy's state of a segment from
the tokens before it; a segment with fewer tokens before it than the largest rank is attended to in full, without a choice.
Not built: decoding with a cache; the paper's large models and downstream tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal, Mask, Padding
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.low_rank_scores import Basis, energy_ratio, factors, score_bound, score_flops, svd_basis, warm_basis, weight_bound
from regard.nn.parts import takes
from regard.nn.rank_policy import RankChooser, RankPolicy, choose


@register("dr-rl", kind="module")
class DynamicRankAttention(RankChooser):
    """Attention over factors of a rank that a policy chooses for each row and segment: x (B, L, dim) -> (B, L, dim).

    ranks: ascending; one of head_dim or more is full attention. segment: tokens a choice (None: all are one segment). causal: see above. policy: one
    that several layers share (None: its own). threshold: eps_t's first value (the paper names none; infinity masks nothing), a buffer. explore: how
    often training draws any safe rank instead. start: the index of the rank before the first segment. iterations: 0 for an SVD a segment, else
    that many steps of subspace iteration from the last segment's directions. svd_gradient: gradients through the directions too, as in the paper's code;
    refused where singular values coincide, as none exists there. energy: the policy also reads the energy that each rank keeps.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        ranks: Sequence[int] = tuple(range(16, 65, 8)),
        *,
        segment: int | None = 128,
        causal: bool = False,
        policy: RankPolicy | None = None,
        threshold: float = math.inf,
        explore: float = 0.1,
        start: int = 0,
        iterations: int = 0,
        svd_gradient: bool = False,
        energy: bool = False,
        dropout: float = 0.1,
        bias: bool = True,
    ):
        super().__init__()
        ranks = tuple(ranks)
        if (
            heads < 1
            or dim % heads
            or not ranks
            or ranks[0] < 1
            or list(ranks) != sorted(set(ranks))
            or not -len(ranks) <= start < len(ranks)
        ):
            raise RegardError(f"dim={dim}, heads={heads}, ranks={ranks}, start={start}; expected heads | dim, ascending ranks and an index")
        if (segment is not None and segment < 1) or iterations < 0 or not threshold >= 0 or not 0 <= explore <= 1:
            raise RegardError(
                f"segment={segment}, iterations={iterations}, threshold={threshold}, explore={explore}; expected 1 or more, 0 or more twice, 0 to 1"
            )
        if svd_gradient and (causal or iterations):
            raise RegardError("svd_gradient: expected causal=False and iterations=0, as earlier tokens' directions are given ones")
        self.dim, self.heads, self.ranks, self.segment, self.causal = dim, heads, ranks, segment, causal
        self.explore, self.start, self.iterations, self.svd_gradient = explore, start % len(ranks), iterations, svd_gradient
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias) for _ in range(4))
        self.policy = RankPolicy(dim, len(ranks), dropout=dropout, energy=energy) if policy is None else policy
        self.register_buffer("threshold", torch.tensor(threshold))

    def statistics(self) -> Tensor:
        """Mean, variance and norm of W_q, W_k and W_v (9)."""
        weights = [one.weight.detach() for one in (self.q, self.k, self.v)]
        return torch.stack([number for w in weights for number in (w.mean(), w.var(), w.norm())])

    def basis(self, x: Tensor, last: Basis | None) -> Basis:
        if self.svd_gradient:
            found = svd_basis(x)
            s = found.sigma.detach()
            if bool((s - F.pad(s[..., 1:], (0, 1)) <= 1e-6 * s[..., :1]).any()):
                raise RegardError(
                    "x: singular values of queries or keys coincide, where svd_gradient=True expected them apart; set it False"
                )
            return found
        with torch.no_grad():
            if not self.iterations or last is None or x.shape[-2] < last.sigma.shape[-1]:
                return svd_basis(x, None if not self.iterations else min(self.ranks[-1], *x.shape[-2:]))
            return warm_basis(x, last.vectors, self.iterations)

    def changes(self, q: Basis, k: Basis, previous: Tensor) -> Tensor:
        """The bound of ||dA||_F from each row's rank to every rank, the largest of the heads, (B, ranks)."""
        to = torch.tensor(self.ranks, device=previous.device)
        sigmas = (one.sigma.detach().unsqueeze(2) for one in (q, k))
        return weight_bound(score_bound(*sigmas, self.dim // self.heads, to[previous][:, None, None], to)).amax(1)

    def read(self, q: Tensor, k: Tensor, v: Tensor, rank: Tensor, bases: tuple[Basis, Basis] | None, keep: Tensor | None) -> Tensor:
        """Attention (B, L, dim) at a rank a row, (B,), before the last projection."""
        width = q.shape[-1]
        mask: Mask | None = Causal() if self.causal else None
        if keep is not None:
            mask = Padding() if mask is None else mask & Padding()
        if bases is not None and bool((rank < width).any()):
            top = min(int(rank.max()), bases[0].sigma.shape[-1])
            within = (torch.arange(top, device=rank.device) < rank[:, None])[:, None, None]
            low = factors(q, k, *(torch.where(within, b.vectors[..., :top], 0.0) for b in bases))
            if bool((rank >= width).any()):  # other rows read all channels as they are
                low = tuple(torch.where((rank < width)[:, None, None, None], F.pad(x, (0, width - top)), y) for x, y in zip(low, (q, k)))  # type: ignore[assignment]
            q, k = (x.to(v.dtype) for x in low)
        scale = width**-0.5
        o = (
            attend(q, k, v, "softmax", mask=mask, scale=scale)
            if keep is None
            else attend(q, k, v, "softmax", mask=mask, scale=scale, keep=keep)
        )
        return o.transpose(1, 2).flatten(2)

    @takes(x="batch length dim", keep="batch length", ranks="batch pieces")
    def forward(
        self,
        x: Tensor,
        mask: Mask | None = None,
        keep: Tensor | None = None,
        ranks: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """keep (B, L) bool: tokens that are no padding. mask: Padding() or None. ranks (B, segments) long: ranks instead of the policy's. generator: of the draws."""
        if mask is not None and (not isinstance(mask, Padding) or keep is None):
            raise RegardError(f"mask={mask!r}; expected Padding() with keep, or causal=True of the layer for a causal one")
        length, width = x.shape[1], self.dim // self.heads
        size = max(1, length if self.segment is None else self.segment)
        pieces = -(-length // size)
        if ranks is not None and (ranks.shape[1] != pieces or bool((ranks < 1).any())):
            raise RegardError(f"ranks {tuple(ranks.shape)}; expected (B, segments={pieces}) of 1 or more")
        there = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        x = torch.where(there[..., None], x, 0.0)
        q, k, v = (one(x).unflatten(-1, (self.heads, width)).transpose(1, 2) for one in (self.q, self.k, self.v))
        index = x.new_full((len(x),), self.start, dtype=torch.long)
        table = torch.tensor(self.ranks, device=x.device)
        bases: tuple[Basis, Basis] | None = None
        outs, told, stats = [], [], self.statistics().expand(len(x), -1)
        for at in range(0, length, size):
            stop = min(at + size, length)
            seen, window = (at, slice(max(0, at - size), at)) if self.causal else (length, slice(at, stop))
            enough = there[:, :seen].sum(-1) >= (self.ranks[-1] if self.causal else 1)
            rank, log_prob, change = torch.full_like(index, width), x.new_zeros(len(x), dtype=torch.float32), x.new_zeros(len(x))
            decided = enough if ranks is None else torch.zeros_like(enough)
            if bool(enough.any()):
                if self.causal or bases is None:
                    sources = (torch.where(there[:, None, :seen, None], t[:, :, :seen], 0.0) for t in (q, k))
                    bases = tuple(self.basis(t, None if bases is None else bases[i]) for i, t in enumerate(sources))  # type: ignore[assignment]
                assert bases is not None
                moves = self.changes(*bases, index)
                if ranks is None:
                    kept = torch.stack(
                        [(energy_ratio(bases[0].sigma, r) + energy_ratio(bases[1].sigma, r)).mean(1) / 2 for r in self.ranks], -1
                    )
                    logits = self.policy(x[:, window].detach(), stats, index, there[:, window], kept.detach().to(x.dtype))
                    choice = choose(logits, moves <= self.threshold, self.explore if self.training else 0.0, not self.training, generator)
                    change = moves.gather(1, choice.chosen[:, None])[:, 0]
                    index, log_prob = torch.where(decided, choice.chosen, index), torch.where(decided, choice.log_prob, 0.0)
                    rank = torch.where(decided, table[index], rank)
            if ranks is not None:
                rank = torch.where(enough, ranks[:, at // size], rank)
            end = stop if self.causal else length
            part = (q[:, :, at:stop], k[:, :, :end], v[:, :, :end])
            outs.append(self.out(self.read(*part, rank, bases, None if keep is None else keep[:, :end])))
            if self.training:
                with torch.no_grad():
                    whole = self.out(self.read(*part, torch.full_like(rank, width), None, None if keep is None else keep[:, :end]))
                    near = torch.where(there[:, at:stop], F.cosine_similarity(whole.float(), outs[-1].float(), dim=-1), 0.0)
                    fidelity = near.sum(-1) / there[:, at:stop].sum(-1).clamp_min(1)
                    cost = torch.stack([fidelity.new_tensor(score_flops(stop - at, end, int(r), width)) for r in rank])
                    told.append((index, decided, log_prob, fidelity, cost / score_flops(stop - at, end, width, width), change))
        if told:
            self.chosen, self.decided, self.log_prob, self.fidelity, self.cost, self.change = (torch.stack(t, 1) for t in zip(*told))
        return torch.cat(outs, 1) if outs else self.out(v.transpose(1, 2).flatten(2))
