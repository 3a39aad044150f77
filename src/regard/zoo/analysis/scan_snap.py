"""Scan and snap: one layer learns which keys tell the next token, and then stands still (id 186; Tian et al., 2023).

x_1 .. x_{L-1} drawn from P(l | m, n), x_L = m the last token, n the next; a common token l has P > 0 for several n, a distinct one for one.
b_l = c_l e^{z_ml} / sum_l' c_l' e^{z_ml'} with counts c (x_L left out),  f = b / |b|,  logits = Y f,  cross-entropy;  Z = Y = 0, SGD, eta_Y >> eta_Z.
Scan: z falls for common tokens, rises for distinct ones by P(l | m, n); snap: then grows like a logarithm, the combination all but fixed.

With sequences of 128 and the default 1000 steps no snap is seen: the last step's growth is not yet a tenth of the fastest, and common tokens still hold 0.63
of the attention. The checks, at 3000 steps of 64, snap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.plots import Plot, figure
from regard.results import Result
from regard.taps import read


@dataclass(frozen=True)
class ScanData:
    """probabilities (last, next, vocab): P(l | m, n) over key tokens, for next tokens of each last one, numbered 0 .. last * next - 1;
    common (last, vocab) bool."""

    probabilities: Tensor
    common: Tensor

    @property
    def vocab(self) -> int:
        return self.probabilities.shape[-1]

    def draw(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(counts (B, vocab) of the length - 1 keys, last token (B,), next token (B,))."""
        lasts, nexts, _ = self.probabilities.shape
        m = torch.randint(lasts, (count,), generator=generator)
        n = torch.randint(nexts, (count,), generator=generator)
        keys = torch.multinomial(self.probabilities[m, n], length - 1, True, generator=generator)
        counts = torch.zeros(count, self.vocab).scatter_add_(1, keys, torch.ones(keys.shape))
        return counts, m, m * nexts + n


def scan_data(
    lasts: int = 2, nexts: int = 2, common: int = 10, more_common: int = 5, distinct: int = 10, common_weight: float = 1.0, low: float = 0.1
) -> ScanData:
    """`common` tokens that all next tokens share and `more_common` shared by those of one last token, of weight `common_weight`; `distinct` tokens
    of each next one, of weights evenly from `low` to 1, the last the greatest."""
    if min(lasts, nexts, distinct) < 1 or common < 0 or more_common < 0 or not 0 < low <= 1:
        raise RegardError(
            f"lasts={lasts}, nexts={nexts}, distinct={distinct}, common={common}, low={low}; expected positive sizes, 0 < low <= 1"
        )
    size = common + lasts * more_common + lasts * nexts * distinct
    weights, shared = torch.zeros(lasts, nexts, size), torch.zeros(lasts, size, dtype=torch.bool)
    for m in range(lasts):
        own = [*range(common), *range(common + m * more_common, common + (m + 1) * more_common)]
        shared[m, own] = True
        weights[m, :, own] = common_weight
        for n in range(nexts):
            at = common + lasts * more_common + (m * nexts + n) * distinct
            weights[m, n, at : at + distinct] = torch.linspace(low, 1, distinct)
    return ScanData(weights / weights.sum(-1, keepdim=True), shared)


def attended(z: Tensor, counts: Tensor) -> Tensor:
    """b (B, vocab): shares c_l e^{z_l} of rows z (B, vocab)."""
    rate = counts * (z - z.amax(1, keepdim=True)).exp()
    return rate / rate.sum(1, keepdim=True)


@dataclass
class ScanRun(Result):
    """steps; z (steps, last, vocab), expected (steps, last, next, vocab): attention P e^z, normalised; loss."""

    data: ScanData
    steps: list[int] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def expected(self) -> Tensor:
        p = self.data.probabilities * torch.stack(self.z)[:, :, None].exp()
        return p / p.sum(-1, keepdim=True)

    def top(self, last: int = 0, following: int = 0) -> Tensor:
        """z of the strongest distinct token of a next token, by step."""
        p = self.data.probabilities[last, following].masked_fill(self.data.common[last], 0.0)
        return torch.stack(self.z)[:, last, int(p.argmax())]

    def common_mass(self, last: int = 0, following: int = 0) -> Tensor:
        """Expected attention on common tokens, by step."""
        return (self.expected()[:, last, following] * self.data.common[last]).sum(-1)

    def phases(self, share: float = 0.1) -> tuple[int, int]:
        """(scan start, snap point): the first step by which the strongest token's z has `share` of its final value, and the first behind it
        from which it grows by less than `share` of its fastest growth a step."""
        top, at = self.top(), torch.tensor(self.steps, dtype=torch.float64)
        rate = top.diff() / at.diff()
        begin = int((top >= share * top[-1]).nonzero()[0])
        slow = (rate < share * rate.max()).nonzero().flatten()
        after = slow[slow > int(rate.argmax())]
        return self.steps[begin], self.steps[int(after[0]) + 1] if len(after) else self.steps[-1]

    def plot(self) -> Plot:
        """Every token's z by step, for the first last token."""
        z = torch.stack(self.z)[:, 0]
        shown = {
            "common": self.data.common[0].nonzero().flatten()[:3],
            "distinct": (self.data.probabilities[0, 0] * ~self.data.common[0]).nonzero().flatten(),
        }
        lines = {
            f"{kind} {int(t)}": [(float(s), float(v)) for s, v in zip(self.steps, z[:, t], strict=True)]
            for kind, ts in shown.items()
            for t in ts
        }
        return figure("Scan and snap", "step", "z", lines)


@register("scan-snap", kind="experiment")
def scan_and_snap(
    data: ScanData,
    *,
    length: int = 128,
    steps: int = 1000,
    batch: int = 512,
    lr_y: float = 1.0,
    lr_z: float = 0.1,
    every: int = 100,
    seed: int = 0,
    shuffled: bool = False,
) -> ScanRun:
    """Train Y and Z by SGD from zero. every: steps between what is kept. shuffled: next tokens drawn anew (the control: nothing to find)."""
    if length < 2 or steps < 1 or every < 1:
        raise RegardError(f"length={length}, steps={steps}, every={every}; expected 2 or more, and 1 or more")
    lasts, nexts, vocab = data.probabilities.shape
    z, y = torch.zeros(lasts, vocab, requires_grad=True), torch.zeros(lasts * nexts, vocab, requires_grad=True)
    generator, run = torch.Generator().manual_seed(seed), ScanRun(data)
    for step in range(steps + 1):
        counts, m, n = data.draw(batch, length, generator)
        n = n[torch.randperm(batch, generator=generator)] if shuffled else n
        loss = F.cross_entropy(F.normalize(attended(z[m], counts), dim=1) @ y.T, n)
        if step % every == 0 or step == steps:
            run.steps.append(step)
            run.z.append(z.detach().clone())
            run.loss.append(loss.item())
        by_z, by_y = torch.autograd.grad(loss, (z, y))
        with torch.no_grad():
            z -= lr_z * by_z
            y -= lr_y * by_y
    return run


@torch.no_grad()
def attention_on_tokens(model: nn.Module, ids: Tensor, vocab: int, layers: Sequence[int] | None = None) -> Tensor:
    """What the last tokens of ids (B, L) give to each key token, by the last token: (layers, heads, vocab, vocab) [m, l], summed over places and
    averaged over the rows that end in m (NaN for m that ends none): the tracker for decoders on real text."""
    with read(model, "weights", layers=layers, positions=[-1]) as seen:
        model(ids)
    last, out = F.one_hot(ids[:, -1], vocab), []
    keys = F.one_hot(ids, vocab)
    for _, w in seen.items("weights"):
        given = torch.einsum("bhl,blv->bhv", w[:, :, 0], keys.to(w))
        out.append(torch.einsum("bm,bhv->hmv", last.to(w), given) / last.sum(0).to(w)[None, :, None].clamp_min(1))
    found = torch.stack(out)
    return found.masked_fill((last.sum(0) == 0)[None, None, :, None], float("nan"))
