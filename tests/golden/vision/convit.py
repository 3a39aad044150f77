"""ConViT: gated positional attention and a net."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.vision.convit import GPSA, ConViT

PARTS = (("gate", "gating_param"), ("position", "pos_proj"), (r"\bout\.", "proj."))


@case("a0", "a1", "a2")
def layer(g: Vectors) -> None:
    made = GPSA(g["dim"], g["heads"], g.get("locality", 1.0), qkv_bias=bool(g.get("qkv_bias")), scale=g.get("scale")).to(g.dtype)
    if g.config == "a2":
        g.same(made.v.weight, "v.weight")
        g.same(made.position.weight, "pos_proj.weight")
        g.same(made.gate, "gating_param")
    g.layer(made, **g.fill(made, *PARTS))
    if g.has("distance"):
        g.same(made.nonlocality(g("x")), "distance")


@case("v0")
def net(g: Vectors) -> None:
    g.split(r"(.*)qkv\.(weight|bias)", r"\1q.\2", r"\1kv.\2", sizes=(1, 2))
    made = ConViT(**{name: g[name] for name in ("width", "heads", "depth", "local", "side", "patch", "classes", "ratio")}).to(g.dtype)
    names = (("patches", "patch_embed.proj"), ("token", "cls_token"), ("places", "pos_embed"), (r"attention\.", "attn."))
    g.layer(made, **g.fill(made, *names, (r"mlp\.0", "mlp.fc1"), (r"mlp\.3", "mlp.fc2"), *PARTS))
