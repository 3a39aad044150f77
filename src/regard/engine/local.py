"""Local linear attention: each query's weighted ridge regression, solved by conjugate gradients over blocks of queries.

s_ij = w_ij (1 - z_ij.rho_i) / (omega_i - mu_i.rho_i),  z_ij = k_j - q_i,  (sum_j w_ij z_ij z_ij^T + ridge I) rho_i = mu_i = sum_j w_ij z_ij
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..algebra.local import LocalLinear
from ..algebra.mask import Mask
from ..algebra.score import SquaredDistance
from ..errors import RegardError
from .pairs import visible
from .problem import check_names, sizes_of
from .reference import repeat_heads

Product = Callable[[Tensor], Tensor]


def conjugate_gradients(product: Product, right: Tensor, iterations: int, tolerance: float = 1e-14) -> Tensor:
    """x with product(x) = right for every row (..., D) at once; rows that are done stay."""
    x, residual = torch.zeros_like(right), right
    direction, size = right, right.square().sum(-1, keepdim=True)
    goal = size * tolerance**2 + torch.finfo(right.dtype).tiny
    for _ in range(iterations):
        open_ = size > goal
        if not bool(open_.any()):
            break
        image = product(direction)
        step = torch.where(open_, size / (direction * image).sum(-1, keepdim=True).clamp_min(torch.finfo(right.dtype).tiny), 0.0)
        x, residual = x + step * direction, residual - step * image
        new = residual.square().sum(-1, keepdim=True)
        direction = residual + torch.where(open_, new / size.clamp_min(torch.finfo(right.dtype).tiny), 0.0) * direction
        size = new
    return x


class Correction(torch.autograd.Function):
    """Sigma^-1 r for a residual r that is nearly zero: its value is left out, its gradient is Sigma^-1 g, by the same solver. Added to a
    solution found without gradient it carries the implicit derivative."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, solve: Product) -> Tensor:
        ctx.solve = solve
        return torch.zeros_like(residual)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.solve(grads[0]), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return ctx.solve(tangents[0])  # type: ignore[no-any-return]


def row_block(mechanism: LocalLinear, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """o of some queries (B, H, r, D) over all keys; seen (B, H, r, Lk)."""
    s = scale * q @ k.transpose(-1, -2) if mechanism.kernel == "dot" else -SquaredDistance.apply(q, k) / (2 * mechanism.width**2)
    s = s.masked_fill(~seen, float("-inf"))
    top = s.amax(-1, keepdim=True)  # the ridge is measured in units of the largest weight, so the largest has a gradient
    w = torch.exp(s - torch.where(top.isfinite(), top, 0.0))
    ridge = mechanism.ridge

    def against(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """z_ij.x_i for every pair, without z."""
        return x @ k.transpose(-1, -2) - (x * q).sum(-1, keepdim=True)

    def sigma(x: Tensor, w: Tensor, q: Tensor, k: Tensor) -> Tensor:
        t = w * against(x, q, k)
        return t @ k - t.sum(-1, keepdim=True) * q + ridge * x

    omega = w.sum(-1, keepdim=True)
    mu = w @ k - omega * q
    fixed = [x.detach() for x in (w, q, k)]
    if mechanism.solver == "direct":
        gathered = torch.einsum("bhrj,bhjd,bhje->bhrde", *(fixed[0], fixed[2], fixed[2]))
        mean, centre = (fixed[0] @ fixed[2])[..., None], fixed[1][..., None]
        system = gathered - mean @ centre.mT - centre @ mean.mT + omega.detach()[..., None] * centre @ centre.mT
        system = system + ridge * torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)

        def solve(right: Tensor) -> Tensor:
            return torch.linalg.solve(system, right[..., None])[..., 0]
    else:

        def solve(right: Tensor) -> Tensor:
            return conjugate_gradients(lambda x: sigma(x, *fixed), right, mechanism.iterations)

    with torch.no_grad():
        rho = solve(mu.detach())
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    if forward_mode or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k))):
        rho = rho + Correction.apply(mu - sigma(rho, w, q, k), solve)
    weights = w * (1 - against(rho, q, k))
    divisor = omega - (mu * rho).sum(-1, keepdim=True)
    return (weights @ v) / torch.where(divisor == 0, 1.0, divisor)


def run(
    mechanism: LocalLinear,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float | None,
    given: Mapping[str, Any],
    attend: Callable[..., Tensor],
) -> Tensor:
    sizes = sizes_of(q, k, v)
    of_mask = {item.name: item for part in mask.parts() for item in getattr(part, "inputs", ())}
    check_names(given, {**{item.name: item for item in mechanism.declared}, **of_mask}, mechanism)
    if scale is not None and mechanism.kernel != "dot":
        raise RegardError(f"scale={scale}: the rbf kernel has a width in its place; expected None")
    dtype = v.dtype
    # Where few keys weigh anything the systems are nearly singular: float32 would leave three digits.
    q, k, v = (x.double() for x in (q, repeat_heads(k, sizes.heads), repeat_heads(v, sizes.heads)))
    scale = sizes.head_dim**-0.5 if scale is None else scale
    at = {"b": sizes.batch, "h": sizes.heads, "j": sizes.k_len}
    index = {name: torch.arange(size, device=q.device) for name, size in at.items()}
    b, h, j = index["b"][:, None, None, None], index["h"][:, None, None], index["j"]
    offset, outs = sizes.k_len - sizes.q_len, []
    for start in range(0, sizes.q_len, mechanism.block):
        stop = min(start + mechanism.block, sizes.q_len)
        i = torch.arange(start, stop, device=q.device)[:, None] + offset
        seen = visible(mask, b, h, i, j, {**given, "offset": offset, "k_len": sizes.k_len})
        seen = seen.expand(sizes.batch, sizes.heads, stop - start, sizes.k_len)
        last = stop + offset if mask.causal else sizes.k_len  # keys behind the block's last query are in nobody's sight
        outs.append(row_block(mechanism, q[:, :, start:stop], k[:, :, :last], v[:, :, :last], seen[..., :last], scale))
    return torch.cat(outs, -2).to(dtype)
