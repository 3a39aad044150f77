"""Vectors of the papers' official code: what an adapter reads them, fills layers and compares with.

`data/SLUG.json` says what the arrays of `data/SLUG.npz` are and where they come from; `<family>/<slug>.py` holds the adapter: functions
marked `@case("c0", "c1")` that feed a configuration to regard's public API, and `@refuses("c2", why)` where regard raises instead.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DATA = pathlib.Path(__file__).parent / "data"
ROUNDED = 2e-7  # gradients stored in float32
FLOAT32 = (2e-5, 2e-4)  # values and gradients of float32 runs, where the vectors name no tolerance of their own

Adapter = Callable[["Vectors"], None]


def case(
    *configs: str, dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32), float32: float | None = None
) -> Callable[[Adapter], Adapter]:
    """Marks an adapter's function as the test of these configurations. float32: another tolerance of its float32 run."""

    def mark(function: Adapter) -> Adapter:
        function.runs = (configs, tuple(dtypes), float32)  # type: ignore[attr-defined]
        return function

    return mark


def refuses(*configs: str, why: str) -> Callable[[Adapter], Adapter]:
    """Marks a function that must raise a RegardError: regard does not follow these configurations, for the reason given."""

    def mark(function: Adapter) -> Adapter:
        function.refused = (configs, why)  # type: ignore[attr-defined]
        return function

    return mark


@functools.lru_cache(maxsize=4)
def arrays(slug: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{slug}.npz") as file:
        found = {name: file[name] for name in file.files}
    if "index" not in found:
        return found
    made, starts = (
        {},
        dict.fromkeys(found, 0),
    )  # many small arrays stand end to end, one array a dtype; a line of the index is: name dtype shape
    for line in found["index"].tobytes().decode().splitlines():
        name, dtype, *shape = line.split(" ")
        size = int(np.prod([int(n) for n in shape]))
        made[name] = found[dtype][starts[dtype] : starts[dtype] + size].reshape([int(n) for n in shape])
        starts[dtype] += size
    return made


@functools.lru_cache(maxsize=4)
def meta(slug: str) -> dict[str, Any]:
    return json.loads((DATA / f"{slug}.json").read_text())


def configs(slug: str) -> set[str]:
    """Names of a slug's configurations: those the JSON lists, else the endings of its arrays."""
    hyper = meta(slug).get("hyper") or {}
    told = [name for name, one in hyper.items() if isinstance(one, dict) and any(name in key.split("_") for key in arrays(slug))]
    named = meta(slug).get("configs") or told
    return set(named) if named else {found[1] for name in arrays(slug) if (found := re.search(r"_([a-z]+\d+)$", name))}


def first_number(given: Any, default: float) -> float:
    """A tolerance as the JSON has it: a number, or a text that begins with one."""
    found = re.search(r"\d[\d.]*(e-?\d+)?", str(given))
    return float(found[0]) if found else default


class Vectors:
    """One configuration in one dtype. `g("q")` is the array `q_CONFIG`, or `q` where configurations share it; `g["heads"]` a hyperparameter."""

    def __init__(self, slug: str, config: str, dtype: torch.dtype, float32: float | None = None):
        self.slug, self.config, self.dtype = slug, config, dtype
        self.arrays, self.meta = {**arrays(slug)}, meta(slug)
        given = self.meta["tolerance"]
        given = given if isinstance(given, dict) else {"values": given}
        self.value = first_number(given.get(f"_{config}", given.get("values", given.get("float64", given.get("direct")))), 1e-10)
        self.grad = first_number(given.get("gradients"), self.value)
        if dtype == torch.float32:
            stated = first_number(given["float32"], FLOAT32[0]) if "float32" in given else None
            self.value, self.grad = (stated, stated) if stated else FLOAT32
            self.value, self.grad = (float32, float32) if float32 else (self.value, self.grad)

    def __getitem__(self, name: str) -> Any:
        own = {**(self.meta.get("hyper") or {}).get(self.config, {})} if isinstance(self.meta.get("hyper"), dict) else {}
        return {**own, **((self.meta.get("configs") or {}).get(self.config) or {})}[name]

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default

    def key(self, name: str) -> str | None:
        return next((key for key in (f"{name}_{self.config}", name) if key in self.arrays), None)

    def has(self, *names: str) -> bool:
        return all(self.key(name) for name in names)

    def __call__(self, name: str) -> Tensor:
        key = self.key(name)
        assert key is not None, f"{self.slug}.npz has no array {name}_{self.config}"
        x = torch.from_numpy(np.array(self.arrays[key]))
        return x.to(self.dtype) if x.is_floating_point() else x

    def leaf(self, name: str) -> Tensor:
        return self(name).clone().requires_grad_()

    def leaves(self, *names: str) -> dict[str, Tensor]:
        return {name: self.leaf(name) for name in names}

    def op(self, function: Callable[..., Tensor], **arrays: str) -> Tensor:
        """function(argument=leaf, ...) and its gradients against the stored ones; arrays: {argument: array}, by default q, k and v."""
        arrays = arrays or {name: name for name in "qkv"}
        leaves = {array: self.leaf(array) for array in arrays.values()}
        out = function(**{argument: leaves[array] for argument, array in arrays.items()})
        self.same(out, "out")
        self.gradients(self.weigh(out), leaves)
        return out.detach()

    def exact(self, want: str | Tensor) -> Tensor:
        """A stored array in the precision it is stored in."""
        if isinstance(want, Tensor):
            return want.detach().double()
        key = self.key(want)
        assert key is not None, f"{self.slug}.npz has no array {want}_{self.config}"
        return torch.from_numpy(np.array(self.arrays[key])).double()

    def put(self, parameter: Tensor, value: str | Tensor) -> None:
        """Copy a stored array, or a tensor made of some, into a parameter or buffer of the same shape."""
        value = self(value) if isinstance(value, str) else value
        assert parameter.shape == value.shape, f"parameter {tuple(parameter.shape)}, stored {tuple(value.shape)}"
        with torch.no_grad():
            parameter.copy_(value)

    def load(self, module: nn.Module, names: Mapping[str, str | Tensor]) -> None:
        """{name in the module: stored array or tensor} for `module`; a name of a submodule stands for its weight and, if it has one, bias."""
        for ours, value in names.items():
            found = module.get_submodule(ours) if ours in dict(module.named_modules()) else None
            if found is None:
                owner, _, leaf = ours.rpartition(".")
                self.put(getattr(module.get_submodule(owner), leaf), value)
                continue
            assert isinstance(value, str)
            for part in ("weight", "bias"):
                if getattr(found, part, None) is not None:
                    self.put(getattr(found, part), f"{value}.{part}")

    def split(self, pattern: str, *parts: str, sizes: Sequence[int] | None = None) -> None:
        """Arrays (and gradients) whose names match, cut along their first dimension in parts, equal or as `sizes` to one another."""
        for key in list(self.arrays):
            name = key.removesuffix(f"_{self.config}")
            if not (found := re.fullmatch(f"(?:grad_)?{pattern}", name)):
                continue
            one = len(self.arrays[key]) // sum(sizes or [1] * len(parts))
            cuts = np.cumsum([one * size for size in sizes or [1] * len(parts)])[:-1]
            for part, piece in zip(parts, np.split(self.arrays[key], cuts), strict=True):
                made = found.expand(part)
                self.arrays[f"grad_{made}" if name.startswith("grad_") else made] = piece

    def stored(self, ours: str, names: Sequence[tuple[str, str]]) -> str:
        """The official name of a parameter of ours: every (pattern, replacement) of `names` in turn."""
        return functools.reduce(lambda name, pair: re.sub(pair[0], pair[1], name), names, ours)

    def fill(self, module: nn.Module, *names: tuple[str, str], without: str = "$.") -> dict[str, Tensor]:
        """Copy the stored arrays into every parameter and statistic of `module`, named by `stored`; the parameters by their official names.
        without: pattern of those that the vectors leave out."""
        for ours, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if self.has(self.stored(ours, names)):
                self.put(tensor, self(self.stored(ours, names)).reshape(tensor.shape))
            else:
                assert not isinstance(tensor, nn.Parameter) or re.search(without, ours), (
                    f"{self.slug}.npz has no array {self.stored(ours, names)} for {ours}"
                )
        module.train(bool(self.get("train")))
        return {self.stored(ours, names): parameter for ours, parameter in module.named_parameters()}

    def moved(self, module: nn.Module, *names: tuple[str, str]) -> None:
        """Statistics that a step of training leaves, against the stored ones."""
        for ours, tensor in module.named_buffers():
            if self.has(name := f"after_{self.stored(ours, names)}"):
                self.same(tensor, name, what=name)

    def same(self, got: Tensor, want: str | Tensor, tolerance: float | None = None, *, what: str = "") -> None:
        """|got - want| <= tolerance max(1, |want|), in the largest entries."""
        limit = self.value if tolerance is None else tolerance
        exact, got = self.exact(want), got.detach().double()
        label = what or (want if isinstance(want, str) else "value")
        assert got.shape == exact.shape, f"{label}: shape {tuple(got.shape)}, stored {tuple(exact.shape)}"
        assert bool(torch.isfinite(got).all()) or not bool(torch.isfinite(exact).all()), f"{label}: not finite"
        worst = float((got - exact).abs().max() / exact.abs().max().clamp_min(1)) if exact.numel() else 0.0
        assert worst <= limit, f"{label}: off by {worst:.1e}, expected at most {limit:.0e}"

    def weigh(self, out: Tensor, probe: str | None = None) -> Tensor:
        """sum(out * probe), what stored gradients are gradients of."""
        probe = probe or ("probe" if self.has("probe") else "w")
        return (out * self(probe)).sum()

    def gradients(self, loss: Tensor, of: Mapping[str, Tensor], tolerance: float | None = None) -> None:
        """d loss / d tensor against grad_NAME, for every {NAME: tensor} that has one."""
        of = {name: x for name, x in of.items() if self.has(f"grad_{name}")}
        assert of, "no gradient is stored for any of these"
        found = torch.autograd.grad(loss, list(of.values()), allow_unused=True, retain_graph=True)
        for (name, x), grad in zip(of.items(), found, strict=True):
            rounded = ROUNDED if self.arrays[self.key(f"grad_{name}") or ""].dtype == np.float32 else 0.0
            limit = max(self.grad if tolerance is None else tolerance, rounded)
            self.same(
                torch.zeros_like(x) if grad is None else grad, self.exact(f"grad_{name}").reshape(x.shape), limit, what=f"grad_{name}"
            )

    def layer(self, function: Callable[[Tensor], Tensor], x: str = "x", want: str = "out", **more: Tensor) -> None:
        """function(x) and its gradients with respect to x and `more` against the stored ones."""
        leaf = self.leaf(x)
        out = function(leaf)
        self.same(out, want)
        self.gradients(self.weigh(out), {x: leaf, **more})


def stepped(layer: Any, x: Tensor, pieces: Sequence[int] | None = None, **given: Any) -> tuple[Tensor, Any]:
    """layer.step over x (B, L, dim), one token at a time or in pieces of these lengths: (outputs, the last state)."""
    outs, state, start = [], None, 0
    with torch.no_grad():
        for size in pieces or [1] * x.shape[1]:
            y, state = layer.step(x[:, start : start + size], state, **given)
            outs.append(y)
            start += size
    return torch.cat(outs, 1), state


def streamed(
    step: Callable[..., tuple[Tensor, Any]], *tensors: Tensor, state: Any = None, pieces: Sequence[int] | None = None
) -> tuple[Tensor, Any]:
    """step(*pieces of tensors (B, H, L, .) or (B, H, L), state) one token at a time or in pieces: (outputs, the last state)."""
    outs, start = [], 0
    with torch.no_grad():
        for size in pieces or [1] * tensors[0].shape[2]:
            out, state = step(*(x[:, :, start : start + size] for x in tensors), state)
            outs.append(out)
            start += size
    return torch.cat(outs, 2), state
