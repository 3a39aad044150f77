"""Checks of scores that are more than a dot product, and of weights blended behind them: neural, phase and relaxed attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...algebra import Causal, Padding, Rope, Weighted
from ...algebra.pairings import Network
from ...catalog import get
from ...engine import attend, weights
from ...nn import RelaxedAttention
from ...nn.inputs import Inputs
from .. import naive
from ..statistics import entropy
from ..verification import check
from .weighted import identity_values, qkv

F64 = torch.float64


def network(width: int, d: int) -> dict[str, Tensor]:
    """Random tensors of a pair network."""
    shapes = {
        **{"q_down": (width, d), "k_down": (width, d), "w1": (width, 2 * width), "w2": (width // 2, width), "w3": (width // 2,)},
        **{"q_bias": (width,), "k_bias": (width,), "b1": (width,), "b2": (width // 2,), "b3": ()},
    }
    return {name: torch.randn(shape, dtype=F64) / 2 for name, shape in shapes.items()}


def network_score(q: Tensor, k: Tensor, w: dict[str, Tensor]) -> Tensor:
    pair = torch.cat((w["q_down"] @ q + w["q_bias"], w["k_down"] @ k + w["k_bias"]))
    hidden = (w["w2"] @ (w["w1"] @ pair + w["b1"]).clamp_min(0) + w["b2"]).clamp_min(0)
    return w["w3"] @ hidden + w["b3"]


@check(
    "neural-attention",
    "split first layer, in tiles, causal == the network on every pair in loops",
    below=1e-10,
    control="without its first bias",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(23)
    w = network(6, 8)
    truth = naive.attention(q, k, v, naive.softmax, naive.causal, score=lambda a, b: network_score(a, b, w))
    mechanism = get("neural-attention", width=6)
    other = {**w, "b1": torch.zeros(6, dtype=F64)}
    return tuple(naive.gap(attend(q, k, v, mechanism, mask=Causal(), **given), truth) for given in (w, other))  # type: ignore[return-value]


@check(
    "neural-attention",
    "task 'the key nearest to a number', 8 keys: accuracy after <= 1500 steps",
    above=0.95,
    control="the best affine bilinear score",
)
def _() -> tuple[float, float]:
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(2, 2))

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            one = torch.ones_like
            return torch.cat((q, one(q)), -1) @ self.a @ torch.cat((k, one(k)), -1).transpose(-1, -2)

    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mechanism = Weighted(score=Network(16))
            from ...algebra import Sizes

            self.inputs = Inputs(self.mechanism, Sizes(1, 1, 1, 1, 8, 1, 1), None)

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            env = self.inputs()
            score = self.mechanism.score
            return score.pair(*score.prepare(q, k, 1.0, env), env)  # type: ignore[union-attr, no-any-return]

    def accuracy(model: nn.Module) -> float:
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(1500):
            q, k = torch.rand(128, 1, 1), torch.rand(128, 8, 1)
            target = (q - k).abs().argmin(1).squeeze(-1)
            loss = nn.functional.cross_entropy(model(q, k).squeeze(1), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss < 0.05:
                break
        with torch.no_grad():
            q, k = torch.rand(4000, 1, 1), torch.rand(4000, 8, 1)
            return float((model(q, k).squeeze(1).argmax(-1) == (q - k).abs().argmin(1).squeeze(-1)).float().mean())

    return accuracy(Scored()), accuracy(Bilinear())


@check("tapa", "tiles, causal, with gradients == the formula in full", below=1e-10, control="phases without the tokens' part")
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(37))
    i = torch.arange(37)
    distance = (i[:, None] - i).abs().double() ** 0.1

    def dense(free: bool) -> Tensor:
        phase = 1.0 if free else q[..., 4:] @ k[..., 4:].transpose(-1, -2) / 2
        s = q[..., :4] @ k[..., :4].transpose(-1, -2) / 2 * torch.cos(2 * math.pi * distance * phase)
        return s.masked_fill(i[:, None] < i, -torch.inf).softmax(-1) @ v

    own = attend(q, k, v, "tapa", mask=Causal())
    seed = torch.randn_like(own)
    grads = [torch.autograd.grad((o * seed).sum(), (q, k, v)) for o in (own, dense(False))]
    return max(naive.gap(own, dense(False)), *[naive.gap(a, b) for a, b in zip(*grads, strict=True)]), naive.gap(own, dense(True))


@check("tapa", "with the phase channels zero it is dot-product attention on the others", below=1e-12, control="with the phase")
def _() -> tuple[float, float]:
    q, k, v = qkv(37)
    plain = attend(q[..., :4], k[..., :4], v)
    quiet = torch.cat((q[..., :4], torch.zeros_like(q[..., 4:])), -1)
    return naive.gap(attend(quiet, k, v, "tapa"), plain), naive.gap(attend(q, k, v, "tapa"), plain)


@check(
    "tapa",
    "largest distance bias left at 10 and 1000 tokens: mean score over that at 0, E[qA.kA] != 0, D = 64",
    below=0.01,
    control="RoPE with the same means",
)
def _() -> tuple[float, float]:
    draws, d = 200_000, 64
    q, k = 1 + torch.randn(draws, d), 1 + torch.randn(draws, d)
    q[:, 32:] -= 1
    k[:, 32:] -= 1
    score = get("tapa").score  # type: ignore[attr-defined]
    left = []
    parts = [x[:, None] for x in score.prepare(q, k, 1.0, {})]
    means = [float(score.pair(*parts, {"i": torch.tensor([[r]]), "j": torch.tensor([0])}).double().mean()) for r in (0, 1, 10, 1000)]
    for r, mean in zip((1, 10, 1000), means[1:], strict=True):
        t = 2 * math.pi * r**0.1
        left.append(abs(mean / means[0] - (1 + t * t / 32) ** -16))
    ones = torch.ones(1, 1, 1, d)
    turned = [float((Rope().rotate(ones, torch.tensor([r])) * ones).sum()) / d for r in (1, 10, 1000)]
    return max(left), max(abs(x) for x in turned)


def relaxed_row(gamma: float, keys: int | None = None) -> naive.RowWeights:
    return lambda s: (1 - gamma) * naive.softmax(s) + gamma / (keys or len(s))


@check(
    "relaxed-attention",
    "blend of softmax and mean == (1 - g) A + g / n, padding and causal",
    below=1e-12,
    control="1 / T with the padded T",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(23)
    keep = (torch.arange(23) < 17)[None]
    mechanism = get("relaxed-attention", gamma=0.2)
    causal = naive.gap(attend(q, k, v, mechanism, mask=Causal()), naive.attention(q, k, v, relaxed_row(0.2), naive.causal))
    padded = attend(q, k, v, mechanism, mask=Padding(), keep=keep)
    truths = [naive.attention(q, k[:, :, :17], v[:, :, :17], relaxed_row(0.2, keys)) for keys in (None, 23)]
    return max(causal, naive.gap(padded, truths[0])), naive.gap(padded, truths[1])


@check("relaxed-attention", "rows sum to one, entropy never falls, gamma = 1 is the mean", below=1e-12, control="gamma = -0.2")
def _() -> tuple[float, float]:
    q, k, _ = qkv(23)
    eye = identity_values(23, 2)
    plain = weights(q, k, "softmax")
    assert plain is not None

    def off(gamma: float) -> float:
        w = attend(q, k, eye, get("relaxed-attention"), blend=torch.tensor((1 - gamma, gamma), dtype=F64))
        return max(naive.gap(w.sum(-1), torch.ones(1, 2, 23)), float((entropy(plain) - entropy(w)).max()))

    uniform = attend(q, k, eye, get("relaxed-attention", gamma=1.0))
    return max(off(0.2), off(0.5), naive.gap(uniform, torch.full_like(uniform, 1 / 23))), off(-0.2)


@check("relaxed-attention", "after training the layer is plain attention, bit for bit", below=0.0, control="matched inference")
def _() -> tuple[float, float]:
    x = torch.randn(2, 19, 32, dtype=F64)

    def gap(when: str) -> float:
        layer = RelaxedAttention(32, 4, 0.2, when).double().eval()
        q, k, v, _ = layer.heads_of(x, x, 0, None)
        return naive.gap(layer(x), layer.close(attend(q, k, v, mask=Causal()), x))

    return gap("train"), gap("matched")
