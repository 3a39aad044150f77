"""Models that call PyTorch's fused attention themselves (timm's, diffusers'): what runs in its place, inside their attention modules alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..algebra import Mechanism, Sizes
from ..catalog import get
from ..engine.policy import Policy
from ..errors import RegardError
from ..nn.functional import scaled_dot_product_attention
from ..nn.inputs import Inputs


class Intercepted(TorchFunctionMode):
    """Inside it, calls of `scaled_dot_product_attention` go to `attend`, with the caller's arguments."""

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self.attend = attend

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), options: dict[str, Any] | None = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return self.attend(*args, **(options or {}))
        return function(*args, **(options or {}))


def attends(module: nn.Module) -> bool:
    """Whether a module is an attention layer of timm's or diffusers' make."""
    return (hasattr(module, "fused_attn") and hasattr(module, "num_heads")) or (hasattr(module, "to_q") and hasattr(module, "heads"))


def shape_of(module: Any) -> tuple[int, int]:
    """(heads, channels a head)."""
    heads = int(module.num_heads if hasattr(module, "num_heads") else module.heads)
    width = getattr(module, "head_dim", None) or getattr(module, "attn_dim", None) or getattr(module, "inner_dim", None)
    if width is None:
        raise RegardError(f"{type(module).__name__} does not say how wide its heads are; expected head_dim or inner_dim")
    return heads, int(width) if hasattr(module, "head_dim") and module.head_dim else int(width) // heads


class SDPAPatch:
    """A mechanism at work in a model whose attention modules call PyTorch's fused kernel; see `patch`. inputs: of each patched layer."""

    def __init__(
        self,
        model: nn.Module,
        mechanism: str | Mechanism | Policy,
        layers: Iterable[int] | None,
        heads: Iterable[int] | None,
        given: dict[str, Any],
    ):
        found = [module for module in model.modules() if attends(module)]
        if not found:
            raise RegardError(
                f"{type(model).__name__} has no attention layer that regard knows; expected a model of transformers, timm or diffusers"
            )
        closed = next((m for m in found if not getattr(m, "fused_attn", True)), None)
        if closed is not None:
            raise RegardError(f"{type(closed).__name__} computes attention itself (fused_attn=False); expected module.fused_attn = True")
        self.mechanism = get(mechanism) if isinstance(mechanism, str) else mechanism
        if isinstance(self.mechanism, Policy):
            raise RegardError(f"{type(self.mechanism).__name__} runs prompts of decoders; expected a mechanism")
        if self.mechanism.causal_only:
            raise RegardError(
                "this mechanism reads the past alone, and these layers see the whole sequence; expected one that reads all keys"
            )
        chosen = list(range(len(found))) if layers is None else list(layers)
        wrong = [at for at in chosen if not 0 <= at < len(found)]
        if wrong or not chosen:
            raise RegardError(f"layers={chosen}; expected some of 0 .. {len(found) - 1}")
        self.modules, self.given = [found[at] for at in chosen], given
        self.heads = None if heads is None else list(heads)
        for module in self.modules:
            if self.heads is not None and not all(0 <= at < shape_of(module)[0] for at in self.heads):
                raise RegardError(f"heads={self.heads}; {type(module).__name__} has heads 0 .. {shape_of(module)[0] - 1}")
        device = next(model.parameters()).device
        self.inputs = nn.ModuleList([self.inputs_of(*shape_of(module)).to(device) for module in self.modules])
        self.calls, self.open = 0, [Intercepted(functools.partial(self.attend, at)) for at in range(len(self.modules))]
        self.handles = [
            handle
            for module in self.modules
            for handle in (module.register_forward_pre_hook(self.enter), module.register_forward_hook(self.leave, always_call=True))
        ]

    def inputs_of(self, heads: int, width: int) -> Inputs:
        assert isinstance(self.mechanism, Mechanism)
        return Inputs(self.mechanism, Sizes(1, heads, heads, 1024, 1024, width, width), None, self.given)

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before a patched module runs. The newest patch comes last, and so is asked first. Copies of the module are not patched."""
        if module in self.modules:
            self.open[self.modules.index(module)].__enter__()
            self.calls = 0

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module not in self.modules:
            return
        self.open[self.modules.index(module)].__exit__(None, None, None)
        if not self.calls and output is not None and not self.covered(module):
            raise RegardError(
                f"{type(module).__name__} ran without PyTorch's scaled_dot_product_attention, so that the patch had no effect; expected "
                "a processor that calls it (diffusers: model.set_attn_processor(AttnProcessor2_0()))"
            )

    def covered(self, module: nn.Module) -> bool:
        """Whether a newer patch of the same module answers in this one's place."""
        others = [getattr(hook, "__self__", None) for hook in module._forward_hooks.values()]
        found = [other for other in others if isinstance(other, SDPAPatch)]
        return found[-1] is not self

    def attend(self, at: int, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        self.calls += 1
        made = {**self.inputs[at](None, {"q": query, "k": key, "v": value}), **self.given}
        out = scaled_dot_product_attention(query, key, value, *args, **{**options, "mechanism": self.mechanism, **made})
        if self.heads is None:
            return out
        mine = torch.zeros(query.shape[-3], dtype=torch.bool, device=query.device)
        mine[self.heads] = True
        return torch.where(mine[:, None, None], out, F.scaled_dot_product_attention(query, key, value, *args, **options))

    def restore(self) -> None:
        """Give the modules their own attention back; nothing of the patch stays in them."""
        for handle in self.handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> SDPAPatch:
        """A copy of the model keeps hooks of this patch, which does not know the copy's modules."""
        return self

    def __enter__(self) -> SDPAPatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()
