"""From a description to the C source of its kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ...algebra.mask import Mask
from ...algebra.mechanism import Weighted
from ...algebra.normalizer import RowLocal
from ...algebra.snapshot import remembered
from ..kernels import mask_expression
from ..symbolic import ONE, Expr, c_lines, const, pullback, substitute, topological, trace, var
from ..tiled.stage import asked, position_of

SIZES = {"max": "s", "max0": "s", "maxabs": "fabsf(s)", "root": "s"}
BODY = " " * 8
FLOAT32 = 1.2e-7  # relative precision of what the kernel computes with


@dataclass(frozen=True)
class Source:
    """Generated text, and the side inputs (name, which of bhqk vary) in the order of its pointers.

    wrt: the side inputs with gradients. bounded: |q||k| bounds the scores that exp sees, which then may need no shift.
    """

    text: str
    sides: tuple[tuple[str, str], ...]
    wrt: tuple[str, ...]
    bounded: bool


@functools.cache
def template() -> str:
    return resources.files(__package__).joinpath("template.c").read_text()


def used(names: Iterable[str], *expressions: Expr) -> set[str]:
    found = {e.args[0] for e in topological(expressions) if e.op == "var"}
    return found & set(names)


@remembered(maxsize=256)
def generate(mechanism: Weighted, mask: Mask, varies: tuple[tuple[str, str], ...], wrt: tuple[str, ...] = ()) -> Source:
    """Forward and backward. `varies`: for each side input, which of b, h, q, k it depends on; `wrt`: side inputs to differentiate by."""
    normalizer = mechanism.normalizer
    assert isinstance(normalizer, RowLocal)
    known = dict(varies)
    names = asked(mechanism) | {name for name, _ in mask.side_shapes}
    sides = tuple((name, known[name]) for name in sorted(names) if name in known)
    wrt = tuple(name for name, _ in sides if name in wrt)
    root, shifting = normalizer.shift == "root", normalizer.shift in ("max", "max0", "maxabs")
    env = {name: var(name) for name in names} | {"c": var("c") if shifting or root else const(0.0)}
    s = var("s")
    score: Any = mechanism.score
    paired = trace(score.linked, [s], {}) if score.raw == "distance" else s
    moved = trace(position_of(mechanism), [paired], env) if position_of(mechanism) else paired
    outputs = [trace(normalizer.weight, [s], env)]
    if normalizer.mass is not None and not root:
        outputs.append(trace(normalizer.mass, [s], env))
    chained = [substitute(e, s, moved) for e in outputs]
    ds, *extra = pullback(chained, [var("gw"), var("gh")][: len(chained)], [s, *[var(name) for name in wrt]])
    slope = pullback(outputs[:1], [ONE], [var("c")])[0] if root else const(0.0)
    floor: Any = trace(normalizer.floor, [], env) if callable(normalizer.floor) else const(float(normalizer.floor))
    moving = {"s", "j", "gw", *(name for name, letters in sides if "k" in letters)}

    def printed(prefix: str, **expressions: Expr) -> tuple[str, str]:
        return c_lines(expressions, BODY, moving, prefix)

    position = printed("p", moved=moved) if moved is not s else ("", "")
    position = (position[0], f"{position[1]}\n{BODY}s = moved;" if moved is not s else "")
    soft = position if not (shifting or root) else ("", "")
    seen = printed("v", keep=mask_expression(mask))
    weight = printed("t", w=outputs[0], m=outputs[1] if len(outputs) > 1 else const(0.0))
    slopes = printed("t", w=outputs[0], u=slope)
    gradients = {f"grad_{name}": e for name, e in zip(wrt, extra, strict=True)}
    pulled = printed("t", w=chained[0], ds=ds, **gradients)
    place = {name: at for at, (name, _) in enumerate(sides)}
    each = [name for name in wrt if "k" in known[name]]
    summed = [name for name in wrt if "k" not in known[name]]
    blanks = {
        "SIDES": str(len(sides)),
        "SHIFTING": str(int(shifting)),
        "DISTANCE": str(int(score.raw == "distance")),
        "ROOT": str(int(root)),
        "SIZE": SIZES.get(normalizer.shift, "s"),
        "CLAMP": str(int(normalizer.shift == "max0")),
        "ROW_LOADS": "\n".join(
            f"    const float *restrict {name}_at = r->side[{at}] + j0;" if "k" in letters else f"    const float {name} = *r->side[{at}];"
            for at, (name, letters) in enumerate(sides)
        ),
        "SCALAR_LOADS": "\n".join(
            f"    const float {name} = *r->side[{at}];" for at, (name, letters) in enumerate(sides) if "k" not in letters
        ),
        "PAIR_LOADS": "\n".join(f"{BODY}const float {name} = {name}_at[at];" for name, letters in sides if "k" in letters),
        "SEEN_FIXED": seen[0],
        "SEEN": seen[1],
        "POSITION_FIXED": position[0],
        "POSITION": position[1],
        "WEIGHT_FIXED": "\n".join([soft[0], weight[0]]),
        "WEIGHT": "\n".join([soft[1], weight[1]]),
        "PULLBACK_FIXED": pulled[0],
        "PULLBACK": pulled[1],
        "SLOPE_FIXED": slopes[0],
        "SLOPE": slopes[1],
        "FLOOR": "\n".join(printed("t", span=floor)),
        "GRAD_START": "\n".join(
            [f"    float *restrict {name}_to = r->grad[{place[name]}] + j0;" for name in each]
            + [f"    float {name}_sum = 0.0f;" for name in summed]
        ),
        "GRAD_SUMS": f"reduction(+ : {', '.join(f'{name}_sum' for name in summed)})" if summed else "",
        "GRAD_STEP": "\n".join(
            [f"{BODY}{name}_to[at] += seen ? grad_{name} : 0.0f;" for name in each]
            + [f"{BODY}{name}_sum += seen ? grad_{name} : 0.0f;" for name in summed]
        ),
        "GRAD_END": "\n".join(f"    *r->grad[{place[name]}] += {name}_sum;" for name in summed),
    }
    text = template()
    for blank, filled in blanks.items():
        text = text.replace(f"@{blank}@", filled)
    lines = [line for line, before in zip(text.split("\n"), ["", *text.split("\n")], strict=False) if line.strip() or before.strip()]
    bounded = shifting and moved is s and normalizer.anchor <= FLOAT32
    return Source("\n".join(lines), sides, wrt, bounded)
