"""A recurrent call made canonical: features, log decays, write strengths and values, all (B, H, L, .) in at least float32."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...algebra.mask import Causal, Full, Mask, Padding, conjuncts
from ...algebra.mechanism import Recurrent
from ...algebra.part import Input, Sizes
from ...errors import RegardError
from ..problem import check_names, fill_inputs, sizes_of
from ..reference import repeat_heads

CLAMP = -200.0  # exp(-200) is zero in float32 and below any tolerance in float64, while sums of it stay finite


@dataclass
class Scan:
    """S_t = exp(decay_t) o S_{t-1} + write, o_t = q_t S_t. decay: None, (B|1, H, L|1, 1) or (B, H, L, F), logs; beta: None or (B, H, L, 1)."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    causal: bool
    summed: bool  # the last channel of v is 1 and divides the others
    eps: float

    @property
    def length(self) -> int:
        return self.k.shape[-2]

    def finish(self, o: Tensor) -> Tensor:
        """Divide by the mass where the readout asks for it."""
        return o[..., :-1] / o[..., -1:].clamp_min(self.eps) if self.summed else o


@functools.lru_cache(maxsize=1024)
def declared_of(mechanism: Recurrent) -> dict[str, Input]:
    """All inputs of a recurrence, its decay and write strength included."""
    found = {item.name: item for item in mechanism.declared}
    shapes = {"head": "h", "token": "bhk", "channel": "bhkf"}
    if mechanism.decay in shapes:
        found.setdefault("log_decay", Input("log_decay", shapes[mechanism.decay]))
    if mechanism.write == "delta":
        found.setdefault("beta", Input("beta", "bhk"))
    return found


def check_mask(mechanism: Recurrent, mask: Mask) -> bool:
    """Whether the call is causal; a recurrence knows no other masks than Full, Causal and Padding."""
    parts = conjuncts(mask)
    if not all(isinstance(part, (Full, Causal, Padding)) for part in parts):
        raise RegardError(f"mask={mask!r}: a recurrence keeps one running state, so it runs under Causal(), Padding(), both or no mask")
    return mechanism.causal_only or any(isinstance(part, Causal) for part in parts)


def kept_keys(mask: Mask, given: Mapping[str, Any], sizes: Sizes) -> tuple[Tensor | None, dict[str, Any]]:
    """(B, Lk) bool of keys that are no padding, or None; and the inputs that are not the mask's."""
    specs = [item for part in mask.parts() for item in getattr(part, "inputs", ())]
    if not specs:
        return None, dict(given)
    keep = given.get(specs[0].name)
    if not isinstance(keep, Tensor):
        raise RegardError(f"mask={mask!r} needs the input {specs[0].name!r}, a bool tensor (B, Lk)")
    specs[0].check(keep, sizes)
    return keep, {name: x for name, x in given.items() if name != specs[0].name}


def visible_tokens(at: Tensor, q_at: Tensor, keep: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """How many keys each query sees, and how many tokens there are up to each key, itself included (all of them when not causal):
    (B or 1, 1, L, 1). Tokens before a stream's first count, as there is no padding in a stream."""
    every = (at + 1)[None] if keep is None else keep.cumsum(-1)
    every = (every if causal else every[:, -1:]).clamp_min(1)[:, None, :, None]
    return (every[:, :, at.numel() - q_at.numel() :] if causal else every), every


def pose(
    mechanism: Recurrent,
    mask: Mask,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    given: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    first: int = 0,
) -> Scan:
    """Check and prepare a recurrent call; `first` is the absolute position of the first key (in a stream)."""
    sizes = sizes_of(q, k, v)
    causal = check_mask(mechanism, mask)
    if causal and sizes.q_len > sizes.k_len:
        raise RegardError(f"{sizes.q_len} queries but {sizes.k_len} keys: a causal recurrence needs a key for every query")
    if scale is not None and not mechanism.scaled:
        raise RegardError(f"scale={scale}: this mechanism's feature map fixes its own scale; expected None")
    wide = dtype or torch.promote_types(q.dtype, torch.float32)
    keep, given = kept_keys(mask, given, sizes)
    declared = declared_of(mechanism)
    check_names(given, declared, mechanism)
    inputs = {name: x.to(wide) if x.is_floating_point() else x for name, x in fill_inputs(declared, given, sizes, q).items()}
    q, k, v = (x.to(wide) for x in (q, k, v))
    if mechanism.scaled:
        q = q * (sizes.head_dim**-0.5 if scale is None else scale)
    at = torch.arange(sizes.k_len, device=q.device) + first
    q_at = at[sizes.k_len - sizes.q_len :] if causal else torch.arange(sizes.q_len, device=q.device)
    k = repeat_heads(k, sizes.heads)
    # Feature maps see shapes of their own: per-head inputs come as (H,), not in elementwise form.
    plain = {
        name: x.reshape(x.shape[1]) if declared[name].shape == "h" else x.reshape(()) if declared[name].shape == "" else x
        for name, x in inputs.items()
    }
    plain = {name: x.expand(sizes.heads) if declared[name].shape == "h" else x for name, x in plain.items()}
    if keep is not None:  # what stands in padding, NaN even, must reach nothing
        k, v = (torch.where(keep[:, None, :, None], x, 0.0) for x in (k, v))
    seen = visible_tokens(at, q_at, keep, causal)
    q, k = mechanism.feature(q, k, {**plain, "position": q_at, "n": seen[0]}, {**plain, "position": at, "n": seen[1]})
    k = k if keep is None else k * keep[:, None, :, None]
    v = repeat_heads(v, sizes.heads)
    if mechanism.readout == "sum":
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    if causal and q.shape[-2] < k.shape[-2]:
        q = torch.cat((q.new_zeros(*q.shape[:-2], k.shape[-2] - q.shape[-2], q.shape[-1]), q), -2)
    decay, beta = inputs.get("log_decay"), inputs.get("beta")
    if decay is not None:
        decay = decay.transpose(-1, -2) if declared["log_decay"].shape == "bhk" else decay
        if mechanism.decay == "channel" and decay.shape[-1] not in (1, k.shape[-1]):
            raise RegardError(f"input 'log_decay' has {decay.shape[-1]} channels; expected {k.shape[-1]}, one for each feature of k")
        if bool((decay > 0).any()):
            raise RegardError(f"input 'log_decay' has entries up to {float(decay.max()):.3g}; expected logs of decays, all <= 0")
        decay = decay.clamp_min(CLAMP)
        if keep is not None and declared["log_decay"].shape != "h":  # nothing fades while padding passes
            decay = decay * keep[:, None, :, None]
        if decay.shape[-2] != 1 or mechanism.decay == "channel":
            decay = decay.expand(sizes.batch, sizes.heads, sizes.k_len, k.shape[-1] if mechanism.decay == "channel" else 1)
    if beta is not None:
        beta = beta.transpose(-1, -2).expand(sizes.batch, sizes.heads, sizes.k_len, 1)
        if mechanism.decay == "channel":
            raise RegardError("write='delta' with decay='channel' is not available; use decay='none', 'head' or 'token'")
    return Scan(q, k, v, decay, beta, causal, mechanism.readout == "sum", mechanism.eps)
