"""Models that call PyTorch's fused attention themselves (timm's, diffusers'): what runs in its place, inside their attention modules alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

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


def attention_layers(model: nn.Module, layers: Iterable[int] | None) -> list[nn.Module]:
    """The attention layers of a model that calls the fused kernel, or some of them by their numbers."""
    found = [module for module in model.modules() if attends(module)]
    if not found:
        raise RegardError(
            f"{type(model).__name__} has no attention layer that regard knows; expected a model of transformers, timm or diffusers"
        )
    closed = next((m for m in found if not getattr(m, "fused_attn", True)), None)
    if closed is not None:
        raise RegardError(f"{type(closed).__name__} computes attention itself (fused_attn=False); expected module.fused_attn = True")
    chosen = list(range(len(found))) if layers is None else list(layers)
    wrong = [at for at in chosen if not 0 <= at < len(found)]
    if wrong or not chosen:
        raise RegardError(f"layers={chosen}; expected some of 0 .. {len(found) - 1}")
    return [found[at] for at in chosen]


class Routed:
    """Attention layers whose calls of the fused kernel go to `attend`, until `.restore()` or the end of a `with` block."""

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules
        self.calls, self.open = 0, [Intercepted(functools.partial(self.answer, at)) for at in range(len(modules))]
        self.handles = [
            handle
            for module in modules
            for handle in (module.register_forward_pre_hook(self.enter), module.register_forward_hook(self.leave, always_call=True))
        ]

    def attend(self, at: int, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        """What layer `at` of the patched ones gets in the kernel's place."""
        raise NotImplementedError

    def answer(self, at: int, *args: Any, **options: Any) -> Tensor:
        self.calls += 1
        return self.attend(at, *args, **options)

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
        found = [other for other in others if isinstance(other, Routed)]
        return found[-1] is not self

    def restore(self) -> None:
        """Give the modules their own attention back; nothing of the patch stays in them."""
        for handle in self.handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of the model keeps hooks of this patch, which does not know the copy's modules."""
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()


class SDPAPatch(Routed):
    """A mechanism at work in a model whose attention modules call PyTorch's fused kernel; see `patch`. inputs: of each patched layer."""

    def __init__(
        self,
        model: nn.Module,
        mechanism: str | Mechanism | Policy,
        layers: Iterable[int] | None,
        heads: Iterable[int] | None,
        given: dict[str, Any],
    ):
        modules = attention_layers(model, layers)
        self.mechanism = get(mechanism) if isinstance(mechanism, str) else mechanism
        if isinstance(self.mechanism, Policy):
            raise RegardError(f"{type(self.mechanism).__name__} runs prompts of decoders; expected a mechanism")
        if self.mechanism.causal_only:
            raise RegardError(
                "this mechanism reads the past alone, and these layers see the whole sequence; expected one that reads all keys"
            )
        self.given, self.heads = given, None if heads is None else list(heads)
        for module in modules:
            if self.heads is not None and not all(0 <= at < shape_of(module)[0] for at in self.heads):
                raise RegardError(f"heads={self.heads}; {type(module).__name__} has heads 0 .. {shape_of(module)[0] - 1}")
        device = next(model.parameters()).device
        self.inputs = nn.ModuleList([self.inputs_of(*shape_of(module)).to(device) for module in modules])
        super().__init__(modules)

    def inputs_of(self, heads: int, width: int) -> Inputs:
        assert isinstance(self.mechanism, Mechanism)
        return Inputs(self.mechanism, Sizes(1, heads, heads, 1024, 1024, width, width), None, self.given)

    def attend(self, at: int, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        made = {**self.inputs[at](None, {"q": query, "k": key, "v": value}), **self.given}
        out = scaled_dot_product_attention(query, key, value, *args, **{**options, "mechanism": self.mechanism, **made})
        if self.heads is None:
            return out
        mine = torch.zeros(query.shape[-3], dtype=torch.bool, device=query.device)
        mine[self.heads] = True
        return torch.where(mine[:, None, None], out, F.scaled_dot_product_attention(query, key, value, *args, **options))


class LayerPatch(Routed):
    """A module in each patched layer, layers[at](q, k, v), (B, H, L, D) each, in place of softmax attention; see `patch_layers`."""

    def __init__(self, modules: list[nn.Module], layers: nn.ModuleList):
        self.layers = layers
        super().__init__(modules)

    def attend(
        self,
        at: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if (
            attn_mask is not None
            or dropout_p
            or is_causal
            or enable_gqa
            or (scale is not None and abs(scale - query.shape[-1] ** -0.5) > 1e-6)
        ):
            raise RegardError(
                f"{type(self.modules[at]).__name__} attends with attn_mask={None if attn_mask is None else tuple(attn_mask.shape)}, "
                f"dropout_p={dropout_p}, is_causal={is_causal}, scale={scale}, enable_gqa={enable_gqa}; expected plain attention: patch other layers"
            )
        return self.layers[at](query, key, value)  # type: ignore[no-any-return]


def patch_layers(model: nn.Module, make: Callable[[int, int], nn.Module], layers: Iterable[int] | None = None) -> LayerPatch:
    """Run make(heads, head_dim), a module of q, k, v (B, H, L, D), in each attention layer of a model of timm or diffusers (layers: their numbers,
    None: all), until `.restore()` or the end of a `with` block. The modules, `.layers`, stand on the device and in the dtype of the model."""
    modules = attention_layers(model, layers)
    like = next(model.parameters())
    made = nn.ModuleList([make(*shape_of(module)).to(like.device, like.dtype) for module in modules])
    return LayerPatch(modules, made)
