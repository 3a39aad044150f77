"""Latent monotonic attention: positions that only move forward, summed over or aligned (id 51; Zeyer et al., 2021).

p(y, t | x) = prod_s p(t_s | t_{s-1}, x) p(y_s | c_s),   t_1 < t_2 < ... < t_S
p(t_s = t | t_{s-1}) = sigma(u_t) prod_{t_{s-1} < t' < t} (1 - sigma(u_t')),   c_s: the frame at t_s, a window, or a segment
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import row_softmax
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes

NEVER = -1e30  # a finite stand-in for log 0: a sum over impossible pasts then has a gradient


def jump_scores(u: Tensor) -> Tensor:
    """u (..., T) stop logits -> log p(t | t') (..., T + 1, T) for t' = -1..T - 1 (row t' + 1), NEVER unless t > t'."""
    stop, go = F.logsigmoid(u), F.logsigmoid(-u)
    passed = F.pad(go.cumsum(-1), (1, 0))  # passed[t]: sum of go before t
    score = stop.unsqueeze(-2) + passed[..., None, :-1] - passed[..., :, None]
    later = torch.ones(u.shape[-1] + 1, u.shape[-1], dtype=torch.bool, device=u.device).triu()
    return score.masked_fill(~later, NEVER)


def moves(jumps: Tensor, labels: Tensor) -> list[Tensor]:
    """For each label s log p(t | t') p(y_s | t', t), (..., T + 1, T): labels (..., S, T), of t alone, or (..., S, T + 1, T)."""
    paired = labels.dim() > jumps.dim()
    return [jumps + (one if paired else one.unsqueeze(-2)) for one in labels.unbind(-3 if paired else -2)]


def full_sum(jumps: Tensor, labels: Tensor) -> Tensor:
    """log sum over t_1 < .. < t_S of prod p(t_s | t_{s-1}) p(y_s | t_{s-1}, t_s); shapes as `moves`."""
    first, *rest = moves(jumps, labels)
    alpha = first[..., 0, :]
    for one in rest:
        alpha = torch.logsumexp(alpha.unsqueeze(-1) + one[..., 1:, :], -2)
    return torch.logsumexp(alpha, -1)


def viterbi(jumps: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The best alignment t (..., S) and its log probability (...,)."""
    first, *rest = moves(jumps, labels)
    alpha, back = first[..., 0, :], []
    for one in rest:
        best = (alpha.unsqueeze(-1) + one[..., 1:, :]).max(-2)
        alpha = best.values
        back.append(best.indices)
    last = alpha.max(-1)
    path = [last.indices]
    for step in reversed(back):
        path.append(step.gather(-1, path[-1].unsqueeze(-1)).squeeze(-1))
    return torch.stack(path[::-1], -1), last.values


def sample_positions(u: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """(..., count) strictly increasing positions drawn from stop logits u (..., T); room is left for those to come."""
    t, frames, out = torch.full(u.shape[:-1], -1), u.shape[-1], []
    for s in range(count):
        at = torch.arange(frames)
        rows = jump_scores(u).gather(-2, (t + 1)[..., None, None].expand(*t.shape, 1, frames)).squeeze(-2)
        rows = rows.masked_fill(at > frames - (count - s), float("-inf"))
        t = torch.multinomial(rows.softmax(-1).flatten(0, -2), 1, generator=generator).view(t.shape)
        out.append(t)
    return torch.stack(out, -1)


@register("latent-monotonic-attention", kind="module")
class MonotonicDecoder(nn.Module):
    """Frames x (B, T, inputs), labels y (B, S) -> log-likelihoods, alignments and hypotheses.

    context: "hard" the frame at t_s; "window" softmax over t_s - width..t_s + width; "segment" over t_{s-1} + 1..t_s; "global" over all frames.
    Labels depend on earlier labels only through positions, so alignments are summed over exactly: O(S T^2), for "segment" with T^2 contexts.
    """

    def __init__(self, inputs: int, classes: int, dim: int = 64, context: str = "segment", width: int = 5):
        super().__init__()
        self.inputs = inputs
        if context not in ("hard", "window", "segment", "global"):
            raise RegardError(f"context={context!r}; expected hard, window, segment or global")
        self.context, self.width = context, width
        # Frames see two neighbours on each side: an encoder of long reach would let any frame tell any label, and alignments mean nothing.
        self.encoder = nn.Sequential(nn.Conv1d(inputs, dim, 3, padding=1), nn.ReLU(), nn.Conv1d(dim, dim, 3, padding=1))
        self.stop, self.energy = nn.Linear(dim, 1), nn.Linear(dim, 1)
        self.label = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, classes))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Frames h (B, T, dim) and stop logits u (B, T)."""
        h = self.encoder(x.transpose(1, 2)).transpose(1, 2)
        return h, self.stop(h).squeeze(-1)

    def contexts(self, h: Tensor, before: Tensor, at: Tensor) -> Tensor:
        """c for positions at (B, n) after positions before (B, n): (B, n, dim)."""
        frames = torch.arange(h.shape[1], device=h.device)
        seen = {
            "hard": lambda: frames == at[..., None],
            "window": lambda: (frames - at[..., None]).abs() <= self.width,
            "segment": lambda: (frames > before[..., None]) & (frames <= at[..., None]),
            "global": lambda: torch.ones(*at.shape, h.shape[1], dtype=torch.bool, device=h.device),
        }[self.context]()
        scores = self.energy(h).transpose(-1, -2).expand(*at.shape, -1)
        return row_softmax(scores, seen) @ h

    def label_scores(self, h: Tensor, y: Tensor, before: Tensor, at: Tensor) -> Tensor:
        """log p(y_s | c_s) (B, S) at given positions."""
        return self.label(self.contexts(h, before, at)).log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)  # type: ignore[no-any-return]

    def emissions(self, h: Tensor, y: Tensor) -> Tensor:
        """log p(y_s | t) (B, S, T), or for "segment" log p(y_s | t', t) (B, S, T + 1, T)."""
        batch, frames = h.shape[:2]
        at = torch.arange(frames, device=h.device)
        if self.context != "segment":
            scores = self.label(self.contexts(h, at.expand(batch, -1) - 1, at.expand(batch, -1))).log_softmax(-1)
            return scores.gather(-1, y[:, None].expand(-1, frames, -1)).transpose(1, 2)  # type: ignore[no-any-return]
        before = torch.arange(-1, frames, device=h.device).repeat_interleave(frames).expand(batch, -1)
        context = self.contexts(h, before, at.repeat(frames + 1).expand(batch, -1))
        scores = self.label(context).log_softmax(-1).gather(-1, y[:, None].expand(-1, context.shape[1], -1))
        return scores.transpose(1, 2).unflatten(-1, (frames + 1, frames))  # type: ignore[no-any-return]

    @takes(x="batch frames inputs")
    def forward(self, x: Tensor, y: Tensor, alignment: Tensor | None = None) -> Tensor:
        """log p (B,): summed over all alignments, or of one alignment t (B, S)."""
        h, u = self.encode(x)
        jumps = jump_scores(u)
        if alignment is None:
            return full_sum(jumps, self.emissions(h, y))
        before = F.pad(alignment[:, :-1], (1, 0), value=-1)
        batch = torch.arange(len(y))[:, None]
        return (jumps[batch, before + 1, alignment] + self.label_scores(h, y, before, alignment)).sum(-1)

    @torch.no_grad()
    def align(self, x: Tensor, y: Tensor) -> Tensor:
        """The best alignment (B, S) of known labels."""
        h, u = self.encode(x)
        return viterbi(jump_scores(u), self.emissions(h, y))[0]

    @torch.no_grad()
    def decode(self, x: Tensor, count: int, beam: int = 4) -> tuple[Tensor, Tensor]:
        """Streaming beam search for `count` labels: (labels, positions), (B, count) each; positions only move forward."""
        h, u = self.encode(x)
        jumps, frames = jump_scores(u), x.shape[1]
        results = []
        for b in range(len(x)):
            kept: list[tuple[float, list[int], list[int]]] = [(0.0, [], [])]
            for s in range(count):
                grown = []
                for score, labels, places in kept:
                    last = places[-1] if places else -1
                    at = torch.arange(last + 1, frames - (count - s) + 1)
                    scores = self.label(self.contexts(h[b : b + 1], torch.full((1, len(at)), last), at[None])).log_softmax(-1)[0]
                    total = score + jumps[b, last + 1, at][:, None] + scores
                    best = total.flatten().topk(min(beam, total.numel()))
                    for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                        grown.append((value, [*labels, place % scores.shape[1]], [*places, int(at[place // scores.shape[1]])]))
                kept = sorted(grown, key=lambda one: -one[0])[:beam]
            results.append(kept[0])
        return torch.tensor([one[1] for one in results]), torch.tensor([one[2] for one in results])


def linear_alignment(count: int, frames: int, batch: int) -> Tensor:
    """t_s = round((s + 1) T / S) - 1: where training starts."""
    return (torch.arange(1, count + 1) * frames / count).round().long().sub(1).expand(batch, -1)


def stretched(
    count: int, symbols: int = 5, labels: int = 4, least: int = 2, most: int = 5, noise: float = 0.2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The synthetic task: frames (count, labels * most, symbols + 1), each label's one-hot for a random number of frames with noise, the rest of
    the frames marked by the last channel; labels (count, labels), no two alike in a row; and each label's last frame."""
    generator = torch.Generator().manual_seed(seed)
    frames = labels * most
    y = torch.randint(symbols, (count, labels), generator=generator)
    for s in range(1, labels):
        same = y[:, s] == y[:, s - 1]
        y[same, s] = (y[same, s] + 1) % symbols
    lengths = torch.randint(least, most + 1, (count, labels), generator=generator)
    ends = lengths.cumsum(1)
    owner = torch.searchsorted(ends, torch.arange(frames).expand(count, -1).contiguous(), right=True)
    kind = torch.cat((y, torch.full((count, 1), symbols)), 1).gather(1, owner)
    x = F.one_hot(kind, symbols + 1).float() + noise * torch.randn(count, frames, symbols + 1, generator=generator)
    return x, y, ends - 1
