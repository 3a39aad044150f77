"""Slots read by softmax: two scans over the same gates, the first with decaying values, joined by a softmax over the slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...algebra.mask import Mask
from ...algebra.mechanism import Recurrent, Weighted
from ...algebra.position import Rope
from ...algebra.position_mask import Causal, Window
from ...algebra.states import Slots
from ...algebra.token_mask import Padding
from ...errors import RegardError
from ..exported import holds
from ..inner import attend_with_stats
from ..problem import check_names, fill_inputs, sizes_of
from ..reference import Stats, repeat_heads
from .chunk import SAFE, SEGMENT, SUB, carry
from .chunked import chunked
from .pose import CLAMP, Scan, check_mask, from_logits, kept_keys, per_head

SIZE = 64


@dataclass
class SlotState:
    """The slots K (B, H, m, D) and V (B, H, m, Dv), what logits of writes were divided by, and the last `window` tokens: their keys, values,
    log gates and writes. length: tokens read."""

    k: Tensor
    v: Tensor
    last: Tensor | None
    recent: tuple[Tensor, ...]
    length: int

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.k, self.v, self.last, *self.recent) if x is not None)


def fading_values(weights: Tensor, s: Tensor, total: Tensor) -> Tensor:
    """out_im = sum_{j <= i} weights_ij s_jm exp(total_im - total_jm), no exponent above zero where decay is strong."""
    end = total[..., -1:, :]
    if holds(end > -SAFE, False):
        middle = total - end / 2
        return torch.exp(middle) * (weights.tril() @ (s * torch.exp(-middle)))
    total, size, rows = total.double(), s.shape[-2], []
    for start in range(0, size, SUB):
        stop = min(start + SUB, size)
        mine = total[..., start:stop, :]
        reference = total[..., start - 1 : start, :] if start else torch.zeros_like(mine[..., :1, :])
        gap = (mine.unsqueeze(-2) - mine.unsqueeze(-3)).clamp_max(0)
        here = weights[..., start:stop, start:stop].tril()
        out = torch.einsum("...ij,...jm,...ijm->...im", here, s[..., start:stop, :], torch.exp(gap).to(s.dtype))
        if start:
            past = s[..., :start, :] * torch.exp(reference - total[..., :start, :]).to(s.dtype)
            out = out + torch.exp(mine - reference).to(s.dtype) * (weights[..., start:stop, :start] @ past)
        rows.append(out)
    return torch.cat(rows, -2)


def slot_scores(q: Tensor, k: Tensor, s: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(K_t q_t for every t (B, H, L, m), K after the last token)."""
    b, h, length, d = k.shape
    state = k.new_zeros(b, h, s.shape[-1], d) if state is None else state
    outs = []
    for start in range(0, length, SEGMENT):
        part = [x[..., start : start + SEGMENT, :] for x in (q, k, s, decay)]
        fill = -part[0].shape[-2] % SIZE
        a, c, w, g = (pad(x, (0, 0, 0, fill)).unflatten(-2, (-1, SIZE)) for x in part)
        total = g.cumsum(-2)
        end = total[..., -1:, :]
        states, state = carry((w * torch.exp(end - total)).transpose(-1, -2) @ c, torch.exp(end).transpose(-1, -2), state)
        out = torch.exp(total) * (a @ states.transpose(-1, -2)) + fading_values(a @ c.transpose(-1, -2), w, total)
        outs.append(out.flatten(-3, -2)[..., : part[0].shape[-2], :])
    return torch.cat(outs, -2), state


def declared(mechanism: Slots) -> dict[str, Any]:
    return {item.name: item for item in mechanism.declared}


def prepared(
    mechanism: Slots,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    given: Mapping[str, Any],
    last: Tensor | None,
    real: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q (scaled), k, v, log gates, writes, and the last divisor of writes; what is no `real` token (B, 1, L, 1) writes and fades nothing."""
    sizes = sizes_of(q, k, v)
    if sizes.q_len > sizes.k_len:
        raise RegardError(f"{sizes.q_len} queries but {sizes.k_len} keys: slots need a key for every query")
    q = pad(q, (0, 0, sizes.k_len - sizes.q_len, 0))
    if scale is not None and not mechanism.scaled:
        raise RegardError(f"scale={scale}: this mechanism's scores are not scaled; expected None")
    specs = declared(mechanism)
    check_names(given, specs, mechanism)
    given = per_head(given, specs, sizes)
    found = fill_inputs(
        {name: spec for name, spec in specs.items() if given.get(name) is not None or spec.default is None}, given, sizes, q
    )
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q, repeat_heads(k, sizes.heads), repeat_heads(v, sizes.heads)))
    if real is not None:
        k, v = (torch.where(real, x, 0.0) for x in (k, v))
    q = q * ((sizes.head_dim**-0.5 if scale is None else scale) if mechanism.scaled else 1.0)
    shape = (sizes.batch, sizes.heads, sizes.k_len)
    write = found["write"].to(wide) if "write" in found else None
    write = write if write is None or real is None else torch.where(real, write, 0.0)
    if mechanism.gates == "sum":
        assert write is not None
        write, decay, last = from_logits("softmax", write.expand(*shape, -1), real, True, last)
        assert decay is not None
        return q, k, v, decay, write if real is None else write * real, last
    decay = found["log_forget"].to(wide)
    decay = decay if real is None else torch.where(real, decay, 0.0)
    if not holds(~(decay > 0), True):
        raise RegardError(f"input 'log_forget' has entries up to {float(decay.max()):.3g}; expected logs of gates, all <= 0")
    write = -torch.expm1(decay) if write is None else write
    decay, write = decay.clamp_min(CLAMP).expand(*shape, -1), write.expand(*shape, -1)
    return (q, k, v, decay, write, None) if real is None else (q, k, v, decay * real, write * real, None)


def slots(
    mechanism: Slots,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float | None,
    given: Mapping[str, Any],
    attend: Callable[..., Tensor],
) -> Tensor:
    check_mask(Recurrent(), mask)
    keep, given = kept_keys(mask, given, sizes_of(q, k, v))
    return run(mechanism, q, k, v, scale, given, None, keep)[0][..., -q.shape[-2] :, :]


def first_slots(mechanism: Slots, state: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor) -> SlotState:
    """Slots (K (B, H, m, D), V (B, H, m, Dv)) as the state before the first token."""
    heads, widths = q.shape[1], (k.shape[-1], v.shape[-1])
    fits = len(state) == 2 and all(
        isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] in (k.shape[1], heads) and x.shape[3] == width
        for x, width in zip(state, widths, strict=False)
    )
    if not fits or mechanism.window or mechanism.gates == "sum":
        raise RegardError("state is a tuple; expected the slots (K (B, H, m, D), V (B, H, m, Dv)) of a mechanism with gates and no window")
    slots_k, slots_v = (x.to(torch.promote_types(q.dtype, torch.float32)).repeat_interleave(heads // x.shape[1], 1) for x in state)
    empty = [x.new_zeros(*x.shape[:2], 0, width) for x, width in ((slots_k, k.shape[-1]), (slots_v, v.shape[-1]))]
    gates = slots_k.new_zeros(*slots_k.shape[:2], 0, slots_k.shape[2])
    return SlotState(slots_k, slots_v, None, (*empty, gates, gates), 0)


def step(
    mechanism: Slots, q: Tensor, k: Tensor, v: Tensor, state: SlotState | None, mask: Mask, scale: float | None, given: Mapping[str, Any]
) -> tuple[Tensor, SlotState]:
    """The next tokens of a stream; the keep of Padding() covers all tokens so far."""
    first = state.length if isinstance(state, SlotState) else 0
    keep, given = kept_keys(mask, given, sizes_of(q, k, v), first)
    return run(mechanism, q, k, v, scale, given, state, keep)


def run(
    mechanism: Slots,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    given: Mapping[str, Any],
    state: SlotState | None,
    keep: Tensor | None = None,
) -> tuple[Tensor, SlotState]:
    """(out (B, H, L, Dv), the state after the last token); keep (B, all tokens so far): those that are no padding."""
    state = first_slots(mechanism, state, q, k, v) if isinstance(state, tuple) else state
    dtype, length = v.dtype, k.shape[-2]
    read = 0 if state is None else state.length
    real = None if keep is None else keep[:, None, read:, None]
    q, k, v, decay, write, last = prepared(mechanism, q, k, v, scale, given, None if state is None else state.last, real)
    window = mechanism.window or 0
    old = (k, v, decay, write) if state is None else state.recent
    # Tokens reach the slots `window` later: those before the first write nothing and let nothing fade.
    queue = [
        torch.cat((pad(x[..., :0, :], (0, 0, window, 0)) if state is None else x, y), -2)
        for x, y in zip(old, (k, v, decay, write), strict=True)
    ]
    late_k, late_v, late_decay, late_write = (x[..., :length, :] for x in queue)
    recent = tuple(x[..., x.shape[-2] - window :, :] for x in queue)
    logits, new_k = slot_scores(q, late_k, late_write, late_decay, None if state is None else state.k)
    p = torch.softmax(logits, -1)
    out, new_v = chunked(Scan(p, late_write, late_v, late_decay, None, True), None if state is None else state.v)
    if window:
        out = joined(mechanism, q, queue[0], queue[1], out, logits, read, keep)
    return out.to(dtype), SlotState(new_k, new_v, last, recent, read + length)


def joined(mechanism: Slots, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logits: Tensor, read: int, keep: Tensor | None) -> Tensor:
    """One softmax over the slots and the window; k and v hold `window` tokens more than q, those not there yet among them."""
    window, length = mechanism.window or 0, q.shape[-2]
    missing = max(0, window - read)
    k, v = (x[..., missing + (1 if read >= window else 0) :, :] for x in (k, v))
    local = Weighted(position=None if mechanism.rope is None else Rope(mechanism.rope))
    near_mask: Mask = Causal() & Window(window)
    given: dict[str, Any] = {}
    if keep is None:
        reached = torch.arange(read, read + length, device=q.device)[:, None] >= window  # before the first write slots are out of sight
    else:
        near_mask, given = near_mask & Padding(), {"keep": keep[:, -k.shape[-2] :]}
        reached = (pad(keep.cumsum(-1), (window, 0))[:, read : read + length] > 0)[:, None, :, None]
    near, stats = attend_with_stats(q, k, v, local, mask=near_mask, scale=1.0, **given)
    return blend(near, stats, out, logits.logsumexp(-1, keepdim=True), reached)


def blend(near: Tensor, stats: Stats, far: Tensor, far_mass: Tensor, reached: Tensor) -> Tensor:
    """Two softmax results over disjoint keys as one, from the logs of their sums."""
    empty = stats.total <= 0  # a padded query sees nothing
    near_mass = stats.shift + torch.log(torch.where(empty, 1.0, stats.total))
    share = torch.where(empty, 1.0, torch.sigmoid(far_mass - near_mass)) * reached
    return near + share * (far - near)
