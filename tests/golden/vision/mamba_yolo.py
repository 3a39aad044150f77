"""Mamba-YOLO: the scan of a map in four orders, its blocks, merging and the stem."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.vision.mamba_yolo import SS2D, VisionClueMerge, VSSBlock, simple_stem

SCAN = (("scan.read", "x_proj_weight"), ("scan.step", "dt_projs_weight"), ("scan.bias", "dt_projs_bias"), ("scan.log_a", "A_logs"))
SCAN += (("scan.skip", "Ds"), (r"norm\.norm", "out_norm"), ("down", "in_rank"), (r"\bup\.", "out_rank."))
SCAN += (("first", "in_proj"), ("last", "out_proj"), ("conv", "conv2d"))


@case("s0", "s1", "s2")
def scan(g: Vectors) -> None:
    options = {name: g[name] for name in ("ratio", "rank_ratio", "rank", "conv_bias", "bias", "gated") if g.get(name) is not None}
    made = SS2D(g["dim"], g["state"], **options).to(g.dtype)
    g.layer(made, **g.fill(made, *SCAN))


@case("b0", "x0", "x1")
def block(g: Vectors) -> None:
    neck = bool(g.get("neck"))
    made = VSSBlock(g["inner"], g["dim"], g.get("scans", 1), g.get("ratio", 4.0), neck=neck, state=g["state"]).to(g.dtype)
    names = [(r"^first\.", "in_proj_." if neck else "proj_conv."), (r"^norm1\.norm", "norm.norm_"), (r"^norm2\.norm", "norm2.norm_")]
    names += [(r"scans\.(\d)\.norm\.norm", r"ss2d.\1.out_norm" if neck else "op.out_norm"), (r"scans\.(\d)", r"ss2d.\1" if neck else "op")]
    names += [(r"local\.branch\.0", "lsblock.fc1"), (r"local\.branch\.1", "lsblock.norm"), (r"local\.branch\.2", "lsblock.fc2")]
    names += [(r"local\.branch\.4", "lsblock.fc3"), (r"mlp\.first", "mlp.fc1"), (r"mlp\.last", "mlp.fc2"), (r"mlp\.local", "mlp.dwconv")]
    inner = [(old, new) for old, new in SCAN if old not in (r"norm\.norm", "conv")]
    names += [*inner, (r"\.conv\.", ".conv2d."), ("in_proj_", "in_proj"), (r"norm_\.", "norm.")]
    g.layer(made, **g.fill(made, *names))
    g.moved(made, *names)


@case("m0")
def merge(g: Vectors) -> None:
    made = VisionClueMerge(g["inner"], g["dim"]).to(g.dtype)
    g.layer(made, **g.fill(made, ("mix", "pw_linear")))


@case("t0")
def stem(g: Vectors) -> None:
    made = simple_stem(g["channels"], g["dim"]).to(g.dtype)
    g.layer(made, **g.fill(made, ("^", "conv.")))
