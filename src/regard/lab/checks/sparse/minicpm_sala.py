"""Checks of minicpm-sala."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal, Recurrent
from regard.engine import step
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.byhand import join_heads, rms, rotary, split_heads
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import masked_softmax, selection_of
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.nn.decoder import Decoder
from regard.zoo.sparse.minicpm_sala import (
    SALAConfig,
    align_loss,
    build_sala,
    convert,
    distil_loss,
    importance,
    infllm,
    infllm_scores,
    next_token_loss,
    reading_all,
    sala_lightning,
    softmax_layers,
    train_stages,
)

SMALL = SALAConfig(vocab=40, dim=32, layers=8, heads=4, kv_heads=2, block_size=8, top_k=2, window=8, dense_len=0, kernel=4, stride=2)


@check("minicpm-sala", "lightning: chunks and steps equal the quadratic form", below=1e-10, control="slopes of layer 0 in layer 3")
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(2, 4, 90, 8, dtype=F64) for _ in range(3))
    mechanism = sala_lightning(3, 8)
    truth = attend(q, k, v, mechanism, executor="parallel")
    state, outs = None, []
    for t in range(90):
        out, state = step(*(x[:, :, t : t + 1] for x in (q, k, v)), mechanism, state)
        outs.append(out)
    own = max(naive.gap(attend(q, k, v, mechanism, executor="chunk"), truth), naive.gap(torch.cat(outs, 2), truth))
    return own, naive.gap(attend(q, k, v, sala_lightning(0, 8)), truth)


@check(
    "minicpm-sala",
    "block scores (windows 32 / 16, blocks of 64) equal a loop, and all blocks are dense attention without positions",
    below=1e-10,
    control="sums over touching windows instead of maxima",
)
def _() -> tuple[float, float]:
    q, k, v = torch.randn(1, 4, 300, 8, dtype=F64), *torch.randn(2, 1, 2, 300, 8, dtype=F64)
    found, own, other = infllm_scores(q, k, 0, 64), 0.0, 0.0
    for h in range(2):
        for i in range(0, 300, 7):
            ready = [m for m in range((300 - 32) // 16 + 1) if m * 16 + 31 <= i]
            mass = torch.zeros((300 - 32) // 16 + 1, dtype=F64)
            for g in (2 * h, 2 * h + 1):
                if ready:
                    mass[ready] += torch.stack([q[0, g, i] @ k[0, h, m * 16 : m * 16 + 32].mean(0) for m in ready]).softmax(0)
            for b in range(5):
                touching = [float(mass[m]) for m in range(len(mass)) if m * 16 < (b + 1) * 64 and m * 16 + 32 > b * 64]
                own = max(own, abs(float(found[0, h, i, b]) - max(touching)))
                other = max(other, abs(float(found[0, h, i, b]) - sum(touching)))
    dense = attend(q, k, v, infllm(top_k=5, window=64, dense_len=0))
    return own + naive.gap(dense, attend(q, k, v, mask=Causal())), other


@check(
    "minicpm-sala",
    "each query reads the first block, its local ones and the best others, the same for a group: differing rows",
    below=0,
    control="local blocks scored with the others",
)
def _() -> tuple[float, float]:
    q, k = torch.randn(1, 4, 96, 8, dtype=F64), torch.randn(1, 2, 96, 8, dtype=F64)
    keep = selection_of(infllm(8, 3, 16, 0, 4, 2).select, q, k).keep
    scores, wrong = infllm_scores(q * 8**-0.5, k, 0, 8, 4, 2), [0, 0]
    for h in range(4):
        for i in range(96):
            own = i // 8
            for n, local in enumerate(((own, own - 1), ())):
                past = sorted((b for b in range(1, own + 1) if b not in local), key=lambda b: (-float(scores[0, h // 2, i, b]), b))
                truth = {b for b in local if b >= 0} | {0} | set(past[: 2 if 0 not in local else 3])
                wrong[n] += truth != set(keep[0, h, i].nonzero().flatten().tolist())
    return float(wrong[0]), float(wrong[1])


@check(
    "minicpm-sala",
    "decoding equals the forward pass, linear layers' bytes do not grow",
    below=1e-9,
    control="growth of the sparse layers' bytes",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, tokens = build_sala(SMALL).double(), torch.randint(40, (2, 60))
    whole, (first, states) = model(tokens), model.step(tokens[:, :30])
    held, outs = [state.bytes for state in states], [first]
    for t in range(30, 60):
        out, states = model.step(tokens[:, t : t + 1], states)
        outs.append(out)
    growth = [state.bytes - old for state, old in zip(states, held, strict=True)]
    kept = softmax_layers(8)
    linear = sum(growth[n] for n in range(8) if n not in kept)
    return naive.gap(torch.cat(outs, 1), whole) + linear, float(min(growth[n] for n in kept))


@check(
    "minicpm-sala",
    "positions: permuting the past leaves the last row of a sparse layer that reads all unchanged",
    below=1e-12,
    control="a linear layer",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x, gaps = torch.randn(1, 40, 32, dtype=F64), []
    order = torch.cat((torch.randperm(39), torch.tensor([39])))
    for mechanism in (infllm(dense_len=64), sala_lightning()):
        layer = Attention(32, 4, mechanism, kv_heads=2, rope=True).double()
        gaps.append(naive.gap(layer(x[:, order])[:, -1], layer(x)[:, -1]))
    return gaps[0], gaps[1]


@check(
    "minicpm-sala",
    "1 : 3 of 8 layers: 2 softmax layers, first and last among them, projections copied to the bit: exceptions",
    below=0,
    control="a model built without the dense one",
)
def _() -> tuple[float, float]:
    dense = Decoder("softmax", vocab=40, dim=32, layers=8, heads=4, kv_heads=2)
    wrong = []
    for model in (convert(dense, SMALL), build_sala(SMALL)):
        kept = [n for n, b in enumerate(model.blocks) if not isinstance(b.mixer.mechanism, Recurrent)]  # type: ignore[union-attr]
        count = int(kept != [0, 7])
        for new, old in zip(model.blocks, dense.blocks, strict=True):
            for name in ("q", "k", "v", "out"):
                a: Tensor = getattr(new.mixer, name).weight
                count += not torch.equal(a, getattr(old.mixer, name).weight)
        wrong.append(float(count))
    scored = softmax_layers(8, 0.5, [0, 1, 5, 2, 9, 3, 1, 0])
    return wrong[0] + (scored != (0, 2, 4, 7)), wrong[1]


@check(
    "minicpm-sala",
    "a toy conversion, 40 steps of alignment and 40 of distillation: the KL to the dense model, after over before",
    below=0.5,
    control="the same steps for a model without the dense one's weights",
)
def _() -> tuple[float, float]:
    dense = Decoder("softmax", vocab=24, dim=32, layers=4, heads=4, kv_heads=2)
    with torch.no_grad():
        dense.embed.weight.mul_(10)
    config = SALAConfig(vocab=24, dim=32, layers=4, heads=4, kv_heads=2, share=0.5)

    def batches(step: int) -> Tensor:
        return torch.randint(24, (8, 32), generator=torch.Generator().manual_seed(step))

    def left(model: Decoder) -> float:
        with torch.no_grad():
            return float(distil_loss(model, dense, batches(999)))

    before, found = left(convert(dense, config)), []
    for model in (convert(dense, config), build_sala(config)):
        log = train_stages(model, dense, batches, (40, 40), 3e-3)
        assert math.isfinite(log["align"][-1])
        found.append(left(model) / before)
    return found[0], found[1]


def linear_by_hand(layer: Attention, x: Tensor, rate: list[float]) -> Tensor:
    """The lightning layer token by token: normed and rotated q and k, S = e^-rate S + k v^T, RMS of S^T q, a sigmoid gate from x."""
    at, heads, kv = torch.arange(x.shape[1]), layer.heads, layer.kv_heads
    assert layer.gate is not None
    q = rotary(rms(split_heads(x @ layer.q.weight.T, heads), layer.q_norm.weight), at)  # type: ignore[arg-type]
    k = rotary(rms(split_heads(x @ layer.k.weight.T, kv), layer.k_norm.weight), at)  # type: ignore[arg-type]
    v, rows = split_heads(x @ layer.v.weight.T, kv), []
    for h in range(heads):
        state, out = torch.zeros(x.shape[0], q.shape[-1], v.shape[-1], dtype=x.dtype), []
        for t in range(x.shape[1]):
            state = math.exp(-rate[h]) * state + k[:, h // (heads // kv), t, :, None] * v[:, h // (heads // kv), t, None, :]
            out.append((q[:, h, t, :, None] * state).sum(1))
        rows.append(rms(torch.stack(out, 1), layer.out_norm.weight))  # type: ignore[arg-type]
    gate = 1 / (1 + torch.exp(-(x @ layer.gate.weight.T)))  # type: ignore[operator, union-attr]
    return torch.cat(rows, -1) * gate @ layer.out.weight.T


def sparse_by_hand(layer: Attention, x: Tensor, keep: Tensor, gated: bool = True) -> Tensor:
    """The sparse layer under pairs `keep`: normed q and k, no positions, a sigmoid gate from x."""
    assert layer.gate is not None
    q = rms(split_heads(x @ layer.q.weight.T, layer.heads), layer.q_norm.weight)  # type: ignore[arg-type]
    k = rms(split_heads(x @ layer.k.weight.T, layer.kv_heads), layer.k_norm.weight)  # type: ignore[arg-type]
    o = join_heads(masked_softmax(q, k, split_heads(x @ layer.v.weight.T, layer.kv_heads), keep))
    return (o / (1 + torch.exp(-(x @ layer.gate.weight.T))) if gated else o) @ layer.out.weight.T  # type: ignore[operator, union-attr]


@check(
    "minicpm-sala",
    "both kinds of layer by hand: norms, gates, rotary positions in the linear one alone, slopes slower with depth, blocks of a loop",
    below=1e-10,
    control="the sparse layer without its gate",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, x = build_sala(SMALL).double(), torch.randn(2, 50, 32, dtype=F64)
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p)
    linear, sparse = model.blocks[3].mixer, model.blocks[7].mixer
    assert isinstance(linear, Attention) and isinstance(sparse, Attention)
    slopes = [2 ** (-2 * (h + 1)) * (1 - 3 / 8) for h in range(4)]
    own = naive.gap(linear(x), linear_by_hand(linear, x, slopes))
    q = rms(split_heads(x @ sparse.q.weight.T, 4), sparse.q_norm.weight)  # type: ignore[arg-type]
    k = rms(split_heads(x @ sparse.k.weight.T, 2), sparse.k_norm.weight)  # type: ignore[arg-type]
    keep, at = torch.zeros(2, 4, 50, 50, dtype=torch.bool), torch.arange(50)
    windows = [range(m, m + 4) for m in range(0, 47, 2)]
    for b in range(2):
        for h in range(4):
            for i in range(50):
                ready = [w for w in windows if w[-1] <= i]
                mass = torch.zeros(len(ready), dtype=F64)
                for g in (h // 2 * 2, h // 2 * 2 + 1):
                    mass += (
                        torch.stack([q[b, g, i] @ k[b, h // 2, list(w)].mean(0) for w in ready]).div(math.sqrt(8)).softmax(0)
                        if ready
                        else 0
                    )
                score = {
                    n: max([float(m) for m, w in zip(mass, ready, strict=True) if set(w) & set(range(n * 8, n * 8 + 8))], default=0.0)
                    for n in range(i // 8)
                }
                best = sorted(score, key=lambda n, score=score: -math.inf if n == 0 else -score[n])[:2]  # the first block comes first
                keep[b, h, i] = torch.isin(at // 8, torch.tensor([i // 8, *best])) & (at <= i)
    for b in range(2):
        own = max(own, naive.gap(sparse(x[b : b + 1]), sparse_by_hand(sparse, x[b : b + 1], keep[b])))
    return own, naive.gap(sparse(x[1:]), sparse_by_hand(sparse, x[1:], keep[1], False))


@check(
    "minicpm-sala",
    "stage 1 trains the linear layers alone and brings their outputs towards the dense ones: gap after 40 steps over before",
    below=0.4,
    control="the dense model's distribution distilled instead, as long",
)
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    dense = Decoder("softmax", vocab=24, dim=32, layers=4, heads=4, kv_heads=2)
    with torch.no_grad():
        dense.embed.weight.mul_(10)
    config = SALAConfig(vocab=24, dim=32, layers=4, heads=4, kv_heads=2, share=0.5)

    def batches(step: int) -> Tensor:
        return torch.randint(24, (8, 32), generator=torch.Generator().manual_seed(step))

    found = []
    for steps in ((40, 0), (0, 40)):
        model = convert(dense, config)
        before = {name: p.clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            start = float(align_loss(model, dense, batches(999)))
        log = train_stages(model, dense, batches, steps, 3e-3)
        with torch.no_grad():
            ratio = float(align_loss(model, dense, batches(999))) / start
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        inside = {name for n in (1, 2) for name in before if name.startswith(f"blocks.{n}.mixer.")}
        honest = moved <= inside and len(log["align"]) == 40 if steps[0] else True
        found.append(ratio if honest else math.inf)
    return found[0], found[1]


@check(
    "minicpm-sala",
    "losses by hand: relative squared gaps of linear layers on the dense stream; KL of the dense distribution to the hybrid's",
    below=1e-9,
    control="gaps on the hybrid's own stream",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    dense = Decoder("softmax", vocab=24, dim=32, layers=3, heads=4, kv_heads=2).double()
    dense.embed.weight.mul_(30)
    config = SALAConfig(vocab=24, dim=32, layers=3, heads=4, kv_heads=2)
    model, tokens = convert(dense, config, [1]), torch.randint(24, (2, 20))
    p, s = (m(tokens).softmax(-1).flatten(0, 1) for m in (dense, model))
    kl = float((p * (p / s).log()).sum()) / 40
    gaps = []
    for stream in (dense, model):
        x, terms = dense.embed(tokens), []
        for n, (new, old) in enumerate(zip(model.blocks, dense.blocks, strict=True)):
            y = rms(x, old.norm1.weight)  # type: ignore[union-attr, arg-type]
            truth = old.mixer(y)  # type: ignore[operator]
            if n != 1:
                terms.append(float(((new.mixer(y) - truth) ** 2).sum() / (truth**2).sum()))  # type: ignore[operator]
            x = stream.blocks[n](x)
        gaps.append(sum(terms) / 2)
    found = float(align_loss(model, dense, tokens))
    return max(abs(found - gaps[0]), abs(float(distil_loss(model, dense, tokens)) - kl)), abs(found - gaps[1])


@check(
    "minicpm-sala",
    "importance: rise of the recall loss over that of the text loss when one layer alone is linear, and which layers stay: off",
    below=1e-12,
    control="layers ranked by the recall loss alone",
)
def _() -> tuple[float, float]:
    dense = Decoder("softmax", vocab=24, dim=32, layers=5, heads=4, kv_heads=2)
    config = SALAConfig(vocab=24, dim=32, layers=5, heads=4, kv_heads=2)
    recall, text = [0.5, 0.9, 0.3, 0.8, 0.2], [1.0, 0.9, 0.1, 0.2, 1.0]

    def losses(model: Decoder) -> tuple[float, float]:
        mixers = [block.mixer for block in model.blocks]
        linear = [n for n, m in enumerate(mixers) if isinstance(m.mechanism, Recurrent)]  # type: ignore[union-attr]
        same = all(m is old.mixer for n, (m, old) in enumerate(zip(mixers, dense.blocks, strict=True)) if n not in linear)
        if len(linear) > 1 or not same:
            return math.nan, math.nan
        return (2.0, 3.0) if not linear else (2.0 + recall[linear[0]], 3.0 + text[linear[0]])

    found = importance(losses, dense, config)
    off = max(abs(a - r / t) for a, r, t in zip(found, recall, text, strict=True))
    kept = [softmax_layers(5, 0.6, one) for one in (found, recall)]
    return off + (kept[0] != (0, 3, 4)), float(kept[1] != (0, 3, 4))


@check(
    "minicpm-sala",
    "stage 3: longer sequences with the sparse layers choosing blocks: next-token loss after 30 steps over before",
    below=0.7,
    control="stage 2 again on short sequences",
)
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    config = SALAConfig(vocab=12, dim=32, layers=3, heads=4, kv_heads=2, block_size=4, top_k=2, window=4, dense_len=0, kernel=4, stride=2)
    dense = Decoder("softmax", vocab=12, dim=32, layers=3, heads=4, kv_heads=2)

    def text(step: int, length: int) -> Tensor:
        first = torch.randint(12, (4, 1), generator=torch.Generator().manual_seed(step))
        return (first + 5 * torch.arange(length)) % 12

    ratios, chosen = [], []
    for steps in ((0, 0, 30), (0, 30)):
        model = convert(dense, config)
        with torch.no_grad():
            with reading_all(model):
                whole = model(text(1, 48))
            chosen.append(naive.gap(whole, model(text(1, 48))) > 1e-4 and model.blocks[0].mixer.mechanism.select is not None)  # type: ignore[union-attr]
            before = float(next_token_loss(model, dense, text(999, 48)))
        log = train_stages(
            model, dense, lambda step: text(step, 12), steps, 3e-3, (lambda step: text(step, 48)) if len(steps) == 3 else None
        )
        with torch.no_grad():
            ratios.append(float(next_token_loss(model, dense, text(999, 48))) / before)
    tokens = text(999, 48)
    with torch.no_grad():
        guess = model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])
        same = abs(float(next_token_loss(model, dense, tokens)) + float(guess.mean())) < 1e-5
    return ratios[0] if all(chosen) and same and len(log["distil"]) == 30 else math.inf, ratios[1]
