"""moba: sequences by themselves and packed, the chosen blocks, and decoding."""

import torch
from golden.choices import chosen
from golden.vectors import Vectors, case, streamed

import regard


@case("c0", "c1", "c2", "c3")
def packed(v: Vectors) -> None:
    lengths, m = v["lens"], regard.get("moba", block_size=v["chunk"], top_k=v["topk"])
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    leaves = list(v.leaves("q", "k", "v").values())
    rows = [x.transpose(0, 1)[None] for x in leaves]
    out = regard.attend(*rows, m, mask=regard.Causal() & regard.Segments(), segments=ids)[0].transpose(0, 1)
    v.same(out, "out")
    for name, grad in zip("qkv", torch.autograd.grad((out * v("w")).sum(), leaves), strict=True):
        v.same(grad, f"d{name}", v.grad)
    parts = list(zip(*(x.detach().split(lengths, 2) for x in rows), strict=True))
    v.same(torch.cat([regard.attend(*part, m) for part in parts], 2)[0].transpose(0, 1), "out")
    want = v("selected").bool()
    found = [torch.nn.functional.pad(keep := chosen(m, q, k)[0], (0, want.shape[-1] - keep.shape[-1])) for q, k, _ in parts]
    assert torch.equal(torch.cat(found, 1), want)
    if len(lengths) == 1:
        steps, _ = streamed(lambda q, k, v_, state: regard.step(q, k, v_, m, state), *parts[0])
        v.same(steps[0].transpose(0, 1), "out")
