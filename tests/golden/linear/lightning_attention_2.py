"""Lightning Attention-2: the operator at lengths around its blocks, in parts, in calls one after another, in streams."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case, streamed

import regard
from regard.zoo.linear.lightning_attention_2 import lightning_blocks, lightning_in_parts


def recurrence(g: Vectors, name: str) -> None:
    slope, length = g("slope"), g("q").shape[2]
    for executor in (None, "parallel"):
        g.op(lambda q, k, v, executor=executor: regard.attend(q, k, v, name, log_decay=-slope, executor=executor))
    g.op(lambda q, k, v: lightning_blocks(q, k, v, slope)[0])
    q, k, v = (g(name) for name in "qkv")
    for block in (16, 64):
        g.same(lightning_blocks(q, k, v, slope, block)[1], "final_state")
    if length > 3:
        g.op(lambda q, k, v: lightning_in_parts(q, k, v, -slope, 3))
    outs, state, cut = [], None, max(1, length // 3)
    for part in (slice(0, cut), slice(cut, length)):
        if part.start < length:
            of = [x[:, :, part] for x in (q, k, v)]
            out, state = regard.attend(*of, name, log_decay=-slope, state=state, return_state=True)
            outs.append(out)
    g.same(torch.cat(outs, 2), "out")
    out, state = streamed(lambda q, k, v, s: regard.step(q, k, v, name, s, log_decay=-slope), q, k, v)
    g.same(out, "out")
    g.same(state.s, "final_state")


@case("c0", "c1", "c2", "c3", "c4")
def operator(g: Vectors) -> None:
    recurrence(g, "lightning-attention-2")
