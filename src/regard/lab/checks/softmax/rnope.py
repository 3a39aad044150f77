"""Checks of rnope."""

from __future__ import annotations

import torch

from regard.algebra import Causal, Rope
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.nn.decoder import Decoder
from regard.zoo.softmax.rnope import rnope_layers


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
