"""ContMix alone and with a context, and the base net's block."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

from regard.nn.images.large_kernels import BRANCHES, RepConvBlock
from regard.zoo.vision.contmix import ContMix

OPTIONS = ("dim", "kernel", "small", "heads", "ratio", "context_dim", "scale", "on_stream", "first")


def names(kernel: int, place: str) -> list[tuple[str, str]]:
    found = [(r"(norm\d)\.norm\.", r"\1."), (rf"{place}\.convs\.0", f"{place}.lk_origin"), (rf"{place}\.norms\.0", f"{place}.origin_bn")]
    for at, (size, step) in enumerate(BRANCHES[kernel], 1):
        found += [
            (rf"{place}\.convs\.{at}", f"{place}.dil_conv_k{size}_{step}"),
            (rf"{place}\.norms\.{at}", f"{place}.dil_bn_k{size}_{step}"),
        ]
    return found


def block(g: Vectors) -> tuple[ContMix, dict[str, torch.nn.Parameter]]:
    made = ContMix(**{name: g[name] for name in OPTIONS if g.get(name) is not None}).to(g.dtype)
    kinds = [
        (r"^place\.", "lepe."),
        *names(g["kernel"], "lepe.0"),
        (r"^near(\d)", r"dwconv\1"),
        (r"^value", "weight_value"),
        (r"^fuse", "fusion"),
    ]
    kinds += [(r"^windows\.query", "weight_query"), (r"^windows\.key\.0", "weight_key.1"), (r"^windows\.key\.1", "weight_key.2")]
    kinds += [(r"^windows\.logits", "weight_proj"), (r"^windows\.near", "rpb1"), (r"^windows\.far", "rpb2"), (r"^join(\d)\.scale", r"ls\1")]
    kinds += [(r"^out", "dyconv_proj" if g.config[0] == "d" else "fusion_proj"), (r"^excite\.first", "se_layer.proj.1"), (r"^last", "proj")]
    kinds += [(r"^excite\.last", "se_layer.proj.3"), (r"^mixed", "x_scale"), (r"^began", "h_scale")]
    return made, g.fill(made, *kinds)


@case("a0", "a1", "a2")
def alone(g: Vectors) -> None:
    made, parameters = block(g)
    g.layer(made, **parameters)


@case("d0", "d1")
def with_context(g: Vectors) -> None:
    made, parameters = block(g)
    leaves = g.leaves(*(name for name in ("x", "context", "origin") if name != "origin" or not g["first"]))
    out = torch.cat(made(**leaves), 1)
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves | parameters)


@case("r0")
def base(g: Vectors) -> None:
    made = RepConvBlock(*(g[name] for name in ("channels", "kernel", "ratio", "scale", "on_stream"))).to(g.dtype)
    kinds = [(r"^near", "dwconv"), (r"^branch\.0\.norm", "proj.0"), (r"^branch", "proj"), *names(g["kernel"], "proj.1")]
    g.layer(made, **g.fill(made, *kinds, (r"3\.first", "3.proj.1"), (r"3\.last", "3.proj.3"), (r"^join\.scale", "ls")))
