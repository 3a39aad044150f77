"""PyTorch's own fused kernel, for softmax over dot products under no mask, a causal one, one that a tensor of the call gives, or one small
enough to spell out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra.mask import Full, Mask, conjuncts
from ..algebra.part import Input, Sizes
from ..algebra.position_mask import Causal
from ..algebra.token_mask import Explicit, Kept, Padding, Segments
from ..errors import RegardError
from .pairs import indices, visible
from .problem import Problem, fill_inputs, keys_in_sight

SMALL_MASK = 1 << 20  # elements of an explicit mask worth building


def form(mask: Mask, sizes: Sizes) -> str | None:
    """How SDPA expresses a mask: "full", "causal", "explicit", "given" (by tensors of the call), or None when it cannot."""
    if isinstance(mask, Full):
        return "full"
    if isinstance(mask, Causal):
        if sizes.q_len == sizes.k_len:
            return "causal"
        if sizes.q_len == 1:
            return "full"
        if sizes.q_len < sizes.k_len and sizes.q_len * sizes.k_len <= SMALL_MASK:
            return "explicit"  # is_causal would align queries to the first keys, not to the last
        return None
    parts = {type(part) for part in conjuncts(mask)}
    if parts & {Explicit, Kept, Padding, Segments} and parts <= {Explicit, Kept, Padding, Segments, Causal, Full}:
        held = Explicit in parts or parts <= {Padding, Kept, Full} or sizes.q_len == 1
        return "given" if held or sizes.batch * sizes.q_len * sizes.k_len <= SMALL_MASK else None
    return None


def call(q: Tensor, k: Tensor, v: Tensor, how: str, scale: float | None, mask: Tensor | None = None) -> Tensor:
    if how == "explicit":
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(k.shape[-2] - q.shape[-2])
    if scale is not None and scale <= 0:  # its kernels multiply the -inf of a mask by the scale
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q) * q, 1.0)
    options: dict[str, bool] = {}
    if q.shape[1] != k.shape[1]:  # as a branch: the compiler may know sizes as symbols alone
        options["enable_gqa"] = True
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=how == "causal", scale=scale, **options)
    if out.requires_grad and not torch.compiler.is_compiling():
        refuse_second_derivatives(out)
    return out


def given(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    declared: Mapping[str, Input],
    inputs: Mapping[str, Any],
    sizes: Sizes,
    scale: float | None,
) -> Tensor:
    """Softmax under a mask whose tensors come with the call."""
    tensors = fill_inputs(declared, inputs, sizes, q)
    return under(q, k, v, pairs(mask, sizes, tensors, q.device), lambda: keys_in_sight(mask, tensors), scale)


def under(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, in_sight: Callable[[], Tensor | None], scale: float | None) -> Tensor:
    """Softmax under a table. in_sight: keys that some query sees, (B or 1, Lk or 1), or None where that is not known."""
    if not (torch.is_grad_enabled() and (k.requires_grad or v.requires_grad or q.requires_grad)):
        out = call(q, k, v, "given", scale, seen)  # what stands where no query looks matters only if it is no number
        if not bool(out.sum().isnan()):
            return out
    read = in_sight()
    if read is not None and not bool(read.all()):
        k, v = (torch.where(read[:, None, :, None], x, 0.0) for x in (k, v))
    return call(q, k, v, "given", scale, seen)


def table(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None) -> Tensor | None:
    """Softmax under a table of bools, without a plan: decoding asks for it token by token. None: the call is to be looked at."""
    if not (
        seen.dim() == q.dim() == k.dim() == v.dim() == 4
        and seen.device == q.device == k.device == v.device
        and q.dtype == k.dtype == v.dtype
    ):
        return None
    (batch, heads, q_len, dim), (k_batch, kv_heads, k_len, k_dim) = q.shape, k.shape
    fit = batch == k_batch and dim == k_dim and kv_heads and heads % kv_heads == 0 and v.shape[:3] == k.shape[:3]
    if not (fit and batch and q_len and k_len and dim and v.shape[3] and q.is_floating_point()):
        return None
    rows = seen.shape
    if not (rows[0] in (1, batch) and rows[1] in (1, heads) and rows[2] in (1, q_len) and rows[3] in (1, k_len)):
        return None
    return under(q, k, v, seen, lambda: seen.any(2).any(1), scale)


def traced(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor, Tensor, str, Tensor | None] | None:
    """q, k, v, how and mask of a call that torch.compile sees, whose mask may be an object just being made; None: it must be looked at."""
    q_len, k_len = q.shape[-2], k.shape[-2]
    if mask is None or type(mask) is Full:
        return q, k, v, "full", None
    if type(mask) is Causal and (q_len == k_len or q_len == 1):
        return q, k, v, "causal" if q_len > 1 else "full", None
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() <= 4:
        seen = mask[(None,) * (4 - mask.dim())]
        read = seen.any(2).any(1)[:, None, :, None]
        return q, torch.where(read, k, 0.0), torch.where(read, v, 0.0), "given", seen
    return None


def pairs(mask: Mask, sizes: Sizes, tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """(B or 1, H or 1, Lq or 1, Lk) bool."""
    if isinstance(mask, Explicit):
        return tensors["visible"]
    if isinstance(mask, Padding):
        return mask.in_sight(tensors)[:, None, None]
    at = indices(sizes, device)
    at = at if any(isinstance(part, (Kept, Explicit)) for part in conjuncts(mask)) else {**at, "h": at["h"][:1]}
    return visible(mask, at["b"], at["h"], at["i"], at["j"], {**tensors, "offset": sizes.k_len - sizes.q_len, "k_len": sizes.k_len})


def run(problem: Problem) -> Tensor:
    """Prepared q already carries the scale."""
    how = form(problem.mask, problem.sizes)
    assert how is not None
    q, k = problem.q.to(problem.v.dtype), problem.k.to(problem.v.dtype)
    seen = pairs(problem.mask, problem.sizes, problem.inputs, q.device) if how == "given" else None
    return call(q, k, problem.v, how, 1.0, seen)


def refuse_second_derivatives(out: Tensor) -> None:
    """PyTorch's fused kernels have no second derivative, and say so only when it is asked of them, by an internal name."""
    node = out.grad_fn
    if node is None or not type(node).__name__.startswith("ScaledDotProduct"):
        return

    def check(grads: Any) -> None:
        if torch.is_grad_enabled():
            raise RegardError(
                "create_graph=True: the fused softmax kernel has no second derivatives; pass executor='tiled' to attend, or run the "
                "forward pass under torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
            )

    node.register_prehook(check)
