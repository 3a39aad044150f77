"""One layer for every mechanism: projections, the mechanism's own parameters, a full pass and a step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra import Causal, Mask, Mechanism, Rope, Sizes
from ..catalog import get
from ..catalog.making import placeable, placed
from ..engine import State, step, weights
from ..engine.door import attend
from ..engine.given import given_mask
from ..errors import RegardError
from .inputs import Inputs
from .parts import HeadGate, Momentary, ShortConv, documents_of, head_norm, takes, whole

ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "elu+1": lambda x: F.elu(x) + 1,
    "t2r": F.relu,
}

GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid, "linear": lambda x: x}


@dataclass
class LayerState:
    """What a layer remembers between steps: the mechanism's state and the last inputs of its convolutions."""

    inner: State | None
    conv: tuple[Tensor, ...]
    position: int

    @property
    def bytes(self) -> int:
        return (self.inner.bytes if self.inner is not None else 0) + sum(x.numel() * x.element_size() for x in self.conv)


@placeable
class Attention(Momentary):
    """Multi-head attention by any mechanism: x (B, L, dim) -> (B, L, dim).

    mechanism: a name or a description. kv_heads: key and value heads (None: the mechanism's, else heads). head_dim: channels a head
    (None: dim / heads). causal: run under Causal(); policies for prompts, whose choice looks ahead, take causal=False and read the past
    alone all the same (`mechanism.past_alone`). rope: rotary positions, where the mechanism has none of its own. context_len: the length
    that length-dependent initial values assume. dropout: the share of weights dropped in training (`attend`'s dropout_p). device, dtype: of the parameters. The mechanism's recipe decides convolutions, activations, norms and gates.
    """

    watcher: Any = None  # of `regard.taps`: attends in the mechanism's place

    @placed
    def __init__(
        self,
        dim: int,
        heads: int,
        mechanism: str | Mechanism = "softmax",
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        rope: bool = False,
        bias: bool = False,
        context_len: int = 1024,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.mechanism = get(mechanism) if isinstance(mechanism, str) else mechanism
        if head_dim is None and dim % heads:
            raise RegardError(f"dim={dim} is not a multiple of heads={heads}; pass head_dim=... to choose it")
        recipe = self.mechanism.recipe_of
        kv_heads = kv_heads or recipe.kv_heads or heads
        if heads % kv_heads:
            raise RegardError(f"heads={heads} is not a multiple of kv_heads={kv_heads}")
        if causal and not (self.mechanism.can_be_causal or self.mechanism.causal_only):
            raise RegardError(f"{name_of(mechanism)} reads the whole sequence at once; pass causal=False")
        if not causal and self.mechanism.causal_only:
            raise RegardError(
                f"causal=False: {name_of(mechanism)} reads the past alone; pass causal=True, or choose a mechanism that reads all keys"
            )
        if not 0 <= dropout < 1:
            raise RegardError(f"dropout={dropout}; expected at least 0 and less than 1")
        self.dim, self.heads, self.kv_heads, self.causal, self.recipe, self.dropout = dim, heads, kv_heads, causal, recipe, dropout
        self.value_dim = head_dim or dim // heads
        key = recipe.key_dim
        self.key_dim = self.value_dim if key is None else key if isinstance(key, int) else max(1, int(self.value_dim * key))
        own_position = getattr(self.mechanism, "position", None) is not None
        turned = rope and recipe.rope and not own_position
        if turned and self.key_dim % 2:
            raise RegardError(f"rope=True turns pairs of channels, and heads have {self.key_dim}; expected an even number, or rope=False")
        self.rope = Rope() if turned else None
        widths = (heads * self.key_dim, kv_heads * self.key_dim, kv_heads * self.value_dim)
        self.q, self.k, self.v = (nn.Linear(dim, width, bias) for width in widths)
        self.out = nn.Linear(heads * self.value_dim, dim, bias)
        after = activation_of(recipe.conv_activation) if recipe.conv_activation else None
        self.convs = nn.ModuleList(
            [ShortConv(width, recipe.short_conv, recipe.conv_bias, after) for width in widths] if recipe.short_conv else []
        )
        self.feature = nn.Linear(self.key_dim, self.key_dim, False) if recipe.activation == "t2r" else nn.Identity()
        self.q_norm = head_norm(recipe.qk_norm.removeprefix("q_"), self.key_dim, recipe.qk_eps)
        self.k_norm = head_norm("" if recipe.qk_norm.startswith("q_") else recipe.qk_norm, self.key_dim, recipe.qk_eps)
        self.out_norm = head_norm(recipe.out_norm, self.value_dim, recipe.norm_eps)
        width = heads * self.value_dim
        self.merge_norm = head_norm(recipe.merge_norm, width, recipe.norm_eps)
        wide = nn.Linear(dim, width, bias)
        low = recipe.gate_rank and nn.Sequential(nn.Linear(dim, recipe.gate_rank, bias), nn.Linear(recipe.gate_rank, width, bias))
        self.gate = (low or wide) if recipe.out_gate in GATES else None
        by_head = recipe.out_gate not in ("", *GATES)
        if causal and recipe.out_gate == "mean":
            raise RegardError("out_gate='mean' averages over all tokens; pass causal=False")
        self.head_gate = (
            HeadGate(dim, heads, recipe.out_gate, recipe.gate_init, recipe.gate_factor, hidden=recipe.gate_hidden) if by_head else None
        )
        sizes = Sizes(1, heads, kv_heads, context_len, context_len, self.key_dim, self.value_dim)
        self.inputs = Inputs(self.mechanism, sizes, dim)

    @property
    def convolves(self) -> bool:
        """Whether tokens meet before attention, so that documents and padding are kept apart there too."""
        return len(self.convs) > 0  # bool() of a list of modules is not traced by torch 2.11

    def heads_of(
        self,
        x: Tensor,
        source: Tensor,
        position: int | Tensor,
        conv: tuple[Tensor, ...] | None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """q, k, v as (B, heads, L, channels), and the convolutions' new state. position: the first token's, or every token's (L,).
        documents: of `ShortConv`."""
        flat, tails = [self.q(x), self.k(source), self.v(source)], []
        for at, layer in enumerate(self.convs):
            flat[at], tail = layer(flat[at], conv[at] if conv else None, documents)
            tails.append(tail)
        act = activation_of(self.recipe.activation)
        q, k, v = (
            y.unflatten(-1, (-1, width)).transpose(1, 2)
            for y, width in zip(flat, (self.key_dim, self.key_dim, self.value_dim), strict=True)
        )
        q, k = self.q_norm(act(self.feature(q))), self.k_norm(act(self.feature(k)))
        v = activation_of(self.recipe.value_activation)(v)
        if self.rope is not None:
            if self.watcher is not None:
                q, k = self.watcher.before_rotary(q, k, position if isinstance(position, int) else int(position[0]))
            for_q, for_k = (
                position if isinstance(position, Tensor) else torch.arange(position, position + y.shape[-2], device=y.device)
                for y in (q, k)
            )
            q, k = self.rope.rotate(q, for_q), self.rope.rotate(k, for_k)
        return q, k, v, tuple(tails)

    def close(self, o: Tensor, x: Tensor) -> Tensor:
        o = self.out_norm(activation_of(self.recipe.out_activation)(o))
        o = o if self.head_gate is None else o * self.head_gate(x)
        o = activation_of(self.recipe.merge_activation)(self.merge_norm(o.transpose(1, 2).flatten(-2)))
        return self.out(o if self.gate is None else o * GATES[self.recipe.out_gate](self.gate(x)))  # type: ignore[no-any-return]

    @takes(x="batch length dim", context="batch keys dim")
    def forward(self, x: Tensor, context: Tensor | None = None, mask: Mask | Tensor | None = None, **inputs: Any) -> Tensor:
        """x (B, L, dim), context (B, Lk, dim) for cross-attention -> (B, L, dim). mask is added to the causal one; `inputs`: tensors the
        mechanism declares and the layer does not make (segments, a mask's ids)."""
        given: dict[str, Any] = dict(inputs)
        mechanism: str | Mechanism = self.mechanism
        if isinstance(mask, Tensor):
            mechanism, mask, given = given_mask(mechanism, mask, given)
        full = self.full_mask(mask)
        source = x if context is None else context
        documents = documents_of(full, given, x.shape[1]) if self.convolves else None
        q, k, v, _ = self.heads_of(x, source, 0, None, documents)
        made = {**self.inputs(source, {"q": q, "k": k, "v": v}), **given}
        dropped = self.dropout if self.training else 0.0
        if self.watcher is not None:
            return self.close(self.watcher.attend(q, k, v, mechanism, full, dropped, 0, None, made)[0], x)
        return self.close(attend(q, k, v, mechanism, mask=full, dropout_p=dropped, **made), x)

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor | None:
        """The layer's weights on x, (B, heads, L, L), or None where the mechanism has no such matrix."""
        q, k, v, _ = self.heads_of(x, x, 0, None)
        return weights(q, k, self.mechanism, mask=Causal() if self.causal else None, **self.inputs(x, {"q": q, "k": k, "v": v}))

    def full_mask(self, mask: Mask | None) -> Mask | None:
        return mask if not self.causal else Causal() if mask is None else Causal() & mask

    @whole
    @takes(x="batch length dim")
    def step(self, x: Tensor, state: LayerState | None = None, mask: Mask | None = None, **inputs: Any) -> tuple[Tensor, LayerState]:
        """New tokens x (B, n, dim) after those in `state` -> (y (B, n, dim), new state); equal to `forward` over all of them. mask: beside the
        causal one; its inputs cover all tokens so far."""
        if not self.causal:
            raise RegardError("step needs causal=True: without it earlier outputs would change with every token")
        state = state or LayerState(None, (), 0)
        documents = documents_of(mask, inputs, x.shape[1]) if self.convolves else None
        q, k, v, conv = self.heads_of(x, x, state.position, state.conv, documents)
        made = {**self.inputs(x, {"q": q, "k": k, "v": v}), **inputs}

        def taken(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
            return step(q, k, v, self.mechanism, state.inner, mask=mask, **made)

        if self.watcher is not None:
            o, inner = self.watcher.attend(q, k, v, self.mechanism, mask, 0.0, state.position, taken, made)
        else:
            o, inner = taken(q, k, v)
        return self.close(o, x), LayerState(inner, conv, state.position + x.shape[1])

    def __getstate__(self) -> dict[str, Any]:
        return {key: x for key, x in super().__getstate__().items() if key != "watcher"}  # a copy is nobody's

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, causal={self.causal}"


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATION:
        raise RegardError(f"activation {name!r}; expected one of {', '.join(map(repr, ACTIVATION))}")
    return ACTIVATION[name]


def name_of(mechanism: str | Mechanism) -> str:
    return mechanism if isinstance(mechanism, str) else type(mechanism).__name__
