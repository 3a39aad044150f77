"""ssa: both streams in training and evaluation, their distance and its gradients, and the chosen blocks."""

import torch
from golden.choices import chosen
from golden.vectors import Vectors, case

import regard


def layer_of(v: Vectors) -> regard.nn.SSAAttention:
    layer = regard.nn.SSAAttention(12, v["H"], v["Hk"], head_dim=v["D"], block_size=v["bs"], top_k=v["S"]).to(v.dtype)
    for into, name in ((layer.q, "q_proj"), (layer.k, "k_proj"), (layer.v, "v_proj"), (layer.out, "o_proj")):
        v.put(into.weight, f"{name}.weight")
        if into.bias is not None:
            v.put(into.bias, torch.zeros_like(into.bias))
    v.put(layer.head_gate.weight, v("g_proj.weight").unflatten(0, (v["H"], 3))[:, 1])  # of three gates the middle one is this stream's
    if layer.head_gate.bias is not None:
        v.put(layer.head_gate.bias, torch.zeros_like(layer.head_gate.bias))
    return layer


@case("c0", "c1", "c2")
def streams(v: Vectors) -> None:
    for mode in ("full", "sparse"):
        for training in (True, False):
            layer, x = layer_of(v).train(training), v.leaf("x")
            layer.use(mode)
            y = layer(x)
            v.same(y, f"out_{mode}")
            v.same(torch.autograd.grad((y * v("w")).sum(), x)[0], f"dx_{mode}", v.grad)


@case("c0", "c1", "c2")
def distance(v: Vectors) -> None:
    layer, x = layer_of(v).train(), v.leaf("x")
    layer(x)
    v.same(layer.distance, "align_loss")
    of = {"dx_align": x} | {f"dalign_{name}_proj.weight": getattr(layer, name).weight for name in "qkv"}
    grads = torch.autograd.grad(layer.distance, [*of.values(), layer.head_gate.weight])
    for name, grad in zip(of, grads, strict=False):
        v.same(grad, name, v.grad)
    v.same(grads[-1], v("dalign_g_proj.weight").unflatten(0, (v["H"], 3))[:, 1], v.grad)
    q, k, _, _ = layer.heads_of(x, x, 0, None)
    want = v("selected").bool()
    if v["S"] >= want.shape[-1]:  # everything is read
        own = torch.arange(x.shape[1])[:, None, None] // v["bs"]
        assert torch.equal(want, (torch.arange(want.shape[-1]) <= own).expand_as(want))
        return
    keep = chosen(layer.sparse, q.detach(), k.detach())[0, :: v["H"] // v["Hk"]].transpose(0, 1)
    assert torch.equal(keep.reshape(want.shape), want)
