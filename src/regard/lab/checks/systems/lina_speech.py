"""Checks of lina-speech."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.gaps import gaps
from regard.lab.verification import check
from regard.nn.blind import BlindCrossAttention, GLABlock, ReaderBlock
from regard.tasks.training import fit
from regard.zoo.systems.lina_speech import InitialStateTuner, LinaLM, delayed, undelayed


def drawn(module: nn.Module) -> Any:
    module.double().eval()
    for p in module.parameters():
        p.data.normal_(std=0.4)
    return module


def swiglu(m: Any, x: Tensor) -> Tensor:
    a, b = (x @ m.into.weight.T + m.into.bias).chunk(2, -1)
    return (a * torch.sigmoid(a) * b) @ m.out.weight.T + m.out.bias


def norm(m: Any, x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * m.weight + m.bias


def gla(m: Any, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One text (L, dim), token by token; state (H, dk, dv)."""
    own, outs, s = m.mixer, [], state
    for token in x:
        y = norm(m.norm1, token)
        q, k, v = (w.weight @ y for w in (own.q, own.k, own.v))
        q, k, v = q.view(own.heads, -1), k.view(own.heads, -1), v.view(own.heads, -1)
        low = own.inputs.projected.log_decay
        gate = torch.nn.functional.logsigmoid(low.up.weight @ (low.down.weight @ y) + low.up.bias) / 16
        s = gate.view(own.heads, -1, 1).exp() * s + k[:, :, None] * v[:, None]
        o = (q[:, :, None] * s).sum(1) / math.sqrt(q.shape[1])
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * own.out_norm.weight
        g = own.gate.weight @ y
        token = token + own.out.weight @ (o.flatten() * g * torch.sigmoid(g))
        outs.append(token + swiglu(m.mlp, norm(m.norm2, token)))
    return torch.stack(outs), s


@check(
    "lina-speech",
    "blocks with a first state: gap to the recurrence token by token, of gradients, and of last states",
    below=1e-9,
    control="first state zero",
)
def _() -> tuple[float, float]:
    own, other = [], []
    for expand_v in (1.0, 2.0):
        m = drawn(GLABlock(8, 2, expand_v=expand_v))
        x = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
        state = torch.randn(1, *m.state_shape, dtype=torch.float64, requires_grad=True)
        found, last = m(x, state)
        rows = [gla(m, row, state[0]) for row in x]
        truth = torch.stack([y for y, _ in rows])
        own += [gaps(found, truth, [x, state]), naive.gap(last, torch.stack([s for _, s in rows]))]
        other.append(naive.gap(m(x)[0], truth))
    return max(own), min(other)


@check(
    "lina-speech",
    "reading of text and the blind look at it, padded: gap to the formulas, and of gradients",
    below=1e-9,
    control="contents in place of places at the first look",
)
def _() -> tuple[float, float]:
    m, r = drawn(BlindCrossAttention(8, 2, 6)), drawn(ReaderBlock(8, 2))
    x, text = (torch.randn(2, n, 8, dtype=torch.float64, requires_grad=True) for n in (7, 5))
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])

    def read(row: Tensor, n: int) -> Tensor:
        q, k, v = (norm(r.norm1, row) @ r.qkv.weight.T + r.qkv.bias).view(5, 3, 2, 4).permute(1, 2, 0, 3)
        angle = torch.arange(5)[:, None].double()  # 2 of 4 channels turn, a pair at a rate of 1

        def turn(t: Tensor) -> Tensor:
            a, b = t[..., :1], t[..., 1:2]
            return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), t[..., 2:]), -1)

        s = (turn(q) @ turn(k).mT / 2)[..., :n].softmax(-1)
        row = row + (s @ v[:, :n]).transpose(0, 1).flatten(1)
        return row + swiglu(r.mlp, norm(r.norm2, row))

    def look(row: Tensor, text: Tensor, n: int, contents: bool = False) -> Tensor:
        q, k, v = (norm(b, t @ a.weight.T + a.bias) for a, b, t in ((m.q, m.norm_q, row), (m.k, m.norm_k, text), (m.v, m.norm_v, text)))
        places = torch.tensor(
            [[math.sin(p * 10000 ** (-2 * (c % 3) / 6) + (c >= 3) * math.pi / 2) for c in range(6)] for p in range(5)], dtype=torch.float64
        )
        p = (q @ k[:n].T / math.sqrt(8)).softmax(-1) @ (v[:n, :6] if contents else places[:n])
        p, _ = gla(m.block, p, torch.zeros(m.block.state_shape, dtype=torch.float64))
        return (p @ places[:n].T / math.sqrt(6)).softmax(-1) @ v[:n]

    z, weights, _ = m(x, text, keep)
    truth = torch.stack([look(x[b], text[b], n) for b, n in ((0, 5), (1, 3))])
    found = r(text, keep)
    hand = torch.stack([read(text[b], n) for b, n in ((0, 5), (1, 3))])
    own = [gaps(z, truth, [x, text]), gaps(found * keep[..., None], hand * keep[..., None], [text])]
    own.append(float((weights.sum(-1) - 1).abs().max()))
    return max(own), naive.gap(z[0], look(x[0], text[0], 5, contents=True))


@check(
    "lina-speech",
    "prompt, then what follows from its state, one token at a time: gap of logits to all at once; sums of embeddings, heads and residuals by hand",
    below=1e-9,
    control="what follows without the state",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    m = drawn(LinaLM(9, 5, 2, dim=8, heads=2, layers=2, text_layers=1, places=4))
    text, tokens = torch.tensor([[3, 4, 5, 6], [3, 7, 0, 0]]), delayed(torch.randint(0, 5, (2, 2, 9)))
    read, keep = m.read(text), text > 0
    whole = m(text, tokens)
    first, _, states = m.run(tokens[:, :5], read, keep)
    sizes, parts = [s.numel() for s in states], [first]
    for at in range(5, tokens.shape[1]):
        part, _, states = m.run(tokens[:, at : at + 1], read, keep, states)
        parts.append(part)
    assert sizes == [s.numel() for s in states] == [2 * math.prod(b.state_shape) for b in m.blocks]
    x = m.codes[0].weight[tokens[..., 0]] + m.codes[1].weight[tokens[..., 1]]
    for block in m.before:
        x = block(x)[0]
    x = x + m.cross(x, m.reader[0](m.text.weight[text], keep), keep)[0]
    for block in m.behind:
        x = block(x)[0]
    hand = torch.stack([x @ head.weight.T for head in m.heads], 2)
    return max(naive.gap(torch.cat(parts, 1), whole), naive.gap(hand, whole)), naive.gap(m.run(tokens[:, 5:], read, keep)[0], whole[:, 5:])


@check(
    "lina-speech",
    "streams delayed by hand and back, and the loss without heads and padding: largest gap",
    below=1e-9,
    control="heads counted too",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    codes = torch.tensor([[[0, 1, 2], [4, 3, 2]]])
    tokens = delayed(codes)
    assert tokens[0].T.tolist() == [[1, 3, 4, 5, 2, 2], [1, 1, 7, 6, 5, 2]] and torch.equal(undelayed(tokens), codes)
    m, text = drawn(LinaLM(9, 5, 2, dim=8, heads=2, layers=1, text_layers=1)), torch.tensor([[3, 4]])
    padded = torch.nn.functional.pad(tokens, (0, 0, 0, 3))
    logits, both = m(text, tokens[:, :-1])[0].log_softmax(-1), []
    for least in (2, 1):
        terms = [-logits[t, q, int(tokens[0, t + 1, q])] for t in range(5) for q in range(2) if tokens[0, t + 1, q] >= least]
        both.append(float(torch.stack(terms).mean()))
    found = [float(m.loss(text, x)) for x in (tokens, padded)]
    return max(abs(x - both[0]) for x in found), abs(found[0] - both[1])


SYMBOLS, CODES = 6, 12


def speech(generator: torch.Generator, offsets: tuple[int, ...], count: int = 8) -> tuple[Tensor, Tensor]:
    """Texts (count, 6) of symbols, three frames each of two streams: code (2 symbol + offset) mod 12, and that plus 1; a row's offset is its speaker's."""
    text = torch.randint(0, SYMBOLS, (count, 6), generator=generator)
    speaker = torch.tensor(offsets)[torch.randint(0, len(offsets), (count, 1), generator=generator)]
    code = ((2 * text + speaker) % CODES).repeat_interleave(3, 1)
    return text + 1, delayed(torch.stack((code, (code + 1) % CODES), 1))


@functools.cache
def taught() -> LinaLM:
    """A model of two speakers, whom it tells apart by their first frames."""
    torch.manual_seed(0)
    model = LinaLM(SYMBOLS + 1, CODES, 2, dim=32, heads=2, layers=1, text_layers=1, dropout=0.0)
    fit(model, lambda g: speech(g, (0, 6)), lambda batch: model.loss(*batch), 160, lr=4e-3)
    return model


@functools.cache
def saved(voice: int) -> float:
    """The share of speaker 3's loss that first states tuned on `voice` take away, on other sentences; the model knows neither."""
    model, generator = taught(), torch.Generator().manual_seed(3)
    tuner = InitialStateTuner(model, generator=generator)
    kept = [p.clone() for p in model.parameters()]
    tuner.fit(model, [speech(generator, (voice,), 2) for _ in range(320)])
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))
    count = sum(p.numel() for p in tuner.parameters())
    assert count == sum(h * (dk + dv) for h, dk, dv in (b.state_shape for b in model.blocks))
    text, tokens = speech(torch.Generator().manual_seed(8), (3,), 32)
    with torch.no_grad():
        return 1 - float(model.loss(text, tokens, tuner.states())) / float(model.loss(text, tokens))


@check(
    "lina-speech",
    "a new speaker: share of the loss that first states of rank 1 take away, 80 steps",
    above=0.05,
    control="first states tuned on another new speaker",
)
def _() -> tuple[float, float]:
    return saved(3), saved(8)
