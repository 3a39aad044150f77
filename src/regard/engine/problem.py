"""One attention call made canonical: inputs checked and filled in, q and k prepared, indices and visible counts at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..algebra.mask import Mask, conjuncts
from ..algebra.mechanism import Mechanism, Weighted
from ..algebra.part import Input, Sizes, asks, call, show
from ..algebra.rows import RowWise
from ..algebra.select import Selection, View
from ..algebra.snapshot import remembered
from ..errors import RegardError, nearest
from .layout import some_and_every
from .pairs import indices, visible, visible_counts


def sizes_of(q: Tensor, k: Tensor, v: Tensor, widened: bool = False) -> Sizes:
    """The sizes of a call; raises RegardError when q, k and v do not fit together (`widened`: q and k may be wider than v)."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            came = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise RegardError(f"{name} is {came}; expected a tensor (batch, heads, length, channels)")
        if not x.is_floating_point():
            raise RegardError(f"{name} has dtype {x.dtype}; expected a floating dtype")
        if x.device != q.device or (x.dtype != q.dtype and not (widened and name == "v")):
            raise RegardError(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; expected one dtype and device")
    if not (q.shape[0] == k.shape[0] == v.shape[0]):
        raise RegardError(f"batch sizes differ: q {q.shape[0]}, k {k.shape[0]}, v {v.shape[0]}")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise RegardError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; expected the same heads and length")
    if q.shape[3] != k.shape[3]:
        raise RegardError(f"q has head_dim {q.shape[3]} but k has {k.shape[3]}; expected the same")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise RegardError(f"q has {q.shape[1]} heads and k {k.shape[1]}; expected the first to be a multiple of the second")
    if 0 in (q.shape[3], v.shape[3]):
        raise RegardError(f"empty q, k or v: q {tuple(q.shape)}, v {tuple(v.shape)}; expected at least one channel")
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    return Sizes(*sizes) if type(sizes[0]) is int else Sizes(*map(int, sizes))  # torch.jit.trace and torch.export have others


def check_names(given: Mapping[str, Any], declared: Mapping[str, Input], mechanism: Mechanism) -> None:
    for name, value in given.items():
        if name not in declared:
            known = ", ".join(sorted(declared)) or "none"
            raise RegardError(f"unknown input {name!r}; this mechanism declares: {known}.{nearest(name, declared)}")
        if not isinstance(value, (Tensor, int, float)):
            raise RegardError(f"input {name!r} is {type(value).__name__}; expected a tensor or a number")


def fill_inputs(
    declared: Mapping[str, Input], given: Mapping[str, Any], sizes: Sizes, like: Tensor, counts: Tensor | None = None
) -> dict[str, Tensor]:
    """Every declared input as a checked tensor, elementwise ones in canonical form; `pool` defaults are left out."""
    out: dict[str, Tensor] = {}
    for name, spec in declared.items():
        value = given.get(name)
        if value is None:
            if spec.default is None:
                raise RegardError(
                    f"input {name!r} is missing; expected a {spec.dtype} tensor of shape ({' '.join(spec.shape) or 'scalar'})"
                )
            if isinstance(spec.default, str):  # "pool": made by the mechanism itself
                continue
            value = spec.default
            if callable(value):
                wanted = asks(value, 0)
                if "n" in wanted and counts is None:
                    raise RegardError(f"the default of input {name!r} needs visible counts, which this call has not")
                value = value(**{key: {"sizes": sizes, "n": counts}[key] for key in wanted})
                if isinstance(value, Tensor) and value.is_floating_point():
                    value = value.to(torch.promote_types(like.dtype, torch.float32))
                if isinstance(value, Tensor) and value.dim() == 4 and len(spec.shape) != 4:
                    out[name] = value.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
                    continue
        if not isinstance(value, Tensor):
            kind = torch.promote_types(like.dtype, torch.float32) if spec.dtype == "float" else None
            value = torch.tensor(value, dtype=kind, device=like.device)
        if value.dim() == 0 and spec.shape:
            value = value if "f" in spec.shape else value.reshape([1] * len(spec.shape))
        value = value.to(like.device)
        spec.check(value, sizes)
        if value.is_floating_point() and value.dtype != torch.float64:
            value = value.to(torch.promote_types(like.dtype, torch.float32))
        out[name] = spec.canonical(value) if spec.elementwise else value
    return out


@dataclass
class Problem:
    """A weighted call ready to run: prepared q and k, v, and everything elementwise."""

    mechanism: Weighted
    mask: Mask
    sizes: Sizes
    q: Tensor
    k: Tensor
    v: Tensor
    inputs: dict[str, Tensor]
    counts: Tensor | None
    selection: Selection | None = None
    tiling: Any = None  # sizes of tiles, where the caller has a say
    blocks: tuple[int, int] | None = None  # the block sizes (queries, keys) that suit the mask
    want_count: bool = False  # whether the visible count of each row must be returned

    @property
    def position_free(self) -> bool:
        """Whether weights depend on scores and rows alone, not on which key a score belongs to."""
        if not ({"j"} & set(asks(self.mechanism.normalizer.weight))):  # type: ignore[attr-defined]
            return all(x.dim() != 4 or x.shape[3] == 1 for x in self.inputs.values())
        return False

    @property
    def offset(self) -> int:
        return self.sizes.k_len - self.sizes.q_len

    def env(self) -> dict[str, Any]:
        """Names that whole-tensor functions may ask for."""
        return {**indices(self.sizes, self.q.device), **self.inputs, "n": self.counts, "offset": self.offset, "k_len": self.sizes.k_len}

    def with_(self, **changes: Any) -> Problem:
        return replace(self, **changes)


def functions_of(mechanism: Weighted) -> list[tuple[Any, int]]:
    """Every plain function a weighted mechanism calls, with its number of leading arguments."""
    normalizer, score = mechanism.normalizer, mechanism.score
    found = [(getattr(mechanism.position, "modify", None), 1), (getattr(score, "row_scale", None), 1)]
    found += [(getattr(normalizer, name, None), 1) for name in ("weight", "mass", "divide")]
    found += [(mechanism.values, 1)]
    found += [(normalizer.function, 2)] if isinstance(normalizer, RowWise) else []
    found += [(normalizer.floor, 0)] if callable(getattr(normalizer, "floor", None)) else []  # type: ignore[attr-defined]
    return [(function, lead) for function, lead in found if function is not None]


@remembered(maxsize=1024)
def wants_counts(mechanism: Weighted) -> bool:
    """Whether anything asks for the visible count n."""
    row_scale = getattr(mechanism.score, "row_scale", None)
    defaults = [item.default for item in mechanism.declared if callable(item.default)]
    return (
        row_scale is not None
        or any("n" in asks(f, lead) for f, lead in functions_of(mechanism))
        or any("n" in asks(default, 0) for default in defaults)
    )


def check_functions(mechanism: Weighted, mask: Mask) -> None:
    """Raise unless every name that a plain function asks for is an index or a declared input."""
    declared = {item.name for item in mechanism.declared} | {item.name for part in mask.parts() for item in getattr(part, "inputs", ())}
    for function, lead in functions_of(mechanism):
        for name in asks(function, lead):
            if name not in declared | {"b", "h", "i", "j", "n", "c", "head_dim", "v"}:
                raise RegardError(
                    f"function {show(function)} asks for {name!r}, which is neither an index nor a declared input; "
                    f"declare it with inputs=(Input({name!r}, ...),) and pass it to attend"
                )


def keys_in_sight(mask: Mask, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """(B or 1, Lk or 1) bool: keys that some query may see, as far as the mask's tensors tell it at once; None: they do not."""
    found: Tensor | None = None
    for part in conjuncts(mask):
        seen = part.in_sight(inputs)
        if seen is not None:
            found = seen if found is None else found & seen
    return found


def combine_masks(mechanism: Weighted, mask: Mask) -> Mask:
    own = mechanism.mask
    assert isinstance(own, Mask)
    return mask if own == mask else own & mask


def pose(
    mechanism: Weighted,
    mask: Mask,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    given: Mapping[str, Any],
    need_counts: bool = False,
) -> Problem:
    """Check a weighted call and prepare it: inputs, visible counts, rotary positions, score preparation, selection."""
    sizes = sizes_of(q, k, v, widened=True)
    mask = combine_masks(mechanism, mask)
    declared = {item.name: item for item in mechanism.declared}
    declared.update({item.name: item for part in mask.parts() for item in getattr(part, "inputs", ())})
    check_names(given, declared, mechanism)
    mask_names = {item.name for part in mask.parts() for item in getattr(part, "inputs", ())}
    masks = fill_inputs({name: declared[name] for name in mask_names}, given, sizes, q)
    counts = visible_counts(mask, sizes, masks, q.device) if need_counts or wants_counts(mechanism) else None
    counts = None if counts is None else counts.to(torch.promote_types(q.dtype, torch.float32))
    read = keys_in_sight(mask, masks)
    if read is not None:  # what stands where no query looks, NaN even, must reach no product
        k, v = (torch.where(read[:, None, :, None], x, 0.0) for x in (k, v))
    rest = {name: spec for name, spec in declared.items() if name not in mask_names}
    inputs = {**masks, **fill_inputs(rest, given, sizes, q, counts)}
    if mechanism.position is not None:
        q = mechanism.position.rotate(q, torch.arange(sizes.k_len - sizes.q_len, sizes.k_len, device=q.device))  # type: ignore[union-attr]
        k = mechanism.position.rotate(k, torch.arange(sizes.k_len, device=k.device))  # type: ignore[union-attr]
    if mechanism.values is not None:
        v = scaled_values(mechanism, v, inputs)
    env: dict[str, Any] = {**inputs, "n": counts, "head_dim": sizes.head_dim}
    scale = sizes.head_dim ** getattr(mechanism.score, "power", -0.5) if scale is None else scale
    q, k = mechanism.score.prepare(q, k, scale, env)  # type: ignore[union-attr]
    selection = None
    if mechanism.select is not None:
        with torch.no_grad():
            selection = mechanism.select.select(q, k, view_of(mask, sizes, inputs, q.device))
        selection = None if selection is None else selection.checked(sizes)
    return Problem(mechanism, mask, sizes, q, k, v, inputs, counts, selection)


def view_of(mask: Mask, sizes: Sizes, inputs: Mapping[str, Tensor], device: torch.device) -> View:
    """What a selector sees of a call: the mask as pairs and as blocks, and the inputs."""
    at, around = indices(sizes, device), {**inputs, "offset": sizes.k_len - sizes.q_len, "k_len": sizes.k_len}
    return View(
        sizes.k_len - sizes.q_len,
        lambda i: visible(mask, at["b"], at["h"], i[:, None], at["j"], around),
        lambda block_q, block_k: some_and_every(mask, sizes, block_q, block_k, inputs, device),
        inputs,
    )


def scaled_values(mechanism: Weighted, v: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """values(v, ...) with its per-key inputs (B, Hkv, Lk) brought to (B, Hkv, Lk, 1), in the dtype of v."""
    assert mechanism.values is not None
    turned = {name: inputs[name].unsqueeze(-1) for name in asks(mechanism.values, 1)}
    return call(mechanism.values, v, env=turned).to(v.dtype)  # type: ignore[no-any-return]


def row_env(problem: Problem, **more: Any) -> dict[str, Any]:
    """Names for functions of whole rows (divide): inputs, n, c, as (B, H, Lq, 1)."""
    return {**problem.inputs, "n": problem.counts, **more}


def divisor(problem: Problem, total: Tensor | None, c: Tensor, counts: Tensor | None = None) -> Tensor | None:
    """Z of each row, or None when nothing is divided by."""
    normalizer: Any = problem.mechanism.normalizer
    if not normalizer.normalised:
        return None
    base = total if total is not None else torch.ones_like(c)
    if normalizer.divide is None:
        return base
    return call(normalizer.divide, base, env=row_env(problem, c=c, n=problem.counts if counts is None else counts))


def reciprocal(z: Tensor) -> Tensor:
    """1 / z, and 0 where z is 0: a row without mass has no weights."""
    empty = z == 0
    return torch.where(empty, torch.zeros_like(z), 1 / torch.where(empty, torch.ones_like(z), z))
