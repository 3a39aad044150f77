"""Checks of show-attend-tell."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.verification import check
from regard.tasks.images import listed_glyphs
from regard.zoo.vision.show_attend_tell import CaptionDecoder, HardLoss, Told, caption_loss


def affine(x: Tensor, layer: nn.Module) -> Tensor:
    out = x @ layer.weight.T  # type: ignore[operator, union-attr]
    return out if getattr(layer, "bias", None) is None else out + layer.bias  # type: ignore[no-any-return, operator]


def gates_by_hand(layer: Any, x: Tensor, h: Tensor, c: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
    total = affine(x, layer.feed) + affine(h, layer.recur) + (0 if z is None else affine(z, layer.see))
    enter, forget, leave, new = total.chunk(4)
    c = c / (1 + torch.exp(-forget)) + torch.tanh(new) / (1 + torch.exp(-enter))
    return torch.tanh(c) / (1 + torch.exp(-leave)), c


def looked_over(d: CaptionDecoder, a: Tensor) -> Tensor:
    """One image's annotations (L, D), read from the first to the last and from the last to the first."""
    if d.around is None:
        return a
    forth: dict[int, Tensor] = {}
    back: dict[int, Tensor] = {}
    for layer, told, order in ((d.around.forth, forth, range(len(a))), (d.around.back, back, reversed(range(len(a))))):
        h = c = torch.zeros(d.around.hidden, dtype=F64)
        for i in order:
            h, c = gates_by_hand(layer, a[i], h, c)
            told[i] = h
    return torch.stack([torch.cat((forth[i], back[i])) for i in range(len(a))])


def by_hand(d: CaptionDecoder, a: Tensor, words: Tensor, picks: Tensor | None = None, pooled: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and weights of one caption after another, one word after another, from the paper's formulas; pooled: z_t is the mean of a."""
    captions, maps, cells = [], [], list[Any](d.cells)
    for n in range(len(a)):
        seen = looked_over(d, a[n])
        mean = seen.sum(0) / len(seen)
        for layer in d.start_deep:
            mean = affine(mean, layer).clamp_min(0)
        states = [(torch.tanh(affine(mean, cell.start_hidden)), torch.tanh(affine(mean, cell.start_memory))) for cell in cells]
        told, weights = [], []
        for t in range(words.shape[1]):
            x = e = d.words.weight[words[n, t - 1]] if t else torch.zeros_like(d.words.weight[0])
            for at, cell in enumerate(cells):
                att, (h, c), scores = cell.attention, states[at], []
                for i in range(len(seen)):
                    key = affine(seen[i], att.key)
                    for layer in att.deep:
                        key = torch.tanh(affine(key, layer))
                    scores.append(affine(torch.tanh(key + affine(h, att.query)), att.energy)[0] * att.scale)
                raised = [torch.exp(s) for s in scores]
                p = torch.stack(raised) / sum(raised)
                z = seen.mean(0) if pooled else sum(p[i] * seen[i] for i in range(len(p))) if picks is None else seen[picks[n, t]]
                if att.selector is not None:
                    z = z / (1 + torch.exp(-affine(h, att.selector)))
                states[at] = gates_by_hand(cell, x, h, c, z)
                x = states[at][0]
            out = affine(x, d.tell)
            out = out + e if d.read_word else out
            out = torch.tanh(out + affine(z, d.tell_context) if d.tell_context is not None else out)
            for layer in d.tell_deep:
                out = affine(out, layer).clamp_min(0)
            told.append(affine(out, d.out))
            weights.append(p)
        captions.append(torch.stack(told))
        maps.append(torch.stack(weights))
    return torch.stack(captions), torch.stack(maps)


@check(
    "show-attend-tell",
    "soft and hard decoders, plain and with every deep net, gate and readout, three LSTMs and one over annotations, == the paper's formulas by loops, values and gradients",
    below=1e-10,
    control="the mean of annotations in place of what attention reads",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    forms: list[dict[str, object]] = [
        {},
        {"deep_attention": 3, "deep_start": 2, "deep_readout": 3, "selector": True, "scale": 0.7},
        {"read_word": False, "deep_readout": 2},
        {"read_context": False, "selector": True},
        {"attention": "hard", "selector": True, "deep_attention": 2},
        {"around": True, "layers": 3, "deep_start": 2, "selector": True},
    ]
    for at, form in enumerate(forms):
        torch.manual_seed(at)
        d = drawn(CaptionDecoder(7, features=5, hidden=4, embed=8, **form))  # type: ignore[arg-type]
        a, words = torch.randn(2, 6, 5, dtype=F64, requires_grad=True), torch.randint(7, (2, 4))
        picks = torch.randint(6, (2, 4)) if form.get("attention") else None
        told, truth = d(a, words, picks=picks), by_hand(d, a, words, picks)
        both = [torch.cat((logits.flatten(), weights.flatten())) for logits, weights in (told[:2], truth)]
        own.append(gap_with_gradients(both[0], both[1], (a, *d.parameters())))
        other = min(other, naive.gap(told.logits, by_hand(d, a, words, picks, pooled=True)[0]))
    return max(own), other


def enumerated(d: CaptionDecoder, a: Tensor, words: Tensor) -> Tensor:
    """E_s[log p(y | s)], every path of places weighed by its probability: a (1, L, D), words (1, T)."""
    total = a.new_zeros(())
    for path in itertools.product(range(a.shape[1]), repeat=words.shape[1]):
        logits, weights = by_hand(d, a, words, torch.tensor([path]))
        chance = math.prod(weights[0, t, s] for t, s in enumerate(path))
        total = total + chance * sum(logits[0, t].log_softmax(-1)[w] for t, w in enumerate(words[0].tolist()))
    return total


@functools.cache
def sampled(reward: float, baseline: float) -> tuple[Tensor, Tensor, Tensor]:
    """The exact gradient of attention's parameters, the mean of 20,000 sampled ones, and the deviations of that mean."""
    torch.manual_seed(0)
    d = drawn(CaptionDecoder(3, features=3, hidden=3, embed=2, attention="hard", sampled=1.0, selector=True), 0.8).train()
    a, words, loss = torch.randn(1, 4, 3, dtype=F64), torch.tensor([[2, 1]]), HardLoss(reward, 0.0, floor=0.0).double()
    read = [p for name, p in list[Any](d.cells)[0].attention.named_parameters() if name != "energy.bias"]  # which softmax does not feel
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(enumerated(d, a, words), read)])
    groups = []
    for _ in range(100):
        told: Told = d(a.expand(200, -1, -1), words.expand(200, -1))
        loss.average.fill_(baseline)
        gradients = torch.autograd.grad(loss(told, words.expand(200, -1)), read, allow_unused=True, materialize_grads=True)
        groups.append(-torch.cat([g.flatten() for g in gradients]))
    found = torch.stack(groups)
    return exact, found.mean(0), found.std(0) / len(found) ** 0.5


@check(
    "show-attend-tell",
    "the mean gradient of 20,000 hard readings is the exact one of E[log p(y|s)] over all paths, with a baseline and without: standard errors off",
    below=4.5,
    control="the score term dropped, in the same errors",
)
def _() -> tuple[float, float]:
    (exact, plain, spread), (_, eased, tight), dropped = sampled(1.0, 0.0), sampled(1.0, -2.0), sampled(0.0, 0.0)[1]
    own = torch.cat(((plain - exact) / spread, (eased - exact) / tight))
    return float(own.abs().max()), float(((dropped - exact) / spread).abs().max())


@check(
    "show-attend-tell",
    "a baseline near the mean log likelihood cuts the variance of hard attention's gradient: over that without",
    below=0.5,
    control="a baseline as far off on the other side",
)
def _() -> tuple[float, float]:
    plain, eased, worse = (float(sampled(1.0, b)[2].square().sum()) for b in (0.0, -2.0, 2.0))
    return eased / plain, worse / plain


class Eye(nn.Module):
    """Images (B, 1, 16, 16) -> annotations (B, 16, 40): what stands in a cell, beside a convolutional net's eight channels of what is around it."""

    def __init__(self) -> None:
        super().__init__()
        self.look, wide = nn.Conv2d(1, 32, 4, 4), [nn.Conv2d(34, 32, 3, padding=1), *(nn.Conv2d(32, 32, 3, padding=1) for _ in range(2))]
        self.around = nn.Sequential(*(part for conv in wide for part in (conv, nn.ReLU())), nn.Conv2d(32, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        own = torch.relu(self.look(x))
        line = torch.linspace(-1, 1, own.shape[-1])
        at = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(x), -1, -1, -1)
        return torch.cat((own, self.around(torch.cat((own, at), 1))), 1).flatten(2).mT


def named_where_looked(scale: float, steps: int = 200) -> float:
    """Share of words, told right, at which the largest weight is on the named glyph's cell."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    eye, decoder = Eye(), CaptionDecoder(8, features=40, hidden=48, embed=32, scale=scale, std=0.1)
    optimizer = torch.optim.Adam([*eye.parameters(), *decoder.parameters()], 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        x, words, _cells = listed_glyphs(24, generator)
        optimizer.zero_grad()
        caption_loss(decoder(eye(x), words), words, penalty=0.0).backward()
        optimizer.step()
        schedule.step()
    x, words, cells = listed_glyphs(1000, torch.Generator().manual_seed(10_000))
    with torch.no_grad():
        told = decoder.eval()(eye(x), words)
    return float(((told.weights.argmax(-1) == cells) & (told.logits.argmax(-1) == words)).double().mean())


@check(
    "show-attend-tell",
    "trained to list three glyphs of a 4 x 4 grid, it names the right glyph while looking at its cell (chance of the cell: 6%)",
    above=0.85,
    control="the mean-pooled decoder",
)
def _() -> tuple[float, float]:
    return named_where_looked(1.0), named_where_looked(0.0)


@check(
    "show-attend-tell",
    "log probability that a beam as wide as all captions finds, off the likeliest of all captions, in ten decoders",
    below=1e-10,
    control="greedy decoding",
)
def _() -> tuple[float, float]:
    wide, greedy = [], []
    for seed in range(10):
        torch.manual_seed(seed)
        d, a = drawn(CaptionDecoder(4, features=3, hidden=4, embed=3), 1.5), torch.randn(1, 5, 3, dtype=F64)
        scores = []
        for caption in itertools.product(range(4), repeat=3):
            words = caption[: caption.index(0) + 1] if 0 in caption else caption
            log_p = by_hand(d, a, torch.tensor([words]))[0][0].log_softmax(-1).detach()
            scores.append(float(sum(log_p[t, w] for t, w in enumerate(words))))
        best = max(scores)
        wide.append(abs(d.generate(a, 64, 3)[0][0].log_p - best))
        greedy.append(abs(d.generate(a, 1, 3)[0][0].log_p - best))
    return max(wide), max(greedy)
