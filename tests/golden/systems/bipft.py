"""BiPFT: one-bit attention with estimators of rank one, and the quantisers' gradients."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.nn.binary import Signed, Unsigned
from regard.zoo.systems.bipft import BinarySelfAttention

NAMES = [(rf"\b{part}_{which}\.", f"{which}_{part}.") for part in "pm" for which in "qkv"] + [(r"\.shift", ".move.bias")]
NAMES += [(r"\.binarize\.scale", ".input_clip_val"), (r"binary_q\.scale", "clip_query"), (r"binary_k\.scale", "clip_key")]
NAMES += [(r"binary_v\.scale", "clip_value"), (r"binary_p\.scale", "clip_attn")]


@case("a0", "a1")
def attention(g: Vectors) -> None:
    made = BinarySelfAttention(g["dim"], g["heads"]).to(g.dtype)
    parameters = g.fill(made, *NAMES)
    g.layer(made, **parameters)


@case("s0", "u0")
def quantisers(g: Vectors) -> None:
    leaves = g.leaves("x", "scale")
    out = (Signed if g.config == "s0" else Unsigned).apply(leaves["x"], leaves["scale"][0])  # type: ignore[no-untyped-call]
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves)
