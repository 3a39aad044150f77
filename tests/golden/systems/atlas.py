"""aTLAS: coefficients a block, one a vector, in groups, and linearised."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case
from torch import nn

from regard.adapt.task_vectors import TaskVectors
from regard.zoo.systems.atlas import Atlas


@case("c0", "c1", "c2", "l0")
def composed(g: Vectors) -> None:
    nets = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(g.dtype) for _ in range(3)]
    for at, net in enumerate(nets):
        g.load(net, {str(n): f"n{at}.{n}" for n in (0, 2)})
    groups = {tuple(p.shape): g(f"groups.{'x'.join(map(str, p.shape))}") for p in nets[0].parameters()} if g["partition"] else None
    made = Atlas(nets[0], TaskVectors(nets[0], nets[1:]), g["partition"], g["isotropic"], bool(g.get("linearised")), groups).to(g.dtype)
    with torch.no_grad():
        made.coefficients.copy_(g("coef"))
    g.layer(made, coef=made.coefficients)
