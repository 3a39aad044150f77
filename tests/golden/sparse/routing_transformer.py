"""routing-transformer in the forms of both releases: the PyTorch port's output, update and loss, and the TensorFlow code's output."""

import torch
from golden.vectors import Vectors, case

import regard
from regard.zoo.sparse.routing_transformer import commitment_loss, update_centroids


@case("c0", "c1", "c2", "c3", "c4")
def port(v: Vectors) -> None:
    q, value = v.leaf("q"), v.leaf("v")
    k = q if v["shared"] else v.leaf("k")
    means = v("means")
    m = regard.get("routing-transformer", clusters=v["nc"], members=v["w"], shared=v["shared"], form="port")
    memory = {"memory_k": v("mem_key"), "memory_v": v("mem_value")} if v("mem_key").shape[2] else {}
    out = regard.attend(q, k, value, m, mask=regard.Causal() if v["causal"] else None, centroids=means, **memory)
    v.same(out, "out")
    of = {"q": q, "v": value} | ({} if v["shared"] else {"k": k})
    for name, grad in zip(of, torch.autograd.grad((out * v("w")).sum(), list(of.values())), strict=True):
        v.same(grad, f"d{name}")
    others = None if v["shared"] else k.detach()
    v.same(update_centroids(means, q.detach(), others, form="port"), "updated_means")
    both = [q] if v["shared"] else [q, k]
    v.same(sum(commitment_loss(means, x, form="port") for x in both) / len(both), "aux_loss")


@case("tf")
def google(v: Vectors) -> None:
    q = v("q")
    m = regard.get("routing-transformer", clusters=v["nc"], members=v["w"], shared=True, form="google")
    v.same(regard.attend(q, q, v("v"), m, mask=regard.Causal(), centroids=v("means")), "out")
