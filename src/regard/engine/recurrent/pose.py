"""A recurrent call made canonical: features, log decays, write strengths and values, all (B, H, L, .) in at least float32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...algebra.feature_map import FeatureMap
from ...algebra.mask import Full, Mask, conjuncts
from ...algebra.mechanism import Recurrent
from ...algebra.part import Function, Input, Sizes, bind, call
from ...algebra.position_mask import Causal
from ...algebra.snapshot import remembered
from ...algebra.token_mask import Padding
from ...errors import RegardError
from ..exported import holds
from ..problem import check_names, fill_inputs, sizes_of
from ..reference import repeat_heads

CLAMP = -200.0  # exp(-200) is zero in float32 and below any tolerance in float64, while sums of it stay finite


Carry = tuple[Any, Tensor | None]


@dataclass
class Lift:
    """Wide features, made when they are needed: query and key map x (..., L, D) -> (..., L, F), kernel (q.k) -> the weight of a pair."""

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    kernel: Callable[[Tensor], Tensor]


@dataclass
class Scan:
    """S_t = exp(decay_t) o S_{t-1} + write, o_t = q_t S_t. decay: None, (B|1, H, L|1, 1) or (B, H, L, F), logs; beta: None or (B, H, L, 1).
    low: None, or a and b (B, H, L, F) of a transition diagonal plus low rank, exp(decay_t) o S + b_t (a_t^T S).

    read: o and its moments -> the output. ones: the last channel of v is 1, so that o's last is the mass. mean: the last feature of k
    is 1 (and of q 0), so that the state's last row sums the values. apart: features of q and k whose products make the mass, where
    those of the numerator are turned. count: visible keys a query. carry: what a stream must know beside the state: a
    feature map's own sums, and what logits of keys were divided by at the last token. lift: q and k are not features yet; these are
    their maps, and the weight of a pair as a function of q.k.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    causal: bool
    read: Callable[..., Tensor] | None = None
    ones: bool = False
    mean: bool = False
    apart: tuple[Tensor, Tensor] | None = None
    count: Tensor | None = None
    carry: Carry | None = None
    lift: Lift | None = None
    low: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        return self.k.shape[-2]


@remembered(maxsize=1024)
def declared_of(mechanism: Recurrent) -> dict[str, Input]:
    """All inputs of a recurrence, its decay and write strength included."""
    found = {item.name: item for item in mechanism.declared}
    shapes = {"head": "h", "token": "bhk", "channel": "bhkf"}
    if mechanism.decay in shapes:
        found.setdefault("log_decay", Input("log_decay", shapes[mechanism.decay]))
    if mechanism.write == "delta":
        found.setdefault("beta", Input("beta", "bhk"))
    if mechanism.write == "dplr":
        for name in ("erase", "insert"):
            found.setdefault(name, Input(name, "bhkf"))
    return found


def check_mask(mechanism: Recurrent, mask: Mask) -> bool:
    """Whether the call is causal; a recurrence knows no other masks than Full, Causal and Padding."""
    parts = conjuncts(mask)
    if not all(isinstance(part, (Full, Causal, Padding)) for part in parts):
        raise RegardError(f"mask={mask!r}: a recurrence keeps one running state, so it runs under Causal(), Padding(), both or no mask")
    return mechanism.causal_only or any(isinstance(part, Causal) for part in parts)


def kept_keys(mask: Mask, given: Mapping[str, Any], sizes: Sizes, first: int = 0) -> tuple[Tensor | None, dict[str, Any]]:
    """(B, first + Lk) bool of keys that are no padding, those before a stream's piece included, or None; and the inputs that are not the mask's."""
    specs = [item for part in mask.parts() for item in getattr(part, "inputs", ())]
    if not specs:
        return None, dict(given)
    keep = given.get(specs[0].name)
    if not isinstance(keep, Tensor):
        raise RegardError(f"mask={mask!r} needs the input {specs[0].name!r}, a bool tensor (B, Lk)")
    specs[0].check(keep, replace(sizes, k_len=first + sizes.k_len))
    return keep, {name: x for name, x in given.items() if name != specs[0].name}


def per_head(given: Mapping[str, Any], declared: Mapping[str, Input], sizes: Sizes) -> dict[str, Any]:
    """Inputs with one entry a key head repeated for the query heads that share it, as k and v are."""
    shared, out = sizes.heads // sizes.kv_heads, dict(given)
    for name, spec in declared.items():
        at, x = spec.shape.find("h"), given.get(name)
        if shared > 1 and at >= 0 and isinstance(x, Tensor) and x.dim() == len(spec.shape) and x.shape[at] == sizes.kv_heads > 1:
            out[name] = x.repeat_interleave(shared, at)
    return out


def visible_tokens(at: Tensor, q_at: Tensor, keep: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """How many keys each query sees, and how many tokens there are up to each key, itself included (all of them when not causal):
    (B or 1, 1, L, 1). keep (B, all tokens so far)."""
    every = (at + 1)[None] if keep is None else keep.cumsum(-1)[:, -at.numel() :]
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
    carry: Carry | None = None,
) -> Scan:
    """Check and prepare a recurrent call; in a stream `first` is the absolute position of the first key, `carry` the earlier `Scan.carry`."""
    sizes = sizes_of(q, k, v)
    causal = check_mask(mechanism, mask)
    if causal and sizes.q_len > sizes.k_len:
        raise RegardError(f"{sizes.q_len} queries but {sizes.k_len} keys: a causal recurrence needs a key for every query")
    if causal and not mechanism.can_be_causal:
        raise RegardError(f"mask={mask!r}: this mechanism's features read the whole sequence; expected no causal mask")
    if scale is not None and not mechanism.scaled:
        raise RegardError(f"scale={scale}: this mechanism's feature map fixes its own scale; expected None")
    wide = dtype or torch.promote_types(q.dtype, torch.float32)
    keep, given = kept_keys(mask, given, sizes, first)
    declared = declared_of(mechanism)
    check_names(given, declared, mechanism)
    given = per_head(given, declared, sizes)
    inputs = {name: x.to(wide) if x.is_floating_point() else x for name, x in fill_inputs(declared, given, sizes, q).items()}
    q, k, v = (x.to(wide) for x in (q, k, v))
    if mechanism.scaled:
        q = q * (sizes.head_dim**-0.5 if scale is None else scale)
    at = torch.arange(sizes.k_len, device=q.device) + first
    q_at = at[sizes.k_len - sizes.q_len :] if causal else torch.arange(sizes.q_len, device=q.device)
    k, v = repeat_heads(k, sizes.heads), repeat_heads(v, sizes.heads)
    # Feature maps see shapes of their own: per-head inputs come as (H,), not in elementwise form.
    plain = {
        name: x.reshape(x.shape[1]) if declared[name].shape == "h" else x.reshape(()) if declared[name].shape == "" else x
        for name, x in inputs.items()
    }
    plain = {name: x.expand(sizes.heads) if declared[name].shape == "h" else x for name, x in plain.items()}
    real = None if keep is None else keep[:, None, -sizes.k_len :, None]
    if real is not None:  # what stands in padding, NaN even, must reach nothing
        k, v = (torch.where(real, x, 0.0) for x in (k, v))
    seen = tuple(x.to(wide) for x in visible_tokens(at, q_at, keep, causal))
    own, last = carry or (None, None)
    k_env = {**plain, "position": at, "n": seen[1], "real": real, "carry": own, "causal": causal}
    lift = lifting(mechanism, plain, sizes.head_dim)
    rest: list[Any] = []
    q_env = {**plain, "position": q_at, "n": seen[0], "causal": causal}
    if lift is None:
        q, k, *rest = mechanism.feature(q, k, q_env, k_env)
    else:
        q, k = mechanism.feature.narrow(q, k, q_env, k_env)  # type: ignore[union-attr]
    decay = log_decays(mechanism, inputs, declared, sizes, k.shape[-1], real)
    if mechanism.keys != "features":
        k, fade, last = from_logits(mechanism.keys, k, real, causal, last)
        decay = fade if decay is None else None if fade is None else decay + fade
    k = k if real is None else k * real
    apart = None
    if mechanism.turn is not None:
        apart = (q, k) if mechanism.weighs else None
        q, k = call(mechanism.turn, q, env={**plain, "position": q_at}), call(mechanism.turn, k, env={**plain, "position": at})
    if decay is not None and decay.shape[-1] not in (1, k.shape[-1]):  # turning put features side by side, as cosines and sines
        decay = decay.repeat(1, 1, 1, k.shape[-1] // decay.shape[-1])
    ones = apart is None and mechanism.weighs
    if ones:
        v = torch.cat((v, torch.ones_like(v[..., :1]) if real is None else real.expand(*v.shape[:-1], 1).to(v.dtype)), -1)
    mean = "mean" in mechanism.read_of
    if mean:
        k = pad(k, (0, 1), value=1.0) if real is None else torch.cat((k, real.expand(*k.shape[:-1], 1).to(k.dtype)), -1)
        q = pad(q, (0, 1))
    if causal and sizes.q_len < sizes.k_len:
        q = pad(q, (0, 0, sizes.k_len - sizes.q_len, 0))
        apart = None if apart is None else (pad(apart[0], (0, 0, sizes.k_len - sizes.q_len, 0)), apart[1])
    beta = inputs["beta"] if mechanism.write == "delta" else None
    if beta is not None:
        beta = beta.transpose(-1, -2).expand(sizes.batch, sizes.heads, sizes.k_len, 1)
        beta = beta if real is None else torch.where(real, beta, 0.0)
        if mechanism.strength is not None:
            beta = mechanism.strength(beta, k.square().sum(-1, keepdim=True))
    low = low_rank(inputs, sizes, k.shape[-1], real) if mechanism.write == "dplr" else None
    divide = {"sum": divided, "add": added}.get(mechanism.readout) if isinstance(mechanism.readout, str) else None
    read: Callable[..., Tensor] | None = None if divide is None else bind(divide, eps=mechanism.eps)
    if callable(mechanism.readout):
        read = functools.partial(called, mechanism.readout, plain)
    return Scan(
        q, k, v, decay, beta, causal, read, ones, mean, apart, seen[1] if causal else seen[0], (rest[0] if rest else None, last), lift, low
    )


def low_rank(inputs: Mapping[str, Tensor], sizes: Sizes, features: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """The inputs `erase` and `insert` in the shape of `Scan.low`; padding erases nothing."""
    found = []
    for name in ("erase", "insert"):
        x = inputs[name]
        if x.shape[-1] != features:
            raise RegardError(f"input {name!r} has {x.shape[-1]} channels; expected {features}, one for each feature of k")
        x = x.expand(sizes.batch, sizes.heads, sizes.k_len, features)
        found.append(x if real is None else torch.where(real, x, 0.0))
    return found[0], found[1]


def lifting(mechanism: Recurrent, inputs: Mapping[str, Any], d: int) -> Lift | None:
    """The maps of a feature map with a kernel, where nothing stands between features and state."""
    feature = mechanism.feature
    if not isinstance(feature, FeatureMap) or feature.kernel is None:
        return None
    if (
        mechanism.decay == "channel"
        or mechanism.write != "add"
        or mechanism.keys != "features"
        or mechanism.turn
        or {"mean", "query_sum"} & mechanism.read_of
    ):
        return None
    maps = [functools.partial(call, function, env=inputs) for function in (feature.query, feature.key or feature.query)]
    return Lift(maps[0], maps[1], functools.partial(weighed, feature.kernel, inputs, d))


def weighed(kernel: Function, inputs: Mapping[str, Any], d: int, s: Tensor) -> Tensor:
    return call(kernel, s, d, env=inputs)  # type: ignore[no-any-return]


def divided(o: Tensor, eps: float, mass: Tensor, **_: Any) -> Tensor:
    mass = mass.clamp_min(eps)
    return o / torch.where(mass == 0, 1.0, mass)  # a row that sees nothing gives zeros


def added(o: Tensor, eps: float, mass: Tensor, **_: Any) -> Tensor:
    mass = mass + eps
    return o / torch.where(mass == 0, 1.0, mass)


def called(readout: Function, inputs: Mapping[str, Any], o: Tensor, **moments: Any) -> Tensor:
    return call(readout, o, env={**inputs, **moments})  # type: ignore[no-any-return]


def log_decays(
    mechanism: Recurrent, inputs: Mapping[str, Tensor], declared: Mapping[str, Input], sizes: Sizes, features: int, real: Tensor | None
) -> Tensor | None:
    """The input `log_decay` in the shape of `Scan.decay`."""
    if mechanism.decay == "none":
        return None
    decay = inputs["log_decay"]
    decay = decay.transpose(-1, -2) if declared["log_decay"].shape == "bhk" else decay
    if mechanism.decay == "channel" and decay.shape[-1] not in (1, features):
        raise RegardError(f"input 'log_decay' has {decay.shape[-1]} channels; expected {features}, one for each feature of k")
    if real is not None and declared["log_decay"].shape != "h":  # nothing fades while padding passes, whatever stands there
        decay = torch.where(real, decay, 0.0)
    if not holds(~(decay > 0), True):
        raise RegardError(f"input 'log_decay' has entries up to {float(decay.max()):.3g}; expected logs of decays, all <= 0")
    decay = decay.clamp_min(CLAMP)
    if decay.shape[-2] != 1 or mechanism.decay == "channel":
        decay = decay.expand(sizes.batch, sizes.heads, sizes.k_len, features if mechanism.decay == "channel" else 1)
    return decay


def from_logits(kind: str, f: Tensor, real: Tensor | None, causal: bool, carry: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Keys e^{f - z}, the log decays z_{t-1} - z_t (None over all keys at once), and the last z; z never falls, so both stay below 1."""
    f = f if real is None else f.masked_fill(~real, -1e30)  # finite: -inf - -inf would be no number
    if kind == "max":
        f_top = f.detach().amax(-1, keepdim=True)
        if not causal:
            top = f_top.amax(-2, keepdim=True)
            return torch.exp(f - top), None, top
        f_top = f_top if carry is None else torch.cat((carry, f_top), -2)
        z = f_top.cummax(-2).values
    else:
        if not causal:
            return torch.softmax(f, -2), None, f.logsumexp(-2, keepdim=True)
        z = torch.logcumsumexp(f if carry is None else torch.cat((carry, f), -2), -2)
    before = pad(z[..., :-1, :], (0, 0, 1, 0), value=-1e30) if carry is None else z[..., :-1, :]
    z = z if carry is None else z[..., 1:, :]
    return torch.exp(f - z), (before - z).clamp_min(CLAMP), z[..., -1:, :]
