"""seerattention: the gate and its loss, the blocks a layer reads in both modes, and the maxima it learns from."""

import re

import torch
from golden.choices import chosen
from golden.vectors import Vectors, case

import regard
from regard.zoo.sparse import seerattention as seer

POOLS = {
    "Qavg_Kmaxminavg": (("avg",), ("max", "min", "avg")),
    "Qavg_Kavg": (("avg",), ("avg",)),
    "Qmaxavg_Kmin": (("max", "avg"), ("min",)),
}


def layer_of(v: Vectors, **options: object) -> regard.nn.SeerAttention:
    q_pools, k_pools = POOLS[v["cls"]]
    layer = regard.nn.SeerAttention(
        v["Hq"], v["Hk"], v["D"], width=v["hid"], block_size=v["b"], rope=v["rope"], q_pools=q_pools, k_pools=k_pools,
        map_q=v.has("mask_linear_q.weight"), **options,
    ).to(v.dtype)  # fmt: skip
    v.put(layer.gate.k, "mask_linear_k.weight")
    if layer.gate.q is not None:
        v.put(layer.gate.q, "mask_linear_q.weight")
    return layer


@case("c0", "c1", "c2", "c3")
def gate(v: Vectors) -> None:
    q, k = (v(name).transpose(0, 1)[None] for name in "qk")
    gate = layer_of(v).gate
    logits = gate(q, k)
    v.same(torch.where(torch.isfinite(logits), logits, 0.0)[0], "logits_lower")
    v.same(logits.softmax(-1)[0], "score")
    loss = seer.gate_loss(logits, v("gt")[None])
    v.same(loss, "kl_loss")
    parameters = {"k": gate.k} | ({} if gate.q is None else {"q": gate.q})
    for name, grad in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
        v.same(grad, f"d_mask_linear_{name}.weight")


@case("c0", "c1", "c2", "c3")
def blocks(v: Vectors) -> None:
    q, k = (v(name).transpose(0, 1)[None] for name in "qk")
    kinds = [found for key in v.arrays if (found := re.fullmatch(rf"mask_(nz|thr)([\d.]+)(?:_last(\d))?_{v.config}", key))]
    assert kinds or v.config == "c3"
    for kind in kinds:
        name, number, last = kind.groups()
        options = {"ratio": float(number), "last_dense": 2 * int(last)} if name == "nz" else {"threshold": float(number)}
        layer = layer_of(v, **options)
        given = {"gate": layer.gate(q, k).detach(), "size": v["b"], "threshold": layer.threshold, "ratio": layer.ratio or 0.0}
        keep = chosen(seer.GATED, *layer.rotated(q, k), **given, last_dense=layer.last_dense)
        assert torch.equal(keep[0], torch.from_numpy(v.arrays[kind[0]])), kind[0]
        place = torch.arange(k.shape[2])
        seen = keep[:, :, place // v["b"]][..., place // v["b"]] & (place <= place[:, None])
        turned = layer.rotated(q, k)
        v.same(layer(q, k, k), regard.attend(*turned, k, mask=seen))


def maxima(v: Vectors, causal: bool) -> torch.Tensor:
    q, k = (torch.from_numpy(v.arrays[f"GT_{name}"]).to(v.dtype)[None] for name in "qk")
    return seer.block_maxima(q, k, v.meta["hyper"]["GT"]["block"], causal=causal)[0]


@case("GT")
def maxima_of_blocks(v: Vectors) -> None:
    v.same(maxima(v, True), torch.from_numpy(v.arrays["GT0_map"]), 1e-5)
    v.same(maxima(v, False), torch.from_numpy(v.arrays["GT1_map"]), 1e-5)
