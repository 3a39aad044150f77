"""Checks of lalte."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, Sinks, Window
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn, joined, silu, split
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.decoder import Decoder
from regard.zoo.linear.lalte import MARGIN, BudgetController, LTEAttention, Scored, lalte_layers


def evicting(bias: float, **options: int) -> LTEAttention:
    layer = LTEAttention(16, 2, window=8, sinks=2, **{"budget": 64, **options}).double().eval()
    layer.router.last.weight.data.mul_(8)  # decisions of both kinds
    layer.router.last.bias.data.fill_(bias)  # type: ignore[union-attr]
    return layer


@check("lalte", "all scores positive: causal softmax; all negative: sinks and window", below=1e-12, control="the two swapped")
def _() -> tuple[float, float]:
    x, gaps, swapped = torch.randn(2, 64, 16, dtype=F64), [], []
    for bias in (1e4, -1e4):
        layer = evicting(bias)
        q, k, v = layer.split(x)
        at = torch.arange(64)
        q, k = layer.rope.rotate(q, at), layer.rope.rotate(k, at)
        near = Causal() & (Window(9) | Sinks(2))
        outs = [layer.out(attend(q, k, v, mask=m).transpose(1, 2).flatten(-2)) for m in (Causal(), near)]
        y = layer(x)
        gaps.append(naive.gap(y, outs[0 if bias > 0 else 1]))
        swapped.append(naive.gap(y, outs[1 if bias > 0 else 0]))
    return max(gaps), min(swapped)


@check(
    "lalte",
    "decoding with a ring of tokens and places for the kept == the masked pass; the kept are some, not all",
    below=1e-10,
    control="places for three",
)
def _() -> tuple[float, float]:
    x, found = torch.randn(2, 64, 16, dtype=F64), []
    for budget in (64, 5):
        torch.manual_seed(3)
        layer = evicting(0.0, budget=budget)
        y = layer(x)
        share = float(layer.kept.double().mean())
        found.append(naive.gap(layer.step(x)[0], y) if 0.1 < share < 0.9 else math.nan)
    return found[0], found[1]


@check(
    "lalte",
    "places for six: those held are the six of largest score that left the window: how many are not",
    below=0,
    control="the last six to leave (FIFO)",
)
def _() -> tuple[float, float]:
    torch.manual_seed(3)
    x, layer = torch.randn(1, 64, 16, dtype=F64), evicting(0.5, budget=8)
    layer(x)
    gone = layer.scores[..., 2 : 64 - 9]
    best = gone.topk(6, -1).indices + 2
    held = layer.step(x)[1].place
    wrong = sum(len(set(a.tolist()) - set(b.tolist())) for a, b in zip(held.flatten(0, 1), best.flatten(0, 1), strict=True))
    fifo = torch.arange(49, 55).expand_as(best)
    return wrong, sum(len(set(a.tolist()) - set(b.tolist())) for a, b in zip(fifo.flatten(0, 1), best.flatten(0, 1), strict=True))


@check("lalte", "the router's gradient == the change of the loss when v_j grows by its share", below=1e-6, control="without the factor v")
def _() -> tuple[float, float]:
    q, k, v = qkv(20)
    seed = torch.randn_like(v)

    def loss(v: Tensor) -> Tensor:
        return (attend(q, k, v, mask=Causal()) * seed).sum().tanh()

    v.requires_grad_()
    score = torch.zeros(1, 2, 20, dtype=F64, requires_grad=True)
    dv, own = torch.autograd.grad(loss(Scored.apply(v, score)), (v, score))
    numeric = torch.zeros_like(own)
    with torch.no_grad():
        for h in range(2):
            for j in range(20):
                step = torch.zeros(1, 2, 20, 1, dtype=F64)
                step[0, h, j] = 1e-5
                numeric[0, h, j] = (loss(v * (1 + step)) - loss(v * (1 - step))) / 2e-5
    return naive.gap(own, numeric), naive.gap(dv.sum(-1), numeric)


@check(
    "lalte", "tokens from j + 7 on never change the decision of j; outputs before a changed token stay", below=0, control="the token j + 6"
)
def _() -> tuple[float, float]:
    layer, x = evicting(0.0), torch.randn(1, 64, 16, dtype=F64)

    def change(token: int) -> tuple[float, float]:
        y, scores = layer(x), layer.scores
        other = x.clone()
        other[:, token:] += 1
        z = layer(other)
        return naive.gap(layer.scores[..., : token - MARGIN], scores[..., : token - MARGIN]), naive.gap(z[:, :token], y[:, :token])

    decided, out = change(40)
    layer(x)
    before = layer.scores[..., 34].clone()
    other = x.clone()
    other[:, 40] += 1
    layer(other)
    return max(decided, out), naive.gap(layer.scores[..., 34], before)


@check(
    "lalte",
    "penalty weights: x 1.5 when over budget, / 2 under 0.95 of it, 0 below 1e-9, back when exceeded: distance from that course",
    below=1e-12,
    control="never lowered",
)
def _() -> tuple[float, float]:
    control = BudgetController(1, 10, interval=1, start=4e-9, average=0.0)
    course = [float(control.update(torch.ones(1, 1, n, dtype=torch.bool))[0]) for n in (12, 10, 4, 4, 4, 4, 12, 12)]
    truth = [6e-9, 6e-9, 3e-9, 1.5e-9, 0.0, 0.0, 1e-9, 1.5e-9]
    flat = [6e-9, 6e-9, 6e-9, 6e-9, 6e-9, 6e-9, 9e-9, 13.5e-9]
    own, other = (max(abs(a - b) for a, b in zip(found, truth, strict=True)) for found in (course, flat))
    return own, other


@check(
    "lalte",
    "penalty weights move every second step, by a running average of each head's kept tokens, up to 1: distance from that course",
    below=1e-6,
    control="by the last step's count",
)
def _() -> tuple[float, float]:
    control, counts = BudgetController(2, 5, interval=2, start=0.4, average=0.5), ((8, 1), (2, 9), (9, 9), (9, 2), (1, 5), (9, 5))
    found, courses = [], {True: [0.4, 0.4], False: [0.4, 0.4]}
    mean: list[float] = []
    own: list[float] = []
    other: list[float] = []
    for step, count in enumerate(counts, 1):
        kept = torch.zeros(3, 2, 12, dtype=torch.bool)
        for head in range(2):
            kept[:, head, : count[head]] = True
        found = control.update(kept).tolist()
        mean = [float(c) for c in count] if step == 1 else [0.5 * m + 0.5 * c for m, c in zip(mean, count, strict=True)]
        for averaged, to in ((True, own), (False, other)):
            if step % 2 == 0:
                seen = mean if averaged else [float(c) for c in count]
                course = courses[averaged]
                courses[averaged] = [min(1.0, 1.5 * w) if m > 5 else w / 2 if m < 4.75 else w for w, m in zip(course, seen, strict=True)]
            to.append(max(abs(x - y) for x, y in zip(found, courses[averaged], strict=True)))
    return max(own), max(other)


@check(
    "lalte",
    "a hybrid decoder of gated DeltaNet and eviction generates what full passes would; state bytes at 120 and 240 tokens differ by",
    below=0,
    control="softmax's",
)
def _() -> tuple[float, float]:
    def grown(lte: bool) -> float:
        torch.manual_seed(0)
        layers = lalte_layers(2, 32, 2, window=8, sinks=2, budget=12) if lte else "softmax"
        model = Decoder(layers, vocab=20, dim=32, layers=2, heads=2, rope=False).eval()
        out = model.generate(torch.randint(20, (1, 10)), 3)
        if not torch.equal(model(out[:, :-1])[:, 9:].argmax(-1), out[:, 10:]):
            return math.nan
        with torch.no_grad():
            sizes = [sum(s.bytes for s in model.step(torch.randint(20, (1, n)))[1]) for n in (120, 240)]
        return float(sizes[1] - sizes[0])

    return grown(True), grown(False)


def kept_by_hand(layer: LTEAttention, k: Tensor, v: Tensor) -> Tensor:
    """Scores of the router: three convolutions of width 3 over every other token, silu after each, a number, sigmoid less a half."""
    scores = []
    for h in range(layer.kv_heads):
        x = torch.cat((k[:, h], v[:, h]), -1)
        for conv in (layer.router.layers[at] for at in (0, 3, 6)):
            width = conv.weight.shape[0] // layer.kv_heads  # type: ignore[index, operator, union-attr]
            weight, bias = (y[h * width : (h + 1) * width] for y in (conv.weight, conv.bias))  # type: ignore[union-attr, index]
            wide = F.pad(x, (0, 0, 2, 2))
            x = silu(sum(wide[:, 2 * at : 2 * at + x.shape[1]] @ weight[:, :, at].T for at in range(3)) + bias)
        last = layer.router.last
        assert last.bias is not None
        scores.append(torch.sigmoid(x @ last.weight[h, :, 0] + last.bias[h]) - 0.5)
    return torch.stack(scores, 1)


@check(
    "lalte",
    "mixed decisions over grouped keys: scores == the router by hand, the layer == softmax over window, sinks and kept in loops; the penalty",
    below=1e-10,
    control="kept tokens left out",
)
def _() -> tuple[float, float]:
    layer = drawn(LTEAttention(32, 4, kv_heads=2, window=6, sinks=2, budget=64)).eval()
    layer.router.last.bias.data.zero_()  # type: ignore[union-attr]
    x = torch.randn(2, 24, 32, dtype=F64)
    y, (q, k, v) = layer(x), (split(layer.q(x), 4), split(layer.k(x), 2), split(layer.v(x), 2))
    score, at = kept_by_hand(layer, k, v), torch.arange(24)
    share = float((score > 0).double().mean())
    a, b, wide = layer.rope.rotate(q, at), layer.rope.rotate(k, at).repeat_interleave(2, 1), v.repeat_interleave(2, 1)

    def truth(keeping: bool) -> Tensor:
        kept = (score > 0).repeat_interleave(2, 1)[:, :, None] & keeping
        seen = ((at[:, None] - at <= 6) | (at < 2) | kept) & (at[:, None] >= at)
        return layer.out(joined((a @ b.mT / 8**0.5).masked_fill(~seen, -math.inf).softmax(-1) @ wide))  # type: ignore[no-any-return]

    gaps = [naive.gap(layer.scores, score), naive.gap(y, truth(True)), naive.gap(layer.penalty(), score.clamp_min(0).mean((0, 2)))]
    return max(gaps) if 0.1 < share < 0.9 else math.nan, naive.gap(y, truth(False))


def needle_kept(steps: int = 400) -> tuple[float, float]:
    """After a short run on finding a needle: (share of sequences whose needle is kept by some head, the same if as many tokens of each were
    kept at random places)."""
    torch.manual_seed(0)
    length, letters = 40, 8
    layer = LTEAttention(32, 2, window=8, sinks=1, budget=64, dropout=0.0)
    embed, head = torch.nn.Embedding(2 * letters + 2, 32), torch.nn.Linear(32, letters + 1)
    parameters = [*layer.parameters(), *embed.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, 3e-3)

    def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
        tokens = torch.randint(letters, (count, length))  # hay
        answer, at = torch.randint(letters, (count,)), torch.randint(2, length - 20, (count,))
        # Some sequences hold no needle: else one needle need not be kept, its absence would tell.
        answer = torch.where(torch.rand(count) < 0.2, letters, answer)
        held = torch.arange(count)[answer < letters]
        tokens[held, at[held]] = letters + answer[held]
        tokens[:, -1] = 2 * letters
        return tokens, answer, at

    for step in range(steps):
        tokens, answer, at = batch(32)
        out = head((embed(tokens) + layer(embed(tokens)))[:, -1])
        loss = F.cross_entropy(out, answer)
        if step > 100:
            loss = loss + 0.02 * layer.penalty().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    tokens, answer, at = batch(200)
    layer(embed(tokens))
    rows, held = torch.arange(200), answer < letters

    def found(kept: Tensor) -> float:
        return float(kept.any(1)[rows, at][held].double().mean())

    anywhere = torch.rand(layer.kept.shape).argsort(-1)
    return found(layer.kept), found(layer.kept.gather(-1, anywhere))


@check(
    "lalte",
    "a needle among letters, a short run with the penalty: share of sequences whose needle is kept",
    above=0.9,
    control="as many tokens kept at random",
)
def _() -> tuple[float, float]:
    return needle_kept()
