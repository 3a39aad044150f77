"""From a description to the source of its kernels."""

from __future__ import annotations

import functools
import itertools
import linecache
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...algebra.mask import Mask
from ...algebra.mechanism import Weighted
from ...algebra.normalizer import RowLocal
from ..symbolic import Expr, const, node, pullback, substitute, topological, trace, triton_lines, var
from ..tiled.stage import asked, position_of
from . import template

INDICES = ("b", "h", "i", "j")
SIZES = {
    "max": "tl.where(seen, s, float('-inf'))",
    "max0": "tl.where(seen, s, float('-inf'))",
    "maxabs": "tl.where(seen, tl.abs(s), float('-inf'))",
}


@dataclass(frozen=True)
class Source:
    """Generated text, and the side inputs (name, which of bhqk vary) in the order of its pointers."""

    text: str
    sides: tuple[tuple[str, str], ...]
    shifting: bool


def mask_expression(mask: Mask) -> Expr:
    """The predicate of a mask that reads no tensor."""
    return trace(lambda b, h, i, j: mask.visible(b, h, i, j, {}), [var(name) for name in INDICES], {})


def load_lines(sides: Iterable[tuple[str, str]], indent: str) -> list[str]:
    """Load each side input as a tile that broadcasts against s."""
    lines = []
    for name, varies in sides:
        where = [f"{letter} * {name}_{letter}" for letter in "bh" if letter in varies]
        masks = []
        if "q" in varies:
            where.append(f"rows[:, None] * {name}_q")
            masks.append("(rows[:, None] < Lq)")
        if "k" in varies:
            where.append(f"columns[None, :] * {name}_k")
            masks.append("(columns[None, :] < Lk)")
        guard = f", mask={' & '.join(masks)}, other=0.0" if masks else ""
        lines.append(f"{indent}{name} = tl.load({' + '.join([f'{name}_at', *where])}{guard})")
    return lines


@functools.lru_cache(maxsize=256)
def generate(mechanism: Weighted, mask: Mask, varies: tuple[tuple[str, str], ...]) -> Source:
    """Forward and both backward kernels. `varies`: for each side input, which of b, h, q, k it depends on."""
    normalizer = mechanism.normalizer
    assert isinstance(normalizer, RowLocal)
    known = dict(varies)
    names = asked(mechanism)
    sides = tuple((name, known[name]) for name in sorted(names) if name in known)
    shifting = normalizer.shift in SIZES
    env = {name: var(name) for name in names} | {"c": var("c") if shifting else const(0.0)}
    s = var("s")
    moved = trace(position_of(mechanism), [s], env) if position_of(mechanism) else s
    w = trace(normalizer.weight, [s], env)
    h = trace(normalizer.mass, [s], env) if normalizer.mass is not None else None
    chained = [substitute(w, s, moved)] + ([substitute(h, s, moved)] if h is not None else [])
    cotangents = [var("gw"), var("gh")][: len(chained)]
    (ds,) = pullback(chained, cotangents, [s])
    keep = mask_expression(mask)
    indent = " " * 8
    # An expression without s would be a scalar, not a tile.
    tile = node("mul", s, const(0.0))
    full = [e if any(x is s for x in topological([e])) else node("add", e, tile) for e in (chained[0], ds)]
    blanks: dict[str, Any] = {
        "pointers": "".join(f"{name}_at, " for name, _ in sides),
        "strides": "".join(f"{name}_{letter}, " for name, letters in sides for letter in letters),
        "loads": "\n".join(load_lines(sides, indent)),
        "mask": "\n".join(triton_lines({"keep": keep}, indent + "    ", "seen")),
    }
    clamp = "tl.maximum(tl.max(size, 1), 0.0)" if normalizer.shift == "max0" else "tl.max(size, 1)"
    forward = template.FORWARD.format(
        **blanks,
        start=template.SHIFT["start"] if shifting else "",
        stored=template.SHIFT["stored"] if shifting else "tl.zeros((BLOCK_M,), tl.float32)",
        position="\n".join(triton_lines({"s": moved}, indent)) if moved is not s else "",
        shift=template.SHIFT["body"].format(size=SIZES[normalizer.shift], clamped=clamp) if shifting else "",
        weights="\n".join(triton_lines({"w": w} | ({"m": h} if h is not None else {}), indent)),
        mass=f"{indent}total += tl.sum(tl.where(seen, m, 0.0), 1)" if h is not None else "",
    )
    gradients = "\n".join(triton_lines({"w": full[0], "ds": full[1]}, indent))
    backward = [template.BACKWARD.format(**{**blanks, **walk}, gradients=gradients) for walk in (template.WALK_QUERIES, template.WALK_KEYS)]
    text = template.COMMON + forward + "".join(backward)
    return Source("\n".join(line for line in text.split("\n") if line.strip() or not line) + "\n", sides, shifting)


_numbers = itertools.count()


@functools.lru_cache(maxsize=256)
def compiled(source: Source) -> Mapping[str, Any]:
    """The kernels of a source, as Triton functions. The text lives in memory only; linecache lets Triton read it back."""
    name = f"<regard kernel {next(_numbers)}>"
    linecache.cache[name] = (len(source.text), None, source.text.splitlines(keepends=True), name)
    space: dict[str, Any] = {"__name__": "regard_kernel"}
    exec(compile(source.text, name, "exec"), space)  # noqa: S102 - printed from traced expressions, never a user's string
    return space
