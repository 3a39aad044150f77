"""The planner: which executor runs a call, why, why not the others, and what it will cost. A pure, cached function."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from ..algebra.mask import Full, Mask
from ..algebra.mechanism import Mechanism, Recurrent, Weighted
from ..algebra.normalizer import SOFTMAX, RowLocal
from ..algebra.part import Input, Sizes
from ..algebra.rows import RowWise
from ..algebra.snapshot import restless
from ..errors import MissingDependency, RegardError
from . import flex, native, order, sdpa, table
from .layout import static_layout
from .problem import check_functions, combine_masks
from .recurrent.pose import declared_of

WEIGHTED = ("sdpa", "table", "native", "tiled", "flex", "triton", "rows", "dense", "reference")
RECURRENT = ("chunk", "step", "parallel", "reference")
ELEMENT = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


@dataclass(frozen=True)
class Plan:
    """What would run. flops: multiply-adds times two. bytes: read and written once by a perfect kernel. memory: beyond q, k, v, out.

    density: share of the Lq x Lk plane whose blocks are worked on (None when it depends on the values of q and k). choice: FLOP of choosing
    what is read, part of flops (None: not known, or nothing is chosen); flops then counts every pair, as if all were read.
    """

    executor: str
    why: str
    refused: tuple[tuple[str, str], ...]
    flops: int
    bytes: int
    memory: int
    density: float | None
    sizes: Sizes
    mechanism: Mechanism = field(repr=False)
    mask: Mask = field(repr=False)
    form: str | None = field(default=None, repr=False)
    direct: bool = field(default=False, repr=False)  # SDPA takes q, k and v as they come
    source: str | None = field(default=None, repr=False)
    choice: int | None = None

    @functools.cached_property
    def whole_mask(self) -> Mask:
        """The mask of the call and the mechanism's own."""
        return combine_masks(self.mechanism, self.mask) if isinstance(self.mechanism, Weighted) else self.mask

    @functools.cached_property
    def mask_inputs(self) -> dict[str, Input]:
        """What the mask reads."""
        return {item.name: item for part in self.whole_mask.parts() for item in getattr(part, "inputs", ())}

    @functools.cached_property
    def inputs(self) -> dict[str, Input]:
        """Everything a call may be given beside q, k and v."""
        own = (
            declared_of(self.mechanism) if isinstance(self.mechanism, Recurrent) else {item.name: item for item in self.mechanism.declared}
        )
        return {**own, **self.mask_inputs}

    def __str__(self) -> str:
        seen = "depends on q and k" if self.density is None else f"{self.density:.1%} of the score matrix"
        if getattr(self.mechanism, "select", None) is not None:
            seen += ", choosing it costs " + ("an unknown part" if self.choice is None else human(self.choice, 1000, "FLOP"))
        s = self.sizes
        lines = [
            f"executor  {self.executor}: {self.why}",
            f"call      q ({s.batch}, {s.heads}, {s.q_len}, {s.head_dim}), k ({s.batch}, {s.kv_heads}, {s.k_len}, {s.head_dim}), "
            f"v ({s.batch}, {s.kv_heads}, {s.k_len}, {s.value_dim}), mask {self.mask!r}".replace("regard.algebra.", ""),
            f"works on  {seen}",
            f"cost      {human(self.flops, 1000, 'FLOP')}, {human(self.bytes, 1024, 'B')} in and out, {human(self.memory, 1024, 'B')} of workspace",
            *[f"not       {name}: {why}" for name, why in self.refused],
        ]
        return "\n".join(lines + ([self.source] if self.source else []))


def human(value: float, base: int, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < base or prefix == "P":
            return f"{value:.3g} {prefix}{unit}"
        value /= base
    raise AssertionError


def dense_bytes(sizes: Sizes, dtype: torch.dtype) -> int:
    q = sizes.batch * sizes.heads * sizes.q_len
    k = sizes.batch * sizes.kv_heads * sizes.k_len
    return (q + k) * (sizes.head_dim + sizes.value_dim) * ELEMENT.get(dtype, 4)


def static_density(mechanism: Weighted, mask: Mask, sizes: Sizes) -> float | None:
    if mechanism.select is not None or mask.reads:
        return None
    if isinstance(mask, Full):
        return 1.0
    block = 128 if sizes.k_len > 128 else max(16, sizes.k_len)
    blocks = min(block, max(1, sizes.q_len)), block
    found = order.arrangement(mechanism, mask, sizes)
    if found is not None:
        mask, blocks = found[0], order.BLOCKS
    return static_layout(mask, sizes, *blocks, torch.device("cpu")).density


def make(
    mechanism: Mechanism,
    mask: Mask,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    grad: bool,
    inputs: frozenset[str],
    wanted: str | None,
    compiling: bool = False,
) -> Plan:
    """Decide. `wanted` names an executor to use; RegardError if it cannot."""
    wide = ELEMENT.get(torch.promote_types(dtype, torch.float32), 4)
    if sizes.empty:
        return Plan("none", "no sequences, no queries or no keys: nothing to compute", (), 0, 0, 0, 0.0, sizes, mechanism, mask)
    if isinstance(mechanism, Weighted):
        return weighted(mechanism, combine_masks(mechanism, mask), mask, sizes, dtype, device, grad, wanted, wide)
    if isinstance(mechanism, Recurrent):
        if mechanism.causal_only and isinstance(mask, Full):
            raise RegardError(
                f"mask={mask!r}: this recurrence reads the past alone; expected Causal() or None, or a mechanism that reads all keys"
            )
        if wanted not in (None, *RECURRENT):
            raise RegardError(f"executor={wanted!r}; a recurrence runs in one of {', '.join(RECURRENT)}")
        name = wanted or "chunk"
        width = sizes.value_dim + mechanism.weighs
        state = sizes.batch * sizes.heads * sizes.head_dim * width
        tokens = sizes.batch * sizes.heads * sizes.k_len
        quadratic = name in ("parallel", "reference")
        flops = 2 * tokens * (sizes.k_len if quadratic else 128 + 2 * sizes.head_dim) * (sizes.head_dim + width) // (1 if quadratic else 2)
        memory = tokens * sizes.k_len * wide if quadratic else (min(sizes.k_len, 1024) // 64 + 1) * state * wide
        why = {
            "chunk": "a running state: time linear in length",
            "step": "one token at a time",
            "parallel": "the quadratic form",
            "reference": "the quadratic form in float64",
        }[name]
        others = (
            ()
            if wanted
            else (
                ("parallel", "time and memory grow with the square of the length"),
                ("step", "one token at a time is slower for many tokens"),
            )
        )
        return Plan(name, why, others, flops, dense_bytes(sizes, dtype), memory, None, sizes, mechanism, mask)
    if wanted not in (None, "composed", "reference", "tiled"):
        raise RegardError(f"executor={wanted!r}; {type(mechanism).__name__} runs composed, or in the reference")
    flops = 4 * sizes.batch * sizes.heads * sizes.q_len * min(sizes.k_len, 64) * (sizes.head_dim + sizes.value_dim)
    return Plan(
        "reference" if wanted == "reference" else "composed",
        f"a few calls of the mechanisms inside {type(mechanism).__name__}",
        (),
        flops,
        dense_bytes(sizes, dtype),
        dense_bytes(sizes, dtype),
        None,
        sizes,
        mechanism,
        mask,
    )


def weighted(
    mechanism: Weighted,
    mask: Mask,
    given_mask: Mask,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    grad: bool,
    wanted: str | None,
    wide: int,
) -> Plan:
    check_functions(mechanism, mask)
    if mask.causal and not isinstance(mechanism.normalizer, (RowLocal, RowWise)):
        raise RegardError(
            f"mask={mask!r}: weights of {type(mechanism.normalizer).__name__} depend on later rows, so a causal mask would not keep them from "
            "being read; expected a mask that is not causal"
        )
    score: Any = mechanism.score
    refused: dict[str, str] = {}
    local = isinstance(mechanism.normalizer, RowLocal)
    root = local and mechanism.normalizer.shift == "root"  # type: ignore[attr-defined]
    if not local:
        rowwise = isinstance(mechanism.normalizer, RowWise)
        why = "is a function of whole rows" if rowwise else "is not row-local: a weight depends on other rows"
        for name in ("sdpa", "table", "flex", "native", "tiled", "triton", *(() if rowwise else ("rows",))):
            refused[name] = f"{type(mechanism.normalizer).__name__} {why}"
        if rowwise:
            refused["dense"] = "it would hold the whole matrix of weights"
    else:
        refused.update(
            {
                name: why
                for name, why in (
                    ("sdpa", sdpa_refusal(mechanism, mask, sizes)),
                    ("table", table.refusal(mechanism, sizes, device)),
                    ("flex", flex.refusal(mechanism, device.type)),
                    ("triton", triton_refusal(mechanism, mask, sizes, device)),
                    ("native", native.refusal(mechanism, mask, sizes, dtype, device)),
                )
                if why
            }
        )
        refused["dense"] = "it would hold the whole matrix of weights"
        refused["rows"] = "tiles need not hold whole rows of elementwise weights"
    refused["reference"] = "float64 and the whole matrix: for checking"
    if wanted is not None:
        if wanted not in WEIGHTED:
            raise RegardError(f"executor={wanted!r}; expected one of {', '.join(WEIGHTED)}")
        if wanted in refused and wanted not in ("dense", "reference"):
            raise RegardError(f"executor={wanted!r} cannot run this: {refused[wanted]}")
        name, why = wanted, "asked for"
    elif not local and "rows" not in refused:
        name, why = "rows", "a function of whole rows: blocks of queries with all their keys"
    elif not local:
        name, why = "dense", "the normalizer needs the whole matrix"
    elif "sdpa" not in refused:
        name, why = "sdpa", "plain softmax over dot products: PyTorch's fused kernel"
    elif device.type == "cuda" and "triton" not in refused:
        name, why = "triton", "the generated kernel: row-local weights on a GPU"
    elif device.type == "cuda" and "flex" not in refused and not mask.reads:
        name, why = "flex", "FlexAttention can express it"
    elif "native" not in refused and worth_compiling(sizes) and not (restless(mechanism) or restless(mask)):
        name, why = "native", f"the generated kernel: row-local weights on a CPU, in blocks of {native.block()}"
    elif "table" not in refused:
        name, why = "table", "so few pairs that those chosen are looked up one by one"
    else:
        if "native" not in refused and device.type == "cpu":
            small = "too small to be worth compiling for"
            refused["native"] = "its functions come with other numbers at each call" if worth_compiling(sizes) else small
        name, why = "tiled", "row-local weights, tile by tile" + (", roots found on whole rows" if root else "")
    refused.pop(name, None)
    density = static_density(mechanism, mask, sizes) if name not in ("dense", "reference") else 1.0
    pairs = sizes.batch * sizes.heads * sizes.q_len * sizes.k_len * (1.0 if density is None else density)
    flops = int(2 * pairs * (sizes.head_dim + sizes.value_dim) * (3.5 if grad else 1))
    choice = None if mechanism.select is None else mechanism.select.flops(sizes)
    flops += choice or 0
    tile = (1 << 19) * 4 if not root else 4 * (1 << 19) * 4
    whole = sizes.batch * sizes.heads * sizes.q_len * sizes.k_len * wide
    rows = sizes.batch * sizes.heads * sizes.q_len * (sizes.value_dim + 3) * wide
    memory = {
        "sdpa": 0,
        "table": tile * wide + whole // wide,
        "tiled": tile * wide + rows,
        "flex": 0,
        "triton": rows,
        "native": rows,
        "rows": 6 * (1 << 20) * wide,
        "dense": 2 * whole,
        "reference": 16 * whole // wide,
    }[name]
    return Plan(
        name,
        why,
        tuple(refused.items()),
        flops,
        dense_bytes(sizes, dtype),
        memory,
        density,
        sizes,
        mechanism,
        given_mask,
        sdpa.form(mask, sizes) if name == "sdpa" else None,
        name == "sdpa" and mechanism.position is None and mechanism.values is None and not score.parts_beyond_dot,
        choice=choice,
    )  # type: ignore[union-attr]


def worth_compiling(sizes: Sizes) -> bool:
    """Whether a call is so large that half a second of compiling, once a machine, is soon paid back."""
    return sizes.q_len >= 16 and sizes.batch * sizes.heads * sizes.q_len * sizes.k_len >= 1 << 20


def sdpa_refusal(mechanism: Weighted, mask: Mask, sizes: Sizes) -> str:
    if mechanism.normalizer != SOFTMAX:
        return "only softmax"
    if not mechanism.score.dot or getattr(mechanism.position, "modify", None) is not None:  # type: ignore[union-attr]
        return "only dot products"
    if mechanism.select is not None:
        return "only static masks"
    if sizes.head_dim != sizes.value_dim and sizes.q_len * sizes.k_len > 1 << 16:
        return "head_dim and value_dim differ, which its fused kernels do not take"
    if sdpa.form(mask, sizes) is None:
        return "this mask would have to be materialised"
    return ""


def triton_refusal(mechanism: Weighted, mask: Mask, sizes: Sizes, device: torch.device) -> str:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a CUDA device (or TRITON_INTERPRET=1)"
    try:
        from .triton import refusal
    except MissingDependency as why:
        return str(why)
    return refusal(mechanism, mask, sizes)
