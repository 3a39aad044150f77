"""psa: level maps from scores, importance of blocks, the cap by similarity, and attention at given levels."""

import torch
from golden.vectors import Vectors, case

import regard
from regard.zoo.sparse.psa import importance, levels_of, similarity_cap


def part(v: Vectors, name: str) -> torch.Tensor:
    x = torch.from_numpy(v.arrays[f"{v.config}_{name}"])
    return (x.to(v.dtype) if x.is_floating_point() else x.long())[None]


@case("A0", "A1", "A2", "A3", "A4")
def level_map(v: Vectors) -> None:
    mode = "topk" if v["mode"] == "topk" else "threshold"
    ranges = tuple((int(level), end) for level, (_, end) in sorted(v["ratios"].items(), key=lambda item: item[1][1]) if level != "0")
    got = levels_of(part(v, "scores"), mode, ranges, v["blocksize"] // v["compute_tile"], v["min_full_attn_ratio"])
    text = -(-v["text_length"] // v["blocksize"])
    want = part(v, "levels")
    if text:  # the last blocks of keys are read in full
        got[..., -text:] = 1
    assert torch.equal(got, want)


@case("B0", "B1")
def scores(v: Vectors) -> None:
    kept, q = v["sampled_per_block"], part(v, "q")
    got = importance(q * q.shape[-1] ** -0.5, part(v, "k"), kept, kept, 0)  # blocks of the sampled tokens alone
    v.same(got / got.sum(-1, keepdim=True), part(v, "importance"), 2e-5)


@case("C")
def cap(v: Vectors) -> None:
    assert torch.equal(similarity_cap(part(v, "k"), v["blocksize"], tuple(v["thresholds"])), part(v, "cap"))


@case("D0", "D1", "D2")
def attention(v: Vectors) -> None:
    m = regard.get("psa", block_size=v["block_m"], causal=v["causal"], tail="repeated")
    mask = regard.Causal() if v["causal"] else None
    out = regard.attend(part(v, "q"), part(v, "k"), part(v, "v"), m, levels=part(v, "levels"), mask=mask)
    v.same(out[:, :, ::4], part(v, "out"), 2e-5)
