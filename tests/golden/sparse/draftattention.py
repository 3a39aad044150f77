"""draftattention: order of tokens, draft, blocks, output. Released code drops one entry less than its share of the map, which sparsity says here."""

import torch
from golden.vectors import Vectors, case

import regard
from regard.algebra import View
from regard.algebra.permute import tiles
from regard.zoo.sparse.draftattention import draft_map, draft_plan


@case("c0", "c1", "c2", "c3")
def prefill(v: Vectors) -> None:
    q, k, value = (v(name).transpose(0, 1)[None] for name in "qkv")
    grid, pool = (v["F"], v["h"], v["w"]), (v["ph"], v["pw"])
    size, tokens = pool[0] * pool[1], grid[0] * grid[1] * grid[2]
    entries = (tokens // size) ** 2
    dropped = int(v["sp"] * entries)
    sparsity = (dropped - 0.5) / entries if dropped else 0.0
    m = regard.get("draftattention", grid=grid, pool=pool, sparsity=sparsity, every_row=False, text=v["text"])
    v.same(regard.attend(q, k, value, m)[0].transpose(0, 1), "out")
    order = tiles(grid, (1, *pool), v["text"])
    assert torch.equal(order.order, v("reorg_idx").long())
    turned = [order.apply(x) for x in (q * q.shape[-1] ** -0.5, k)]
    v.same(draft_map(*(x[..., :tokens, :] for x in turned), size)[0], "draft_map")
    view = View(0, lambda i: i, lambda a, b: (q, q), {})  # not read: there is no mask
    plan = draft_plan(*turned, view, size=size, visual=tokens, sparsity=sparsity, every_row=False)
    assert torch.equal(plan.keep[0], v("block_mask").bool())
