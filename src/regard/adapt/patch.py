"""Another mechanism in a Hugging Face model, through transformers' attention interface; its code and its weights are not touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Mechanism, Sizes, Weighted
from ..catalog import get
from ..engine import weights
from ..engine.door import attend
from ..engine.policy import Policy
from ..engine.weights import drop
from ..errors import RegardError
from ..nn.inputs import Inputs
from .call import Call
from .fit import always_causal, check_host, compares_places, dressed, reads_places, shifts_freely
from .host import attention_modules, interface, route, routed, shape_of, unroute
from .intercept import SDPAPatch, attends
from .policies import check_policy, run_policy
from .sight import Piece, Sight, pieces

WHEN = ("prefill", "decode", "both")


def patch(
    model: nn.Module,
    mechanism: str | Mechanism | Policy,
    *,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    when: str = "both",
    **inputs: Any,
) -> Patch | SDPAPatch:
    """Run `mechanism` in the attention layers of a model of transformers, timm or diffusers, until `.restore()` or the end of a `with` block.

    layers, heads: which (None: all). when: "prefill" (several queries at once), "decode" (one query) or "both". Layers, heads and phases
    left alone run the model's own attention, bit for bit. inputs: tensors the mechanism declares, the same in every layer; learned ones
    not given become parameters of the patch (`patch.inputs`, a module per layer).

    Masks, caches and packed documents are the model's: each row gives what it gives alone, places being those of its real tokens. The
    model's softcap, position bias, biases in masks and sinks change the mechanism's scores and rows as they change softmax's; dropout
    in training acts on its weights, and `output_attentions=True` gives them. A policy (an object that knows layers, such as `LongHeads`,
    `Ltri` or `ReuseLayers`) runs prompts only, whole and without padding. A copy of the model is not patched.

    Of timm and diffusers, the modules that call PyTorch's fused kernel are patched: the mechanism reads what that kernel would have read.

    Raises RegardError for models that do not use transformers' attention interface, or not in all they compute; unknown layers or heads;
    mechanisms whose inputs are projected from the layer's x; causal mechanisms where the model sees the whole sequence, and others where
    it is causal. A call raises it for what the mechanism cannot express of the model's attention. MissingDependency without transformers.
    """
    if when not in WHEN:
        raise RegardError(f"when={when!r}; expected one of {', '.join(WHEN)}")
    if any(attends(module) for module in model.modules()):
        if when != "both":
            raise RegardError(f"when={when!r}: {type(model).__name__} does not decode token by token; expected when='both'")
        return SDPAPatch(model, mechanism, layers, heads, inputs)
    return Patch(model, mechanism, layers, heads, when, inputs)


class Patch:
    """A mechanism at work in a model; see `patch`. inputs: the learned tensors of each patched layer."""

    def __init__(
        self,
        model: nn.Module,
        mechanism: str | Mechanism | Policy,
        layers: Iterable[int] | None,
        heads: Iterable[int] | None,
        when: str,
        given: dict[str, Any],
    ):
        interface(forward)
        self.model, self.when, self.given = model, when, given
        self.mechanism = get(mechanism) if isinstance(mechanism, str) else mechanism
        self.dressed: dict[tuple[float | None, bool, bool], Mechanism] = {}  # by what the host adds: softcap, a bias, sinks
        self.name = mechanism if isinstance(mechanism, str) else type(mechanism).__name__
        modules = attention_modules(model)
        self.modules = [modules[at] for at in chosen("layers", layers, len(modules))]
        self.shapes = [shape_of(module) for module in self.modules]
        wanted = None if heads is None else list(heads)
        if isinstance(self.mechanism, Policy):
            check_policy(self.mechanism, self.modules[0], when, wanted, given)
        self.heads = None if wanted is None else [chosen("heads", wanted, count) for count, _, _ in self.shapes].pop()
        self.inputs = nn.ModuleList([self.inputs_of(*shape) for shape in self.shapes])
        if isinstance(self.mechanism, Mechanism):
            self.probe(self.mechanism, next(model.parameters()).device)
        for module in self.modules:
            route(module, self)

    def inputs_of(self, heads: int, kv_heads: int, width: int) -> Inputs:
        mechanism = Weighted() if isinstance(self.mechanism, Policy) else self.mechanism
        made = Inputs(mechanism, Sizes(1, heads, kv_heads, 1024, 1024, width, width), None, self.given)
        return made.to(next(self.model.parameters()).device)

    def at(self, module: nn.Module) -> int:
        """Which of the patched modules this is."""
        return self.modules.index(module)

    def probe(self, mechanism: Mechanism, device: torch.device) -> None:
        """Try the mechanism on a small call: RegardError where it cannot do what the layers do."""
        heads, kv_heads, width = self.shapes[0]
        seed = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, count, 16, width, generator=seed).to(device) for count in (heads, kv_heads, kv_heads))
        made = {**self.inputs[0](None, {"q": q, "k": k, "v": v}), **self.given}
        check_host(mechanism, self.name, self.modules, (q, k, v), made)

    def run(self, call: Call) -> tuple[Tensor, Tensor | None] | None:
        """(B, Lq, H, Dv) and weights where they are asked for; None where this call is not the patch's."""
        if self.when == ("prefill" if call.query.shape[2] == 1 else "decode"):
            return None
        call.check()
        q, k, v = call.heads()
        with torch.autocast(q.device.type, enabled=False):
            if isinstance(self.mechanism, Policy):
                out, p = run_policy(self.mechanism, self.at(call.module), q, k, v, call), None
            else:
                out, p = self.attention(call, q, k, v)
        out = out.transpose(1, 2).contiguous()
        if self.heads is None:
            return out, p
        own, own_p = call.own()
        mine = torch.zeros(q.shape[1], dtype=torch.bool, device=q.device)
        mine[self.heads] = True
        p = None if p is None or own_p is None else torch.where(mine[:, None, None], p.to(own_p.dtype), own_p)
        return torch.where(mine[:, None], out.to(own.dtype), own), p

    def attention(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, H, Lq, Dv) and the weights (B, H, Lq, Lk), if somebody wants them."""
        assert isinstance(self.mechanism, Mechanism)
        places, given_keys = reads_places(self.mechanism), k.shape[2]
        sight = call.sight(places)
        self.check_sight(call, sight)
        heads = (q, k[:, :, : sight.k_len], v[:, :, : sight.k_len])
        bias = call.bias(sight)
        parts = list(pieces(sight, q.shape[0])) if places else [whole(sight)]
        out, p = q.new_zeros(*q.shape[:3], v.shape[-1]), None
        for piece in parts:
            o, own = self.part(call, piece, piece.heads(*heads), bias, sight)
            out = piece.put(out, o)
            if own is not None:
                p = piece.put_pairs(own.new_zeros(*q.shape[:3], sight.k_len) if p is None else p, own)
        return out, p if p is None else nn.functional.pad(p, (0, given_keys - sight.k_len)).to(q.dtype)

    def part(
        self, call: Call, piece: Piece, heads: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, sight: Sight
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs of a piece's queries, and their weights where they are wanted or must be dropped from."""
        q, k, v = heads
        mechanism, options = self.posed(call, piece, heads, bias, sight)
        if not call.dropout and not call.wants_weights:
            return attend(q, k, v, mechanism, **options), None
        p = weights(q, k, mechanism, **options)
        if p is None or (call.dropout and getattr(mechanism, "values", None) is not None):
            why = f"dropout={call.dropout}" if call.dropout else "output_attentions=True"
            raise RegardError(
                f"{self.name} has no matrix of weights for {why}; expected model.eval() or no dropout, and no output_attentions"
            )
        if not call.dropout:
            return attend(q, k, v, mechanism, **options), p
        return drop(p, v, call.dropout)

    def posed(
        self, call: Call, piece: Piece, heads: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, sight: Sight
    ) -> tuple[Mechanism, dict[str, Any]]:
        """The mechanism with the host's changes, and the options of its call on a piece."""
        assert isinstance(self.mechanism, Mechanism)
        at, batch, sinks = self.at(call.module), call.query.shape[0], call.sinks
        added = call.softcap, bias is not None, sinks is not None
        if added not in self.dressed:
            self.dressed[added] = dressed(self.mechanism, *added)
        mechanism = self.dressed[added]
        if self.inputs[at].items and heads[0].shape[1] != self.shapes[at][0]:
            raise RegardError(f"{type(call.module).__name__} attends with {heads[0].shape[1]} heads but says it has {self.shapes[at][0]}")
        if piece.rows is not None:
            self.check_given()
        made = self.inputs[at](None, dict(zip("qkv", heads, strict=True)))
        options = {"mask": piece.mask, "scale": self.scale(call.scale), **made, **self.given, **piece.reads}
        if bias is not None:
            options["position_bias"] = piece.pairs(bias, batch, sight.q_len, sight.k_len)
        if sinks is not None:
            options["sink_logits"] = piece.of_queries(sinks, batch, sight.q_len)
        return mechanism, options

    def check_given(self) -> None:
        """Inputs given along queries or keys cannot follow tokens that move out of a padded row."""
        for item in self.mechanism.declared:  # type: ignore[union-attr]
            x = self.given.get(item.name)
            if isinstance(x, Tensor) and any(x.shape[at] > 1 for at, letter in enumerate(item.shape) if letter in "bqk" and at < x.dim()):
                raise RegardError(
                    f"input {item.name!r} has shape {tuple(x.shape)} and the batch is padded or packed; expected one for all tokens"
                )

    def check_sight(self, call: Call, sight: Sight) -> None:
        """Raise where the mechanism cannot mean, in this call, what it means."""
        mechanism, kind = self.mechanism, type(call.module).__name__
        assert isinstance(mechanism, Mechanism)
        if always_causal(mechanism) and not sight.causal:
            raise RegardError(
                f"{self.name} is causal by itself, and this call of {kind} sees later tokens; expected a mechanism that is not"
            )
        if sight.crossed and compares_places(mechanism):
            raise RegardError(
                f"{self.name} sets places of queries against places of keys, which in {kind} are of two sequences; expected only layers "
                "that attend to their own sequence (layers=[...])"
            )
        cut = call.window is not None and sight.q_len < sight.k_len and sight.k_len >= call.window
        if cut and reads_places(mechanism) and not shifts_freely(mechanism):
            raise RegardError(
                f"{self.name} reads the places of tokens, and the cache of {kind} forgets those more than {call.window} back; expected "
                "use_cache=False, or only layers without a sliding window"
            )

    def scale(self, scale: float | None) -> float | None:
        """The model's scale, where the mechanism has one."""
        mechanism: Any = self.mechanism
        return scale if getattr(getattr(mechanism, "score", mechanism), "scaled", True) else None

    def restore(self) -> None:
        """Give the model its own attention back; nothing of the patch stays in it."""
        for module in self.modules:
            unroute(module, self)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()


def whole(sight: Sight) -> Piece:
    """The call as it is, for mechanisms to which places mean nothing."""
    return Piece(None, None, None, sight.shown if sight.shown is not None else None if sight.q_len == 1 else sight.mask)


def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **given: Any) -> tuple[Tensor, Any]:
    """What transformers calls in every attention layer: q (B, H, Lq, D), k, v (B, Hkv, Lk, D) -> (B, Lq, H, Dv), and weights or None."""
    view = routed(module)
    call = Call(module, query, key, value, attention_mask, given)
    if view is None:
        return call.own()
    view.calls += 1
    if view.station is None:
        return answered(call, view.patches)
    seen: tuple[Tensor, Any] = view.station.attend(call, view.patches)
    return seen


def answered(call: Call, patches: Sequence[Patch]) -> tuple[Tensor, Any]:
    """What the newest patch of this call gives, or the model's own attention."""
    for patch in reversed(patches):
        found = patch.run(call)
        if found is not None:
            return found
    return call.own()


def chosen(name: str, wanted: Iterable[int] | None, count: int) -> list[int]:
    if wanted is None:
        return list(range(count))
    found = list(wanted)
    wrong = [at for at in found if not 0 <= at < count]
    if wrong or not found:
        raise RegardError(f"{name}={found}; expected some of 0 .. {count - 1}")
    return found
