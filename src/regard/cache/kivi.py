"""KIVI as a policy: what stays is stored in few bits."""

from __future__ import annotations

from torch import Tensor

from ..errors import RegardError
from .layer import KeptLayer, Part
from .packed import Form, Packed, unpacked
from .policies import Full, Planned
from .policy import Policy
from .view import View


class KIVI(Policy):
    """Old entries in few bits (Liu et al., 2024): x' = round((x - min) / s) s + min, s = (max - min) / (2^bits - 1), min and max of a group.

    bits: of keys and values, or each its own: 2, 4 or 8. Groups are `group` neighbouring tokens of one channel for keys, `group` neighbouring channels of one
    token for values. recent: keys are packed `recent` at a time, the newest `recent` values are not; a multiple of `group`. base: a policy that drops
    entries after the prompt, of which the others are packed (None: nothing is dropped). Prompts are attended before anything is packed.
    """

    def __init__(
        self,
        bits: int = 2,
        group: int = 32,
        recent: int = 128,
        key_bits: int | None = None,
        value_bits: int | None = None,
        base: Policy | None = None,
    ):
        form = Form(bits if key_bits is None else key_bits, bits if value_bits is None else value_bits, group, recent)
        self.base = Full() if base is None else base
        if (
            self.base.decode
            or not self.base.whole_prompts
            or type(self.base).reading is not Policy.reading
            or isinstance(self.base, Planned)
        ):
            raise RegardError(
                f"base {type(self.base).__name__}, decode={self.base.decode}: expected a policy that drops after the prompt alone, and reads all that "
                "it keeps"
            )
        super().__init__(self.base.budget)
        self.form = form

    @property
    def whole_prompts(self) -> bool:
        return self.base.whole_prompts

    def begin(self, layers: int, heads: int) -> None:
        self.base.begin(layers, heads)

    def reading(self, view: View) -> Part:
        return unpacked(view.part)

    def scores(self, view: View) -> Tensor:
        return self.base.scores(view)

    def run(self, layer: KeptLayer, number: int, view: View) -> None:
        before = len(layer.parts)
        if not isinstance(view.part, Packed):
            self.base.run(layer, number, view)
        for at in range(number, number + 1 + len(layer.parts) - before):
            layer.parts[at] = Packed.stored(layer.parts[at], self.form)
