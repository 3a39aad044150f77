"""Checks of chinchilla-mcq-circuit-analysis."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regard import models
from regard.interpret.direct import direct_effects
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn
from regard.lab.verification import check
from regard.nn.decoder import Decoder
from regard.tasks.choices import Choices, choices, vocabulary
from regard.zoo.analysis.chinchilla_mcq_circuit_analysis import head_pattern_report, letter_kind, low_rank_head, projector, total_effect


def asked(count: int = 3, **options: Any) -> Choices:
    return choices(count, torch.Generator().manual_seed(1), **options)


def towards(given: Choices, vocab: int) -> Tensor:
    """One-hot of the right label, less the mean over the labels."""
    out = torch.zeros(len(given.ids), vocab, dtype=F64)
    out.scatter_(1, given.labels, -1 / given.labels.shape[1])
    return out.scatter_add(1, given.answer[:, None], torch.ones(len(out), 1, dtype=F64))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return drawn(
        GPT2LMHeadModel(
            GPT2Config(vocab_size=vocabulary(), n_positions=30, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
        ).eval(),
        0.1,
    )


@check(
    "chinchilla-mcq-circuit-analysis",
    "direct effects of embedding, heads, MLPs and biases add up to the centred logit: regard's decoder (RMS and layer norm), GPT-2",
    below=1e-9,
    control="without the MLPs",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    given, own, other = asked(), [], math.inf
    hosts: list[Any] = [
        drawn(Decoder(vocab=vocabulary(), dim=16, layers=2, heads=4, kv_heads=2, norm=norm).eval()) for norm in ("rms", "layer")
    ]
    for model in (*hosts, gpt2()):
        out = model(given.ids)
        logits = getattr(out, "logits", out)[:, -1]
        found = direct_effects(model, given.ids, towards(given, logits.shape[1]))
        truth = given.centred(logits)
        own.append(naive.gap(found.total, truth) / float(truth.abs().max()))
        other = min(other, naive.gap(found.total - found.mlps.sum(1), truth) / float(truth.abs().max()))
    return max(own), other


@check(
    "chinchilla-mcq-circuit-analysis",
    "tiny model: each head's direct effect by hand, its output through its slice of o_proj, the norm's factor and the unembedding",
    below=1e-9,
    control="the next head's slice",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, given = models.load("tiny").double(), asked()
    kept: dict[int, Tensor] = {}
    last: list[Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, x, n=n: kept.update({n: x[0][:, -1]}))
        for n, layer in enumerate(model.model.layers)
    ]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda m, x: last.append(x[0][:, -1])))
    model(given.ids)
    for hook in hooks:
        hook.remove()
    found, norm = direct_effects(model, given.ids, towards(given, 256)).heads, model.model.norm
    along = (
        (towards(given, 256) @ model.lm_head.weight) * norm.weight / (last[0].square().mean(1, keepdim=True) + norm.variance_epsilon).sqrt()
    )
    size = model.config.hidden_size // 8

    def hand(shift: int) -> Tensor:
        rows = []
        for n, layer in enumerate(model.model.layers):
            w = layer.self_attn.o_proj.weight
            cut = [slice(size * h, size * h + size) for h in range(8)]
            rows.append(torch.stack([(kept[n][:, cut[h]] @ w[:, cut[(h + shift) % 8]].T * along).sum(1) for h in range(8)], 1))
        return torch.stack(rows, 1)

    scale = float(found.abs().max())
    return naive.gap(found, hand(0)) / scale, naive.gap(found, hand(1)) / scale


@check(
    "chinchilla-mcq-circuit-analysis",
    "tiny model: total effects of heads and MLPs, resampled and by means, == runs with hooks; 0 where the source is the prompt",
    below=1e-9,
    control="with the source's rows turned",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, given, source = models.load("tiny").double(), asked(), choices(3, torch.Generator().manual_seed(7)).ids
    layers = model.model.layers

    def metric(out: Any) -> Tensor:
        return given.centred(out.logits[:, -1])

    clean = metric(model(given.ids))

    def hand(point: str, n: int, head: int, rows: Tensor, mean: bool, positions: list[int]) -> float:
        module = layers[n].self_attn.o_proj if point == "heads" else layers[n].mlp
        kept: list[Tensor] = []
        cut = slice(32 * head, 32 * head + 32) if point == "heads" else slice(None)

        def swap(x: Tensor) -> Tensor:
            x, new = x.clone(), kept[0].mean(0, keepdim=True) if mean else kept[0]
            x[:, positions, cut] = new[:, positions, cut].expand(len(x), -1, -1)
            return x

        def run(ids: Tensor, change: Any) -> Any:
            hook = (
                module.register_forward_pre_hook(lambda m, x: (change(x[0]),))
                if point == "heads"
                else module.register_forward_hook(lambda m, x, y: change(y))
            )
            try:
                return model(ids)
            finally:
                hook.remove()

        def keep(x: Tensor) -> Tensor:
            kept.append(x)
            return x

        run(rows, keep)
        return float((clean - metric(run(given.ids, swap))).mean())

    size, everywhere, gap, other = model.config.hidden_size // 8, list(range(given.ids.shape[1])), 0.0, 0.0
    assert size == 32
    for mean, positions in ((False, None), (True, [-1, -2])):
        found = total_effect(model, given.ids, metric, source, mean=mean, positions=positions)
        places = everywhere if positions is None else positions
        for n, head in ((0, 3), (2, 5), (3, 0)):
            gap = max(gap, abs(float(found.heads.scores[n, head]) - hand("heads", n, head, source, mean, places)))
            gap = max(gap, abs(float(found.mlps[n]) - hand("mlp", n, 0, source, mean, places)))
            if not mean:
                other = max(other, abs(float(found.heads.scores[n, head]) - hand("heads", n, head, source.roll(1, 0), mean, places)))
    same = total_effect(model, given.ids, metric, given.ids)
    return max(gap, float(same.heads.scores.abs().max()), float(same.mlps.abs().max())), other


@check(
    "chinchilla-mcq-circuit-analysis",
    "weights by role == plain attention's; kinds of planted heads: how much is wrong",
    below=1e-6,
    control="from the token before the last",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, given = models.load("tiny"), asked(4)
    at = torch.arange(given.ids.shape[1])
    right = at == given.places[given.correct][:, None]
    roles = {"right": right, "labels": torch.isin(at, given.places).expand(4, -1), "first": (at == 0).expand(4, -1)}
    found = head_pattern_report(model, given.ids, roles)
    maps = models.load("tiny", attn_implementation="eager")(given.ids, output_attentions=True).attentions
    gaps = []
    for row in (-1, -2):
        truth = {name: torch.stack([(p[:, :, row] * role[:, None]).sum(-1).mean(0) for p in maps]) for name, role in roles.items()}
        gaps.append(max(naive.gap(found[name].scores, truth[name].double()) for name in roles))
    shown = {
        "correct": 0.8 * torch.nn.functional.one_hot(given.correct, 4) + 0.02,
        "single": torch.tensor([0.05, 0.6, 0.05, 0.05]).expand(4, -1),
        "uniform": torch.full((4, 4), 0.2),
        "other": torch.full((4, 4), 0.05),
    }
    wrong = sum(letter_kind(w, given.correct) != kind for kind, w in shown.items())
    wrong += letter_kind(shown["other"], given.correct, torch.full((4,), 0.7)) != "amplification"
    return gaps[0] + wrong, gaps[1]


@check(
    "chinchilla-mcq-circuit-analysis",
    "keys and queries of 64 channels whose labels stand in 3 dimensions, and noise: right labels that rank 3 selects",
    above=0.99,
    control="without taking the means off (a drawn subspace of rank 3 keeps no more than 0.85)",
)
def _() -> tuple[float, float]:
    draw = torch.Generator().manual_seed(0)
    corners = torch.linalg.qr(torch.eye(4, dtype=F64) - 0.25).Q[:, :3] * 4  # four labels, centred
    base = torch.linalg.qr(torch.randn(64, 64, generator=draw, dtype=F64)).Q
    basis, offset = base[:3], 40 * base[3]
    right = torch.randint(4, (400,), generator=draw)
    q = corners[right] @ basis + 0.2 * torch.randn(400, 64, generator=draw, dtype=F64) + offset
    k = corners @ basis + 0.2 * torch.randn(400, 4, 64, generator=draw, dtype=F64) + 30 * base[4]
    q0, k0 = q.mean(0), k.flatten(0, 1).mean(0)

    def kept(p: Tensor, q0: Tensor, k0: Tensor) -> float:
        near, far = q0 + (q - q0) @ p, k0 + (k - k0) @ p
        return float(((far @ near[..., None])[..., 0].argmax(1) == right).double().mean())

    centred = kept(projector([q - q0, k.flatten(0, 1) - k0], 3), q0, k0)
    raw = kept(projector([q, k.flatten(0, 1)], 3), torch.zeros(64, dtype=F64), torch.zeros(64, dtype=F64))
    other = torch.linalg.qr(torch.randn(64, 3, generator=draw, dtype=F64)).Q
    return centred if kept(other @ other.T, q0, k0) <= 0.85 else 0.0, raw


@check(
    "chinchilla-mcq-circuit-analysis",
    "tiny model, a head in 3 dimensions, scores and values: its output at the last token by hand, the others' as they were; full rank changes nothing",
    below=1e-8,
    control="values left as they are",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    from regard.taps import read

    model, given, head = models.load("tiny").double(), asked(6), (1, 5)
    places = given.places.tolist()
    plain = model(given.ids).logits
    full = low_rank_head(model, head, given.ids, places, 32)
    with full.patched(model):
        gap = naive.gap(model(given.ids).logits, plain)
    with read(model, ["q", "k", "v", "heads"], layers=[1]) as seen:
        model(given.ids)
    q, k, v = seen["q", 1][:, 5, -1], seen["k", 1][:, 2], seen["v", 1][:, 2]

    def squeezed(x: Tensor, parts: list[Tensor], mean: Tensor) -> Tensor:
        _, _, vh = torch.linalg.svd(torch.cat(parts))
        return mean + (x - mean) @ vh[:3].T @ vh[:3]

    kl, vl = (x[:, places].flatten(0, 1) for x in (k, v))
    both = [q - q.mean(0), kl - kl.mean(0)]
    s = (k @ q[..., None])[..., 0] / 32**0.5
    near, far = squeezed(q, both, q.mean(0)), squeezed(k[:, places], both, kl.mean(0))
    s[:, places] = (far @ near[..., None])[..., 0] / 32**0.5
    p, low = s.softmax(-1), v.clone()
    outs = [(p[:, None] @ low)[:, 0]]
    low[:, places] = squeezed(v[:, places], [vl - vl.mean(0)], vl.mean(0))
    outs.append((p[:, None] @ low)[:, 0])
    found = low_rank_head(model, head, given.ids, places, 3)
    with read(model, "heads", layers=[1]) as unpatched, found.patched(model), read(model, "heads", layers=[1]) as patched:
        model(given.ids)
    o, before = patched["heads", 1], seen["heads", 1]
    rest = o.clone()
    rest[:, 5, -1] = before[:, 5, -1]
    assert unpatched["heads", 1].shape == o.shape
    return max(gap, naive.gap(o[:, 5, -1], outs[1]), naive.gap(rest, before)), naive.gap(o[:, 5, -1], outs[0])
