"""Parts of any model, replaced and put back exactly: gates behind a convolution, mixers in place of attention."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from types import TracebackType

from torch import nn

from ..errors import RegardError, nearest

Where = str | type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, nn.Module], bool]
Factory = Callable[[nn.Module], nn.Module]
WIDTHS = ("out_channels", "out_features", "num_features", "embed_dim", "dim", "channels")


def width(module: nn.Module) -> int:
    """Channels that a part gives: of itself, or of the last part inside that says."""
    for one in reversed(list(module.modules())[1:]) if any(module.children()) else [module]:
        for name in WIDTHS:
            size = getattr(one, name, None)
            if type(size) is int:
                return size
        shape = getattr(one, "normalized_shape", None)
        if shape:
            return int(shape[-1])
    raise RegardError(
        f"{type(module).__name__} does not say how many channels it gives; expected one of {', '.join(WIDTHS)} on it or inside it"
    )


def after(make: Callable[[int], nn.Module]) -> Factory:
    """A factory for `replace`: the part itself, then make(channels that it gives)."""
    return lambda module: nn.Sequential(module, make(width(module)))


class Replaced:
    """What `replace` did: `names` of the parts. `restore()`, or leaving `with`, puts the same objects back."""

    def __init__(self, model: nn.Module, put: dict[str, tuple[nn.Module, nn.Module]]):
        self.model, self._put = model, put
        self.names = tuple(put)

    def restore(self) -> None:
        changed = [name for name, (_, new) in self._put.items() if self.model.get_submodule(name) is not new]
        if changed:
            raise RegardError(f"parts {', '.join(changed)} were changed again since; expected to restore the later change first")
        for name, (old, _) in self._put.items():
            set_part(self.model, name, old)
        self._put = {}

    def __enter__(self) -> Replaced:
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()


def set_part(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    model.get_submodule(parent)._modules[key] = part


def found(model: nn.Module, where: Where) -> dict[str, nn.Module]:
    """Parts by name, the outermost where one stands inside another; a part that has several names under each."""

    def fits(name: str, module: nn.Module) -> bool:
        if isinstance(where, str):
            return fnmatch.fnmatchcase(name, where)
        return isinstance(module, where) if isinstance(where, (type, tuple)) else bool(where(name, module))

    chosen: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{outer}.") for outer in chosen)
        if name and not inside and fits(name, module):
            chosen[name] = module
    return chosen


def replace(model: nn.Module, where: Where, factory: Factory) -> Replaced:
    """Each part of `model` that `where` names becomes factory(part); the result restores them, also as a context manager.

    where: a pattern of names as shells have them ("layer*.*.bn2"), a type or several, or a function (name, module) -> bool. Parts inside a
    chosen part are left alone; one module under two names is replaced by one. New parts take device, dtype and training mode of the old.
    `after(make)` is a factory that keeps the part and adds make(width) behind it.
    RegardError: nothing fits, or the factory gives no module; the model is then as it was.
    """
    chosen = found(model, where)
    if not chosen:
        names = [name for name, _ in model.named_modules() if name]
        hint = nearest(where, names) if isinstance(where, str) else ""
        raise RegardError(f"where={where!r} names no part of {type(model).__name__}; expected one of its {len(names)}.{hint}")
    made: dict[int, nn.Module] = {}
    for name, old in chosen.items():
        if id(old) in made:
            continue
        new = factory(old)
        if not isinstance(new, nn.Module):
            raise RegardError(f"factory gave {type(new).__name__} for {name}; expected a torch.nn.Module")
        kept = set(old.modules())
        like = next((p for p in [*old.parameters(), *old.buffers(), *model.parameters()] if p.is_floating_point()), None)
        for part in new.modules():
            if part not in kept:
                part.training = old.training
        for tensor in [*new.parameters(), *new.buffers()] if like is not None else []:
            if not any(tensor is own for own in [*old.parameters(), *old.buffers()]):
                assert like is not None
                tensor.data = tensor.data.to(like.device, like.dtype if tensor.is_floating_point() else None)
        made[id(old)] = new
    put = {name: (old, made[id(old)]) for name, old in chosen.items()}
    for name, (_, new) in put.items():
        set_part(model, name, new)
    return Replaced(model, put)
