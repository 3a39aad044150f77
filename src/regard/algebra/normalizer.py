"""Normalizers: how a row of scores becomes a row of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError
from .part import Function, Input, Part, asks, bind, call, described

SHIFTS = ("none", "max", "max0", "maxabs", "root")


@described
class Normalizer(Part):
    """Base of all normalizers; `row_local` ones run tiled, the others say so and materialise what they need."""

    @property
    def row_local(self) -> bool:
        return False

    def weights(self, s: Tensor, visible: Tensor, env: Mapping[str, Any]) -> Tensor:
        """Scores (..., Lq, Lk) and what is visible -> weights of the same shape; used when not row-local."""
        raise RegardError(f"{type(self).__name__} has neither row-local functions nor `weights`")


@described
class RowLocal(Normalizer):
    """p_ij = weight(s_ij, c_i) / divide(sum_j mass(s_ij, c_i)), given by plain elementwise functions.

    weight, mass: functions of s and, by name, of any of c, n (visible count), i, j, h, b and the declared inputs.
    mass None: nothing is summed. divide: function of the sum, by default the sum itself; a row that divides by 0 is zero.
    shift: what c_i is. "none": 0. "max", "max0", "maxabs": the row's max of s, max(s, 0), |s|, for stability only: weight and
    mass must scale with exp(-c). "root": the c for which the weights sum to 1 (weight falls in c); then mass and divide are unused.
    floor: for "root", c lies between max s and max s - floor (above max s where floor is negative), and scores more than |floor| below
    both weigh nothing.
    anchor: how much, relative to a weight, weights may depend on c being the row's extreme itself (as where divide adds to a shifted sum);
    executors may leave the shift out where scores are small and their precision is coarser than this.
    usual: the same rule, quicker to compute, for calls that leave `inputs` at their defaults.
    """

    weight: Function = torch.exp
    mass: Function | None = None
    divide: Function | None = None
    shift: str = "none"
    inputs: tuple[Input, ...] = ()
    floor: Function | float = 1.0
    anchor: float = 0.0
    usual: RowLocal | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift not in SHIFTS:
            raise RegardError(f"shift={self.shift!r}; expected one of {', '.join(SHIFTS)}")

    @property
    def row_local(self) -> bool:
        return True

    @property
    def normalised(self) -> bool:
        """Whether something is divided by."""
        return self.mass is not None or self.divide is not None


def exp_shifted(s: Tensor, c: Tensor) -> Tensor:
    return torch.exp(s - c)


def softmax() -> RowLocal:
    """p_ij = e^{s_ij} / sum_j e^{s_ij}."""
    return RowLocal(exp_shifted, exp_shifted, shift="max")


SOFTMAX = softmax()


def with_sink(total: Tensor, c: Tensor, sink: Tensor) -> Tensor:
    return total + torch.exp(sink - c)


def softmax_plus(sink: float = 0.0) -> RowLocal:
    """p_ij = e^{s_ij} / (e^{sink_h} + sum_j e^{s_ij}): softmax-plus-one at sink 0, a learned sink logit per head otherwise."""
    from .part import Learned

    inputs = (Input("sink", "h", default=sink, layer=Learned(sink)),)
    return RowLocal(exp_shifted, exp_shifted, with_sink, shift="max0", inputs=inputs)


def joined_by_sinks(total: Tensor, c: Tensor, sink_logits: Tensor, mass: Function, shifted: bool) -> Tensor:
    # A sink far above every visible score takes all weight; cut where e^80 to 1 is all or nothing, before the exponential overflows.
    sink_logits = torch.minimum(sink_logits, c + 80.0) if shifted else sink_logits
    return total + call(mass, sink_logits, env={"c": c})  # type: ignore[no-any-return]


def with_sinks(normalizer: Normalizer) -> RowLocal:
    """The same weights where one more key, of value zero and score `sink_logits`, takes its share of every row (gpt-oss; OpenAI, 2025).

    Input `sink_logits` (B, H, Lq, 1), where 1 broadcasts. Weights that divide by no sum over keys (sigmoid, ReLU by the count of keys) are the same
    with it. Raises RegardError for weights that are not quotients by a plain sum.
    """
    if not isinstance(normalizer, RowLocal) or normalizer.shift == "root":
        raise RegardError(f"sinks join the sum that weights are divided by; {type(normalizer).__name__} weights have none")
    inputs = (*normalizer.inputs, Input("sink_logits", "bhqk"))
    if normalizer.mass is None:
        return replace(normalizer, inputs=inputs)
    if normalizer.divide is not None or set(asks(normalizer.mass)) - {"c"}:
        raise RegardError(f"sinks join a plain sum of masses, such as softmax divides by; {normalizer!r} divides by something else")
    return replace(normalizer, divide=bind(joined_by_sinks, mass=normalizer.mass, shifted=normalizer.shift != "none"), inputs=inputs)


@described
class Sinkhorn(Normalizer):
    """Doubly stochastic weights by alternately normalising rows and columns of e^s in the log domain.

    Not row-local: a column's sum needs every query, so it holds the whole matrix and cannot be causal.
    iterations: single normalisations, rows first (1 is softmax); an odd count ends with rows.
    detach_columns: no gradient through the column potential, as the released language code does.
    """

    iterations: int = 3
    detach_columns: bool = False

    def weights(self, s: Tensor, visible: Tensor, env: Mapping[str, Any]) -> Tensor:
        visible = visible.expand_as(s)
        live_row, live_col = visible.any(-1, keepdim=True), visible.any(-2, keepdim=True)
        # A masked column must reach no row and an empty row no column, without -inf - -inf anywhere.
        s = s.masked_fill(~visible, float("-inf"))
        log_mass = torch.log(live_col.sum(-1, keepdim=True) / live_row.sum(-2, keepdim=True).clamp_min(1).to(s.dtype))
        f = torch.zeros_like(live_row, dtype=s.dtype)
        g = torch.zeros_like(live_col, dtype=s.dtype)
        for step in range(self.iterations):
            if step % 2 == 0:
                f = -safe_logsumexp(s + g, -1, live_row)
            else:
                g = -log_mass - safe_logsumexp(s + f, -2, live_col)
                g = g.detach() if self.detach_columns else g
        return torch.where(visible, torch.exp(torch.where(visible, s + f + g, 0.0)), 0.0)


def safe_logsumexp(s: Tensor, dim: int, live: Tensor) -> Tensor:
    """log-sum-exp that gives 0, with zero gradient, where nothing is live."""
    return torch.where(live, torch.logsumexp(torch.where(live, s, 0.0), dim, keepdim=True), 0.0)
