"""A model's gradient as one vector."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.zoo.softmax.variational_attention import LatentAlignment


def gradient(model: LatentAlignment, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(model.parameters(), found, strict=True)])
