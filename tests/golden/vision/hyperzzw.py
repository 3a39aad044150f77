"""HyperZ.Z.W's parts: slow nets, the local branch, gates, standardisation and losses."""

from __future__ import annotations

import numpy as np
import torch
from golden.vectors import Vectors, case

from regard.nn.images.hyper_kernels import GroupedStandard, RecursiveGate, SlowNet
from regard.zoo.vision.hyperzzw import HyperChannel, HyperInteract, HyperZZWLocal, slow_loss, terminator_loss

KERNEL = ((r"filters\.(\d)", r"filters.\1.linear"), (r"\blast", "output_linear"), (r"\bplace", "bias_p"), (r"\breduce", "fast_reduce"))
KERNEL += ((r"\bfc", "fast_fc1"), (r"\bfast\.", "fast_linears_x."))


@case("k0")
def slow_net(g: Vectors) -> None:
    made = SlowNet(g["out"], g["shape"], g["hidden"]).to(g.dtype)
    parameters = g.fill(made, ("^", "Kernel."), *KERNEL)
    out = made()[None]
    g.same(out, "out")
    g.gradients(g.weigh(out), parameters)


@case("l0")
def local(g: Vectors) -> None:
    made = HyperZZWLocal(g["channels"], g["kernel"], g["hidden"]).to(g.dtype)
    g.arrays |= {"kept": np.ones(made.net.kept.shape), "unit": np.full(made.net.unit.shape, 0.1)}
    names = (("mix", "local_conv.channel_mixer"), (r"^bias", "fast_bias"), (r"net\.(kept|unit)", r"\1"), (r"^net\.", "slow_net.Kernel."))
    parameters, leaves = g.fill(made, *names, *KERNEL, ("bias_p", "bias_pk")), g.leaves("x1", "x2")
    out = made(**leaves)
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves | parameters)


@case("i0")
def interact(g: Vectors) -> None:
    made = HyperInteract(g["channels"], g["side"], g["hidden"], g["hidden_pixels"]).to(g.dtype)
    names = ((r"over_channels\.net", "slow_net_gc.Kernel"), ("over_pixels", "slow_net_gs.Kernel"), *KERNEL)
    g.fill(made, *names)
    leaves = g.leaves("y", "x")
    out = made(leaves["y"], leaves["x"])
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves)


@case("c0")
def over_channels(g: Vectors) -> None:
    made = HyperChannel(g["channels"], g["hidden"]).to(g.dtype)
    g.fill(made, (r"^net", "slow_net_gc.Kernel"), *KERNEL)
    g.layer(lambda x: x * torch.sigmoid(made(x)))


@case("r0")
def recursive_gate(g: Vectors) -> None:
    made = RecursiveGate(g["channels"], g["side"]).to(g.dtype)
    g.layer(made, **g.fill(made, (r"^([kvqy])\.", r"fast_linear_\1."), ("place", "bias_p")))


@case("g0")
def standard(g: Vectors) -> None:
    g.layer(GroupedStandard(g["channels"], g["groups"]))


@case("s0")
def kernels_loss(g: Vectors) -> None:
    leaves = g.leaves("a", "bb", "c")
    loss = slow_loss(list(leaves.values()), g["factors"])
    g.same(loss, "out")
    g.gradients(g.weigh(loss), leaves)


@case("s1")
def smoothed(g: Vectors) -> None:
    logits = g.leaf("logits")
    loss = terminator_loss(logits, torch.tensor([0, 2]), logits.new_zeros(()))
    g.same(loss, "out")
    g.gradients(g.weigh(loss), {"logits": logits})
