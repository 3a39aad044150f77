"""Checks of efficient-attention-survey."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal, Learned, LogLinear, Mechanism, Recurrent, Sizes, Weighted
from regard.catalog import get, names
from regard.engine import step
from regard.engine.composed import inputs_of
from regard.engine.door import attend
from regard.engine.recurrent import levels
from regard.errors import RegardError
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.linear.efficient_attention_survey import LEAVES, Place, growth_of, place_of, table, taxonomy

OPTIONS = {
    "lln-attention": {"statistics": "given"},
    "flowformer": {"causal": True},
    "cosformer": {"horizon": 512.0},
    "performer": {"features": 16},
    "swat": {"window": 64},
    "moba": {"block_size": 16, "top_k": 2},
}


def sample(name: str, length: int) -> tuple[Mechanism, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """A causal call of a registered mechanism, gates and betas drawn, learned inputs at their start."""
    mechanism = get(name, **OPTIONS.get(name, {}))
    q, k, v = (torch.randn(1, 2, length, 8, dtype=F64) for _ in range(3))
    if isinstance(mechanism, Recurrent) and mechanism.write == "delta":
        k = torch.nn.functional.normalize(k, dim=-1)
    sizes, inputs = Sizes(1, 2, 2, length, length, 8, 8), {}
    for item in inputs_of(mechanism):
        shape = [sizes.letter(c) or 12 for c in item.shape]
        if isinstance(item.layer, Learned):
            start = item.layer.init(sizes) if callable(item.layer.init) else torch.full(shape, float(item.layer.init))
            inputs[item.name] = (start if item.layer.transform is None else item.layer.transform(start)).to(F64)
        elif item.layer is not None or item.default is None:
            drawn = torch.rand(shape, dtype=F64)
            inputs[item.name] = -drawn if item.name.startswith("log") else drawn
    return mechanism, q, k, v, inputs


def cut(inputs: dict[str, Tensor], mechanism: Mechanism, a: int, b: int) -> dict[str, Tensor]:
    """Inputs with a letter of the sequence, from a to b."""
    found = {}
    for item in inputs_of(mechanism):
        if item.name in inputs:
            x, at = inputs[item.name], next((i for i, c in enumerate(item.shape) if c in "qk"), None)
            found[item.name] = x if at is None or x.shape[at] == 1 else x.narrow(at, a, b - a)
    return found


def streaming() -> list[str]:
    found = []
    for name in names():
        mechanism = get(name, **OPTIONS.get(name, {}))
        whole = {item.name for item in inputs_of(mechanism) if "q" in item.shape and "k" in item.shape}
        if growth_of(mechanism) != "-" and not whole and place_of(name, mechanism).leaf != "dense":
            found.append(name)
    return found


def bytes_at(name: str, lengths: tuple[int, ...]) -> list[int]:
    mechanism, q, k, v, inputs = sample(name, lengths[-1])
    state, start, found = None, 0, []
    for stop in lengths:
        part = cut(inputs, mechanism, start, stop)
        state = step(q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop], mechanism, state, **part)[1]
        found.append(state.bytes)
        start = stop
    return found


@check(
    "efficient-attention-survey",
    "systems whose state at 127, 255, 511 tokens grows otherwise than declared",
    below=0,
    control="all declared constant",
)
def _() -> tuple[float, float]:
    wrong = flat = 0
    for name in streaming():
        mechanism = get(name, **OPTIONS.get(name, {}))
        a, b, c = bytes_at(name, (127, 255, 511))
        seen = "none" if a == b == c else "log" if b - a == c - b else "linear" if c - b == 2 * (b - a) else "?"
        wrong += seen != growth_of(mechanism)
        flat += seen != "none"
    return wrong, flat


def agreement(name: str, broken: bool) -> float:
    """Largest difference between the forms that a system declares, 24 tokens; broken: the step's inputs one token late."""
    mechanism, q, k, v, inputs = sample(name, 24)
    whole, state, outs = attend(q, k, v, mechanism, mask=Causal(), **inputs), None, []
    for t in range(24):
        at = max(0, t - 1) if broken else t
        o, state = step(q[:, :, t : t + 1], k[:, :, at : at + 1], v[:, :, t : t + 1], mechanism, state, **cut(inputs, mechanism, t, t + 1))
        outs.append(o)
    gaps = [naive.gap(torch.cat(outs, 2), whole)]
    if isinstance(mechanism, Recurrent):
        gaps += [naive.gap(attend(q, k, v, mechanism, mask=Causal(), executor=e, **inputs), whole) for e in ("parallel", "step")]
    if isinstance(mechanism, LogLinear):
        gaps.append(naive.gap(levels.parallel(*levels.prepared(mechanism, Causal(), q, k, v, None, inputs, 0)), whole))
    return max(gaps)


@check(
    "efficient-attention-survey",
    "every causal system: parallel, chunk and step forms agree, 24 tokens",
    below=1e-8,
    control="keys that reach the step a token late: the least difference",
)
def _() -> tuple[float, float]:
    return max(agreement(n, False) for n in streaming()), min(agreement(n, True) for n in streaming())


@check(
    "efficient-attention-survey",
    "every causal system: outputs up to token 30 after the others change",
    below=1e-12,
    control="the same systems without a mask, where they run so: the least change",
)
def _() -> tuple[float, float]:
    def change(name: str, mask: Causal | None) -> float:
        mechanism, q, k, v, inputs = sample(name, 48)
        other = [torch.cat((x[:, :, :30], torch.randn_like(x[:, :, 30:])), 2) for x in (q, k, v)]

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, mechanism, mask=mask, **inputs)

        return naive.gap(call(*other)[:, :, :30], call(q, k, v)[:, :, :30])

    both = [n for n in streaming() if place_of(n, get(n, **OPTIONS.get(n, {}))).bidirectional]
    return max(change(n, Causal()) for n in streaming()), min(change(n, None) for n in both)


@check("efficient-attention-survey", "classes of the survey with fewer than two systems", below=0, control="layers and models left out")
def _() -> tuple[float, float]:
    found = taxonomy()
    if set(found) != set(LEAVES):
        return math.nan, math.nan
    few = [leaf for leaf, members in found.items() if len(members) < 2]
    bare = [leaf for leaf, members in found.items() if sum(not isinstance(m, str) for m in members) < 2]
    if few:
        raise RegardError(f"fewer than two systems: {', '.join(few)}")
    return len(few), len(bare)


# The survey's sections, by hand: which class, how training time and the state of a stream grow, whether it runs in both directions.
KNOWN = {
    "cosformer": ("linear, kernel", "L", "none", True),
    "performer": ("linear, kernel", "L", "none", True),
    "gla": ("linear, decay", "L", "none", False),
    "lightning-attention": ("linear, decay", "L", "none", False),
    "lightnet": ("linear, decay", "L", "none", True),
    "gsa": ("linear, decay", "L", "none", False),
    "deltanet": ("linear, fast weight", "L", "none", False),
    "efla": ("linear, fast weight", "L", "none", False),
    "log-linear-attention": ("linear, decay", "L log L", "log", False),
    "local-linear-attention": ("linear, in-context regression", "L^2", "linear", True),
    "nha": ("hybrid, in a layer", "L", "none", False),
    "soft": ("reduced, low rank", "L", "-", True),
    "agent-attention": ("reduced, low rank", "L", "-", True),
    "moba": ("sparse, block routing", "density x L^2", "linear", False),
    "swat": ("sparse, fixed", "density x L^2", "none", False),
    "softmax": ("dense", "L^2", "linear", True),
}


@check(
    "efficient-attention-survey",
    "16 systems whose class, time, state and directions the survey names: how many stand elsewhere; each is a row of the table",
    below=0,
    control="read with a window or a decay taken away",
)
def _() -> tuple[float, float]:
    def places(strip: bool) -> dict[str, Place]:
        found = {}
        for name in KNOWN:
            mechanism = get(name, **OPTIONS.get(name, {}))
            if strip and isinstance(mechanism, Weighted):
                mechanism = Weighted()
            if strip and isinstance(mechanism, Recurrent):
                mechanism = Recurrent()
            found[name] = place_of(name, mechanism)
        return found

    def wrong(found: dict[str, Place]) -> int:
        return sum((p.leaf, p.train, p.state, p.bidirectional) != KNOWN[name] for name, p in found.items())

    lines = table().splitlines()
    rows = [f"| {leaf} | {name} |" for name, (leaf, *_) in KNOWN.items() if name != "softmax"]
    missing = sum(not any(line.startswith(row) for line in lines) for row in rows)
    return wrong(places(False)) + missing, wrong(places(True))
