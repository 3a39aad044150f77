"""Checks of nha."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients, streamed
from regard.lab.checks.shared.slots import slot_inputs, slot_loop
from regard.lab.verification import check


@check("nha", "w = 8 with gradients, and streams == the loop", below=1e-9, control="tokens written on arrival")
def _() -> tuple[float, float]:
    leaves = q, k, v, g = tuple(x.requires_grad_() for x in slot_inputs(40))
    mechanism = get("nha", window=8, rope=None)
    truth = slot_loop(q, k, v, g.exp(), 1 - g.exp(), 8, 8**-0.5)
    out = attend(q, k, v, mechanism, log_forget=g)
    own = max(gap_with_gradients(out, truth, leaves), naive.gap(streamed(mechanism, q, k, v, log_forget=g), truth))
    return own, naive.gap(out, slot_loop(q, k, v, g.exp(), 1 - g.exp(), 8, 8**-0.5, arrival=True))


@check("nha", "w >= length is causal softmax attention, w = 0 gated slots", below=1e-12, control="w = 8 for both")
def _() -> tuple[float, float]:
    q, k, v, g = slot_inputs(40)
    full = attend(q, k, v, mask=Causal())
    slots = attend(q, k, v, get("gsa", scaled=True), log_forget=g)

    def out(window: int) -> Tensor:
        return attend(q, k, v, get("nha", window=window, rope=None), log_forget=g)

    return max(naive.gap(out(40), full), naive.gap(out(0), slots)), min(naive.gap(out(8), full), naive.gap(out(8), slots))


@check(
    "nha",
    "what a value inside the window gives: softmax's share of the window, times what the slots leave",
    below=1e-9,
    control="softmax's share alone",
)
def _() -> tuple[float, float]:
    q, k, v, g = slot_inputs(40)
    v.requires_grad_()
    out = attend(q, k, v, get("nha", window=8, rope=None), log_forget=g)
    got = torch.autograd.grad(out[0, 0, 30, 0], v)[0][0, 0, 23:31, 0]
    near = 8**-0.5 * k[0, 0, 23:31] @ q[0, 0, 30]
    keys = torch.zeros(6, 8, dtype=F64)
    for e in range(23):
        keys = g[0, 0, e].exp()[:, None] * keys + (1 - g[0, 0, e].exp())[:, None] * k[0, 0, e]
    far = 8**-0.5 * keys @ q[0, 0, 30]
    left = near.logsumexp(0).exp() / (near.logsumexp(0).exp() + far.logsumexp(0).exp())
    return naive.gap(got, left * near.softmax(0)), naive.gap(got, near.softmax(0))
