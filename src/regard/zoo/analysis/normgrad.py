"""NormGrad and its family: how much each place of a layer contributes to the gradient of its weights (id 72; Rebuffi et al., 2020).

x_u the activation and g_u = d score / d x_u at place u:   virtual identity |g_u| |x_u| (the length of g_u x_u^T, u's part of the gradient of a
1x1 identity convolution put there), gradient max_c |g_uc|, linear approximation <g_u, x_u>, selective |relu(x_u g_u)|,
Grad-CAM relu(sum_c x_uc mean_v g_vc), virtual bias |g_u|, virtual scaling |g_u x_u|;   true layer |d score / d y_u| |patch of its input at u|
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError

Rule = Callable[[Tensor, Tensor], Tensor]

# x, g with channels last, (B, ..., C) -> (B, ...)
RULES: dict[str, Rule] = {
    "normgrad": lambda x, g: g.norm(dim=-1) * x.norm(dim=-1),
    "selective_normgrad": lambda x, g: (x * g).relu().norm(dim=-1),
    "gradient": lambda x, g: g.abs().amax(-1),
    "gradient_x_input": lambda x, g: (g * x).sum(-1).abs(),
    "linear_approximation": lambda x, g: (g * x).sum(-1),
    "grad_cam": lambda x, g: (x * g.flatten(1, -2).mean(1).view(len(g), *[1] * (g.dim() - 2), -1)).sum(-1).relu(),
    "bias": lambda x, g: g.norm(dim=-1),
    "scaling": lambda x, g: (g * x).norm(dim=-1),
}
TRUE = "true_layer"


def module_of(model: nn.Module, layer: str | nn.Module) -> nn.Module:
    found = dict(model.named_modules()).get(layer) if isinstance(layer, str) else layer
    if not isinstance(found, nn.Module) or all(found is not m for m in model.modules()):
        raise RegardError(f"layer={layer!r}; expected a module of the model, or its name in named_modules()")
    return found


def unfolded(z: Tensor, module: nn.Module) -> Tensor:
    """What each output place of a layer reads, channels last: (B, H, W, C k k) of a convolution, z itself of a linear layer."""
    if isinstance(module, nn.Linear):
        return z
    if not isinstance(module, nn.Conv2d) or isinstance(module.padding, str) or module.groups != 1 or module.padding_mode != "zeros":
        kind = type(module).__name__
        raise RegardError(
            f"rule={TRUE!r} and a layer {kind}; expected nn.Linear, or nn.Conv2d of one group with numbers of zeros as padding"
        )
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(z.shape[-2:], module.padding, module.dilation, module.kernel_size, module.stride, strict=True)
    )
    patches = F.unfold(z, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.view(*patches.shape[:2], height, width).movedim(1, -1)


def score_of(out: Any, target: Tensor | int | Callable[[Any], Tensor]) -> Tensor:
    """The sum of the examples' scores: of class `target`, or what the function gives."""
    if callable(target) and not isinstance(target, Tensor):
        return target(out).sum()
    logits = getattr(out, "logits", out)
    if logits.dim() == 4:
        logits = logits.sum((2, 3))
    if logits.dim() != 2:
        raise RegardError(f"the model gives {tuple(logits.shape)}; expected (B, classes), or a target that is a function of the output")
    classes = torch.as_tensor(target, device=logits.device).reshape(-1).expand(len(logits))
    if bool(((classes < 0) | (classes >= logits.shape[1])).any()):
        raise RegardError(f"target={target!r}; expected classes from 0 to {logits.shape[1] - 1}")
    return logits.gather(1, classes[:, None].long()).sum()


@register("normgrad", kind="function")
def saliency(
    model: nn.Module,
    x: Any,
    target: Tensor | int | Callable[[Any], Tensor],
    layer: str | nn.Module,
    rule: str = "normgrad",
    *,
    resize: bool | tuple[int, int] = False,
) -> Tensor:
    """Map of a layer's places: (B, 1, H, W) where it gives (B, C, H, W), (B, T) where it gives tokens (B, T, C), as the projections q, k, v
    and out of attention do.

    x: the model's input, a tensor or a table of arguments. target: class, classes (B,), or a function of the output (B,). rule: "normgrad"
    (virtual identity), "selective_normgrad", "gradient", "gradient_x_input", "linear_approximation", "grad_cam", "bias", "scaling", or
    "true_layer": the layer's own weights in place of an identity, for nn.Linear and nn.Conv2d. resize: grids to the input's size, or to
    (H, W), bilinear. Parameters get no gradient, and need none. RegardError for a layer that is not reached, or not on the way to the score.
    """
    if rule not in (*RULES, TRUE):
        raise RegardError(f"rule={rule!r}; expected one of {', '.join((*RULES, TRUE))}")
    module = module_of(model, layer)
    held: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        leaf = first + torch.zeros_like(first, requires_grad=True) if not first.requires_grad else first * 1.0
        came: Any = args[0] if args else named.get("input", first)  # as nn.Linear and nn.Conv2d call what they read
        held.append((came, leaf))
        return (leaf, *out[1:]) if isinstance(out, tuple) else leaf

    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.enable_grad():
            total = score_of(model(**x) if isinstance(x, Mapping) else model(x), target)
    finally:
        handle.remove()
    if len(held) != 1:
        raise RegardError(f"layer ran {len(held)} times in a pass; expected once")
    came, y = held[0]
    (slope,) = torch.autograd.grad(total, y, allow_unused=True)
    if slope is None:
        raise RegardError("the score does not depend on the layer; expected a layer on the way to it")
    grid = y.dim() == 4 and not isinstance(module, nn.Linear)
    y, slope = ((z.movedim(1, -1) if grid else z).detach() for z in (y, slope))
    if rule == TRUE:
        found = slope.norm(dim=-1) * unfolded(came.detach(), module).norm(dim=-1)
    else:
        found = RULES[rule](y, slope)
    if not grid:
        return found
    found = found[:, None]
    size = (x.shape[-2], x.shape[-1]) if resize is True and isinstance(x, Tensor) else resize
    return F.interpolate(found, size, mode="bilinear", align_corners=False) if isinstance(size, tuple) else found


def combine(maps: Sequence[Tensor], weights: Sequence[float] | str = "uniform", mode: str = "sum") -> Tensor:
    """Maps (B, 1, H, W) of several layers as one, at the size of the largest: each to (m - min) / (max - min) of its example, then
    sum_l w_l m_l (mode "sum") or prod_l m_l^w_l ("product"), weights over their sum. weights: numbers (stand-alone accuracies, say),
    "uniform", or "linear": 1/n, 2/n .. 1. An even map counts as zeros."""
    if mode not in ("sum", "product"):
        raise RegardError(f"mode={mode!r}; expected sum or product")
    named = {"uniform": [1.0] * len(maps), "linear": [(n + 1) / len(maps) for n in range(len(maps))]}
    chosen = named.get(weights, []) if isinstance(weights, str) else [float(w) for w in weights]
    if not maps or len(chosen) != len(maps) or any(w < 0 for w in chosen) or sum(chosen) <= 0:
        raise RegardError(f"weights={weights!r} for {len(maps)} maps; expected as many numbers of at least 0, 'uniform' or 'linear'")
    size = max((m.shape[-2:] for m in maps), key=lambda shape: shape[0] * shape[1])
    total: Tensor | None = None
    for m, w in zip(maps, chosen, strict=True):
        m = F.interpolate(m, tuple(size), mode="bilinear", align_corners=False) if m.shape[-2:] != size else m
        low, high = m.amin((1, 2, 3), keepdim=True), m.amax((1, 2, 3), keepdim=True)
        m = (m - low) / torch.where(high > low, high - low, 1)
        part = w / sum(chosen) * m if mode == "sum" else m ** (w / sum(chosen))
        total = part if total is None else total + part if mode == "sum" else total * part
    assert total is not None
    return total


def class_sensitivity(method: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> Tensor:
    """(B,): the correlation of the maps `method(classes)` for each example's likeliest and least likely class; lower is more sensitive.
    Zero where a map is even."""
    with torch.no_grad():
        logits = model(x)
    first, last = (method(at).flatten(1) for at in (logits.argmax(1), logits.argmin(1)))
    first, last = (m - m.mean(1, keepdim=True) for m in (first, last))
    spread = first.norm(dim=1) * last.norm(dim=1)
    return torch.where(spread > 0, (first * last).sum(1) / spread.clamp_min(torch.finfo(spread.dtype).tiny), 0.0)


def meta_saliency(
    method: Callable[[], Tensor], model: nn.Module, x: Tensor, target: Tensor | int, *, lr: float = 1e-4, negate_loss: bool = False
) -> Tensor:
    """`method()` behind one step of SGD on the cross-entropy of x and target (negate_loss: away from it), in evaluation mode; weights,
    buffers, modes and gradients are afterwards as they were, to the bit."""
    modes = {m: m.training for m in model.modules()}
    kept = {name: t.detach().clone() for name, t in model.state_dict().items()}
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        model.eval().requires_grad_(True)
        with torch.enable_grad():
            logits = model(x)
            classes = torch.as_tensor(target, device=logits.device).reshape(-1).expand(len(logits)).long()
            loss = F.cross_entropy(logits, classes) * (-1 if negate_loss else 1)
        slopes = torch.autograd.grad(loss, list(flags), allow_unused=True)
        with torch.no_grad():
            for p, slope in zip(flags, slopes, strict=True):
                if slope is not None:
                    p.sub_(slope, alpha=lr)
        return method()
    finally:
        with torch.no_grad():
            for name, t in model.state_dict().items():
                t.copy_(kept[name])
        for p, flag in flags.items():
            p.requires_grad_(flag)
        for m, mode in modes.items():
            m.training = mode
