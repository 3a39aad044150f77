"""sparsifiner: masked attention in each of its modes, and the phase that trains the predictor."""

import torch
from golden.vectors import Vectors, case

import regard

PARAMETERS = {
    "qkv": "qkv", "out": "proj", "reduce_q": "mask_predictor.proj_c_q", "reduce_k": "mask_predictor.proj_c_k",
    "down": "mask_predictor.proj_n", "up": "mask_predictor.proj_back_n",
}  # fmt: skip


def layer_of(v: Vectors) -> regard.nn.SparsifinerAttention:
    layer = regard.nn.SparsifinerAttention(
        v["dim"], v["heads"], v["N"], rank=v["N"] // v["rn"], keep=v["keep"], reduction=v["rc"], basis_threshold=v["bth"],
        coefficient_threshold=v["cth"], coefficient_top=v["ctopk"], estimate_threshold=v["ath"] or None,
    ).to(v.dtype)  # fmt: skip
    v.load(layer, PARAMETERS)
    return layer


@case("c0", "c1", "c2", "c3", "c5")
def masked(v: Vectors) -> None:
    layer, x = layer_of(v), v.leaf("x")
    y = layer(x, v("token_mask").bool()) if v.has("token_mask") else layer(x)
    v.same(y, "out")
    v.same(torch.autograd.grad((y * v("w")).sum(), x)[0], "dx", v.grad)
    v.same(layer.estimate, "approx_attn")
    assert torch.equal(layer.mask, v("attn_mask").bool())


@case("c4")
def reconstruction(v: Vectors) -> None:
    layer, x = layer_of(v), v.leaf("x")
    layer.sparse = False
    y = layer(x)
    v.same(y, "out")
    v.same(torch.autograd.grad((y * v("w")).sum(), x)[0], "dx", v.grad)
    q, k, _ = layer.split(x.detach())
    v.same(layer.predict(q, k, thresholds=False), "approx_attn")
    loss = layer.reconstruction(q.detach(), k.detach(), v("teacher"))
    v.same(loss, "recon_loss")
    of = {"proj_n": layer.down, "proj_back_n": layer.up}
    of |= {f"proj_c_{n}.{p}": getattr(m, p) for n, m in (("q", layer.reduce_q), ("k", layer.reduce_k)) for p in ("weight", "bias")}
    for name, grad in zip(of, torch.autograd.grad(loss, list(of.values())), strict=True):
        v.same(grad, f"d_mask_predictor.{name}")
