"""TaylorShift: both forms, other coefficients, without normalised inputs, and the layer."""

from __future__ import annotations

from golden.vectors import Vectors, case

import regard


@case("c0", "c1", "c2")
def forms(g: Vectors) -> None:
    a, b, c = (0.7, 0.6, 0.9) if g.config == "c2" else (0.5, 1.0, 1.0)
    for mode in ("direct", "efficient"):
        leaves = g.leaves("q", "k", "v", "tau")
        q, k, v, tau = leaves.values()
        out = regard.attend(q, k, v, regard.get("taylorshift", mode=mode, a=a, b=b, c=c), tau=tau.flatten())
        out = out * (q.shape[2] / q.shape[3]) ** 0.5 if g.config != "c0" else out  # the layer's output scale
        g.same(out, "out", max(g.value, 1e-9))
        g.gradients(g.weigh(out), leaves)


@case("c3")
def raw_inputs(g: Vectors) -> None:
    for mode in ("direct", "efficient"):
        g.op(lambda q, k, v, mode=mode: regard.attend(q, k, v, regard.get("taylorshift", mode=mode, normalize=False)))


@case("c4", "c5")
def layer(g: Vectors) -> None:
    for mode in ("auto", "direct", "efficient"):
        made = regard.nn.TaylorShiftAttention(12, 3, mode=mode, output_scale=True, bias=True).to(g.dtype)
        for name, weight, bias in zip("qkv", g("qkv.weight_c45").chunk(3), g("qkv.bias_c45").chunk(3), strict=True):
            g.put(getattr(made, name).weight, weight)
            g.put(getattr(made, name).bias, bias)
        tau = made.inputs.learned["tau"]
        g.load(made, {"out.weight": "proj.weight_c45", "out.bias": "proj.bias_c45"})
        g.put(tau, g("temperature_c45").flatten())
        x = g.leaf("x")
        out = made(x)
        g.same(out, "out", max(g.value, 1e-9))
        g.gradients(g.weigh(out), {"x": x, "temperature": tau, "proj.weight": made.out.weight, "proj.bias": made.out.bias})
