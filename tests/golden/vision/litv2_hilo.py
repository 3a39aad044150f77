"""HiLo attention and its block."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.vision.litv2_hilo import HiLo, LITBlock

PARTS = ((r"(high|low)\.(q|kv|out)\.", r"\1_\2."), ("high", "h"), ("low", "l"), ("out", "proj"))


@case("h0", "h1", "h2", "h3", "h4", "h5")
def layer(g: Vectors) -> None:
    g.split(r"h_qkv\.(weight|bias)", r"h_q.\1", r"h_kv.\1", sizes=(1, 2))
    made = HiLo(*(g[name] for name in ("dim", "heads", "window", "alpha", "qkv_bias", "scale"))).to(g.dtype)
    g.layer(made, **g.fill(made, *PARTS))


@case("b0")
def block(g: Vectors) -> None:
    g.split(r"attn\.h_qkv\.(weight|bias)", r"attn.h_q.\1", r"attn.h_kv.\1", sizes=(1, 2))
    made = LITBlock(*(g[name] for name in ("dim", "heads", "window", "alpha", "ratio", "qkv_bias")), 0.0, 0.0).to(g.dtype)
    mlp = ((r"mlp\.0", "mlp.fc1"), (r"mlp\.1", "mlp.dwconv.dwconv"), (r"mlp\.4", "mlp.fc2"))
    g.fill(made, (r"(norm\d)\.norm", r"\1"), ("attention", "attn"), *mlp, *PARTS)
    g.layer(lambda x: made(x.mT.unflatten(-1, (4, 4))).flatten(2).mT)
