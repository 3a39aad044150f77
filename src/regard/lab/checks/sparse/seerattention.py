"""Checks of seerattention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal
from regard.algebra.blocks import pooled
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.byhand import rotary
from regard.lab.checks.shared.selected import qkv, s_attend, selection_of
from regard.lab.verification import check
from regard.zoo.sparse.seerattention import GATED, AttnGate, SeerAttention, block_maxima, gate_loss


@check(
    "seerattention",
    "the tiled ground truth equals max-pooling of the full map, causal, grouped heads, normalised and not",
    below=1e-10,
    control="mean-pooling",
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(320, 8, 4, 2)
    causal = torch.ones(320, 320, dtype=torch.bool).tril()
    p = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(8)).masked_fill(~causal, -math.inf).softmax(-1)
    blocks = p.unflatten(-1, (10, 32)).unflatten(-3, (10, 32))
    truth, mean = blocks.amax((-1, -3)), blocks.mean((-1, -3))
    own = max(naive.gap(block_maxima(q, k, 32, False), truth), naive.gap(block_maxima(q, k, 32), truth / truth.sum(-1, keepdim=True)))
    return own, naive.gap(block_maxima(q, k, 32, False), mean)


def topics(count: int, generator: torch.Generator, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Queries constant a block; needles in 80% of key blocks, cancelled by the rest of their block."""
    at = torch.randint(6, (count, 16), generator=generator)
    q = (4 * directions[at] + 0.5 * torch.randn(count, 16, 16, generator=generator)).repeat_interleave(16, 1)
    k = 0.5 * torch.randn(count, 16, 16, 16, generator=generator)
    topic, spot = torch.randint(6, (count, 16), generator=generator), torch.randint(16, (count, 16), generator=generator)
    needle = 4 * directions[topic] * (torch.rand(count, 16, 1, generator=generator) < 0.8)
    k = k - needle[:, :, None] / 15
    k.scatter_add_(2, spot[..., None, None].expand(-1, -1, 1, 16), (needle * 16 / 15)[:, :, None])
    return q[:, None], k.flatten(1, 2)[:, None]


@check(
    "seerattention",
    "needles hidden from the mean: mass in the trained gate's top 3 blocks over the true top 3's",
    above=0.9,
    control="mean-pooled keys",
)
def _() -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(6, 16, generator=generator), dim=-1)
    gate = AttnGate(1, 1, 16, width=32, block_size=16, rope=False)
    step = torch.optim.Adam(gate.parameters(), lr=5e-3)
    for _ in range(300):
        q, k = topics(32, generator, directions)
        loss = gate_loss(gate(q, k), block_maxima(q, k, 16))
        step.zero_grad()
        loss.backward()
        step.step()
    q, k = topics(64, generator, directions)
    causal = torch.ones(256, 256, dtype=torch.bool).tril()
    p = (q @ k.transpose(-1, -2) / 4).masked_fill(~causal, -math.inf).softmax(-1)
    mass = p.unflatten(-1, (16, 16)).sum(-1).unflatten(-2, (16, 16)).mean(-2)[..., 4:, :]
    best = mass.topk(3, -1).values.sum()
    seen = torch.ones(16, 16, dtype=torch.bool).tril()
    means = (pooled(q, 16) @ pooled(k, 16).transpose(-1, -2)).masked_fill(~seen, -math.inf)
    return tuple(float(mass.gather(-1, s[..., 4:, :].topk(3, -1).indices).sum() / best) for s in (gate(q, k), means))  # type: ignore[return-value]


def gate_loop(gate: AttnGate, q: Tensor, k: Tensor, base: float = 10000.0, by_number: bool = False) -> Tensor:
    """Logits (B, H, n, n) of a gate with mean queries and max, min and mean keys; positions are the blocks' first tokens', or block numbers."""
    assert gate.q is not None
    size, heads = gate.block_size, q.shape[1]
    blocks = [slice(a, a + size) for a in range(0, q.shape[2], size)]
    at = torch.arange(len(blocks)) * (1 if by_number else size)
    logits = torch.full((q.shape[0], heads, len(blocks), len(blocks)), -math.inf, dtype=q.dtype)
    for h in range(heads):
        g = h // (heads // k.shape[1])
        pooled_q = torch.stack([q[:, h, b].mean(1) for b in blocks], 1) @ gate.q[h]
        kinds = [torch.cat((k[:, g, b].amax(1), k[:, g, b].amin(1), k[:, g, b].mean(1)), -1) for b in blocks]
        pooled_k = torch.stack(kinds, 1) @ gate.k[g]
        turned_q, turned_k = (rotary(x, at, base) if gate.rope is not None else x for x in (pooled_q, pooled_k))
        for u in range(len(blocks)):
            for w in range(u + 1):
                logits[:, h, u, w] = (turned_q[:, u] * turned_k[:, w]).sum(-1) / math.sqrt(pooled_q.shape[-1])
    return logits


def kept_pairs(logits: Tensor, size: int, length: int, threshold: float, ratio: float | None, last_dense: int) -> Tensor:
    """(H, L, L) bool of one sequence's logits (H, n, n): blocks over the threshold, or the best int((1 - sqrt(1 - ratio)) n) of a row."""
    n = logits.shape[-1]
    keep = torch.zeros(logits.shape, dtype=torch.bool)
    for h in range(len(logits)):
        for u in range(n):
            row = logits[h, u, : u + 1].softmax(0).tolist()
            best = sorted(range(u + 1), key=lambda w, row=row: -row[w])
            chosen = [w for w in best if row[w] > threshold] if ratio is None else best[: max(1, int((1 - math.sqrt(1 - ratio)) * n))]
            keep[h, u, list(range(u + 1)) if u >= n - last_dense else chosen] = True
    block, at = torch.arange(length) // size, torch.arange(length)
    return keep[:, block[:, None], block] & (at[:, None] >= at)


@check(
    "seerattention",
    "the gate and the sparse output equal loops: rotary at the blocks' first tokens, threshold and ratio, dense last rows, ragged, grouped heads",
    below=1e-10,
    control="rotary positions by block number",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    q, k, v = qkv(92, 8, 4, 2)
    at, own, other = torch.arange(92), 0.0, math.inf
    for threshold, ratio, last_dense, base in ((0.12, None, 0, 1e4), (0.2, None, 2, 100.0), (0.0, 0.3, 1, 1e4), (0.0, 0.75, 0, 1e4)):
        layer = SeerAttention(4, 2, 8, width=6, block_size=8, threshold=threshold, ratio=ratio, last_dense=last_dense, base=base).double()
        logits = gate_loop(layer.gate, q, k, base)
        found, out = layer.gate(q, k), layer(q, k, v)
        low = torch.ones(12, 12, dtype=torch.bool).tril()
        pairs = kept_pairs(logits[0], 8, 92, threshold, ratio, last_dense)
        turned = [rotary(x, at, base) for x in (q, k.repeat_interleave(2, 1))]
        truth = s_attend(*turned, v.repeat_interleave(2, 1), pairs)
        own = max(own, naive.gap(found[..., low], logits[..., low]), naive.gap(out, truth))
        other = min(other, naive.gap(found[..., low], gate_loop(layer.gate, q, k, base, True)[..., low]))
    return own, other


@check(
    "seerattention",
    "the loss: mean over elements of KL of the maxima to the gate's softmax, the first quarter of rows left out, and what distil gives",
    below=1e-10,
    control="all rows",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    q, k, _ = qkv(64, 8, 2)
    layer = SeerAttention(2, 2, 8, width=8, block_size=8).double()
    logits, turned = gate_loop(layer.gate, q, k), [rotary(x, torch.arange(64)) for x in (q, k)]
    causal = torch.ones(64, 64, dtype=torch.bool).tril()
    p = (turned[0] @ turned[1].transpose(-1, -2) / math.sqrt(8)).masked_fill(~causal, -math.inf).softmax(-1)
    tops = p.unflatten(-1, (8, 8)).unflatten(-3, (8, 8)).amax((-1, -3))
    tops = (tops / tops.sum(-1, keepdim=True))[0].tolist()

    def loss(first: int) -> float:
        total = 0.0
        for h in range(2):
            for u in range(first, 8):
                guess = logits[0, h, u].softmax(0).tolist()
                total += sum(t * math.log(t / g) for t, g in zip(tops[h][u], guess, strict=True) if t > 0)
        return total / (2 * (8 - first) * 8)

    found = float(layer.distil(q, k))
    return max(abs(found - loss(2)), abs(float(gate_loss(layer.gate(q, k), torch.tensor([tops], dtype=q.dtype))) - loss(2))), abs(
        found - loss(0)
    )


@check(
    "seerattention",
    "realised density for ratio 0.1, 0.3, 0.5 and 0.9: largest difference; threshold 0 is dense",
    below=0.02,
    control="ratio as a share of each whole row",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(1024, 16, 2)
    layer = SeerAttention(2, 2, 16, width=16, block_size=8, threshold=0.0).double()
    turned = layer.rotated(q, k)
    dense = naive.gap(layer(q, k, v), attend(*turned, v, mask=Causal()))
    logits = layer.gate(q, k).detach()
    worst = plain = 0.0
    available = 128 * 129 / 2
    for ratio in (0.1, 0.3, 0.5, 0.9):
        given = {name: torch.tensor(x) for name, x in (("threshold", 0.0), ("ratio", ratio), ("size", 8), ("last_dense", 0))}
        keep = selection_of(GATED.select, q, k, gate=logits, **given).keep
        worst = max(worst, abs(float(keep.sum()) / 2 / available - ratio))
        plain = max(plain, abs(sum(min(u + 1, round(ratio * 128)) for u in range(128)) / available - ratio))
    return worst if dense < 1e-10 else math.inf, plain


@check("seerattention", "in gate-only training q and k get no gradient: largest", below=0, control="the gate's own gradient")
def _() -> tuple[float, float]:
    layer, (q, k, _) = SeerAttention(2, 2, 16, width=16, block_size=8).double(), (x.requires_grad_() for x in qkv(64, 16, 2))
    layer.distil(q, k).backward()
    assert layer.gate.q is not None and layer.gate.q.grad is not None
    return max(0.0 if x.grad is None else float(x.grad.abs().max()) for x in (q, k)), float(layer.gate.q.grad.abs().max())
