"""longheads: a prompt, then tokens. Prompt queries read their own key, as the paper's form does; the released prompt stops before it."""

import torch
from golden.vectors import Vectors, case

from regard.zoo.sparse.longheads import LongHeads, LongHeadsCache


@case("c0", "c1", "c2")
@torch.no_grad()
def prompt_and_tokens(v: Vectors) -> None:
    policy = LongHeads(v["w"], v["A"], released=True)
    length, w = v["L"], v["w"]
    q, k, value = ((v("x") @ v(f"{n}_proj.weight").T).unflatten(-1, (v["H"], -1)).transpose(1, 2) for n in "qkv")
    head = [x[:, :, :length] for x in (q, k, value)]
    out, whole, keys = [policy.prefill(*head)], length // w * w, policy.chunk_keys(*head)
    cache = LongHeadsCache(None, head[1], head[2], head[0][:, :, whole:] if whole < length else None, [keys] if keys.shape[2] else [])
    for t in range(length, length + v["dec"]):
        o, cache = policy.step(*(x[:, :, t : t + 1] for x in (q, k, value)), cache)
        out.append(o)
    y = torch.cat(out, 2).transpose(1, 2).flatten(-2) @ v("o_proj.weight").T
    v.same(y[:, :length], v("out_with_own_key")[:, :length])
    v.same(y[:, length:], v("out")[:, length:])
    v.same(torch.cat(cache.chunk_keys, 2)[0] if cache.chunk_keys else keys[0], "chunk_keys")
    if length > v["A"]:
        ids = policy.select(q[:, :, v["A"] : length], keys, v["A"])[0]
        assert torch.equal(ids, v("selected").long()[:, v["A"] : length])
