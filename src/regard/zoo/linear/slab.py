"""SLAB's simplified linear attention: ReLU features and a plain sum (id 197; Guo et al., 2024).

o_i = relu(q_i) (sum_j relu(k_j) v_j^T) / (relu(q_i).sum_j relu(k_j) + eps) (+ a depthwise convolution of v)
Pretrained models: `convert_norms` puts `PRepBN` where LayerNorm stood; attention by `regard.adapt.patch(model, "slab")` or `regard.adapt.convert`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from regard.adapt.replace import Replaced, Where, replace
from regard.algebra import FeatureMap, Recipe, Recurrent, bind
from regard.algebra.readouts import sum_divided
from regard.catalog.registry import register
from regard.errors import RegardError


@register("slab")
def slab(eps: float = 1e-6) -> Recurrent:
    """The module with positions on keys and the convolution is `regard.nn.GridAttention`; its norm is `regard.nn.PRepBN`."""
    return Recurrent(FeatureMap(torch.relu), readout=bind(sum_divided, eps=eps), scaled=False, recipe=Recipe(rope=False))


class RepBN(nn.Module):
    """BN(x) + eta x over the last dimension of x (..., dim); statistics over all others. In eval the affine map x -> c x + h."""

    def __init__(self, dim: int, eta: float = 1.0, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, eps, momentum)
        self.eta = nn.Parameter(torch.tensor(eta))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.reshape(-1, x.shape[-1])).view_as(x) + self.eta * x  # type: ignore[no-any-return]

    def affine(self) -> tuple[Tensor, Tensor]:
        """(c, h) of eval: c = gamma / sigma + eta, h = beta - mu gamma / sigma."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None and variance is not None
        slope = self.norm.weight / (variance + self.norm.eps).sqrt()
        return slope + self.eta, self.norm.bias - mean * slope

    def folded(self) -> tuple[Tensor, Tensor]:
        """(gamma', beta') of the one BatchNorm that equals it: gamma + eta sigma, beta + eta mu."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None and variance is not None
        return self.norm.weight + self.eta * (variance + self.norm.eps).sqrt(), self.norm.bias + self.eta * mean


class PRepBN(nn.Module):
    """x (..., dim) -> (..., dim): lam LayerNorm + (1 - lam) RepBN in training, RepBN alone in eval and after `steps` steps.

    start: lam at step 0 (1: exactly LayerNorm). warm_up: steps of pure LayerNorm before the descent begins, in which BatchNorm's statistics stand still. A step is a forward pass in
    training. `fuse(linear)` gives the Linear that equals linear(RepBN(x)).
    """

    step_count: Tensor

    def __init__(self, dim: int, steps: int, start: float = 1.0, warm_up: int = 0, eta: float = 1.0):
        super().__init__()
        if steps < 1 or not 0 < start <= 1 or warm_up < 0:
            raise RegardError(f"steps={steps}, start={start}, warm_up={warm_up}: expected steps >= 1, 0 < start <= 1 and warm_up >= 0")
        self.steps, self.start, self.warm_up = steps, start, warm_up
        self.layer, self.rep = nn.LayerNorm(dim), RepBN(dim, eta)
        self.register_buffer("step_count", torch.zeros((), dtype=torch.long))

    @property
    def share(self) -> float:
        """lam at this step."""
        done = int(self.step_count) - self.warm_up
        return 1.0 if done < 0 else max(0.0, self.start * (1 - done / self.steps))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.rep(x)  # type: ignore[no-any-return]
        share, warming = self.share, int(self.step_count) < self.warm_up
        self.step_count += 1
        if warming:
            return self.layer(x)  # type: ignore[no-any-return]
        rep = self.rep(x)  # also at share 1: its running statistics must be ready when it takes over
        return share * self.layer(x) + (1 - share) * rep if share else rep  # type: ignore[no-any-return]

    @torch.no_grad()
    def fuse(self, linear: nn.Linear) -> nn.Linear:
        """W' = W diag(c), b' = b + W h: the norm of eval inside the Linear after it."""
        c, h = self.rep.affine()
        fused = nn.Linear(linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype)
        fused.weight.copy_(linear.weight * c)
        fused.bias.copy_(linear.weight @ h + (0 if linear.bias is None else linear.bias))
        return fused


def convert_norms(model: nn.Module, steps: int, *, start: float = 1.0, warm_up: int = 0, where: Where = nn.LayerNorm) -> Replaced:
    """Every LayerNorm over one dimension of a model becomes a `PRepBN` that begins as it (with start=1, exactly) and lets go of it over `steps` steps of
    training; the result puts the old ones back. where: which norms, as of `regard.adapt.replace`. RegardError: norms over several dimensions."""

    def made(old: nn.Module) -> nn.Module:
        if not isinstance(old, nn.LayerNorm) or len(old.normalized_shape) != 1:
            raise RegardError(f"{type(old).__name__} {getattr(old, 'normalized_shape', '')}: expected LayerNorm over one dimension")
        new = PRepBN(old.normalized_shape[0], steps, start, warm_up)
        new.layer = copy.deepcopy(old)
        with torch.no_grad():
            if old.weight is not None:
                new.rep.norm.weight.copy_(old.weight)
            if old.bias is not None:
                new.rep.norm.bias.copy_(old.bias)
        return new

    return replace(model, where, made)
