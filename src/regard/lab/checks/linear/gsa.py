"""Checks of gsa."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, Mechanism
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients, streamed
from regard.lab.checks.shared.slots import slot_inputs, slot_loop
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.decoder import Decoder


@check(
    "gsa",
    "two chained scans with gradients, and streams == the recurrence, with weak and strong gates",
    below=1e-7,
    control="writes of strength 1",
)
def _() -> tuple[float, float]:
    own = []
    for strength in (0.3, 60.0):
        leaves = q, k, v, g = tuple(x.requires_grad_() for x in slot_inputs(90, strength))
        truth = slot_loop(q, k, v, g.exp(), 1 - g.exp())
        out = attend(q, k, v, "gsa", log_forget=g)
        own += [gap_with_gradients(out, truth, leaves), naive.gap(streamed("gsa", q, k, v, log_forget=g), truth)]
    other = attend(q, k, v, "gsa", log_forget=g, write=torch.ones_like(g))
    return max(own), naive.gap(other, truth)


@check(
    "gsa",
    "one-hot writes to as many slots as tokens, unwritten ones left out == causal softmax",
    below=1e-12,
    control="softmax over two tokens a slot",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(12)
    truth = attend(q, k, v, mask=Causal(), scale=1.0)

    def last_row(slots: int) -> float:
        write = F.one_hot(torch.arange(12) % slots, slots).to(F64).expand(1, 2, -1, -1)
        out = attend(q, k, v, "gsa", log_forget=torch.zeros_like(write), write=write)
        return naive.gap(out[:, :, -1], truth[:, :, -1])  # all slots are written by then

    return last_row(12), last_row(6)


@check("gsa", "gates from sums (ABC): K is each slot's softmax average of keys", below=1e-10, control="without the running divisor")
def _() -> tuple[float, float]:
    q, k, v = qkv(50)
    s = 3 * torch.randn(1, 2, 50, 6, dtype=F64)
    mechanism = get("gsa", gates="sum")
    rows: list[Tensor] = []
    other: list[Tensor] = []
    for t in range(50):
        for share, to in ((torch.softmax(s[:, :, : t + 1], 2), rows), (torch.exp(s[:, :, : t + 1]), other)):
            keys, values = share.mT @ k[:, :, : t + 1], share.mT @ v[:, :, : t + 1]
            to.append(torch.softmax(keys @ q[:, :, t, :, None], -2).mT @ values)
    truth = torch.cat(rows, 2)
    own = max(naive.gap(attend(q, k, v, mechanism, write=s), truth), naive.gap(streamed(mechanism, q, k, v, write=s), truth))
    return own, naive.gap(torch.cat(other, 2), truth)


@check(
    "gsa",
    "a decoder of gated slots generates the tokens that full passes would; bytes of its state at 40 and 80 tokens differ by",
    below=0,
    control="softmax's",
)
def _() -> tuple[float, float]:
    def grown(mechanism: str | Mechanism) -> float:
        model = Decoder(mechanism, vocab=20, dim=32, layers=2, heads=2)
        prompt = torch.randint(20, (1, 40))
        out = model.generate(prompt, 3)
        full = model(out[:, :-1])[:, 39:].argmax(-1)
        if not torch.equal(full, out[:, 40:]):
            return math.nan
        sizes = [sum(s.bytes for s in model.step(torch.randint(20, (1, n)))[1]) for n in (40, 80)]
        return float(sizes[1] - sizes[0])

    return grown(get("gsa", slots=8)), grown("softmax")
