"""A model with some of its parts replaced by others that are to do their work: teachers and students side by side."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Mechanism
from ..catalog import get
from ..errors import RegardError
from .replace import Replaced, Where, replace, set_part

Batch = Tensor | dict[str, Any]


class Conversion:
    """parts: by name the teacher (what stood there) and the student (what stands there now). Made by `convert`.

    `carry_out` trains it by a recipe. `restore()`, or leaving a `with` block, gives the model its own parts back; without it the model stays as
    it is now, a plain module.
    """

    def __init__(self, model: nn.Module, replaced: Replaced, parts: dict[str, tuple[nn.Module, nn.Module]]):
        self.model, self.replaced, self.parts = model, replaced, parts

    @property
    def students(self) -> dict[str, nn.Module]:
        return {name: student for name, (_, student) in self.parts.items()}

    @contextmanager
    def taught(self) -> Iterator[None]:
        """While open, the model runs its teachers."""
        for name, (teacher, _) in self.parts.items():
            set_part(self.model, name, teacher)
        try:
            yield
        finally:
            for name, (_, student) in self.parts.items():
                set_part(self.model, name, student)

    @torch.no_grad()
    def lessons(self, batch: Batch) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]]:
        """What each teacher was called with, and what it gave, while the model, left in evaluation mode, reads a batch through its teachers."""
        kept: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}

        def keeping(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
                kept[name] = args, kwargs, out

            return hook

        modes = {part: part.training for teacher, _ in self.parts.values() for part in teacher.modules()}
        handles = [teacher.register_forward_hook(keeping(name), with_kwargs=True) for name, (teacher, _) in self.parts.items()]
        try:
            with self.taught():
                self.model.eval()
                self.read(batch)
        finally:
            for handle in handles:
                handle.remove()
            for part, mode in modes.items():
                part.training = mode
        missing = [name for name in self.parts if name not in kept]
        if missing:
            raise RegardError(
                f"the model did not call {', '.join(missing)} on this batch, so that they learn nothing; expected batches that reach every part"
            )
        return kept

    def read(self, batch: Batch) -> Any:
        """The model's answer to a batch: token ids (B, L), or its keyword arguments."""
        given: dict[str, Any] = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        return self.model(**({"use_cache": False} if hasattr(self.model, "config") else {}) | given)

    def teacher(self) -> nn.Module:
        """A copy of the model with its own parts, frozen."""
        with self.taught():
            return copy.deepcopy(self.model).requires_grad_(False).eval()

    def restore(self) -> None:
        self.replaced.restore()

    def __enter__(self) -> Conversion:
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()


def attention_parts(model: nn.Module) -> list[str]:
    """Names of the attention layers of a transformers decoder, in order."""
    found = [name for name, part in model.named_modules() if all(hasattr(part, x) for x in ("q_proj", "k_proj", "v_proj", "o_proj"))]
    if not found:
        raise RegardError(
            f"{type(model).__name__} has no attention layers with q_proj, k_proj, v_proj and o_proj; expected a transformers decoder"
        )
    return found


def convert(
    model: nn.Module,
    make: str | Mechanism | Callable[[nn.Module], nn.Module],
    where: Where | None = None,
    layers: Iterable[int] | None = None,
) -> Conversion:
    """Replace parts of a model by make(part), its student, which starts from copies of the part's weights.

    make: or a mechanism, by name or description: attention layers of a transformers decoder with q_proj, k_proj, v_proj and o_proj become
    layers of it on the same projections, its gates, maps and norms new (`MechanismStudent`; the projections are then named
    "attention.q", "attention.k", "attention.v" and "attention.out").
    where: as of `replace` (None: every attention layer with q_proj, k_proj, v_proj and o_proj). layers: which of those attention layers, by
    number. RegardError where nothing fits, or make refuses a part; the model is then as it was.
    """
    if where is not None and layers is not None:
        raise RegardError("where and layers: expected one of them")
    if where is None:
        names = attention_parts(model)
        chosen = list(range(len(names))) if layers is None else list(layers)
        wrong = [at for at in chosen if not 0 <= at < len(names)]
        if wrong or not chosen:
            raise RegardError(f"layers={chosen}; expected some of 0 .. {len(names) - 1}")
        wanted = {names[at] for at in chosen}

        def fits(name: str, module: nn.Module) -> bool:
            return name in wanted

        where = fits
    if isinstance(make, (str, Mechanism)):
        from .any_mechanism import MechanismStudent

        make = functools.partial(MechanismStudent, mechanism=get(make) if isinstance(make, str) else make)
    before = dict(model.named_modules(remove_duplicate=False))
    replaced = replace(model, where, make)
    return Conversion(model, replaced, {name: (before[name], model.get_submodule(name)) for name in replaced.names})
