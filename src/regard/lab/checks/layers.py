"""Checks of layers with fewer projections, of Gaussian weights over features, and of layer patterns."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...algebra import Causal, Rope
from ...engine import attend
from ...nn import Decoder, FrugalAttention, GaussianAdaptiveAttention, importance_factor, rnope_layers
from .. import naive
from ..verification import check

F64 = torch.float64


@check("super-attention", "parameters beyond 4, 3, 2 dim^2 and 2 dim^2 + L^2, over the four kinds", below=0.0, control="a hidden W_V")
def _() -> tuple[float, float]:
    expected = {"standard": 4 * 256, "optimised": 3 * 256, "efficient": 2 * 256, "super": 2 * 256 + 81}

    def off(hidden: int) -> int:
        layers = {kind: FrugalAttention(16, 2, kind, length=9) for kind in expected}
        return sum(abs(sum(p.numel() for p in layers[kind].parameters()) + hidden - want) for kind, want in expected.items())

    return off(0), off(256)


@check(
    "super-attention",
    "one head: optimised with W_O W_V equals standard; efficient with W_K^T W_Q equals optimised",
    below=1e-10,
    control="without collapsing the matrices",
)
def _() -> tuple[float, float]:
    x = torch.randn(2, 11, 16, dtype=F64)
    standard, optimised, efficient = (FrugalAttention(16, 1, kind).double() for kind in ("standard", "optimised", "efficient"))
    assert standard.v is not None and standard.k is not None and optimised.k is not None

    def gap(collapse: bool) -> float:
        with torch.no_grad():
            optimised.q.weight.copy_(standard.q.weight)
            optimised.k.weight.copy_(standard.k.weight)  # type: ignore[union-attr]
            optimised.out.weight.copy_(standard.out.weight @ standard.v.weight if collapse else standard.out.weight)  # type: ignore[union-attr]
            efficient.q.weight.copy_(standard.k.weight.T @ standard.q.weight if collapse else standard.q.weight)  # type: ignore[union-attr]
            efficient.out.weight.copy_(optimised.out.weight)
        return max(naive.gap(optimised(x), standard(x)), naive.gap(efficient(x), optimised(x)))

    return gap(True), gap(False)


@check(
    "super-attention",
    "super with W_A = I equals efficient; causal, steps equal the pass and nothing leaks",
    below=1e-10,
    control="W_A not lower triangular",
)
def _() -> tuple[float, float]:
    x = torch.randn(2, 11, 16, dtype=F64)
    layer = FrugalAttention(16, 2, "super", length=11, start="eye").double()
    plain = FrugalAttention(16, 2, "efficient").double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    same = naive.gap(layer(x), plain(x))

    def leak(causal: bool) -> float:
        one = FrugalAttention(16, 2, "super", length=11, causal=True).double()
        mask = one.mixing
        if not causal:
            one.mixing = lambda queries, keys: one.mix[queries, :keys]  # type: ignore[method-assign, index, assignment]
        other = x.clone()
        other[:, 6:] += 1
        changed = naive.gap(one(other)[:, :6], one(x)[:, :6])
        one.mixing = mask  # type: ignore[method-assign]
        state, outs = None, []
        for t in range(11):
            out, state = one.step(x[:, t : t + 1], state)
            outs.append(out)
        return changed if not causal else max(changed, naive.gap(torch.cat(outs, 1), one(x)))

    return max(same, leak(True)), leak(False)


def gaussian_loop(x: Tensor, layer: GaussianAdaptiveAttention, padding: float | None, mixture: bool = True) -> Tensor:
    """The paper's formula, an entry at a time, for x (n,)."""
    size, out = len(x) // layer.heads, x.clone()
    for h in range(layer.heads):
        at = range(h * size, (h + 1) * size if h < layer.heads - 1 else len(x))
        values = [0.0 if float(x[i]) == padding else float(x[i]) for i in at]
        mean = sum(values) / len(values)
        sigma = math.sqrt(sum((y - mean) ** 2 for y in values) / (len(values) - 1) + layer.eps)
        weights = []
        for y in (float(x[i]) for i in at):  # padding weighs by what it is, around statistics that count it as 0
            terms = []
            for delta, c in zip(layer.delta[h].tolist(), layer.c[h].tolist(), strict=True):
                z = (y - mean - delta) / sigma
                terms.append(math.exp(-z * z / (2 * c * c)) / math.sqrt(2 * math.pi * c * c))
            weights.append(math.prod(terms) if mixture else sum(terms))
        total = max(sum(weights), layer.eps)
        for i, y, w in zip(at, values, weights, strict=True):
            out[i] = x[i] if float(x[i]) == padding else y * w / total
    return out


@check("gaam", "equals a loop, 11 entries in 4 heads with padding", below=1e-12, control="Gaussians added, not multiplied")
def _() -> tuple[float, float]:
    layer = GaussianAdaptiveAttention(-1, 4, 2, padding_value=-9.0).double()
    nn.init.normal_(layer.delta)
    x = torch.randn(11, dtype=F64)
    x[[2, 10]] = -9.0
    return tuple(naive.gap(layer(x), gaussian_loop(x, layer, -9.0, product)) for product in (True, False))  # type: ignore[arg-type, return-value]


def weights_of_layer(layer: GaussianAdaptiveAttention, x: Tensor) -> Tensor:
    return layer(x, return_weights=True)[1]  # type: ignore[return-value]


@check(
    "gaam",
    "weights sum to one in each chunk, do not change under x -> 3 x + 2, and two Gaussians are the product of two maps",
    below=1e-6,
    control="offsets of 1: not invariant",
)
def _() -> tuple[float, float]:
    x = torch.randn(3, 12, dtype=F64)
    two = GaussianAdaptiveAttention(-1, 3, 2).double()
    w = weights_of_layer(two, x)
    sums = naive.gap(w.unflatten(-1, (3, 4)).sum(-1), torch.ones(3, 3))
    moved = naive.gap(weights_of_layer(two, 3 * x + 2), w)
    singles = [GaussianAdaptiveAttention(-1, 3, 1).double() for _ in range(2)]
    for at, one in enumerate(singles):
        one.c.data.copy_(two.c[:, at : at + 1])
    product = torch.stack([weights_of_layer(one, x) for one in singles]).prod(0).unflatten(-1, (3, 4))
    split = naive.gap((product / product.sum(-1, keepdim=True)).flatten(-2), w)
    nn.init.ones_(two.delta)
    return max(sums, moved, split), naive.gap(weights_of_layer(two, 3 * x + 2), weights_of_layer(two, x))


@check("gaam", "importance factors span exactly [0, 1] (distance of their ends)", below=0.0, control="the average weights themselves")
def _() -> tuple[float, float]:
    w = weights_of_layer(GaussianAdaptiveAttention(-1, 3, 2).double(), torch.randn(50, 12, dtype=F64))
    factor, mean = importance_factor(w), w.detach().mean(0)
    return tuple(abs(float(x.min())) + abs(float(x.max()) - 1) for x in (factor, mean))  # type: ignore[return-value]


@check("gaam", "gradients of offsets and widths: gradcheck (1)", above=1.0, control="widths detached")
def _() -> tuple[float, float]:
    layer = GaussianAdaptiveAttention(-1, 2, 2).double()
    x = torch.randn(2, 7, dtype=F64)

    def passes(detach: bool) -> float:
        def run(delta: Tensor, c: Tensor) -> Tensor:
            names = {"delta": delta, "c": c.detach() + 0 * c if detach else c}
            return torch.func.functional_call(layer, names, (x,))  # type: ignore[no-any-return]

        leaves = tuple(p.detach().requires_grad_() for p in (layer.delta, layer.c))
        return float(torch.autograd.gradcheck(run, leaves, raise_exception=False))

    return passes(False), passes(True)


@check(
    "rnope",
    "4 layers, window 8, n = 40: steps equal the pass, and caches hold n + 3 min(n, w) entries",
    below=1e-10,
    control="all layers full",
)
def _() -> tuple[float, float]:
    def gap(mixed: bool) -> float:
        layers = rnope_layers(4, window=8) if mixed else ["softmax"] * 4
        model = Decoder(layers, vocab=20, dim=16, layers=4, heads=2).double()
        tokens = torch.randint(20, (1, 40))
        states, outs = None, []
        for t in range(40):
            out, states = model.step(tokens[:, t : t + 1], states)
            outs.append(out)
        assert states is not None
        held = sum(state.inner.k.shape[-2] for state in states)  # type: ignore[union-attr]
        return naive.gap(torch.cat(outs, 1), model(tokens)) + abs(held - (40 + 3 * 8))

    return gap(True), gap(False)


@check("rnope", "a full layer's last output does not change when earlier tokens are permuted", below=1e-12, control="a RoPE layer")
def _() -> tuple[float, float]:
    near, full = rnope_layers(4, window=64)[0], rnope_layers(4, window=64)[3]
    q, k, v = (torch.randn(1, 2, 12, 8, dtype=F64) for _ in range(3))
    order = torch.cat((torch.randperm(11), torch.tensor([11])))

    def gap(mechanism: object) -> float:
        out = [attend(q[:, :, -1:], x, y, mechanism, mask=Causal()) for x, y in ((k, v), (k[:, :, order], v[:, :, order]))]  # type: ignore[arg-type]
        return naive.gap(*out)

    return gap(full), gap(near)


@check(
    "rnope",
    "a window layer ignores token i - w, and rotating q and k by a common offset changes nothing",
    below=1e-12,
    control="token i - w + 1",
)
def _() -> tuple[float, float]:
    near = rnope_layers(4, window=8)[0]
    q, k, v = (torch.randn(1, 2, 30, 8, dtype=F64) for _ in range(3))
    base = attend(q, k, v, near)

    def change(at: int) -> float:
        other = k.clone()
        other[:, :, at] += 1
        return naive.gap(attend(q, other, v, near)[:, :, 25], base[:, :, 25])

    shifted = [Rope().rotate(x, torch.arange(30) + 100) for x in (q, k)]
    plain = [Rope().rotate(x, torch.arange(30)) for x in (q, k)]
    offset = naive.gap(shifted[0] @ shifted[1].transpose(-1, -2), plain[0] @ plain[1].transpose(-1, -2))
    return max(change(25 - 8), offset), change(25 - 7)
