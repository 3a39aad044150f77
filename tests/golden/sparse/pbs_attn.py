"""pbs-attn: the order of keys, the blocks chosen, and the output."""

import torch
from golden.vectors import Vectors, case

import regard
from regard.algebra import View
from regard.zoo.sparse.pbs_attn import order_of, pbs_plan


@case("c0", "c1", "c2", "c3", "c4")
def prefill(v: Vectors) -> None:
    q, k = v("q"), v("k")
    sizes = {"block_size": v["block"], "segment": v["segment"]}
    m = regard.get("pbs-attn", threshold=v["threshold"], first=v["force"], **sizes)
    v.same(regard.attend(q, k, v("v"), m), "out")
    if v.has("key_order"):
        q = q * q.shape[-1] ** -0.5
        order = order_of(q, k, **sizes)
        assert torch.equal(order.order, v("key_order").long())
        view = View(0, lambda i: i, lambda a, b: (q, q), {})  # only the first position is read
        plan = pbs_plan(q, order.apply(k), view, order.order[:, :, None], threshold=v["threshold"], force=v["force"], **sizes)
        assert torch.equal(plan.keep, v("block_mask"))
