"""The elementwise middle of a tile: scores to weights and masses, and its pullback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...algebra.mechanism import Weighted
from ...algebra.normalizer import RowLocal
from ...algebra.part import asks, call
from ...algebra.snapshot import remembered
from ..symbolic import ONE, Expr, Program, Untraceable, const, pullback, substitute, trace, var

Env = Mapping[str, Any]


class Traced:
    """Stage of functions that could be traced: programs that overwrite the tile's own buffers."""

    def __init__(self, mechanism: Weighted, wrt: tuple[str, ...], unshifted: bool):
        normalizer = mechanism.normalizer
        assert isinstance(normalizer, RowLocal)
        names = asked(mechanism)
        s, c = var("s"), var("c")
        env = {name: var(name) for name in names} | {"c": const(0.0) if unshifted else c}
        self.wrt = [var(name) for name in wrt]
        moved = trace(position_of(mechanism), [s], env) if position_of(mechanism) else s
        outputs = [trace(normalizer.weight, [s], env)]
        if normalizer.mass is not None:
            outputs.append(trace(normalizer.mass, [s], env))
        chained = [substitute(e, s, moved) for e in outputs]
        gradients = (
            pullback(chained, [var("gw"), var("gh")], [s, *self.wrt])
            if len(chained) == 2
            else pullback(chained, [var("gw")], [s, *self.wrt])
        )
        self.moves = moved is not s
        self.move = Program([moved], ["s"])
        self.weigh = Program(outputs, ["s"])
        self.back = Program([chained[0], *gradients], ["s", "gw"])
        self.slope = Program([outputs[0], *pullback([outputs[0]], [ONE], [c])], [])
        self.expressions: dict[str, Sequence[Expr]] = {"forward": chained, "backward": gradients}

    def scores(self, s: Tensor, env: Env) -> Tensor:
        return as_tensor(self.move({**env, "s": s})[0], s) if self.moves else s

    def weights(self, s: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
        out = self.weigh({**env, "s": s})
        w = as_tensor(out[0], s)  # a function may turn out to be constant
        return w, (w if out[1] is out[0] else as_tensor(out[1], s)) if len(out) > 1 else None

    def pullback(self, s: Tensor, env: Env, gw: Tensor, gh: Tensor | None, hidden: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(w, ds, d inputs) from raw scores, zero where hidden; s and gw are used up."""
        w, *rest = self.back({**env, "s": s, "gw": gw, "gh": gh})
        w = as_tensor(w, s)
        rest = [as_tensor(r, s) for r in rest]
        if hidden is not None:
            if any(r is w for r in rest):
                w = w.clone()
            hide(w, hidden)
            rest = [hide(r, hidden) for r in rest]
        return w, rest[0], rest[1:]

    def weight_and_slope(self, s: Tensor, env: Env) -> tuple[Tensor, Tensor]:
        """(w, dw/dc) of moved scores, which are kept."""
        w, u = self.slope({**env, "s": s})
        return as_tensor(w, s), as_tensor(u, s)


class Opaque:
    """Stage of functions that cannot be traced: autograd, a tile at a time."""

    def __init__(self, mechanism: Weighted, wrt: tuple[str, ...]):
        self.position = position_of(mechanism)
        self.normalizer: Any = mechanism.normalizer
        self.wrt = wrt

    def scores(self, s: Tensor, env: Env) -> Tensor:
        return as_tensor(call(self.position, s, env=env), s) if self.position else s

    def weights(self, s: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
        mass = self.normalizer.mass
        w = as_tensor(call(self.normalizer.weight, s, env=env), s)
        return w, None if mass is None else as_tensor(call(mass, s, env=env), s)

    def pullback(self, s: Tensor, env: Env, gw: Tensor, gh: Tensor | None, hidden: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        if hidden is not None:
            gw = hide(gw, hidden)
            gh = None if gh is None else hide(gh.expand_as(gw).clone(), hidden)
        with torch.enable_grad():
            leaf = s.detach().requires_grad_()
            leaves = {name: env[name].detach().requires_grad_() for name in self.wrt}
            inner = {**env, **leaves}
            w, h = self.weights(self.scores(leaf, inner), inner)
            outputs = [(w, gw.expand_as(w))] + ([(h, gh.expand_as(h))] if h is not None and gh is not None else [])
            grads = torch.autograd.grad([o for o, _ in outputs], [leaf, *leaves.values()], [g for _, g in outputs], allow_unused=True)
        filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, [leaf, *leaves.values()], strict=True)]
        if hidden is not None:
            return hide(w.detach(), hidden), hide(filled[0], hidden), filled[1:]
        return w.detach(), filled[0], filled[1:]

    def weight_and_slope(self, s: Tensor, env: Env) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            c = env["c"].detach().expand_as(s).clone().requires_grad_()
            w = call(self.normalizer.weight, s.detach(), env={**env, "c": c})
            (u,) = torch.autograd.grad(w.sum(), c)
        return w.detach(), u


def hide(x: Tensor, hidden: Tensor, value: float = 0.0) -> Tensor:
    """Overwrite the hidden pairs of x's last columns."""
    x[..., x.shape[-1] - hidden.shape[-1] :].masked_fill_(hidden, value)
    return x


def position_of(mechanism: Weighted) -> Any:
    return getattr(mechanism.position, "modify", None)


def asked(mechanism: Weighted) -> set[str]:
    """Names that the elementwise functions of a mechanism ask for."""
    normalizer: Any = mechanism.normalizer
    functions = (position_of(mechanism), normalizer.weight, normalizer.mass)
    floor = set(asks(normalizer.floor, 0)) if callable(normalizer.floor) else set()
    return {name for f in functions if f for name in asks(f, 1)} | floor


def as_tensor(x: Any, like: Tensor) -> Tensor:
    """What a function of scores gave, a value a pair: it may have turned out to be a constant, or one number a row."""
    if not isinstance(x, Tensor):
        return torch.full_like(like, float(x))
    return x if x.shape == like.shape else x.expand_as(like).clone()


@remembered(maxsize=512)
def stage_of(mechanism: Weighted, wrt: tuple[str, ...], unshifted: bool) -> Traced | Opaque:
    """The stage of a mechanism; `wrt` names the inputs whose gradient is asked for; `unshifted`: c is 0 everywhere."""
    raw = {item.name for item in mechanism.declared if not item.elementwise}
    if raw & set(asks(position_of(mechanism), 1) if position_of(mechanism) else ()):
        return Opaque(mechanism, wrt)
    try:
        return Traced(mechanism, wrt, unshifted)
    except Untraceable:
        return Opaque(mechanism, wrt)
