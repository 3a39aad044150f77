"""Whether a mechanism fits a host, and the mechanism with what the host does to its scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Bias, Causal, Chain, Full, Hybrid, Mechanism, Program, Recurrent, Softcap, Weighted, with_sinks
from ..algebra.part import asks
from ..engine.door import attend
from ..engine.problem import functions_of
from ..errors import RegardError


def always_causal(mechanism: Mechanism) -> bool:
    """Whether the mechanism never looks ahead, even where no mask is given."""
    if isinstance(mechanism, Hybrid):
        return any(always_causal(member) for member in mechanism.members)
    own = mechanism.mask.causal if isinstance(mechanism, Weighted) else False  # type: ignore[union-attr]
    return mechanism.causal_only or own or (isinstance(mechanism, Program) and mechanism.under == "causal")


def reads_places(mechanism: Mechanism) -> bool:
    """Whether it matters where tokens stand, beside which of them are visible."""
    if isinstance(mechanism, Hybrid):
        return any(reads_places(member) for member in mechanism.members)
    if not isinstance(mechanism, Weighted):
        return True
    asked = {name for function, lead in functions_of(mechanism) for name in asks(function, lead)}
    turned = mechanism.position is not None and not isinstance(mechanism.position, (Softcap, Bias))
    chosen = mechanism.select is not None or mechanism.score.placed  # type: ignore[union-attr]
    return turned or chosen or bool(asked & {"i", "j"}) or not isinstance(mechanism.mask, Full) or not mechanism.normalizer.row_local


def shifts_freely(mechanism: Mechanism) -> bool:
    """Whether only distances between tokens matter, so that a cache may forget its oldest keys."""
    if isinstance(mechanism, Hybrid):
        return all(shifts_freely(member) for member in mechanism.members)
    if not isinstance(mechanism, Weighted) or mechanism.select is not None:
        return False
    position: Any = mechanism.position
    rest = [(function, lead) for function, lead in functions_of(mechanism) if position is None or function != position.modify]
    asked = {name for function, lead in rest for name in asks(function, lead)}
    masked = isinstance(mechanism.mask, Full) or mechanism.mask.relative  # type: ignore[union-attr]
    return masked and (position is None or position.relative) and not asked & {"i", "j"}


def compares_places(mechanism: Mechanism) -> bool:
    """Whether the mechanism sets places of queries against places of keys, which two sequences do not share."""
    if isinstance(mechanism, Recurrent):
        functions = [value for part in mechanism.parts() for value in vars(part).values() if callable(value)]
        return mechanism.turn is not None or any("position" in asks(function) for function in functions)
    if isinstance(mechanism, Hybrid):
        return any(compares_places(member) for member in mechanism.members)
    return isinstance(mechanism, Weighted) and reads_places(mechanism)


Heads = tuple[Tensor, Tensor, Tensor]


def check_host(mechanism: Mechanism, name: str, modules: list[nn.Module], heads: Heads, inputs: dict[str, Any]) -> None:
    """Raise unless the mechanism can be causal where the model is, and see everything where the model does. heads, inputs: a small call."""
    flags = [getattr(module, "is_causal", None) for module in modules]
    if always_causal(mechanism) and False in flags:
        raise RegardError(
            f"{name} is causal by itself, and {named(modules, flags, False)} see the whole sequence; expected a mechanism that runs without a "
            f"causal mask{instead(flags, True)}"
        )
    why = why_not_causal(mechanism, heads, inputs) if True in flags else None
    if why is not None:
        raise RegardError(f"{name} does not run causally ({why}), and {named(modules, flags, True)} are causal{instead(flags, False)}")


@torch.no_grad()
def why_not_causal(mechanism: Mechanism, heads: Heads, inputs: dict[str, Any]) -> str | None:
    """What keeps the mechanism from running under a causal mask, found by running it on a small call; None: nothing does."""
    if isinstance(mechanism, Weighted) and not mechanism.normalizer.row_local:
        return "its weights depend on later queries"
    q, k, v = heads
    try:
        before = attend(q, k, v, mechanism, mask=Causal(), **inputs)
    except RegardError as refused:
        return str(refused) if runs(mechanism, heads, inputs) else None  # where it runs under no mask either, the call was too small
    changed = torch.cat((v[:, :, :-1], v[:, :, -1:] + 1), 2)
    after = attend(q, k, changed, mechanism, mask=Causal(), **inputs)
    return None if torch.equal(before[:, :, :-1], after[:, :, :-1]) else "it reads later values"


def runs(mechanism: Mechanism, heads: Heads, inputs: dict[str, Any]) -> bool:
    try:
        attend(*heads, mechanism, **inputs)
    except RegardError:
        return False
    return True


def named(modules: list[nn.Module], flags: list[Any], wanted: bool) -> str:
    kinds = dict.fromkeys(type(module).__name__ for module, flag in zip(modules, flags, strict=True) if flag is wanted)
    return "layers " + ", ".join(kinds)


def instead(flags: list[Any], wanted: bool) -> str:
    """Which layers would do, as advice."""
    fit = [at for at, flag in enumerate(flags) if flag is wanted]
    return f"; of the layers named, numbers {fit} of them would do" if fit else ""


def dressed(mechanism: Mechanism, softcap: float | None, bias: bool, sinks: bool) -> Mechanism:
    """The mechanism with a host's changes of scores: capped and biased before its own positions, and sinks beside every row."""
    if softcap is None and not bias and not sinks:
        return mechanism
    if not isinstance(mechanism, Weighted):
        what = [word for word, there in ((f"softcap={softcap}", softcap is not None), ("a position bias", bias), ("sinks", sinks)) if there]
        raise RegardError(
            f"the model's attention has {', '.join(what)}, which change scores or rows of weights; {type(mechanism).__name__} has "
            "neither. Expected a weighted mechanism, or only layers without"
        )
    added = [*([] if softcap is None else [Softcap(float(softcap))]), *([Bias()] if bias else [])]
    own = (
        ()
        if mechanism.position is None
        else mechanism.position.positions
        if isinstance(mechanism.position, Chain)
        else (mechanism.position,)
    )
    if bias and any(isinstance(position, Bias) for position in own):
        raise RegardError("the model's attention has a position bias, and so has the mechanism; expected one of them")
    position = mechanism.position if not added else Chain((*added, *own)) if len(added) + len(own) > 1 else added[0]
    normalizer = with_sinks(mechanism.normalizer) if sinks else mechanism.normalizer
    return replace(mechanism, position=position, normalizer=normalizer)
