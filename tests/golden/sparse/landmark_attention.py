"""landmark-attention: the layer with landmarks in place and anywhere, and cached inference with released places and shared choices."""

import torch
from golden.vectors import Vectors, case

import regard
from regard.zoo.sparse.landmark_attention import grouped_softmax, placed_softmax


def layer_of(v: Vectors, **options: object) -> regard.nn.LandmarkAttention:
    biased = v.has("c_attn.bias")
    layer = regard.nn.LandmarkAttention(v["H"] * v["D"], v["H"], block=7, bias=biased, **options).to(v.dtype)
    v.load(layer, {"qkv": "c_attn", "out": "c_proj"})
    return layer


@case("c0", "c1")
def training(v: Vectors) -> None:
    layer, x = layer_of(v, rope=False), v.leaf("x")
    landmarks = v("is_mem").bool()
    for given in (landmarks, None) if v.config == "c0" else (landmarks,):
        y = layer(x, given)
        v.same(y, "out")
        grads = torch.autograd.grad((y * v("w")).sum(), [x, layer.qkv.weight])
        v.same(grads[0], "dx", v.grad)
        v.same(grads[1], "d_c_attn.weight", v.grad)
        q, k, _ = layer.split(x)
        s = q @ k.transpose(-1, -2) * v["D"] ** -0.5
        v.same(grouped_softmax(s, 7) if given is None else placed_softmax(s, given), "weights", 1e-6)  # stored to that precision


@case("c2", "c3", "c4", "c5", "c6")
@torch.no_grad()
def cached(v: Vectors) -> None:
    kind = {"per_token_and_head": "token_and_head", "max_over_heads": "heads", "max_over_tokens": "tokens"}[v["cache_selection_method"]]
    rope = regard.Rope(interleaved=True)
    layer = layer_of(v, rope=rope, top_blocks=v["cache_topk"], places="front", selection=kind)
    x, first = v("x"), v["prefix_tokens"]
    _, cache = layer.step(x[:, :first])
    y, cache = layer.step(x[:, first:], cache)
    v.same(y, "out")
    q, k, _ = layer.split(x)
    found = layer.chosen(q[:, :, first:], k, first, v["cached_blocks"])
    assert found is not None
    assert torch.equal(found[0].expand(-1, v["new_tokens"], -1), v("selected_blocks").long())
    assert cache.length == x.shape[1]
