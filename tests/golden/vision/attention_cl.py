"""Attention-CL: the pooling over frames, and the losses."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case
from torch import Tensor

from regard.nn.retrieval import CentreLoss, triplet_batch_hard
from regard.zoo.vision.attention_cl import OSMCAALoss, TemporalAttentionPool


@case("p0", "p1")
def pool(g: Vectors) -> None:
    made = TemporalAttentionPool(4, 3, (3, 2), g["kind"]).to(g.dtype)
    parameters = g.fill(made, ("^conv", "attention_conv"), ("over_time", "attention_tconv"))
    g.layer(lambda x: made(x)[0], **parameters)


def loss(g: Vectors, value: Tensor, leaves: dict[str, Tensor]) -> None:
    g.same(value, "out")
    g.gradients(g.weigh(value), leaves)


@case("o0", "o1")
def mining(g: Vectors) -> None:
    leaves = g.leaves("x", "vectors")
    loss(g, OSMCAALoss(g["alpha"], g["share"], g["sigma"])(leaves["x"], torch.tensor(g["labels"]), leaves["vectors"]), leaves)


@case("c0")
def centres(g: Vectors) -> None:
    made, leaves = CentreLoss(3, 5).to(g.dtype), g.leaves("x")
    leaves |= g.fill(made, ("centres", "centers"))
    loss(g, made(leaves["x"], torch.tensor(g["labels"])), leaves)


@case("t0", "t1")
def triplets(g: Vectors) -> None:
    leaves = g.leaves("x")
    loss(g, triplet_batch_hard(leaves["x"], torch.tensor(g["labels"]), 0.3, g["metric"] == "cosine"), leaves)
