"""Liger: a pretrained model's own projections drive a gated recurrence beside a window of softmax, without a new parameter (id 170; Lan et al., 2025).

o = mix o_window + (1 - mix) o_recurrent, mix = 1/2;   o_window: softmax over rotary keys i - w .. i;   G = Pool(x W_K), adaptive means along channels
gla:   S_t = diag(e^g) S_{t-1} + softmax(k) v^T, g = logsigmoid(G) / 16,  o = softmax(q) S_t
hgrn2: the same with k = 1 - sigmoid(G) in place of softmax(k), g = logsigmoid(G)
gsa:   slots K, V <- e^g K + (1 - e^g) k^T, e^g V + (1 - e^g) v^T, g as of gla, a slot each,  o = softmax(K q) V.   q, k here without rotary positions
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.adapt.conversion import Conversion, convert
from regard.adapt.stages import Lora
from regard.adapt.student import Student, Tokens
from regard.algebra import Causal, Input, Recurrent, Slots
from regard.catalog.registry import register
from regard.engine.stream import step
from regard.errors import RegardError
from regard.nn.window_sums import window_sums

KINDS = ("gla", "hgrn2", "gsa")
GATED = Recurrent(decay="channel", scaled=False)
SLOTTED = Slots(inputs=(Input("log_forget", "bhkf"), Input("write", "bhkf", default="1 - f")))


class Remembered(NamedTuple):
    """The last w keys and values (key heads), which of them are there, and the recurrence's state."""

    k: Tensor
    v: Tensor
    there: Tensor
    state: Any


class LigerAttention(Student):
    """An attention layer's Liger form, on its parameters alone; see `convert_liger`."""

    def __init__(self, layer: nn.Module, kind: str = "gla", window: int = 64, mix: float = 0.5, tau: float = 16.0, slots: int = 128):
        super().__init__(layer)
        if kind not in KINDS or window < 0 or not 0 <= mix <= 1 or tau <= 0 or slots < 1:
            raise RegardError(
                f"kind={kind!r}, window={window}, mix={mix}, tau={tau}, slots={slots}: expected one of {', '.join(KINDS)}, a window of 0 or more, "
                "mix from 0 to 1, tau above 0, and at least one slot"
            )
        self.kind, self.window, self.share, self.tau, self.slots = kind, window, mix, tau, slots

    def gates(self, k: Tensor) -> Tensor:
        """G (B, Hkv, L, d or slots) of keys (B, Hkv, L, d), pooled over the channels of all heads together."""
        if self.kind != "gsa":
            return k  # as many means as channels
        flat = F.adaptive_avg_pool1d(k.transpose(1, 2).flatten(2), self.slots * self.kv_heads)
        return flat.unflatten(2, (self.kv_heads, -1)).transpose(1, 2)

    def recurrent(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, state: Any) -> tuple[Tensor, Any]:
        gates = tokens.repeated(self.gates(k))
        k, v = tokens.repeated(k), tokens.hide(tokens.repeated(v))
        fade = tokens.hide(F.logsigmoid(gates) / (1.0 if self.kind == "hgrn2" else self.tau))
        if self.kind == "gsa":
            return step(q, tokens.hide(k), v, SLOTTED, state, log_forget=fade)
        k = 1 - gates.sigmoid() if self.kind == "hgrn2" else k.softmax(-1)
        return step(q.softmax(-1), tokens.hide(k), v, GATED, state, mask=Causal(), log_decay=fade)

    def mix(self, tokens: Tokens, state: Any) -> tuple[Tensor, Remembered]:
        wide = torch.promote_types(tokens.q.dtype, torch.float32)
        q, k, v, turned_q, turned_k = (x.to(wide) for x in (tokens.q, tokens.k, tokens.v, tokens.turned_q, tokens.turned_k))
        there = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if tokens.keep is None else tokens.keep
        old = state or Remembered(k[:, :, :0], v[:, :, :0], there[:, :0], None)
        out, now = self.recurrent(q, k, v, tokens, old.state)
        k, v, there = torch.cat((old.k, turned_k), 2), torch.cat((old.v, v), 2), torch.cat((old.there, there), 1)
        near = window_sums(turned_q, k, v, self.window + 1, self.scaling, None if bool(there.all()) else there)
        softmax = near.values / torch.where(near.mass == 0, 1.0, near.mass)
        last = slice(max(0, k.shape[2] - self.window), None)
        return self.share * softmax + (1 - self.share) * out, Remembered(k[:, :, last], v[:, :, last], there[:, last], now)


@register("liger", kind="function")
def convert_liger(model: nn.Module, kind: str = "gla", window: int = 64, layers: Any = None, **options: Any) -> Conversion:
    """Every attention layer of a transformers decoder (or those numbered in `layers`) in its Liger form: names and shapes of parameters stay.

    kind: "gla", "hgrn2" or "gsa". window: keys before a token's own that softmax sees beside it, as flash-attn counts: window + 1 in all.
    options: mix (softmax's share), tau (the gates' temperature), slots (of "gsa"). Then `carry_out(conversion, [liger_lora(...)], draw)`.
    """
    return convert(model, lambda layer: LigerAttention(layer, kind, window, **options), layers=layers)


def liger_lora(steps: int, lr: float = 1e-3, rank: int = 8, **options: Any) -> Lora:
    """Recovery: low-rank updates of q, k and v, of peft's own scale, learn from next tokens."""
    given: dict[str, Any] = {"targets": ("q_proj", "k_proj", "v_proj"), "accumulate": 8, "clip": 1.0, **options}
    return Lora(steps, lr, rank=rank, **given)
