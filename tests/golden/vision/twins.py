"""Twins: attention inside windows, to strided tokens, PEG and both nets."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.vision.twins import PEG, GlobalSubsampledAttention, LocallyGroupedAttention, Twins

INNER = ((r"inner\.", ""), (r"\bout\.", "proj."))


@case("l0", "l1", "l2", "l3")
def near(g: Vectors) -> None:
    g.split(r"qkv\.(weight|bias)", r"q.\1", r"kv.\1", sizes=(1, 2))
    options = {"scale": g.get("scale"), "masked": bool(g.get("masked"))}
    made = LocallyGroupedAttention(g["dim"], g["heads"], g["window"], bool(g.get("qkv_bias")), **options).to(g.dtype)
    g.layer(lambda x: made(x, tuple(g["shape"])), **g.fill(made, *INNER))


@case("g0", "g1")
def far(g: Vectors) -> None:
    made = GlobalSubsampledAttention(g["dim"], g["heads"], g["reduction"], bool(g.get("qkv_bias")), scale=g.get("scale")).to(g.dtype)
    g.layer(lambda x: made(x, tuple(g["shape"])), **g.fill(made, *INNER, ("^reduce", "sr")))


@case("p0")
def places(g: Vectors) -> None:
    made = PEG(g["dim"]).to(g.dtype)
    g.layer(lambda x: made(x, tuple(g["shape"])), **g.fill(made, ("conv", "proj.0")))


@case("v0", "v1")
def net(g: Vectors) -> None:
    g.split(r"(.*)qkv\.(weight|bias)", r"\1q.\2", r"\1kv.\2", sizes=(1, 2))
    made = Twins([4, 4], [2, 3], [1, 2], g["windows"], [2, 1], [2, 1], classes=3).to(g.dtype)
    names = [
        (r"patches\.(\d)", r"patch_embeds.\1.proj"),
        (r"^norms\.(\d)", r"patch_embeds.\1.norm"),
        (r"places\.(\d)\.conv", r"pos_block.\1.proj.0"),
    ]
    names += [
        ("^stages", "blocks"),
        (r"attention\.reduce", "attn.sr"),
        ("attention", "attn"),
        (r"mlp\.0", "mlp.fc1"),
        (r"mlp\.3", "mlp.fc2"),
    ]
    g.layer(made, **g.fill(made, *names, *INNER))
