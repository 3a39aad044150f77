"""dhsa: the predictor of borders, its labels and loss, the choice of borders, and attention. Tokens of a chunk share a score, and released code
breaks such ties as it comes: sets agree up to tokens of a chunk, outputs where the sets are the same."""

import torch
from golden.choices import chosen
from golden.vectors import Vectors, case

import regard
from regard.zoo.sparse.dhsa import BoundaryPredictor, boundary_loss, choose_boundaries, mass_ratio


def array(v: Vectors, name: str) -> torch.Tensor:
    x = torch.from_numpy(v.arrays[name])
    return x.to(v.dtype) if x.is_floating_point() else x


@case("A")
def predictor(v: Vectors) -> None:
    made = BoundaryPredictor(v["channel_in"], v["window"], v["d_h"], inner=v["d_in"]).to(v.dtype)
    assert made.depth is not None
    for module, name in ((made.depth, "enc.0"), (made.point, "enc.2"), (made.mlp[0], "mlp.0"), (made.mlp[2], "mlp.2")):
        for part in ("weight", "bias"):
            into = getattr(module, part)
            v.put(into, array(v, f"A_{name}.{part}").reshape(into.shape))
    v.same(made(array(v, "A_x").transpose(1, 2)), array(v, "A_logits"))


@case("B")
def labels_and_loss(v: Vectors) -> None:
    logits = array(v, "B_logits").requires_grad_()
    loss = boundary_loss(logits, array(v, "B_ratio"), array(v, "B_mask"))
    v.same(loss, array(v, "B_loss"))
    v.same(torch.autograd.grad(loss, logits)[0], array(v, "B_dlogits"))
    ratio = mass_ratio(array(v, "B_attn")[None, None], 4)[0]
    v.same(ratio[7:32], array(v, "B_ratios")[7:32])  # released code gives 0 at both ends


@case("B_nms0", "B_nms1", "B_nms2", dtypes=(torch.float64,))
def borders(v: Vectors) -> None:
    scores = array(v, "B_scores")[None]
    starts = choose_boundaries(scores, v["theta"], v["topk"], distance=v["nms"] + 1, instruction=v["instruction_tokens"])[0]
    want = torch.zeros_like(starts)
    want[array(v, v.config).long() + 1] = True
    want[0] = True  # the first token always starts a chunk
    assert torch.equal(starts, want)


@case("C0", "C1", "C2", "C3", "C4")
def attention(v: Vectors) -> None:
    q, k, value = (v(name)[None] for name in "qkv")
    length, size, last = v["L"], v["bs"], v["ins"] or 0
    starts = torch.zeros(1, length, dtype=v.dtype)
    starts[0, v["bnd"][:-1]] = 1
    pool = {"avgpool_norm": "norm", "avgpool": "mean", "maxpool": "max"}[v["pool"]]
    options = {"budget": v["bud"], "block_size": size, "local": v["loc"], "dense_last": last, "pool": pool, "window": v["sw"]}
    m = regard.get("dhsa", first=v["glob"], **options)
    out = regard.attend(q, k, value, m, starts=starts)[0]
    if v["bud"] >= length:
        v.same(out, "out")
        return
    rows = torch.arange(length - last)
    place = torch.arange(length)
    choice = chosen(m, q, k, starts=starts)[0, 0]
    keep = choice.repeat_interleave(-(-length // choice.shape[0]) if not last else length // choice.shape[0], 0)[: length - last]
    blocks, want = rows // size, v("topk_indices").long()
    listed = torch.zeros(len(want), length, dtype=torch.bool).scatter_(-1, want, True)[blocks]
    visible = place <= rows[:, None] if v["sw"] is None else (place <= rows[:, None]) & (place >= rows[:, None] - v["sw"])
    keep, listed = keep & visible, listed & visible
    chunk = torch.bucketize(place, torch.tensor(v["bnd"][1:]), right=True)
    if not v["glob"]:
        counts = [torch.zeros(len(rows), len(v["bnd"]) - 1).index_add_(1, chunk, x.float()) for x in (keep, listed)]
        ends = torch.zeros(len(rows), dtype=torch.bool).index_fill_(0, rows[rows % size == size - 1], True)
        assert torch.equal(counts[0][ends], counts[1][ends])  # whole lists are visible to the last query of a block
    same = (keep == listed).all(-1)
    if v["glob"]:  # early blocks list a token several times, which then weighs as often
        same &= (blocks + 1) * size > v["glob"]
    assert int(same.sum()) >= len(rows) // 3
    v.same(out[:, : length - last][:, same], v("out")[:, : length - last][:, same])
    if last:
        v.same(out[:, -last:], v("out")[:, -last:])
