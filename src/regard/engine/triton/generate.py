"""From a description to the source of its kernels."""

from __future__ import annotations

import functools
import itertools
import linecache
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...algebra.mask import Mask
from ...algebra.mechanism import Weighted
from ...algebra.normalizer import RowLocal
from ...algebra.snapshot import remembered
from ..kernels import mask_expression
from ..symbolic import ONE, Expr, const, node, pullback, substitute, topological, trace, triton_lines, var
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
    """Generated text, and the side inputs (name, which of bhqk vary) in the order of its pointers. wrt: those with gradients."""

    text: str
    sides: tuple[tuple[str, str], ...]
    wrt: tuple[str, ...]
    root: bool


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


def gather_lines(wrt: Iterable[str], letters: Mapping[str, str], indent: str) -> list[str]:
    """Add the gradient of each side input, a tile, to where the input came from: summed over what it does not depend on."""
    lines = []
    for name in wrt:
        varies = letters[name]
        at = " + ".join([f"{name}_to", *[f"{letter} * {name}_{letter}" for letter in "bh" if letter in varies]])
        tile = f"tl.where(seen, grad_{name}, 0.0)"
        place = {
            (True, True): (f"{at} + rows[:, None] * {name}_q + columns[None, :] * {name}_k", tile, ", mask=seen"),
            (True, False): (f"{at} + rows * {name}_q", f"tl.sum({tile}, 1)", ", mask=rows < Lq"),
            (False, True): (f"{at} + columns * {name}_k", f"tl.sum({tile}, 0)", ", mask=columns < Lk"),
            (False, False): (at, f"tl.sum(tl.sum({tile}, 1), 0)", ""),
        }["q" in varies, "k" in varies]
        lines.append(f"{indent}tl.atomic_add({place[0]}, {place[1]}{place[2]})")
    return lines


@remembered(maxsize=256)
def generate(mechanism: Weighted, mask: Mask, varies: tuple[tuple[str, str], ...], wrt: tuple[str, ...] = ()) -> Source:
    """Forward and both backward kernels. `varies`: for each side input, which of b, h, q, k it depends on; `wrt`: which to differentiate by."""
    normalizer = mechanism.normalizer
    assert isinstance(normalizer, RowLocal)
    known = dict(varies)
    names = asked(mechanism) | {name for name, _ in mask.side_shapes}
    sides = tuple((name, known[name]) for name in sorted(names) if name in known)
    wrt = tuple(name for name, _ in sides if name in wrt)
    root, shifting = normalizer.shift == "root", normalizer.shift in SIZES
    env = {name: var(name) for name in names} | {"c": var("c") if shifting or root else const(0.0)}
    s = var("s")
    moved = trace(position_of(mechanism), [s], env) if position_of(mechanism) else s
    w = trace(normalizer.weight, [s], env)
    h = trace(normalizer.mass, [s], env) if normalizer.mass is not None and not root else None
    chained = [substitute(w, s, moved)] + ([substitute(h, s, moved)] if h is not None else [])
    pulled = node("sub", var("gw"), var("gh")) if root else var("gw")
    ds, *extra = pullback(chained, [pulled, var("gh")][: len(chained)], [s, *[var(name) for name in wrt]])
    u = pullback([w], [ONE], [var("c")])[0] if root else const(0.0)
    indent, deep = " " * 8, " " * 12
    # An expression without s would be a scalar, not a tile.
    tile = node("mul", s, const(0.0))

    def tiled(e: Expr) -> Expr:
        return e if any(x is s for x in topological([e])) else node("add", e, tile)

    keep = mask_expression(mask)
    blanks: dict[str, Any] = {
        "pointers": "".join(f"{name}_at, " for name, _ in sides),
        "strides": "".join(f"{name}_{letter}, " for name, letters in sides for letter in letters),
        "loads": "\n".join(load_lines(sides, indent)),
        "mask": "\n".join(triton_lines({"keep": keep}, deep, "seen")),
        "position": "\n".join(triton_lines({"s": moved}, indent, "moved")) if moved is not s else "",
    }
    blanks["scores"] = template.SCORES.format(**blanks)
    weights = {"w": tiled(w)} | ({"m": tiled(h)} if h is not None else {})
    if root:
        floor: Any = trace(normalizer.floor, [], env) if callable(normalizer.floor) else const(float(normalizer.floor))
        read = {e.args[0] for e in topological([floor]) if e.op == "var"}
        of_rows = [(name, letters) for name, letters in sides if name in read]
        forward = template.ROOT_FORWARD.format(
            **blanks,
            deep_scores=textwrap.indent(blanks["scores"], "    "),
            floor_loads="\n".join(load_lines(of_rows, " " * 4)),
            floor="\n".join(triton_lines({"span": floor}, " " * 4, "floor")),
            slopes="\n".join(triton_lines({"w": tiled(w), "u": tiled(u)}, deep, "near")),
            weights="\n".join(triton_lines(weights, indent)),
        )
    else:
        clamp = "tl.maximum(tl.max(size, 1), 0.0)" if normalizer.shift == "max0" else "tl.max(size, 1)"
        forward = template.FORWARD.format(
            **blanks,
            start=template.SHIFT["start"] if shifting else "",
            stored=template.SHIFT["stored"] if shifting else "tl.zeros((BLOCK_M,), tl.float32)",
            shift=template.SHIFT["body"].format(size=SIZES[normalizer.shift], clamped=clamp) if shifting else "",
            weights="\n".join(triton_lines(weights, indent)),
            mass=f"{indent}total += tl.sum(tl.where(seen, m, 0.0), 1)" if h is not None else "",
        )
    outputs = {"w": tiled(chained[0]), "ds": tiled(ds)}
    by_input = {f"grad_{name}": tiled(e) for name, e in zip(wrt, extra, strict=True)}
    slopes = "\n".join(triton_lines({"u": tiled(substitute(u, s, moved))}, indent, "near")) if root else ""
    backward = ""
    for walk, found in ((template.WALK_QUERIES, outputs | by_input), (template.WALK_KEYS, outputs)):
        filled = {**blanks, **walk, "pairs": template.PAIRS.format(**{**blanks, **walk})}
        filled["gradients"] = "\n".join(triton_lines(found, indent))
        filled["before"] = template.ROOT_BEFORE.format(**filled, slopes=slopes) if root and walk["name"] == "dq" else ""
        if walk["name"] == "dq":
            filled["results"] = ", ".join(["DQ", *[f"{name}_to" for name in wrt]])
            filled["gather"] = "\n".join([filled["gather"], *gather_lines(wrt, known, indent)])
        backward += template.BACKWARD.format(**filled)
    text = template.COMMON + template.HEAD.format(**blanks) + forward + backward
    return Source("\n".join(line for line in text.split("\n") if line.strip() or not line) + "\n", sides, wrt, root)


_numbers = itertools.count()


@functools.lru_cache(maxsize=256)
def compiled(source: Source) -> Mapping[str, Any]:
    """The kernels of a source, as Triton functions. The text lives in memory only; linecache lets Triton read it back."""
    name = f"<regard kernel {next(_numbers)}>"
    linecache.cache[name] = (len(source.text), None, source.text.splitlines(keepends=True), name)
    space: dict[str, Any] = {"__name__": "regard_kernel"}
    exec(compile(source.text, name, "exec"), space)  # noqa: S102 - printed from traced expressions, never a user's string
    return space
