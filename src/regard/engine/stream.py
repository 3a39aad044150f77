"""Decoding: `step` takes new tokens and a state, and gives what the full pass would have given for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..algebra.feature_map import FeatureMap
from ..algebra.local import LocalLinear
from ..algebra.mask import Mask, conjuncts
from ..algebra.mechanism import Hybrid, Mechanism, Recurrent, Weighted
from ..algebra.part import Input, Sizes, asks
from ..algebra.position_mask import Causal, Window
from ..algebra.rows import RowWise
from ..algebra.token_mask import Padding
from ..errors import RegardError
from . import recurrent as scans
from .autocast import autocasting, under_autocast
from .composed import STEP, blended
from .inner import attend
from .names import resolved
from .problem import combine_masks, fill_inputs, functions_of, scaled_values, sizes_of
from .recurrent.levels import LevelState
from .recurrent.slots import SlotState
from .settle import settle


@dataclass
class KeyValueState:
    """Keys and values so far, k (B, Hkv, n, D), v (B, Hkv, n, Dv), in buffers that grow when full.

    length: tokens read. Under a causal window only the last `window` of them are kept: entries [begin, end) of the buffers.
    """

    buffer_k: Tensor
    buffer_v: Tensor
    length: int
    begin: int = 0
    end: int = 0

    @property
    def k(self) -> Tensor:
        return self.buffer_k[..., self.begin : self.end, :]

    @property
    def v(self) -> Tensor:
        return self.buffer_v[..., self.begin : self.end, :]

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values held (not of the spare room)."""
        return self.k.numel() * self.k.element_size() + self.v.numel() * self.v.element_size()

    def append(self, k: Tensor, v: Tensor) -> KeyValueState:
        new, fresh = k.shape[-2], torch.is_grad_enabled() and (k.requires_grad or v.requires_grad or self.buffer_k.requires_grad)
        moved = fresh or self.buffer_k.shape[-2] < self.end + new
        buffers = [grow(buffer, x, self.begin, self.end, fresh) for buffer, x in ((self.buffer_k, k), (self.buffer_v, v))]
        begin = 0 if moved else self.begin
        return KeyValueState(buffers[0], buffers[1], self.length + new, begin, self.end - self.begin + begin + new)

    def keep(self, window: int) -> KeyValueState:
        """The state with only its last `window` entries."""
        return replace(self, begin=max(self.begin, self.end - window))


def grow(buffer: Tensor, x: Tensor, begin: int, end: int, fresh: bool) -> Tensor:
    """`buffer` with x written behind its entries [begin, end), which move to the front of a new buffer when there is no room."""
    have = end - begin
    if fresh:
        return torch.cat((buffer[..., begin:end, :], x), -2)
    if buffer.shape[-2] < end + x.shape[-2]:
        wider = buffer.new_empty(*buffer.shape[:-2], max(have + x.shape[-2], 2 * have), buffer.shape[-1])
        wider[..., :have, :] = buffer[..., begin:end, :]
        buffer, end = wider, have
    buffer[..., end : end + x.shape[-2], :] = x
    return buffer


def reach(description: Weighted, mask: Mask) -> int | None:
    """How many keys a causal mask leaves in sight of any token to come, where older ones may be forgotten; None: all of them.

    What selects counts blocks from the first token, so it forgets nothing.
    """
    position, score = description.position, description.score
    sizes = [part.size for part in conjuncts(mask) if isinstance(part, Window)]
    if description.select is not None or not sizes or not mask.relative or not (position is None or position.relative):  # type: ignore[union-attr]
        return None
    beside = [(function, lead) for function, lead in functions_of(description) if function is not getattr(position, "modify", None)]
    if score.placed or any({"i", "j"} & set(asks(function, lead)) for function, lead in beside):  # type: ignore[union-attr]
        return None  # they read the places that keys have in the whole sequence
    if isinstance(description.normalizer, RowWise):
        return None  # its functions look at whatever keys there are
    return min(sizes)


def length_decides(item: Input, sizes: Sizes) -> bool:
    """Whether an input's default would be another number at another length."""
    if not callable(item.default) or "sizes" not in asks(item.default, 0) or {"q", "k"} & set(item.shape):
        return False
    now, later = (
        item.default(**{name: {"sizes": at, "n": None}[name] for name in asks(item.default, 0)})
        for at in (sizes, replace(sizes, q_len=sizes.q_len + 1, k_len=sizes.k_len + 1))
    )
    return not torch.equal(torch.as_tensor(now), torch.as_tensor(later))


@dataclass
class ScanState:
    """A recurrence's running state S (B, H, F, E), how many tokens it has read, and what else its features must know of them."""

    s: Tensor
    length: int
    carry: scans.Carry | None = None

    @property
    def bytes(self) -> int:
        own, last = self.carry or (None, None)
        return sum(x.numel() * x.element_size() for x in (self.s, last, *(own or ())) if x is not None)


@dataclass
class ManyStates:
    """One state a member of a hybrid."""

    states: tuple[Any, ...]

    @property
    def length(self) -> int:
        return int(self.states[0].length)

    @property
    def bytes(self) -> int:
        return sum(state.bytes for state in self.states)


State = KeyValueState | ScanState | ManyStates | SlotState | LevelState


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism = "softmax",
    state: State | None = None,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    **inputs: Any,
) -> tuple[Tensor, State]:
    """Causal attention of new tokens after those in `state`; returns (out, new state).

    q (B, Hq, n, D), k (B, Hkv, n, D), v (B, Hkv, n, Dv) with n >= 1 new tokens (a prompt, or one token); state None starts a
    stream, and a recurrence also from tensors: S (B, H, F, E), with the sums of phi_k(k) as a last column where the readout divides by
    them, or the slots (K (B, H, m, D), V (B, H, m, Dv)); one a key head is shared as k and v are. Equal to the last n rows of `attend` over all tokens with mask=Causal() (& `mask`); masks' inputs (`keep` of Padding()) cover
    all keys so far. A stream owns its state: older states share its buffers. Inputs whose default depends on the length must be passed.
    """
    if autocasting(q):
        q, k, v = under_autocast(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            return step(q, k, v, mechanism, state, mask=mask, scale=scale, **inputs)
    description = settle(resolved(mechanism))
    sizes = sizes_of(q, k, v)
    for item in description.declared:
        if inputs.get(item.name) is None and length_decides(item, sizes):
            raise RegardError(f"input {item.name!r} depends on the length, which a stream does not know; pass {item.name}=...")
    if isinstance(description, Recurrent):
        return step_scan(description, q, k, v, state, scale, inputs, mask)
    if type(description) in STEP:
        mask = mask or Causal()
        if not all(isinstance(part, (Causal, Padding)) for part in conjuncts(mask)):
            raise RegardError(
                f"mask={mask!r}: a stream of {type(description).__name__} reads every token that is no padding; expected None, Causal() or Padding()"
            )
        return STEP[type(description)](description, q, k, v, state, mask, scale, inputs)
    if isinstance(description, Hybrid) and description.how != "head":
        states = state.states if isinstance(state, ManyStates) else (None,) * len(description.members)
        stepped = [
            step(q, k, v, member, old, mask=mask, scale=scale, **{i.name: inputs[i.name] for i in member.declared if i.name in inputs})
            for member, old in zip(description.members, states, strict=True)
        ]
        outs = [out for out, _ in stepped]
        if description.how == "gate":
            out = (torch.stack(outs, -1) * inputs["gate"][..., None, :]).sum(-1)
        else:
            out = blended(description, outs, inputs)
        return out, ManyStates(tuple(new for _, new in stepped))
    if not isinstance(description, (Weighted, LocalLinear)) or not description.can_be_causal:
        raise RegardError(
            f"{mechanism if isinstance(mechanism, str) else type(description).__name__} cannot decode: it reads the whole sequence at once"
        )
    if state is None:
        state = KeyValueState(k.new_empty(*k.shape[:2], 0, k.shape[3]), v.new_empty(*v.shape[:2], 0, v.shape[3]), 0)
    if not isinstance(state, KeyValueState):
        raise RegardError(f"state is {type(state).__name__}; expected a KeyValueState from an earlier step of this mechanism")
    if isinstance(description, Weighted) and description.values is not None:  # what is kept are the values as they are weighted
        names = asks(description.values, 1)
        declared = {item.name: item for item in description.declared if item.name in names}
        v = scaled_values(description, v, fill_inputs(declared, inputs, sizes_of(q, k, v), q))
        inputs = {name: x for name, x in inputs.items() if name not in names}
        description = replace(description, values=None, inputs=tuple(x for x in description.inputs if x.name not in names))
    full: Mask | None = Causal() if mask is None or isinstance(mask, Causal) else Causal() & mask
    seen = reach(description, combine_masks(description, full)) if isinstance(description, Weighted) else None  # type: ignore[arg-type]
    new = state.append(k, v)
    if seen is not None:
        new = new.keep(seen + q.shape[-2] - 1)
        out = attend(q, new.k, new.v, description, mask=full, scale=scale, **inputs)
        return out, new.keep(seen)
    if q.shape[-2] == 1 and isinstance(full, Causal):
        full = None  # the newest token sees everything: no mask to plan for at every new length
    return attend(q, new.k, new.v, description, mask=full, scale=scale, **inputs), new


def first_state(description: Recurrent, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> ScanState:
    """A tensor as the state before the first token."""
    if description.keys != "features" or not isinstance(description.feature, FeatureMap) or "mean" in description.read_of:
        raise RegardError("state is a tensor: this mechanism's state holds more than one; expected a ScanState from an earlier step")
    heads, wide = q.shape[1], v.shape[-1] + description.weighs
    if s.dim() != 4 or s.shape[0] not in (1, q.shape[0]) or s.shape[1] not in (k.shape[1], heads) or s.shape[3] != wide:
        raise RegardError(f"state has shape {tuple(s.shape)}; expected (B={q.shape[0]}, H={heads}, features, {wide})")
    s = s.to(torch.promote_types(q.dtype, torch.float32))
    return ScanState(s.repeat_interleave(heads // s.shape[1], 1).expand(q.shape[0], -1, -1, -1), 0)


def step_scan(
    description: Recurrent,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | None,
    scale: float | None,
    inputs: dict[str, Any],
    mask: Mask | None,
) -> tuple[Tensor, ScanState]:
    if isinstance(state, Tensor):
        state = first_state(description, state, q, k, v)
    if state is not None and not isinstance(state, ScanState):
        raise RegardError(f"state is {type(state).__name__}; expected a ScanState from an earlier step of this mechanism, or a tensor")
    first = 0 if state is None else state.length
    full: Mask = Causal() if mask is None or isinstance(mask, Causal) else Causal() & mask
    scan = scans.pose(description, full, q, k, v, scale, inputs, first=first, carry=None if state is None else state.carry)
    out, s = scans.run(scan, "step" if q.shape[-2] == 1 else "chunk", None if state is None else state.s)
    assert s is not None
    return out.to(v.dtype), ScanState(s, first + k.shape[-2], scan.carry)
