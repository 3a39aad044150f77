"""vmoba: the chosen pairs and the output on grids. Ranking the pairs of a whole batch together couples sequences: refused."""

import numpy as np
import torch
from golden.vectors import Vectors, case, refuses

import regard
from regard.algebra import View
from regard.algebra.permute import tiles
from regard.zoo.sparse.vmoba import partition, vmoba_plan


def options(v: Vectors) -> dict[str, object]:
    grid, chunk = tuple(v["grid"]), v["chunk"]
    layer, tile = (0, (chunk, 1, 1)) if isinstance(chunk, int) else (1, (1, *chunk)) if len(chunk) == 2 else (2, tuple(chunk))
    released = {"unreached": 2} if v["scope"] in ("query_head", "block") else {}
    return {
        "grid": grid, "tile": tile, "layer": layer, "mode": v["mode"], "threshold": v["threshold"], "top_k": v["topk"], "scope": v["scope"],
        "fallback": v["fallback_to_full"], **released,
    }  # fmt: skip


@case("c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c9", "c10", "c11", "c12")
def blocks(v: Vectors) -> None:
    given = Vectors(v.slug, v["inputs_from"], v.dtype)
    leaves, made = list(given.leaves("q", "k", "v").values()), options(v)
    q, k, value = (x.transpose(1, 2) for x in leaves)
    out = regard.attend(q, k, value, regard.get("vmoba", **made)).transpose(1, 2)
    v.same(out, "out")
    if v.has("dq"):
        for name, grad in zip("qkv", torch.autograd.grad((out * given("w")).sum(), leaves), strict=True):
            v.same(grad, f"d{name}")
    order = tiles(made["grid"], partition(made["grid"], made["tile"], made["layer"]))
    assert torch.equal(order.order, v("order").long())
    view = View(0, lambda i: i, lambda a, b: (q, q), {})  # not read: there is no mask
    rest = {name: made.get(name) for name in ("mode", "threshold", "top_k", "scope", "unreached", "fallback")}
    plan = vmoba_plan(order.apply(q), order.apply(k), view, size=v["block_tokens"], **rest)
    bits = np.unpackbits(v.arrays[f"selected_{v.config}"], axis=2)[:, :, : q.shape[2]].astype(bool)
    if plan is not None:  # (blocks, heads, queries) of one sequence
        assert torch.equal(plan.keep[0].permute(2, 0, 1), torch.from_numpy(bits))


@refuses("c8", why="released code ranks the pairs of all sequences of a batch together, so that one changes what another reads")
def batch_together(v: Vectors) -> None:
    regard.get("vmoba", scope="batch")
