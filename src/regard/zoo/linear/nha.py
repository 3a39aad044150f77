"""Native hybrid attention: one softmax over the last w tokens and over m slots that hold what came before (id 49; Du et al., 2025).

Token t - w is written into the slots when it leaves the window (as in gated slot attention);  o_t = softmax(q_t [K_slots; k_{t-w+1..t}]^T / sqrt(D)) [V_slots; v]
Pretrained layers become layers of it by `regard.adapt.convert(model, regard.get("nha", rope=base))`: with w at least the length they give what they gave.
"""

from regard.algebra import Recipe, Slots
from regard.catalog.registry import register
from regard.zoo.linear.gsa import gate_inputs


@register("nha")
def nha(window: int = 64, slots: int = 64, tau: float = 8.0, rope: float | None = 10000.0) -> Slots:
    """window: w, free to change at inference: 0 reads the slots alone (gated slot attention), at least the length is full attention. slots,
    tau: as of "gsa". rope: base of the rotary positions inside the window (None: none); slots have no position. Inputs as of "gsa"."""
    return Slots(window=window, rope=rope, scaled=True, inputs=gate_inputs(slots, tau), recipe=Recipe(rope=False))
