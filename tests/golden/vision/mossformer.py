"""MossFormer's joint attention, and the net of masks."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.vision.mossformer import JointGatedAttention, MossFormerSeparator

BLOCK = ((r"\b(hidden|qk|out)\.norm", r"to_\1.mdl.0"), (r"\b(hidden|qk|out)\.linear", r"to_\1.mdl.1"), (r"mdl\.0\.weight$", "mdl.0.g"))
BLOCK += ((r"\b(hidden|qk|out)\.conv", r"to_\1.mdl.3.sequential.1.conv"), (r"\b(gamma|beta)", r"qk_offset_scale.\1"))
LAYERNORM = tuple(pair for pair in BLOCK if pair[1] != "mdl.0.g")


@case("b0", "b1", "b2", "b3")
def block(g: Vectors) -> None:
    options = {name: g[name] for name in ("dim", "group", "qk_dim", "causal", "norm", "shift")}
    made = JointGatedAttention(**options, dropout=0.0).to(g.dtype)
    names = BLOCK if g["norm"] == "scalenorm" else LAYERNORM
    parameters = g.fill(made, *names)
    if not g["causal"]:
        return g.layer(made, **parameters)
    for layer in (made.hidden, made.qk, made.out):
        layer.ends = (8, 8)  # the public code's convolutions read both sides
    return g.layer(made, **parameters)


@case("n0")
def masks(g: Vectors) -> None:
    made = MossFormerSeparator(2, g["encoded"], g["dim"], g["blocks"], dropout=0.0).to(g.dtype)
    inside = "mdl.intra_mdl."
    names = [("norm1", "norm"), ("norm2", "mdl.intra_norm"), ("^first", "conv1d_encoder"), ("^scale", "pos_enc.scale"), ("^act", "prelu")]
    names += [(rf"blocks\.{g['blocks']}", f"{inside}norm"), (r"blocks\.(\d)", inside + r"mossformerM.layers.\1"), ("^split", "conv1d_out")]
    names += [("^value", "output.0"), ("^gate", "output_gate.0"), ("^last", "conv1_decoder"), *BLOCK]
    parameters = g.fill(made, *names, without="^(en|de)coder")
    g.layer(made.masks, **parameters)
