"""Where a model attends, in whichever host it is: one site an attention layer, which turns the host's calls into `Attending`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt.call import Call
from ..adapt.host import NAME, attention_modules, interface, own_name, shape_of, watch
from ..adapt.intercept import Intercepted
from ..adapt.patch import Patch, answered, forward
from ..algebra import Causal
from ..catalog import get
from ..engine import weights
from ..engine.door import attend
from ..errors import MissingDependency, RegardError
from ..nn.attention import Attention
from .attending import Attending, Given, Softmax, Terms
from .site import Run, Site, clock_of, leave_clock
from .stream import names_of
from .turning import Through, Turning, rotary_names


class TransformersSite(Site):
    """A module that goes through transformers' attention interface. owner: the stack of layers it stands in."""

    def __init__(self, model: nn.Module, module: nn.Module, name: str, layer: int, owner: nn.Module | None):
        super().__init__(model, module, name, layer, *shape_of(module)[:2])
        self.owner = owner

    def watch(self, run: Run) -> None:
        interface(forward)
        self.run = run
        if self.owner is not None:
            self.clock = clock_of(self.owner)
        watch(self.module, self)

    def leave(self) -> None:
        watch(self.module, None)
        if self.owner is not None:
            leave_clock(self.owner)

    @property
    def unturned(self) -> str | None:
        return None if rotary_names(type(self.module)) else "it has no rotary positions; expected the points q and k"

    def turning(self, through: Through) -> Turning:
        return Turning(self.module, self.heads, self.kv_heads, through)

    def attend(self, call: Call, patches: Sequence[Patch]) -> tuple[Tensor, Any]:
        """What transformers' call gives with taps on it: (B, Lq, H, Dv), and weights or None."""
        assert self.run is not None

        def with_heads(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Call:
            return replace(call, query=q, key=k, value=v, given={**call.given, **more})

        def fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Any]:
            out, p = answered(with_heads(q, k, v), patches)
            return out.transpose(1, 2), p

        working = [patch for patch in patches if patch.when != ("prefill" if call.query.shape[2] == 1 else "decode")]
        asked = (call.query, call.key, call.value, fused, call.dropout)
        attending: Attending
        own = own_name(call.module)
        if not working and not own.startswith(f"{NAME}:"):
            attending = Softmax(*asked, functools.partial(self.terms, call))
        else:
            matrix = lambda q, k, v: answered(with_heads(q, k, v, output_attentions=True), working)[1]  # noqa: E731
            attending = Given(*asked, f"the patch {working[-1].name!r}" if working else repr(own), matrix)
        out, p = self.run(attending)
        return out.transpose(1, 2).contiguous(), p

    def terms(self, call: Call) -> Terms:
        call.check()
        sight = call.sight(False)
        scale = call.query.shape[-1] ** -0.5 if call.scale is None else float(call.scale)
        first = sight.first if sight.shown is None and sight.causal and sight.q_len > 1 else None
        return Terms(scale, sight.k_len, sight.shown, first, call.bias(sight), call.softcap, call.sinks)


class SDPASite(Site):
    """A module whose forward calls torch's scaled_dot_product_attention once, as timm's do."""

    def watch(self, run: Run) -> None:
        if not getattr(self.module, "fused_attn", True):
            raise RegardError(
                f"{type(self.module).__name__} computes attention itself (fused_attn=False); expected module.fused_attn = True for all of "
                "the model's attention modules"
            )
        self.run = run
        own = self.module.forward

        @functools.wraps(own)
        def seen(*args: Any, **options: Any) -> Any:
            self.calls = 0
            with Intercepted(self.attend):
                out = own(*args, **options)
            if self.calls != 1:
                raise RegardError(
                    f"{type(self.module).__name__} called SDPA {self.calls} times; expected once, so that taps see its attention"
                )
            return out

        self.module.forward = seen  # type: ignore[method-assign]

    def leave(self) -> None:
        del self.module.forward

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        assert self.run is not None
        self.calls += 1
        self.clock.start = 0

        def fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
            options = {"scale": scale, "enable_gqa": enable_gqa}
            with torch._C.DisableTorchFunction():
                return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **options), None  # type: ignore[arg-type]

        def terms() -> Terms:
            wide = attn_mask
            while wide is not None and wide.dim() < 4:
                wide = wide.unsqueeze(0)
            told_apart = (None, wide) if wide is None or wide.dtype != torch.bool else (wide, None)
            own = query.shape[-1] ** -0.5 if scale is None else scale
            return Terms(own, key.shape[2], told_apart[0], 0 if is_causal else None, told_apart[1])

        out, _ = self.run(Softmax(query, key, value, fused, dropout_p, terms))
        return out


class OwnSite(Site):
    """A `regard.nn.Attention` layer."""

    module: Attention

    through: Through | None = None

    def watch(self, run: Run) -> None:
        self.run = run
        self.module.watcher = self

    def leave(self) -> None:
        self.module.watcher = None

    @property
    def unturned(self) -> str | None:
        if self.module.rope is not None:
            return None
        return "it has no rotary positions before its mechanism; expected the points q and k, which stand before those of a mechanism"

    def turning(self, through: Through) -> OwnSite:
        self.through = through
        return self

    def remove(self) -> None:
        self.through = None

    def before_rotary(self, q: Tensor, k: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Queries and keys of tokens from `position` on, past the taps before they are turned."""
        self.clock.start = position
        return (q, k) if self.through is None else (self.through("q_pre_rotary", q), self.through("k_pre_rotary", k))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mechanism: Any, mask: Any, dropout: float, position: int, step: Any, made: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """Heads (B, H, L, Dv), and the state behind a step (None in a whole pass)."""
        assert self.run is not None
        self.clock.start = position
        state: list[Any] = [None]

        def fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
            if step is None:
                return attend(q, k, v, mechanism, mask=mask, dropout_p=dropout, **made), None
            out, state[0] = step(q, k, v)
            return out, None

        def matrix(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            return None if getattr(mechanism, "values", None) is not None else weights(q, k, mechanism, mask=mask, **made)

        def terms() -> Terms:
            return Terms(q.shape[-1] ** -0.5, k.shape[2], None, k.shape[2] - q.shape[2] if isinstance(mask, Causal) else None)

        attending: Attending
        if step is not None:
            attending = Stepped(q, k, v, fused, dropout)
        elif mechanism == get("softmax") and (mask is None or isinstance(mask, Causal)):
            attending = Softmax(q, k, v, fused, dropout, terms)
        else:
            attending = Given(q, k, v, fused, dropout, type(mechanism).__name__, matrix)
        return self.run(attending)[0], state[0]


class Stepped(Attending):
    """New tokens whose past is in a state: there are no keys to look at."""

    @property
    def stepped(self) -> bool:
        return True

    def logits(self, heads: Tensor, rows: Tensor) -> Tensor:
        raise RegardError("a step of regard's own layer keeps its past in a state; expected a forward pass over all tokens for its logits")

    def weights(self, heads: Tensor, rows: Tensor, logits: Tensor | None = None) -> Tensor:
        raise RegardError("a step of regard's own layer keeps its past in a state; expected a forward pass over all tokens for its weights")


def sites(model: nn.Module) -> list[Site]:
    """The attention layers of a model, in the order of its modules: regard's own, or timm's, or those of transformers' interface."""
    if not isinstance(model, nn.Module):
        raise RegardError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    names = names_of(model)
    own = [module for module in model.modules() if isinstance(module, Attention)]
    if own:
        return [OwnSite(model, x, names[x], at, x.heads, x.kv_heads) for at, x in enumerate(own)]
    fused = [module for module in model.modules() if hasattr(module, "fused_attn") and hasattr(module, "num_heads")]
    if fused:
        return [SDPASite(model, x, names[x], at, int(x.num_heads), int(x.num_heads)) for at, x in enumerate(fused)]  # type: ignore[arg-type]
    try:
        from transformers import PreTrainedModel
    except ImportError as missing:
        raise MissingDependency(
            "taps on models that are not regard's own or timm's need transformers: pip install 'regard[hf]'"
        ) from missing
    found = attention_modules(model)
    owners = {module: parent for parent in model.modules() if isinstance(parent, PreTrainedModel) for module in parent.modules()}
    return [TransformersSite(model, x, names[x], at, owners.get(x)) for at, x in enumerate(found)]
