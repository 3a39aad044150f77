"""What token mixers are as matrices: ranks of softmax, linear attention and selective state spaces, and how well features find an object (id 32).

Y = M X;  selective state space: M_ts = sum_n C_tn exp(A_n sum_{u = s+1..t} D_u) D_s B_sn for s <= t
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.engine import weights
from regard.errors import RegardError
from regard.nn.attention import Attention
from regard.plots import figure


def selective_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """x, delta (B, L, D), a (D, n) < 0, b, c (B, L, n) -> y (B, L, D): h_t = exp(delta_t a) h_{t-1} + delta_t b_t x_t, y_t = c_t.h_t."""
    h = x.new_zeros(len(x), x.shape[2], a.shape[1])
    outs = []
    for t in range(x.shape[1]):
        h = torch.exp(delta[:, t, :, None] * a) * h + delta[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
        outs.append((h * c[:, t, None]).sum(-1))
    return torch.stack(outs, 1)


def selective_matrix(delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The same as matrices (B, D, L, L), one a channel."""
    total = delta.cumsum(1).transpose(1, 2)  # (B, D, L)
    gap = (total[..., :, None] - total[..., None, :]).clamp_min(0)
    fade = torch.exp(gap[..., None] * a[:, None, None])  # (B, D, L, L, n)
    m = torch.einsum("btn,bdtsn,bsn->bdts", c, fade, b) * delta.transpose(1, 2)[..., None, :]
    return m.tril()


class SelectiveSSM(nn.Module):
    """A Mamba-like mixer x (B, L, dim) -> (B, L, dim): step sizes, B and C read from x; bidirectional adds the same run backwards."""

    def __init__(self, dim: int, state: int = 8, bidirectional: bool = False):
        super().__init__()
        self.bidirectional = bidirectional
        ways = 2 if bidirectional else 1
        self.log_a = nn.Parameter(torch.log(torch.arange(1, state + 1.0)).repeat(ways, dim, 1))
        self.read = nn.ModuleList([nn.Linear(dim, dim + 2 * state) for _ in range(ways)])
        self.state = state

    def parts(self, x: Tensor, way: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """delta, a, b, c."""
        delta, b, c = self.read[way](x).split([x.shape[2], self.state, self.state], -1)
        return F.softplus(delta), -torch.exp(self.log_a[way]), b, c

    def forward(self, x: Tensor) -> Tensor:
        y = selective_scan(x, *self.parts(x))
        if self.bidirectional:
            back = x.flip(1)
            y = y + selective_scan(back, *self.parts(back, 1)).flip(1)
        return y


def token_mixing_matrix(layer: nn.Module, x: Tensor) -> Tensor:
    """(B, heads or channels, L, L) with Y = M X: of a `regard.nn.Attention` (its weights on the values) or a `SelectiveSSM`."""
    if isinstance(layer, SelectiveSSM):
        m = selective_matrix(*layer.parts(x))
        if layer.bidirectional:
            m = m + selective_matrix(*layer.parts(x.flip(1), 1)).flip(-1, -2)
        return m
    if isinstance(layer, Attention):
        found = layer.weights(x)
        if found is not None:
            return found
    raise RegardError(f"layer is a {type(layer).__name__}; expected a regard.nn.Attention whose mechanism has a matrix, or a SelectiveSSM")


def effective_rank(m: Tensor) -> Tensor:
    """exp of the entropy of the singular values over their sum, of (..., L, L); 1 for a matrix of zeros."""
    p = torch.linalg.svdvals(m)
    p = p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return torch.exp(-torch.special.xlogy(p, p).sum(-1))


@dataclass(frozen=True)
class RankReport:
    """numerical: rank of the whole matrix; off_diagonal: largest rank of the blocks [a:, :a]; effective: of the whole; curve: effective rank of
    [a:, :a] for each cut a."""

    numerical: int
    off_diagonal: int
    effective: float
    curve: tuple[tuple[int, float], ...]

    def plot(self) -> str:
        """The curve as an SVG."""
        return figure("Rank across a cut", "cut", "effective rank of the block below", {"block": [(float(a), r) for a, r in self.curve]})


def rank_report(m: Tensor, cuts: int = 8) -> RankReport:
    """Ranks of one matrix (L, L)."""
    if m.dim() != 2 or m.shape[0] != m.shape[1]:
        raise RegardError(f"m has shape {tuple(m.shape)}; expected one square matrix")
    length = len(m)
    at = sorted({max(1, length * i // (cuts + 1)) for i in range(1, cuts + 1)})
    blocks = [m[a:, :a] for a in at]
    ranks = [int(torch.linalg.matrix_rank(x)) for x in blocks]
    return RankReport(
        int(torch.linalg.matrix_rank(m)),
        max(ranks),
        float(effective_rank(m)),
        tuple((a, float(effective_rank(x))) for a, x in zip(at, blocks, strict=True)),
    )


@register("mamba-rank-analysis", kind="module")
def mixing_ranks(length: int = 64, state: int = 8, dim: int = 16, seed: int = 0) -> dict[str, RankReport]:
    """Ranks of random layers of the same state size: "softmax", "linear" (both directions), "mamba" (causal), "mamba-bidirectional"."""
    torch.manual_seed(seed)
    x = torch.randn(1, length, dim, dtype=torch.float64)
    q, k = (2 * torch.randn(1, 1, length, state, dtype=torch.float64) for _ in range(2))
    found: dict[str, Any] = {"softmax": weights(q, k, "softmax"), "linear": weights(q, k, "slab")}
    for name, both in (("mamba", False), ("mamba-bidirectional", True)):
        found[name] = token_mixing_matrix(SelectiveSSM(dim, state, both).double(), x)
    return {name: rank_report(m[0, 0].detach()) for name, m in found.items()}


def binary_auc(activation: Tensor, mask: Tensor) -> float:
    """How well activations (B, H, W) tell object from background: the share of (object, background) pairs of pixels that they order rightly, ties
    counting half; mean over images that have both. 1: perfectly, 1/2: not at all."""
    if activation.shape != mask.shape or mask.dtype != torch.bool:
        raise RegardError(
            f"activation {tuple(activation.shape)}, mask {tuple(mask.shape)} {mask.dtype}: expected the same shape, and a bool mask"
        )
    found = []
    for a, m in zip(activation.flatten(1).double(), mask.flatten(1), strict=True):
        inside, outside = a[m], a[~m]
        if len(inside) and len(outside):
            values = outside.sort().values
            below = torch.searchsorted(values, inside, right=False)
            upto = torch.searchsorted(values, inside, right=True)
            found.append(float((below + upto).double().mean()) / (2 * len(outside)))
    if not found:
        raise RegardError("no image of the mask has both object and background")
    return sum(found) / len(found)


class VisionMamba(nn.Module):
    """Images (B, channels, H, W) -> features (B, H' W', dim): patches, places, blocks of a bidirectional selective mixer with a gate."""

    def __init__(self, channels: int, dim: int, layers: int, patch: int, tokens: int, state: int = 4):
        super().__init__()
        self.patch = nn.Conv2d(channels, dim, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(layers)])
        self.mixers = nn.ModuleList([SelectiveSSM(dim, state, bidirectional=True) for _ in range(layers)])
        self.gates, self.outs = (nn.ModuleList([nn.Linear(dim, dim) for _ in range(layers)]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        for norm, mixer, gate, out in zip(self.norms, self.mixers, self.gates, self.outs, strict=True):
            y = norm(x)
            x = x + out(mixer(y) * F.silu(gate(y)))
        return x  # type: ignore[no-any-return]


def shapes(count: int, side: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(images (count, 1, side, side), masks): a textured disc or square on noise."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.arange(side)[:, None], torch.arange(side)
    centre = torch.randint(side // 4, side - side // 4, (count, 2), generator=generator)
    radius = torch.randint(side // 6, side // 4 + 1, (count, 1, 1), generator=generator)
    dy, dx = (y - centre[:, 0, None, None]).abs(), (x - centre[:, 1, None, None]).abs()
    square = torch.rand(count, 1, 1, generator=generator) < 0.5
    mask = torch.where(square, torch.maximum(dy, dx) <= radius, dy**2 + dx**2 <= radius**2)
    image = 0.3 * torch.randn(count, side, side, generator=generator) + mask * (1 + 0.5 * torch.sin(1.5 * x))
    return image[:, None], mask


@dataclass(frozen=True)
class DinoResult:
    """losses of each step; auc_before, auc_after: `binary_auc` of feature norms before and after training."""

    losses: tuple[float, ...]
    auc_before: float
    auc_after: float


def dino_loss(
    student: Tensor, teacher: Tensor, centre: Tensor, student_temperature: float = 0.1, teacher_temperature: float = 0.04
) -> Tensor:
    """-softmax((t - c) / tau_t) . log softmax(s / tau_s), mean over rows; no gradient to the teacher."""
    target = torch.softmax((teacher.detach() - centre) / teacher_temperature, -1)
    return -(target * torch.log_softmax(student / student_temperature, -1)).sum(-1).mean()


def dino_run(steps: int = 100, dim: int = 24, outputs: int = 32, batch: int = 16, lr: float = 1e-3, seed: int = 0) -> DinoResult:
    """Self-distillation of a small bidirectional Vision Mamba on shapes: two noisy shifted views, a teacher that follows the student's average
    (0.996 towards 1), its outputs centred by an average (0.9)."""
    torch.manual_seed(seed)

    def network() -> tuple[VisionMamba, nn.Module]:
        return VisionMamba(1, dim, 2, 4, 16), nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, outputs))

    (body, head), (old_body, old_head) = network(), network()
    old_body.load_state_dict(body.state_dict())
    old_head.load_state_dict(head.state_dict())
    images, masks = shapes(256, seed=seed)
    coarse = F.avg_pool2d(masks[:, None].float(), 4)[:, 0] > 0.3

    def auc() -> float:
        with torch.no_grad():
            return binary_auc(body(images[:64]).norm(dim=-1).unflatten(-1, (4, 4)), coarse[:64])

    def view(x: Tensor) -> Tensor:
        shift = torch.randint(-2, 3, (2,)).tolist()
        return x.roll(shift, (2, 3)) + 0.1 * torch.randn_like(x)

    optimiser = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr)
    centre, losses, before = torch.zeros(outputs), [], auc()
    for step in range(steps):
        x = images[torch.randint(len(images), (batch,))]
        a, b = view(x), view(x)
        with torch.no_grad():
            targets = [old_head(old_body(y).mean(1)) for y in (a, b)]
        outs = [head(body(y).mean(1)) for y in (a, b)]
        loss = (dino_loss(outs[0], targets[1], centre) + dino_loss(outs[1], targets[0], centre)) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        keep = 1 - (1 - 0.996) * (1 - step / steps)
        with torch.no_grad():
            for new, old in zip((*body.parameters(), *head.parameters()), (*old_body.parameters(), *old_head.parameters()), strict=True):
                old.mul_(keep).add_((1 - keep) * new)
            centre = 0.9 * centre + 0.1 * torch.cat(targets).mean(0)
        losses.append(float(loss.detach()))
    return DinoResult(tuple(losses), before, auc())
