"""dma: the layer with its step, and masks from given biases. A single mask for all rows reads the future: refused."""

import torch
from golden.vectors import Vectors, case, refuses, stepped

import regard
from regard.zoo.sparse.dma import kept, positive_lifetimes, smoothed, top_lifetimes

NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj", "dt": "dt_proj", "q_norm": "q_norm", "k_norm": "k_norm"}


@case("c0", "c1", "c2", "c3", dtypes=(torch.float64,))
def layer(v: Vectors) -> None:
    x = v.leaf("x")
    made = regard.nn.DynamicMaskAttention(x.shape[-1], v["H"], v["Hk"], window=v["w"], bias=v["form"], head_dim=v["D"], dt_bias=False).to(
        v.dtype
    )
    v.load(made, {**NAMES, "strength": "A"})
    y = made(x)
    v.same(y, "out")
    of = {"dx": x, "d_A": made.strength, "d_dt_proj.weight": made.dt.weight}
    for name, grad in zip(of, torch.autograd.grad((y * v("w")).sum(), list(of.values())), strict=True):
        v.same(grad, name)
    bias = made.heads_of(x, 0)[3]
    v.same(bias, "bias")
    assert torch.equal(kept(top_lifetimes(bias, v["w"])), v("kept").bool())
    v.same(stepped(made, x.detach())[0], "out")


@case("m0", "m1", "m3", "m4", dtypes=(torch.float64,))
def masks(v: Vectors) -> None:
    bias, want = v("bias")[None], v("mask").bool()
    keep = kept(top_lifetimes(bias, v["w"]) if v["type"] == "topk" else positive_lifetimes(bias))
    keep = smoothed(keep, v["bs"]) if v["bs"] else keep
    causal = torch.ones_like(want[0]).tril()  # released smoothing shows keys of the diagonal's block, which its kernel hides again
    assert torch.equal(keep[0], want & causal)


@refuses("m2", why="one choice of keys for all rows depends on tokens to come")
def one_mask_for_all_rows(v: Vectors) -> None:
    regard.nn.DynamicMaskAttention(8, 1, mask="global")
