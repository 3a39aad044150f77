"""An attention layer of a transformers decoder with another mechanism in its place, on the same projections."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Causal
from ..engine.reference import repeat_heads
from ..errors import RegardError
from .host import mask_form, shape_of
from .sight import Sight, ahead, look, pieces

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")  # of queries and keys, a head, before the rotary turn, where a model has them
Rotary = tuple[Tensor, Tensor]
Turn = Callable[[Tensor, Tensor, Tensor, Tensor], Rotary]


@dataclass
class Tokens:
    """What a mechanism reads: q (B, H, L, D), k, v (B, Hkv, L, D) as projected, turned_q and turned_k with rotary positions, keep (B, L) bool:
    which tokens are no padding (None: all)."""

    q: Tensor
    k: Tensor
    v: Tensor
    turned_q: Tensor
    turned_k: Tensor
    keep: Tensor | None

    def repeated(self, x: Tensor) -> Tensor:
        """x (B, Hkv, L, D) a query head."""
        return repeat_heads(x, self.q.shape[1])

    def hide(self, x: Tensor) -> Tensor:
        """x (B, H, L, D), zero where there is padding."""
        return x if self.keep is None else torch.where(self.keep[:, None, :, None], x, 0.0)


class Student(nn.Module):
    """Stands where an attention layer with q_proj, k_proj, v_proj, o_proj stood, with copies of them under their names.

    A kind of student gives `mix`, which reads `Tokens` and a state and returns each head's output and the next state; or `run`, where more
    than the mixing is its own. In a cache it keeps that state and nothing else. Padding, and without a cache documents packed in a row, give
    what each text gives alone; texts beside a cache are padded on the left.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        host: Any = layer
        check_layer(host)
        self.config, self.layer_idx, self.is_causal = host.config, host.layer_idx, True
        self.heads, self.kv_heads, self.head_dim = shape_of(host)
        self.scaling = getattr(host, "scaling", self.head_dim**-0.5)
        for name in (*PROJECTIONS, *(name for name in NORMS if hasattr(host, name))):
            setattr(self, name, copy.deepcopy(getattr(host, name)))
        self.turn = turn_of(host)
        self.train(host.training)

    def mix(self, tokens: Tokens, state: Any) -> tuple[Tensor, Any]:
        """(each head's output (B, H, L, D), the state after the last token). state: None at the beginning of the texts."""
        raise NotImplementedError

    def projected(self, x: Tensor, rotary: Rotary, keep: Tensor | None) -> Tokens:
        """x (B, L, dim) -> queries, keys and values."""
        return projected(self, x, rotary, keep, self.turn)

    def heads_of(self, x: Tensor, rotary: Rotary, keep: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """Each head's output (B, H, L, D) before the output projection, and the next state; mixed in at least float32."""
        tokens = self.projected(x, rotary, keep)
        with torch.autocast(x.device.type, enabled=False):
            out, state = self.mix(tokens, state)
        return out.to(tokens.v.dtype), state

    def run(self, x: Tensor, rotary: Rotary, keep: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """x (B, L, dim) -> (B, L, dim), and the next state. rotary: cosines and sines (B or 1, L, D) of the places."""
        out, state = self.heads_of(x, rotary, keep, state)
        y: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[operator]
        return y, state

    def read(self, x: Tensor, rotary: Rotary) -> Tensor:
        """A whole text (B, L, dim), of which no state is kept."""
        return self.run(x, rotary)[0]

    def forward(
        self, hidden_states: Tensor, position_embeddings: Rotary | None = None, attention_mask: Any = None, **given: Any
    ) -> tuple[Tensor, None]:
        """As transformers calls its attention layers."""
        if position_embeddings is None:
            raise RegardError(f"{type(self).__name__} got no position_embeddings; expected the cosines and sines that the model makes")
        cache = next((given[name] for name in ("cache", "past_key_values") if given.get(name) is not None), None)
        length = hidden_states.shape[1]
        if cache is None:
            sight = look(attention_mask, length, length, True, mask_form(self), None, True)
            return self.apart(hidden_states, position_embeddings, sight), None
        from .kept_state import held

        memory = held(cache, self.layer_idx)
        sight = look(attention_mask, length, memory.seen + length, True, mask_form(self), None, True)
        y, state = self.run(hidden_states, position_embeddings, keep_of(sight, length), memory.state)
        memory.remember(state, length)
        return y, None

    def apart(self, x: Tensor, rotary: Rotary, sight: Sight) -> Tensor:
        """Whole texts, each by itself."""
        if sight.shown is None:
            return self.read(x, rotary)
        y = torch.zeros_like(x)
        cos, sin = (z.expand(x.shape[0], -1, -1) for z in rotary)
        for piece in pieces(sight, x.shape[0]):
            if piece.mask != Causal() or piece.rows is None or piece.queries is None:
                raise RegardError("attention_mask hides more than padding and other texts; expected one or the other")
            at = (piece.rows[:, None], piece.queries)
            y = y.index_put(at, self.read(x[at], (cos[at], sin[at])).to(y.dtype))
        return y


def turn_of(layer: Any) -> Turn:
    """How a model's attention layer puts rotary positions on queries and keys."""
    found: Turn = sys.modules[type(layer).__module__].apply_rotary_pos_emb
    return found


def projected(layer: Any, x: Tensor, rotary: Rotary, keep: Tensor | None = None, turn: Turn | None = None) -> Tokens:
    """What an attention layer makes of x (B, L, dim). rotary: cosines and sines (B or 1, L, D). turn: None for a model's own layer."""
    q, k, v = (getattr(layer, name)(x).unflatten(-1, (-1, layer.head_dim)) for name in PROJECTIONS[:3])
    q, k = (getattr(layer, name)(y) if hasattr(layer, name) else y for name, y in zip(NORMS, (q, k), strict=True))
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    turned_q, turned_k = (turn or turn_of(layer))(q, k, *rotary)
    return Tokens(q, k, v, turned_q, turned_k, keep)


def keep_of(sight: Sight, length: int) -> Tensor | None:
    """(B, length) bool of new tokens that are no padding, which must stand on the left; None: all."""
    if sight.shown is None:
        return None
    table = sight.shown[:, 0]
    keep = table[:, -1, -length:]
    own = keep[:, None] & ~ahead(table[..., -length:], 0)
    if bool((keep[:, :-1] & ~keep[:, 1:]).any()) or bool(((table[..., -length:] != own) & keep[..., None]).any()):
        raise RegardError("attention_mask with a cache: expected one text a row, padded on the left")
    return None if bool(keep.all()) else keep


def check_layer(layer: Any) -> None:
    """Raise unless an attention layer is what a student can stand for."""
    name = type(layer).__name__
    missing = [part for part in PROJECTIONS if not isinstance(getattr(layer, part, None), nn.Module)]
    if missing or not hasattr(layer, "config") or not hasattr(sys.modules[type(layer).__module__], "apply_rotary_pos_emb"):
        raise RegardError(
            f"{name}{' has no ' + ', '.join(missing) if missing else ''}: expected an attention layer of a transformers decoder with "
            f"{', '.join(PROJECTIONS)} and rotary positions (Llama, Qwen, Mistral and their like)"
        )
    extra = [part for part in ("sinks", "attn_logit_softcapping", "sliding_window") if getattr(layer, part, None) is not None]
    if not hasattr(layer, "sliding_window") and getattr(layer.config, "sliding_window", None) is not None:
        extra.append("sliding_window")
    if extra or not getattr(layer, "is_causal", True):
        raise RegardError(
            f"{name} has {', '.join(extra) or 'no causal order'}, which a student has no part for; expected plain causal softmax"
        )
