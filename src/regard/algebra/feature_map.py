"""Feature maps: phi_q and phi_k such that phi_q(q).phi_k(k) stands for the weight of a pair."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError
from .part import Function, Input, Learned, Part, Sizes, bind, call, described


@described
class FeatureMap(Part):
    """query and key: plain functions x (B, H, L, D) -> (B, H, L, F), and by name any of: position (L,), n, causal, inputs; key also
    real.

    n (B|1, 1, L|1, 1) is how many tokens are visible to a query, or stand up to a key. causal: whether the call is. real (B, 1, L, 1): which
    keys are no padding, or None.

    key None: the same function as query. pre: a power of D multiplying q and k before the map (Performer: -1/4).
    causal: whether each token's features read no later token. kernel: phi_q(q).phi_k(k) as a plain function of (q.k, D), for maps that are
    far wider than D: then pairs inside a chunk are weighed without their features, which are never there for the whole sequence at once.
    before: plain functions of q and of k that come first and keep their width; query, key and kernel then see what they return.
    """

    query: Function
    key: Function | None = None
    inputs: tuple[Input, ...] = ()
    pre: float = 0.0
    causal: bool = True
    kernel: Function | None = None
    before: tuple[Function, Function] | None = None

    def narrow(self, q: Tensor, k: Tensor, q_env: Mapping[str, Any], k_env: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """q and k as `query` and `key` read them."""
        if self.pre:
            q, k = q * q.shape[-1] ** self.pre, k * k.shape[-1] ** self.pre
        if self.before is not None:
            q, k = call(self.before[0], q, env=q_env), call(self.before[1], k, env=k_env)
        return q, k

    def __call__(self, q: Tensor, k: Tensor, q_env: Mapping[str, Any], k_env: Mapping[str, Any]) -> tuple[Any, ...]:
        # What features that are asked for outside a call go without.
        alone = {"real": None, "causal": False, **{x.name: x.default for x in self.inputs if isinstance(x.default, (int, float))}}
        q_env, k_env = {**alone, **q_env}, {**alone, **k_env}
        q, k = self.narrow(q, k, q_env, k_env)
        return call(self.query, q, env=q_env), call(self.key or self.query, k, env=k_env)


@described
class JointMap(Part):
    """A plain function (q, k) -> (phi_q, phi_k), for maps that read both at once; further arguments by name as of `FeatureMap`,
    and real (B, 1, Lk, 1): which keys are no padding, or None.

    causal: whether each token's features read no later token; else the mechanism runs in both directions only. A causal function that
    must know more of the past than the state asks for carry, what it returned third when the stream stopped, or None.
    """

    function: Function
    inputs: tuple[Input, ...] = ()
    causal: bool = False

    def __call__(self, q: Tensor, k: Tensor, q_env: Mapping[str, Any], k_env: Mapping[str, Any]) -> tuple[Any, ...]:
        return call(self.function, q, k, env=k_env)  # type: ignore[no-any-return]


def identity(x: Tensor) -> Tensor:
    return x


def elu_plus_one(x: Tensor) -> Tensor:
    """Linear Transformer's map, elu(x) + 1."""
    return torch.nn.functional.elu(x) + 1


def taylor(x: Tensor, eps: float = 0.0) -> Tensor:
    """[1, x / D^(1/4), vec(x x^T) / sqrt(2 D)]: phi(q).phi(k) = 1 + s + s^2/2 with s = q.k / sqrt(D) (Based, 2024)."""
    d = x.shape[-1]
    square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / math.sqrt(2 * d)
    return torch.cat((torch.ones_like(x[..., :1]), x / d**0.25, square), -1)


def taylor_kernel(s: Tensor, d: int) -> Tensor:
    """What `taylor` makes of q.k = s: 1 + x + x^2/2, x = s / sqrt(D)."""
    x = s / math.sqrt(d)
    return 1 + x + x * x / 2


def taylor_packed(x: Tensor) -> Tensor:
    """`taylor` with only the upper triangle of x x^T, off-diagonal entries times sqrt(2): the same products, (D+1)(D+2)/2 wide."""
    d = x.shape[-1]
    rows, cols = torch.triu_indices(d, d, device=x.device)
    factor = (1 + (rows != cols).to(x.dtype)).sqrt() / math.sqrt(2 * d)
    return torch.cat((torch.ones_like(x[..., :1]), x / d**0.25, x[..., rows] * x[..., cols] * factor), -1)


def orthogonal_gaussian(sizes: Sizes, features: int, orthogonal: bool = True, seed: int = 0, regularised: bool = False) -> Tensor:
    """FAVOR+'s projection (features, D): blocks of D Haar-orthogonal rows, each of chi_D length (sqrt(D) when regularised)."""
    generator = torch.Generator().manual_seed(seed)
    d = sizes.head_dim
    if not orthogonal:
        return torch.randn(features, d, generator=generator)
    blocks = []
    for _ in range(0, features, d):
        turn, upper = torch.linalg.qr(torch.randn(d, d, generator=generator))
        blocks.append(turn * upper.diagonal().sign())  # without the sign fix QR is not Haar and the estimate is biased
    norms = torch.full((features,), math.sqrt(d)) if regularised else torch.randn(features, d, generator=generator).norm(dim=-1)
    return torch.cat(blocks)[:features] * norms[:, None]


def exponents(x: Tensor, projection: Tensor, hyperbolic: bool) -> tuple[Tensor, Tensor]:
    """w.x of every feature, and |x|^2 / 2."""
    at = x @ projection.to(x.dtype).transpose(-1, -2)
    return torch.cat((at, -at), -1) if hyperbolic else at, x.square().sum(-1, keepdim=True) / 2


def positive_random(x: Tensor, projection: Tensor, eps: float, hyperbolic: bool) -> Tensor:
    """m^(-1/2) (exp(w.x - |x|^2/2) + eps): an unbiased positive estimate of exp(q.k)."""
    at, half = exponents(x, projection, hyperbolic)
    return (torch.exp(at - half) + eps) / math.sqrt(at.shape[-1])


def stable_query(x: Tensor, projection: Tensor, eps: float, hyperbolic: bool) -> Tensor:
    """The same over e^max w.x of the token, which the readout divides out but for eps."""
    at, half = exponents(x, projection, hyperbolic)
    return (torch.exp(at - half - at.detach().amax(-1, keepdim=True)) + eps) / math.sqrt(at.shape[-1])


def stable_key(x: Tensor, projection: Tensor, key_shift: Tensor, real: Tensor | None, causal: bool, eps: float, hyperbolic: bool) -> Tensor:
    """The same over e^max w.x of all keys that are no padding; over e^key_shift in a causal call, where a maximum would look ahead."""
    at, half = exponents(x, projection, hyperbolic)
    if causal:
        top = key_shift
    else:
        top = (at.detach() if real is None else at.detach().masked_fill(~real, float("-inf"))).amax((-1, -2), keepdim=True)
        top = torch.where(top.isfinite(), top, 0.0)
    return (torch.exp(at - half - top) + eps) / math.sqrt(at.shape[-1])


def favor(
    features: int = 256,
    *,
    eps: float = 1e-4,
    orthogonal: bool = True,
    hyperbolic: bool = False,
    stabilize: bool = True,
    seed: int = 0,
    causal: bool = True,
    regularised: bool = False,
) -> FeatureMap:
    """Performer's positive random features; input `projection` (features, D), drawn from `seed` unless passed.

    phi(x) = m^(-1/2) (exp(w.x - |x|^2/2 - shift) + eps).
    stabilize: exponents are taken from the largest w.x, of the token for queries, of all keys for keys; under a causal mask from the input
    `key_shift` (B, H), 0 unless given, since a maximum would let a query feel later keys through eps. causal: whether it may run so.
    """
    draw = bind(orthogonal_gaussian, features=features, orthogonal=orthogonal, seed=seed, regularised=regularised)
    common: dict[str, Any] = {"eps": eps, "hyperbolic": hyperbolic}
    inputs = (Input("projection", "fd", default=draw, layer=Learned(draw, trainable=False)),)
    if not stabilize:
        return FeatureMap(bind(positive_random, **common), inputs=inputs, pre=-0.25, causal=causal)
    shift = Input("key_shift", "bh", default=0.0)
    return FeatureMap(bind(stable_query, **common), bind(stable_key, **common), inputs=(*inputs, shift), pre=-0.25, causal=causal)


def generalized(x: Tensor, projection: Tensor, function: Function, eps: float) -> Tensor:
    return function(x @ projection.to(x.dtype).transpose(-1, -2)) + eps


def eye_per_head(sizes: Sizes) -> Tensor:
    return torch.eye(sizes.head_dim).repeat(sizes.heads, 1, 1)


def softmax_pair(y: Tensor) -> Tensor:
    """Hedgehog's [softmax_d(y), softmax_d(-y)]."""
    return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1)


def softmax_half(y: Tensor) -> Tensor:
    return y.softmax(-1)


def exp_pair(y: Tensor) -> Tensor:
    """[exp(y), exp(-y)], the unnormalised form."""
    return torch.cat((y, -y), -1).exp()


def exp_shifted_pair(y: Tensor) -> Tensor:
    """[exp(y - max y), exp(-y + min y)]: between 0 and 1, and for keys another function than `exp_pair`."""
    return torch.cat((y - y.amax(-1, keepdim=True), y.amin(-1, keepdim=True) - y), -1).exp()


HEDGEHOG: dict[str, Function] = {"softmax": softmax_pair, "half": softmax_half, "exp": exp_pair, "exp_shifted": exp_shifted_pair}


def mapped(x: Tensor, weight: Tensor, shift: Tensor, form: str, clamp: float) -> Tensor:
    """The form of y = W x + b, clamped from below."""
    y = torch.einsum("...hld,hfd->...hlf", x, weight.to(x.dtype)) + shift.to(x.dtype)[:, None, None]
    return HEDGEHOG[form](y).clamp_min(clamp)  # type: ignore[no-any-return]


def on_query(x: Tensor, query_map: Tensor, query_shift: Tensor, form: str, clamp: float) -> Tensor:
    return mapped(x, query_map, query_shift, form, clamp)


def on_key(x: Tensor, key_map: Tensor, key_shift: Tensor, form: str, clamp: float) -> Tensor:
    return mapped(x, key_map, key_shift, form, clamp)


def hedgehog(form: str = "softmax", clamp: float = 1e-12) -> FeatureMap:
    """Learned maps, one D x D matrix a head for queries and one for keys, from the identity; inputs `query_map`, `key_map`
    (H, F, D) and scalar shifts `query_shift`, `key_shift` (H,)."""
    if form not in HEDGEHOG:
        raise RegardError(f"form={form!r}; expected one of {', '.join(HEDGEHOG)}")
    maps = [Input(f"{side}_map", "hfd", default=eye_per_head, layer=Learned(eye_per_head)) for side in ("query", "key")]
    shifts = [Input(f"{side}_shift", "h", default=0.0, layer=Learned(0.0, trainable=False)) for side in ("query", "key")]
    return FeatureMap(bind(on_query, form=form, clamp=clamp), bind(on_key, form=form, clamp=clamp), inputs=(*maps, *shifts))


def cosine_reweighted(x: Tensor, position: Tensor, horizon: float, base: Function) -> Tensor:
    """cosFormer: [phi(x) cos a, phi(x) sin a] with a = pi/2 * (position + 1) / horizon."""
    angle = (math.pi / 2) * (position.to(torch.float64) + 1) / horizon
    feature = base(x)
    wide = feature.dtype
    return torch.cat((feature * angle.cos().to(wide)[:, None], feature * angle.sin().to(wide)[:, None]), -1)


def over_channels(q: Tensor) -> Tensor:
    return torch.softmax(q, -1)
