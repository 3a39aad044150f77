"""A student by any causal mechanism, its gates too: the model's own projections, and as new parameters whatever else the mechanism's layer has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Mechanism, Padding
from ..errors import RegardError
from ..nn.attention import Attention, LayerState
from .student import NORMS, Rotary, Student, Turn

MOVED = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}


class HostRotary:
    """The model's own rotary positions in the place of `regard.algebra.Rope`: those of the call that is under way."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.now: Rotary | None = None

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        assert self.now is not None
        return self.turn(x, x, *self.now)[0]


class MechanismStudent(Student):
    """`attention` is a `regard.nn.Attention` whose q, k, v and out are the model's; its convolutions, norms, feature maps and gates begin as in
    a new layer. Rotary positions are the model's, where the mechanism's layer has them and no position of its own."""

    def __init__(self, layer: nn.Module, mechanism: str | Mechanism):
        super().__init__(layer)
        normed = [name for name in NORMS if hasattr(self, name)]
        if normed:
            raise RegardError(
                f"{type(layer).__name__} has {', '.join(normed)}, for which a layer of another mechanism has no place; expected one without norms"
            )
        inside: Any = self.q_proj
        with torch.device(inside.weight.device):
            self.attention = Attention(
                inside.in_features,
                self.heads,
                mechanism,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                rope=True,
                dtype=inside.weight.dtype,
            )
        if self.attention.key_dim != self.head_dim:
            raise RegardError(
                f"the layer of {type(self.attention.mechanism).__name__} has {self.attention.key_dim} channels a key and the model {self.head_dim}; "
                "expected a mechanism whose keys are as wide as its values (key_dim=None)"
            )
        for name, own in MOVED.items():
            setattr(self.attention, name, getattr(self, own))
            delattr(self, own)
        with torch.no_grad():  # the model's scale of scores, where it is not D^-1/2
            for p in self.attention.q.parameters():
                p.mul_(self.scaling * self.head_dim**0.5)
        if self.attention.rope is not None:
            self.attention.rope = HostRotary(self.turn)  # type: ignore[assignment]
        self.train(layer.training)

    def placed(self, rotary: Rotary) -> Attention:
        if isinstance(self.attention.rope, HostRotary):
            self.attention.rope.now = rotary
        return self.attention

    def read(self, x: Tensor, rotary: Rotary) -> Tensor:
        y: Tensor = self.placed(rotary)(x)
        return y

    def run(self, x: Tensor, rotary: Rotary, keep: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        inner, kept = state or (None, None)
        if keep is not None or kept is not None:
            before = 0 if inner is None else inner.position
            parts = [x.new_ones(x.shape[0], count, dtype=torch.bool) for count in (before, x.shape[1])]
            kept = torch.cat((parts[0] if kept is None else kept, parts[1] if keep is None else keep), 1)
        given: dict[str, Any] = {} if kept is None else {"mask": Padding(), "keep": kept}
        y: Tensor
        now: LayerState
        y, now = self.placed(rotary).step(x, inner, **given)
        return y, (now, kept)
