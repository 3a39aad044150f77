"""The shapes an attention can have: weighted, recurrent, reduced, clustered, hybrid. Descriptions only: no tensors, no device."""

from __future__ import annotations

import functools
from dataclasses import field, replace

import torch
from torch import Tensor

from ..errors import RegardError
from .feature_map import FeatureMap, JointMap, identity
from .mask import Full, Mask, as_mask
from .neighborhood import Neighborhood
from .normalizer import SOFTMAX, Normalizer, RowLocal
from .part import Function, Input, Learned, Part, Sizes, asks, bind, described
from .position import Chain, Modified, Position, Rope
from .score import Dot, Pairwise, Score
from .select import Selector


@described
class Recipe(Part):
    """How the paper's layer dresses the mechanism: what `regard.nn.Attention` does around it.

    short_conv: width of a causal depthwise convolution on q, k, v (0: none), with conv_bias, and conv_activation after it. activation: on q and
    k: "", "silu", "relu", "gelu", "gelu_tanh", "elu+1", or "t2r": relu(W x), W shared by q, k and all heads; value_activation: on v.
    qk_norm: "", "l2", "sum", "rms" or "layer", over head_dim; "q_l2" and so on: q alone. out_norm: "", "l2", "rms" or "layer", a head.
    out_activation: before it. merge_norm: "", "rms", "srms" (without learned factors), "gated_rms" or "layer", over all heads' channels
    together; merge_activation: after it. qk_eps, norm_eps: of the first and of the other norms (None: `head_norm`'s). out_gate: "", or
    "silu", "sigmoid", "linear": output times act(x W), W of rank gate_rank if given; "head", "head_mlp", "heads", "mean" or "constant":
    each head times gate_factor sigmoid(G) (see `regard.nn.parts.HeadGate`), gate_hidden wide inside "head_mlp", with the bias
    logit(gate_init) at the start. rope: rotate q and k when the model asks for rotary positions.
    key_dim: head_dim of q and k: a number of channels, a share of the layer's own head_dim (a float), or None for the same.
    kv_heads: key and value heads when the layer is not told (None: as many as query heads).
    """

    short_conv: int = 0
    conv_bias: bool = False
    conv_activation: str = ""
    activation: str = ""
    value_activation: str = ""
    qk_norm: str = ""
    qk_eps: float | None = None
    norm_eps: float | None = None
    out_activation: str = ""
    out_norm: str = ""
    merge_norm: str = ""
    merge_activation: str = ""
    out_gate: str = ""
    gate_rank: int | None = None
    gate_init: float = 0.5
    gate_factor: float = 1.0
    gate_hidden: int | None = None
    rope: bool = True
    key_dim: int | float | None = None
    kv_heads: int | None = None


@described
class Mechanism(Part):
    """Base of the shapes."""

    @functools.cached_property
    def declared(self) -> tuple[Input, ...]:
        """Every input the parts declare, each name once."""
        found: dict[str, Input] = {}
        for part in self.parts():
            for item in getattr(part, "inputs", ()):
                if found.setdefault(item.name, item) != item:
                    raise RegardError(f"two parts declare the input {item.name!r} differently")
        return tuple(found.values())

    @property
    def causal_only(self) -> bool:
        """Whether the mechanism is causal by itself, so that no mask need be given."""
        return False

    @property
    def past_alone(self) -> bool:
        """Whether no later key is ever read, whatever the mask, though the choice of keys may look ahead."""
        return self.causal_only

    @property
    def can_be_causal(self) -> bool:
        return True

    @property
    def recipe_of(self) -> Recipe:
        return getattr(self, "recipe", Recipe())


@described
class Weighted(Mechanism):
    """s_ij = score(q_i, k_j) + position(i, j); p_i = normalizer(s_i | mask, selection); o_i = sum_j p_ij v_j.

    score may be a plain function (q, k) -> (..., Lq, Lk); position a plain function of s and, by name, of b, h, i, j, n or
    declared inputs, or several positions; mask a plain function of (b, h, i, j). values: a plain function of v and of declared
    inputs of shape "bgk", applied before anything else. `inputs` declares tensors that plain functions ask for.
    """

    score: Score | Function = field(default_factory=Dot)
    position: Position | Function | tuple[Position, ...] | None = None
    normalizer: Normalizer = SOFTMAX
    mask: Mask | Function = field(default_factory=Full)
    select: Selector | None = None
    values: Function | None = None
    inputs: tuple[Input, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)
    plain: bool = field(init=False, repr=False, compare=False, default=False)  # softmax over dot products and nothing else

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.score, Score):
            object.__setattr__(self, "score", Pairwise(self.score))
        if isinstance(self.position, (tuple, list)):
            object.__setattr__(self, "position", Chain(tuple(self.position)))
        elif self.position is not None and not isinstance(self.position, Position):
            object.__setattr__(self, "position", Modified(self.position))
        object.__setattr__(self, "mask", as_mask(self.mask))
        if callable(self.normalizer) and not isinstance(self.normalizer, Normalizer):
            object.__setattr__(self, "normalizer", RowLocal(self.normalizer))
        bare = self.position is None and self.values is None and self.select is None and self.mask == Full()
        object.__setattr__(self, "plain", bare and self.normalizer == SOFTMAX and self.score == Dot())

    @property
    def can_be_causal(self) -> bool:
        # A neighbourhood's windows shift inwards at the end of the grid, so they depend on tokens to come.
        grids = [part for part in self.parts() if isinstance(part, Neighborhood)]
        return self.normalizer.row_local and all(grid.causal for grid in grids) and not self.looks_ahead

    @property
    def causal_only(self) -> bool:
        return isinstance(self.mask, Mask) and self.mask.causal and not self.looks_ahead

    @property
    def past_alone(self) -> bool:
        return isinstance(self.mask, Mask) and self.mask.causal

    @property
    def looks_ahead(self) -> bool:
        """Whether which keys a query reads depends on later queries: a policy for prompts."""
        return self.select is not None and self.select.looks_ahead


DECAYS = ("none", "head", "token", "channel")


@described
class Recurrent(Mechanism):
    """S_t = decay_t o S_{t-1} + write(k_t, v_t), o_t = read(phi_q(q_t) S_t).

    decay: "none"; "head" (input log_decay (H,)), "token" (B, H, L) or "channel" (B, H, L, F), always logs, <= 0.
    write: "add": phi(k) v^T, or "delta": beta phi(k) (v - S^T phi(k))^T, with input beta (B, H, L). strength: a plain function (beta,
    |phi(k)|^2) of what stands for beta in the delta rule. Or "dplr", a transition that is diagonal plus low rank, as RWKV-7's: inputs
    `erase` a and `insert` b (B, H, L, F), S_t = (decay_t o I + b_t a_t^T) S_{t-1} + phi(k_t) v_t^T; a reads the state before it fades.
    keys: "features"; or logits f whose exponentials are divided by what they sum to so far, "softmax" (a channel: k_t = e^{f_t - z_t},
    z_t = log sum_{s<=t} e^{f_s}, and the state fades by e^{z_{t-1} - z_t}) or by the largest so far, "max" (one number a token).
    readout: "none"; "sum": divide by phi_q(q_t).sum phi_k(k), at least eps; "add": by the same plus eps; or a plain function of o_t and, by
    name, of mass (phi_q(q_t).sum phi_k(k)), query_sum (sum phi_q(q_t)), mean (of the visible values), n (how many are visible), causal
    (whether the call is) and inputs.
    turn: a plain function of features and, by name, position: applied to both in the numerator only (rotary positions).
    scaled: multiply q by `scale` (D^-1/2 unless given). Without decay and delta it also runs over all keys (bidirectional), unless
    `causal` says that it never does.
    """

    feature: FeatureMap | JointMap = field(default_factory=lambda: FeatureMap(identity))
    decay: str = "none"
    write: str = "add"
    strength: Function | None = None
    keys: str = "features"
    readout: str | Function = "none"
    turn: Function | None = None
    eps: float = 1e-6
    scaled: bool = True
    causal: bool = False
    inputs: tuple[Input, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (
            ("decay", self.decay, DECAYS),
            ("write", self.write, ("add", "delta", "dplr")),
            ("keys", self.keys, ("features", "softmax", "max")),
            ("readout", self.readout, ("none", "sum", "add")),
        ):
            if value not in known and not (name == "readout" and callable(value)):
                raise RegardError(f"Recurrent({name}={value!r}): expected one of {', '.join(known)}")
        for name, idle, cure in (
            ("log_decay", self.decay == "none", "decay='head', 'token' or 'channel'"),
            ("beta", self.write != "delta", "write='delta'"),
            ("erase", self.write != "dplr", "write='dplr'"),
            ("insert", self.write != "dplr", "write='dplr'"),
        ):
            if idle and any(item.name == name for item in self.inputs):
                raise RegardError(f"Recurrent declares the input {name!r}, which nothing reads: expected {cure}, or no such input")
        if "mean" in self.read_of and (self.decay != "none" or self.write != "add" or self.keys != "features"):
            raise RegardError("a readout that asks for the mean of values needs decay='none', write='add' and keys='features'")
        if self.keys == "softmax" and (self.write != "add" or self.decay != "none"):
            raise RegardError("keys='softmax' is a decay of its own: expected decay='none' and write='add'")

    @property
    def read_of(self) -> frozenset[str]:
        """What a readout function asks for by name."""
        return frozenset(asks(self.readout, 1)) if callable(self.readout) else frozenset()

    @property
    def weighs(self) -> bool:
        """Whether the readout needs phi_q(q_t).sum phi_k(k)."""
        return self.readout in ("sum", "add") or "mass" in self.read_of

    @property
    def causal_only(self) -> bool:
        return self.causal or self.decay != "none" or self.write != "add"

    @property
    def can_be_causal(self) -> bool:
        return self.feature.causal


@described
class Relayed(Mechanism):
    """Attention through few tokens: o = spread(q, agents, gather(agents, k, v)), two weighted calls.

    agents: the input `agents` (B, H, m, D), or, when absent, q pooled over its length to `count` tokens. Not causal.
    """

    gather: Weighted = field(default_factory=Weighted)
    spread: Weighted = field(default_factory=Weighted)
    count: int = 49
    inputs: tuple[Input, ...] = (Input("agents", "bhfd", default="pool"),)
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def can_be_causal(self) -> bool:
        return False

    @functools.cached_property
    def declared(self) -> tuple[Input, ...]:
        """Inputs of the two calls carry the prefixes `gather_` and `spread_`."""
        named = [
            replace(item, name=f"{side}_{item.name}")
            for side, inner in (("gather", self.gather), ("spread", self.spread))
            for item in inner.declared
        ]
        return (*self.inputs, *named)


@described
class Nystrom(Mechanism):
    """o = P A^+ (P'^T v) with P = kernel(q, landmarks), A = kernel(landmarks, landmarks), P' = kernel(k, landmarks).

    The kernel is Gaussian, exp(-|x - y|^2 / 2), on q and k times D^(-1/4). A^+ by `iterations` Newton-Raphson steps on
    A + ridge I, whose backward is -Y^T G Y^T. symmetric: D^-1/2 A^+ D^-1/2 with D = diag(A 1). mode: "newton" or "symmetric", from a
    start a sample and head; "exact": a direct inverse; "released": from one start over the batch, differentiated step by step. Not causal.
    landmarks: the input `landmarks` (B, H, m, D), or, when absent, q pooled over its length to `count` tokens.
    """

    count: int = 49
    iterations: int = 20
    ridge: float = 0.0
    symmetric: bool = False
    mode: str = "newton"
    inputs: tuple[Input, ...] = (Input("landmarks", "bhfd", default="pool"),)
    recipe: Recipe = field(default_factory=lambda: Recipe(rope=False))

    @property
    def can_be_causal(self) -> bool:
        return False


FORMS = ("", "layer", "unit", "layer+unit")


@described
class Clustered(Mechanism):
    """Tokens meet only inside clusters: cluster c takes its `members` best queries and keys, attends, and outputs are averaged.

    Input `centroids` (H, c, D). members None: ceil(Lk / c). shared: keys are the queries. Tokens are first made "layer" (LayerNorm without
    affine, `norm_eps`), "unit" (length one), "layer+unit" or left as they are (""): to be routed (`route`; centroids too where it says unit),
    and as `queries` and `keys` that attend. hide_self: a token sees itself only where it would see nothing else. count_eps: outputs are summed
    over n clusters and divided by n + count_eps. Inputs `memory_k` (H, c, m, D) and `memory_v` (H, c, m, Dv), optional: keys of each cluster
    that every query of it sees. Membership looks along the whole sequence, so under a causal mask values never leak but the choice does.
    """

    inner: Weighted = field(default_factory=Weighted)
    clusters: int = 8
    members: int | None = None
    shared: bool = False
    route: str = "layer+unit"
    queries: str = "layer+unit"
    keys: str = "layer+unit"
    hide_self: bool = False
    scaled: bool = True
    count_eps: float = 0.0
    norm_eps: float = 1e-5
    inputs: tuple[Input, ...] = (
        Input("centroids", "hfd"),
        Input("memory_k", "hffd", default="pool"),
        Input("memory_v", "hffe", default="pool"),
    )
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("route", "queries", "keys"):
            if getattr(self, name) not in FORMS:
                raise RegardError(f"Clustered({name}={getattr(self, name)!r}): expected one of {', '.join(map(repr, FORMS))}")

    @property
    def can_be_causal(self) -> bool:
        return False  # the choice of members reads the whole sequence


def constants(sizes: Sizes, values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def every_channel(sizes: Sizes, values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None].repeat(1, sizes.heads, sizes.value_dim)


@described
class Hybrid(Mechanism):
    """Several mechanisms on the same q, k, v. how: "sum", "head" (heads split in `shares`), "gate": sum_m gate_m o_m with input
    `gate` (B, H, Lq, M), "blend": sum_m blend_m o_m with input `blend` (M,), by default `shares`, or "channels": the same with `blend`
    (M, H, Dv), learned from `shares`."""

    members: tuple[Mechanism, ...] = ()
    how: str = "sum"
    shares: tuple[float, ...] = ()
    inputs: tuple[Input, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.how not in ("sum", "head", "gate", "blend", "channels"):
            raise RegardError(f"Hybrid(how={self.how!r}): expected sum, head, gate, blend or channels")
        if self.how == "channels" and not self.inputs:
            wide = bind(every_channel, values=self.shares)
            object.__setattr__(self, "inputs", (Input("blend", "fhe", default=wide, layer=Learned(wide)),))
        if self.how == "blend" and not self.inputs:
            start = bind(constants, values=self.shares)
            object.__setattr__(self, "inputs", (Input("blend", "f", default=start, layer=Learned(start, trainable=False)),))
        if self.how == "gate" and not self.inputs:
            object.__setattr__(self, "inputs", (Input("gate", "bhqf"),))
        if self.how in ("head", "blend", "channels") and len(self.shares) != len(self.members):
            raise RegardError(f"Hybrid(shares={self.shares}): expected one number for each of {len(self.members)} members")

    @property
    def causal_only(self) -> bool:
        return all(member.causal_only for member in self.members)

    @property
    def can_be_causal(self) -> bool:
        return all(member.can_be_causal for member in self.members)


@described
class Program(Mechanism):
    """A plain function made of calls of other mechanisms: `function(q, k, v, call)` -> o (B, H, Lq, Dv), and by name declared inputs.

    call: the mask and scale given, and `call.attend`, `call.with_stats`, `call.merge`, which run a weighted mechanism inside.
    under: "none": it takes no mask; "causal": always under Causal(); "any": with or without. causal: its choices do not look ahead
    either, so it also trains and decodes token by token. Fixed constants belong to the function (`bind`).
    """

    function: Function = lambda q, k, v, call: v  # replaced by the mechanism's
    under: str = "none"
    causal: bool = False
    inputs: tuple[Input, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.under not in ("none", "causal", "any"):
            raise RegardError(f"Program(under={self.under!r}): expected none, causal or any")

    @property
    def can_be_causal(self) -> bool:
        return self.causal

    @property
    def causal_only(self) -> bool:
        return self.causal and self.under == "causal"

    @property
    def past_alone(self) -> bool:
        return self.under == "causal"


__all__ = ["Clustered", "Hybrid", "Mechanism", "Nystrom", "Program", "Recipe", "Recurrent", "Relayed", "Rope", "Weighted"]
