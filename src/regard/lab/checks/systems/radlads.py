"""Checks of radlads."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.adapt.conversion import Conversion
from regard.adapt.kept_state import state_bytes
from regard.adapt.recipe import carry_out
from regard.adapt.stages import distance
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.converting import Heads, heads_by_hand, shaken, streamed, student_of, turned
from regard.lab.checks.shared.decoding import llama
from regard.lab.verification import check
from regard.zoo.systems.radlads import KINDS, output_distance, radlads_convert, radlads_stages


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def ends(layer: Any, states: Any, q: Tensor, gate: Tensor) -> Tensor:
    """W_o (o gate), o of states (B, H, L, d, d) read by q / sqrt(d)."""
    o = torch.einsum("bhld,bhlde->blhe", q / math.sqrt(layer.head_dim), states).flatten(2)
    return (o * gate) @ layer.o_proj.weight.T


def sixth(layer: Any, x: Tensor, later: bool = False) -> Tensor:
    """rad_rwkv6 a token and a head at a time; later: the state is read before its token is written."""
    d, outs = layer.head_dim, []
    before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
    dx = before - x
    told = torch.tanh((x + dx * layer.mu_x) @ layer.mix_a)
    rank = layer.mix_b.shape[1]
    seen = [x + dx * (layer.mu[i] + told[..., i * rank : (i + 1) * rank] @ layer.mix_b[i]) for i in range(5)]
    h: Heads = Heads(*(heads_by_hand(layer, y)[at] for at, y in enumerate(seen[:3])), x, x)
    log = -torch.exp(layer.decay.bias + torch.tanh(seen[3] @ layer.decay.a) @ layer.decay.b)
    gate = sigmoid(torch.tanh(seen[4] @ layer.gate.a) @ layer.gate.b)
    for b in range(len(x)):
        heads = []
        for a in range(layer.heads):
            state, rows = torch.zeros(d, d, dtype=F64), []
            for t in range(x.shape[1]):
                w = torch.exp(log[b, t, a * d : (a + 1) * d])
                new = w[:, None] * state + torch.outer((1 - w) * h.k[b, a, t], h.v[b, a, t])
                rows.append(state if later else new)
                state = new
            heads.append(torch.stack(rows))
        outs.append(torch.stack(heads))
    return ends(layer, torch.stack(outs), h.q, gate)


def seventh(layer: Any, x: Tensor, late: bool = False) -> Tensor:
    """rad_rwkv7 a token and a head at a time; late: what is erased is read from the state that has faded."""
    h, d, outs = heads_by_hand(layer, x), layer.head_dim, []
    rate = sigmoid(layer.rate.bias + x @ layer.rate.a @ layer.rate.b)
    decay = torch.exp(-math.exp(-0.5) * sigmoid(layer.decay.bias + torch.tanh(x @ layer.decay.a) @ layer.decay.b))
    gate = sigmoid(x @ layer.gate.a) @ layer.gate.b
    for b in range(len(x)):
        heads = []
        for a in range(layer.heads):
            state, rows = torch.zeros(d, d, dtype=F64), []
            for t in range(x.shape[1]):
                w, r = (y[b, t, a * d : (a + 1) * d] for y in (decay, rate))
                k = h.turned_k[b, a, t]
                unit = k / k.square().sum().sqrt()
                read = (unit * w if late else unit) @ state
                state = w[:, None] * state - torch.outer(r * unit, read) + torch.outer(k * (1 - w + r), h.v[b, a, t])
                rows.append(state)
            heads.append(torch.stack(rows))
        outs.append(torch.stack(heads))
    return ends(layer, torch.stack(outs), h.turned_q, gate)


@check(
    "radlads",
    "a layer of each student (4 heads over 2, 7 tokens) equals loops over tokens, values and gradients",
    below=1e-10,
    control="the state read one token late; what is erased read from the faded state",
)
def _() -> tuple[float, float]:
    own, other, x = 0.0, math.inf, torch.randn(2, 7, 32, dtype=F64, requires_grad=True)
    for kind, truth in (("rad_rwkv6", sixth), ("rad_rwkv7", seventh)):
        model = llama()
        layer = shaken(student_of(radlads_convert(model, kind), 1), 0.3)
        found = layer.run(x, turned(model, x))[0]
        own = max(own, gap_with_gradients(found, truth(layer, x), (x, *layer.parameters())))
        other = min(other, naive.gap(found, truth(layer, x, True)))
    return own, other


@check(
    "radlads",
    "each student, a text of 30 read in pieces and token by token: logits equal the whole pass, and its state does not grow",
    below=1e-10,
    control="the token before a piece is forgotten",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    ids, own, other = torch.randint(1, 50, (2, 30)), 0.0, 0.0
    for kind in KINDS:
        model = llama()
        conversion = radlads_convert(model, kind)
        for student in conversion.students.values():
            shaken(student, 0.2)
        truth = model(ids, use_cache=False).logits
        found, cache = streamed(model, ids)
        own = max(own, naive.gap(found, truth), abs(state_bytes(cache) / state_bytes(streamed(model, ids[:, :20])[1]) - 1))
        for student in conversion.students.values():
            run: Any = student.run

            def forgetful(x: Tensor, rotary: Any, keep: Any = None, state: Any = None, run: Any = run) -> Any:
                return run(x, rotary, keep, None if state is None else state._replace(last=0 * state.last))

            student.run = forgetful  # type: ignore[assignment, method-assign]
        other = max(other, naive.gap(streamed(model, ids)[0], truth))
    return own, other


@check(
    "radlads",
    "rad_rwkv6 that keeps everything (lambda = -inf, keys as they are) and with open gates, off causal linear attention",
    below=1e-10,
    control="keys balanced by 1 - w",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, x, gaps = llama(), torch.randn(2, 9, 32, dtype=F64), []
    for balance in (False, True):
        layer = student_of(radlads_convert(llama(), "rad_rwkv6", balance=balance))
        layer.load_state_dict(layer.state_dict() | dict(model.model.layers[0].self_attn.state_dict()))
        layer.decay.bias.fill_(-math.inf)
        h = heads_by_hand(layer, x)
        o = (h.q @ h.k.mT / math.sqrt(layer.head_dim)).tril() @ h.v
        truth = (o.transpose(1, 2).flatten(2) / 2) @ layer.o_proj.weight.T  # gates begin at one half
        gaps.append(naive.gap(layer.run(x, turned(model, x))[0], truth))
    return gaps[0], gaps[1]


@check(
    "radlads",
    "what the token before changes in what rad_rwkv6 projects, at first",
    below=0.0,
    control="with mixing moved off its first values",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x, gaps = torch.randn(2, 9, 32, dtype=F64), []
    layer = student_of(radlads_convert(llama(), "rad_rwkv6"))
    for _ in range(2):
        gaps.append(naive.gap(layer.shifted(x, 0 * x[:, :1]), x.expand(5, -1, -1, -1)))
        shaken(layer, 0.1)
    return gaps[0], gaps[1]


@check(
    "radlads",
    "first decays of the middle layer of three, off -6 + 5 (n / 31)^1.35 and its RWKV-7 form",
    below=1e-6,
    control="the last layer's",
)
def _() -> tuple[float, float]:
    own, other = 0.0, math.inf
    for kind, low, power, extra in (("rad_rwkv6", -6, 1.35, 0.0), ("rad_rwkv7", -7, 0.85 + 0.5**0.5, 0.5)):
        conversion = radlads_convert(llama(layers=3), kind)
        found = [student_of(conversion, at).decay.bias.detach() for at in (1, 2)]
        truth = torch.tensor([low + 5 * (n / 31) ** power + extra for n in range(32)], dtype=F64)
        own, other = max(own, naive.gap(found[0], truth)), min(other, naive.gap(found[1], truth))
    return own, other


def copied(generator: torch.Generator) -> Tensor:
    """Eight letters, twice."""
    word = torch.randint(1, 20, (16, 8), generator=generator)
    return torch.cat((word, word), 1)


@functools.cache
def teacher() -> dict[str, Tensor]:
    """A two-layer softmax decoder that copies."""
    torch.manual_seed(0)
    model, generator = llama(vocab=20).float().train(), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.mul_(0.5 if p.dim() > 1 else 1)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(300):
        ids = copied(generator)
        optimizer.zero_grad()
        F.cross_entropy(model(ids, use_cache=False).logits[:, 7:-1].flatten(0, 1), ids[:, 8:].flatten()).backward()
        optimizer.step()
    return {name: x.detach() for name, x in model.state_dict().items()}


def converted(kind: str) -> Conversion:
    model = llama(vocab=20).float()
    model.load_state_dict(teacher())
    return radlads_convert(model, kind)


@torch.no_grad()
def apart(conversion: Conversion) -> tuple[float, float]:
    """(mean distance of the layers' outputs, KL of logits from the teacher's), on new texts."""
    ids = copied(torch.Generator().manual_seed(1))
    lessons = conversion.lessons(ids)
    far = [float(output_distance(conversion.students[name].eval(), lesson)) for name, lesson in lessons.items()]
    truth = conversion.teacher()(ids, use_cache=False).logits
    return sum(far) / len(far), float(distance(conversion.model(ids, use_cache=False).logits, truth))


@functools.cache
def trained(kind: str, align: int, distil: int) -> tuple[float, float, float]:
    """(distance of layers before, behind the first stage, or the second where there is no first; KL at the end)."""
    conversion = converted(kind)
    far = [apart(conversion)[0]]

    def watch(number: int, stage: object) -> None:
        far.append(apart(conversion)[0])

    carry_out(conversion, radlads_stages(align, distil, lr=5e-3, final_lr=1e-3), copied, watch=watch)
    return far[0], far[1], apart(conversion)[1]


@check(
    "radlads",
    "distance of rad_rwkv6's layers from a copying teacher's after 60 steps of alignment, over its start",
    below=0.6,
    control="as many steps of distillation",
)
def _() -> tuple[float, float]:
    found = [trained("rad_rwkv6", *steps) for steps in ((60, 0), (0, 60))]
    return found[0][1] / found[0][0], found[1][1] / found[1][0]


@check("radlads", "the same, of rad_rwkv7", below=0.6, control="as many steps of distillation")
def _() -> tuple[float, float]:
    found = [trained("rad_rwkv7", *steps) for steps in ((60, 60), (0, 60))]
    return found[0][1] / found[0][0], found[1][1] / found[1][0]


@check(
    "radlads",
    "KL of rad_rwkv7's logits from the teacher's after 60 steps of alignment and 60 of distillation",
    below=1.3,
    control="alignment alone",
)
def _() -> tuple[float, float]:
    return trained("rad_rwkv7", 60, 60)[2], trained("rad_rwkv7", 60, 0)[2]
