"""delta-attention over sinks and a window, in its three modes."""

from golden.vectors import Vectors, case

import regard


@case("c0", "c1", "c2", "c3")
def modes(v: Vectors) -> None:
    streaming = regard.Weighted(mask=regard.Causal() & (regard.Window(v["window"]) | regard.Sinks(v["sink"])))
    for mode, want in (("sparse-only", "sparse"), ("delta", "out_delta"), ("recompute", "out_recompute")):
        if v.has(want):
            m = regard.get("delta-attention", sparse=streaming, stride=v["lam"], mode=mode)
            v.same(regard.attend(v("q"), v("k"), v("v"), m)[0].transpose(0, 1), want)
