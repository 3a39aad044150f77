"""Gated slot attention: a bounded memory of m slots with forgetting, read by softmax (id 106; Zhang et al., 2024).

K_t = diag(f_t) K_{t-1} + (1 - f_t) k_t^T,   V_t = diag(f_t) V_{t-1} + (1 - f_t) v_t^T,   o_t = V_t^T softmax(K_t q_t),   f = sigmoid(x W)^(1/tau)
Pretrained softmax layers become layers of it by `regard.adapt.convert(model, "gsa")` (T2R: q, k, v and o are kept, the gate is new), then trained.
"""

from regard.algebra import Input, Projected, Recipe, Slots, bind
from regard.algebra.gates import log_gate
from regard.catalog.registry import register
from regard.errors import RegardError


def gate_inputs(slots: int, tau: float) -> tuple[Input, ...]:
    layer = Projected(bind(log_gate, tau=tau), channels=slots, grouped=True)
    return Input("log_forget", "bhkf", layer=layer), Input("write", "bhkf", default="1 - f")


@register("gsa")
def gsa(
    slots: int = 64,
    tau: float = 8.0,
    gates: str = "forget",
    scaled: bool = False,
    short_conv: int = 0,
    feature_map: str = "silu",
    norm_eps: float = 1e-5,
) -> Slots:
    """slots: m of the layer. tau: temperature of its gates, one a key head. gates: "forget", or "sum" without gates (ABC: input `write`
    (B, H, L, m) holds logits). scaled: scores times D^-1/2, as the released operator's default; the layer's scale is 1. feature_map: of q
    and k, "silu", "relu", "" or "t2r", relu(W x). short_conv: width of convolutions with silu (0: none). norm_eps: of the RMS norm over all
    heads. Inputs `log_forget` (B, H, L, m) <= 0 and `write` (B, H, L, m), by default 1 - f. Slots nothing was written to take part."""
    if gates == "sum":
        inputs: tuple[Input, ...] = (Input("write", "bhkf", layer=Projected(channels=slots, grouped=True)),)
    elif gates == "forget":
        inputs = gate_inputs(slots, tau)
    else:
        raise RegardError(f"gates={gates!r}; expected forget or sum")
    recipe = Recipe(
        short_conv=short_conv,
        conv_activation="silu",
        activation=feature_map,
        value_activation="silu",
        out_activation="silu",
        merge_norm="rms",
        norm_eps=norm_eps,
        rope=False,
    )
    return Slots(gates, scaled=scaled, inputs=inputs, recipe=recipe)
