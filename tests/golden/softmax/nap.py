"""NAP: the normalizer, its layer inside a block, the comparisons NON and MTE, and the form on graphs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from golden.vectors import Vectors, case

import regard


@case("c0")
def weights(g: Vectors) -> None:
    leaves = g.leaves("logits", "gain", "bias")
    eye = torch.eye(17, dtype=g.dtype).expand(2, 3, 17, 17)
    out = regard.attend(
        leaves["logits"], eye, eye, "nap", mask=g("mask").bool(), gain=leaves["gain"].flatten(), shift=leaves["bias"].flatten()
    )
    g.same(out, "weights")
    g.gradients(g.weigh(out), leaves)


def layer(g: Vectors, **options: object) -> regard.nn.Attention:
    made = regard.nn.Attention(12, 3, regard.get("nap", **options), causal=False, bias=True).to(g.dtype)
    for name in ("key", "query", "value"):
        g.put(getattr(made, name[0]).weight, g(f"attn.{name}_weight").T)
        g.put(getattr(made, name[0]).bias, f"attn.{name}_bias")
    g.put(made.out.weight, g("attn.mix_weight").T)
    g.put(made.out.bias, "attn.mix_bias")
    if g.has("hidden_ln.gamma"):
        g.put(made.merge_norm.weight, "hidden_ln.gamma")
        g.put(made.merge_norm.bias, "hidden_ln.beta")
    return made


def norm(g: Vectors, x: torch.Tensor, name: str) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], g(f"{name}.gamma"), g(f"{name}.beta"), 1e-3)


@case("c1", "c2", "c3")
def layers(g: Vectors) -> None:
    options = {"c1": {}, "c2": {"variant": "non", "length": 13}, "c3": {"variant": "mte"}}[g.config]
    made, x = layer(g, **options), g.leaf("x")
    out = made(x, mask=regard.Padding(), keep=g("mask")[:, 0, 0].bool())
    if g.config == "c1":
        g.put(made.inputs.learned["gain"], g("attn.gain").flatten())
        g.put(made.inputs.learned["shift"], g("attn.bias").flatten())
        out = made(x, mask=regard.Padding(), keep=g("mask")[:, 0, 0].bool())
        pool = norm(g, out, "pool_ln") + x
        hidden = F.gelu(norm(g, pool @ g("ff1.kernel") + g("ff1.bias"), "ff_ln"), approximate="tanh")
        out = norm(g, hidden @ g("ff2.kernel") + g("ff2.bias"), "out_ln") + pool
    g.same(out, "out")
    g.gradients(g.weigh(out), {"x": x})
    g.weigh(out).backward()
    for ours, theirs in (("q", "query"), ("v", "value"), ("out", "mix")):
        g.same(getattr(made, ours).weight.grad.T, f"grad_attn.{theirs}_weight", g.grad)


@case("c4")
def graph(g: Vectors) -> None:
    """Row i sees the sources j of edges j -> i; the names of queries and keys are swapped there."""
    made = regard.nn.Attention(12, 3, regard.get("nap", eps=0.0, activation="gelu", norm_eps=1e-5), causal=False, bias=True).to(g.dtype)
    g.load(made, {"q": "key_layer", "k": "query_layer", "v": "value_layer", "merge_norm": "layer_norm_1", "out": "mixing_layer"})
    g.put(made.inputs.learned["gain"], g("gain").flatten())
    g.put(made.inputs.learned["shift"], g("shift").flatten())
    seen, x = (g("adj") | torch.eye(11, dtype=torch.bool)).T, g.leaf("x")

    def t(y: torch.Tensor, n: int) -> torch.Tensor:
        return F.layer_norm(y, y.shape[-1:], g(f"layer_norm_{n}.weight"), g(f"layer_norm_{n}.bias"))

    pool = t(made(x[None], mask=seen)[0], 2) + x
    hidden = F.gelu(t(F.linear(pool, g("ff1.weight"), g("ff1.bias")), 3))
    out = t(F.linear(hidden, g("ff2.weight"), g("ff2.bias")), 4) + pool
    g.same(out, "out")
    g.gradients(g.weigh(out), {"x": x}, max(g.grad, 1e-7))
