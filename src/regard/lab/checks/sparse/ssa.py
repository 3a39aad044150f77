"""Checks of ssa."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.byhand import join_heads, rotary, split_heads
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.retrieved_chunks import ssa
from regard.lab.checks.shared.selected import masked_softmax, selection_of
from regard.lab.verification import check
from regard.nn.decoder import Decoder
from regard.zoo.sparse.ssa import SSAAttention, alignment, block_top, captured_mass, training_loss


@check("ssa", "blocks >= all: both streams are one, in outputs and in loss; 64 tokens", below=1e-12, control="2 of 8 blocks")
def _() -> tuple[float, float]:
    q, k, v = torch.randn(2, 4, 64, 8, dtype=F64), *torch.randn(2, 2, 2, 64, 8, dtype=F64)
    gaps = [ssa(count).streams(q, k, v) for count in (8, 2)]
    return tuple(naive.gap(g["sparse"], g["full"]) + float(alignment(g["full"], g["sparse"])) for g in gaps)  # type: ignore[return-value]


@check(
    "ssa",
    "the choice equals a loop over mean keys of complete blocks, shared by the heads of a group: differing blocks",
    below=0,
    control="heads that choose on their own",
)
def _() -> tuple[float, float]:
    q, k = torch.randn(1, 4, 64, 8, dtype=F64), torch.randn(1, 2, 64, 8, dtype=F64)
    found = selection_of(block_top(8, 3), q, k).keep
    wrong = [0, 0]
    for h in range(2):
        for i in range(64):
            ready = [w for w in range(8) if w * 8 + 7 <= i]
            masses = torch.zeros(2, 8, dtype=F64)
            for g in range(2 if ready else 0):
                s = torch.stack([q[0, 2 * h + g, i] @ k[0, h, w * 8 : w * 8 + 8].mean(0) for w in ready]) / math.sqrt(8)
                masses[g, ready] = s.softmax(0)
            for number, mass in enumerate((masses.sum(0), masses[0])):
                past = sorted(range(i // 8), key=lambda w: (-float(mass[w]), w))[:2]
                truth = torch.zeros(8, dtype=torch.bool)
                truth[[i // 8, *past]] = True
                wrong[number] += int((found[0, 2 * h : 2 * h + 2, i] != truth).sum())
    return float(wrong[0]), float(wrong[1])


@check(
    "ssa",
    "share of tokens in unselected blocks that the last row's loss reaches through k and v",
    above=0.99,
    control="the sparse stream alone",
)
def _() -> tuple[float, float]:
    layer = ssa()
    q, k, v = (torch.randn(1, h, 64, 8, dtype=F64, requires_grad=True) for h in (4, 2, 2))
    keep = selection_of(block_top(8, 2), q.detach(), k.detach()).keep[:, ::2, -1].repeat_interleave(8, -1)
    o = layer.streams(q, k, v)
    sparse, full = o["sparse"][:, :, -1], o["full"][:, :, -1]
    shares = []
    for loss in (sparse.square().sum() + alignment(full, sparse), sparse.square().sum()):
        grads = torch.autograd.grad(loss, (k, v), retain_graph=True)
        shares.append(min(float((g[~keep].abs().sum(-1) > 0).double().mean()) for g in grads))
    return shares[0], shares[1]


@check("ssa", "each term's gradient equals a one-sided loss written by hand", below=1e-10, control="gradient through both sides")
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, h, 64, 8, dtype=F64, requires_grad=True) for h in (4, 2, 2))
    o = ssa().streams(q, k, v)
    full, sparse = o["full"], o["sparse"]

    def smooth(a: Tensor, b: Tensor) -> Tensor:
        d = (a - b).abs()
        return torch.where(d < 1, d * d / 2, d - 0.5).mean()

    mine = torch.autograd.grad(alignment(full, sparse), (q, k, v), retain_graph=True)
    one, two = full.detach().clone(), sparse.detach().clone()
    truth = torch.autograd.grad(smooth(full, two) + smooth(one, sparse), (q, k, v), retain_graph=True)
    both = torch.autograd.grad(2 * smooth(full, sparse), (q, k, v))
    return max(map(naive.gap, mine, truth)), min(map(naive.gap, both, truth))


@check("ssa", "|o_f - o_s| over 2 delta max |v|, the largest of 1024 rows", below=1, control="delta of a choice of 6 blocks instead")
def _() -> tuple[float, float]:
    q, k, v = torch.randn(4, 4, 64, 8, dtype=F64) * 2, *torch.randn(2, 4, 2, 64, 8, dtype=F64)
    o = ssa().streams(q, k, v)
    size = v.norm(dim=-1).amax(-1).repeat_interleave(2, 1)[..., None]
    gap = (o["full"] - o["sparse"]).norm(dim=-1)
    ratios = []
    for count in (2, 6):
        delta = 1 - captured_mass(q, k, selection_of(block_top(8, count), q, k))
        ratios.append(float((gap / (2 * delta * size).clamp_min(1e-12))[..., 24:].max()))
    return ratios[0], ratios[1]


def layer_by_hand(layer: SSAAttention, x: Tensor, choice: Tensor | None) -> Tensor:
    """Gated heads (B, H, L, D) of the stream that reads `choice` (H, L, blocks), or everything before (None)."""
    n, at = x.shape[1], torch.arange(x.shape[1])
    q, k = (rotary(split_heads(x @ m.weight.T, heads), at) for m, heads in ((layer.q, layer.heads), (layer.k, layer.kv_heads)))
    v, causal = split_heads(x @ layer.v.weight.T, layer.kv_heads), at <= at[:, None]
    seen = causal if choice is None else causal & choice.repeat_interleave(layer.block_size, -1)[..., :n]
    assert layer.head_gate is not None and layer.head_gate.weight is not None
    gate = 1 / (1 + torch.exp(-(x @ layer.head_gate.weight.T + layer.head_gate.bias)))
    return masked_softmax(q, k, v, seen) * gate.transpose(1, 2)[..., None]


@check(
    "ssa",
    "the layer's both streams by hand, gated by sigmoid heads; its distance, in training; and the stream that goes on",
    below=1e-10,
    control="the other stream",
)
def _() -> tuple[float, float]:
    layer, x = ssa(), torch.randn(1, 64, 32, dtype=F64)
    assert layer.head_gate is not None and layer.head_gate.weight is not None
    torch.nn.init.normal_(layer.head_gate.weight)
    q, k = (rotary(split_heads(x @ m.weight.T, heads), torch.arange(64)).detach() for m, heads in ((layer.q, 4), (layer.k, 2)))
    choice = torch.zeros(4, 64, 8, dtype=torch.bool)
    for h in range(4):
        for i in range(64):
            mass = torch.zeros(8, dtype=F64)
            for g in (h // 2 * 2, h // 2 * 2 + 1):
                done = (i + 1) // 8
                s = [q[0, g, i] @ k[0, h // 2, w * 8 : w * 8 + 8].mean(0) / math.sqrt(8) for w in range(done)]
                mass[:done] += torch.stack(s).softmax(0) if done else 0
            past = sorted(range(i // 8), key=lambda w, mass=mass: -float(mass[w]))[:1]
            choice[h, i, [i // 8, *past]] = True
    outs = {"sparse": layer_by_hand(layer, x, choice), "full": layer_by_hand(layer, x, None)}
    truth = {name: join_heads(o) @ layer.out.weight.T for name, o in outs.items()}
    d = (outs["full"] - outs["sparse"]).abs()
    apart = 2 * torch.where(d < 1, d * d / 2, d - 0.5).mean()
    own, other = 0.0, math.inf
    for name, wrong in (("sparse", "full"), ("full", "sparse")):
        layer.use(name)
        for training in (True, False):
            y = layer.train(training)(x)
            own, other = max(own, naive.gap(y, truth[name])), min(other, naive.gap(y, truth[wrong]))
        assert layer.distance is not None
        own = max(own, float((layer.distance - apart).abs().detach()))
    return own, other


@check(
    "ssa",
    "a model's loss is cross-entropy and 10 times the layers' mean distance, by a stream drawn for all layers with probability 1/2",
    below=1e-10,
    control="weight 1",
)
def _() -> tuple[float, float]:
    layers = [SSAAttention(32, 4, 2, block_size=4, top_k=2) for _ in range(3)]
    model, tokens = Decoder(layers, vocab=20, dim=32, layers=3, heads=4).double(), torch.randint(20, (2, 25))
    with torch.no_grad():
        model.embed.weight.mul_(30)
    own, other, drawn = 0.0, math.inf, []
    for seed in range(24):
        loss, apart = training_loss(model, tokens, torch.Generator().manual_seed(seed))
        modes = {layer.mode for layer in layers}
        drawn.append(modes.pop() if len(modes) == 1 else "several")
        logits = model(tokens[:, :-1]).log_softmax(-1)
        entropy = -logits.gather(-1, tokens[:, 1:, None]).mean()
        mean = sum((layer.distance for layer in layers if layer.distance is not None), torch.zeros(())) / 3
        own = max(own, naive.gap(loss, entropy + 10 * mean), naive.gap(apart, mean))
        other = min(other, naive.gap(loss, entropy + mean))
    halves = {name: drawn.count(name) for name in ("sparse", "full")}
    return own if sum(halves.values()) == 24 and min(halves.values()) >= 6 else math.inf, other
