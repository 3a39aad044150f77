"""Checks of the reduced rows: agent attention, Set Transformer, SOFT."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...catalog import get
from ...engine import attend
from ...engine.composed import NewtonInverse, gaussian
from ...mechanisms.reduced.agent import agent_attention
from ...nn.set_transformer import ISAB, PMA, SAB, SetTransformer
from ...nn.vision import AgentAttention
from .. import naive
from ..memory import largest_tensor
from ..verification import check

F64 = torch.float64


def qkv(n: int, d: int = 8, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(1, heads, n, d, dtype=F64) for _ in range(3))  # type: ignore[return-value]


def eye(n: int, heads: int = 2) -> Tensor:
    return torch.eye(n, dtype=F64).expand(1, heads, n, n)


@check(
    "agent-attention",
    "two calls == softmax(s Q A^T + B2) softmax(s A K^T + B1) V, A pooled from Q",
    below=1e-12,
    control="agents pooled from K",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(50)
    b1, b2 = torch.randn(2, 9, 50, dtype=F64), torch.randn(2, 50, 9, dtype=F64)

    def explicit(x: Tensor) -> Tensor:
        # pooled by hand: agent a averages tokens floor(a n / m) .. ceil((a + 1) n / m)
        cells = [x[:, :, a * 50 // 9 : -(-(a + 1) * 50 // 9)].mean(2) for a in range(9)]
        a = torch.stack(cells, 2)
        spread = (q @ a.transpose(-1, -2) / math.sqrt(8) + b2).softmax(-1)
        return spread @ (a @ k.transpose(-1, -2) / math.sqrt(8) + b1).softmax(-1) @ v

    out = attend(q, k, v, get("agent-attention", agents=9), gather_bias=b1, spread_bias=b2)
    return naive.gap(out, explicit(q)), naive.gap(out, explicit(k))


@check("agent-attention", "the implied matrix has rank n = 9 at N = 50, and rows that sum to one", below=9.0, control="softmax's matrix")
def _() -> tuple[float, float]:
    q, k, _ = qkv(50)
    implied = attend(q, k, eye(50), get("agent-attention", agents=9))
    sums = naive.gap(implied.sum(-1), torch.ones(1, 2, 50, dtype=F64))
    rank = float(torch.linalg.matrix_rank(implied, rtol=1e-10).max())
    return rank if sums < 1e-12 else math.inf, float(torch.linalg.matrix_rank(attend(q, k, eye(50), "softmax"), rtol=1e-10).max())


@check("agent-attention", "N agents at separated tokens give back softmax attention", below=1e-6, control="9 agents")
def _() -> tuple[float, float]:
    q, k, v = qkv(32, 32)
    q = 40 * torch.linalg.qr(q)[0]  # separated tokens: softmax(Q A^T) is then the identity
    truth = attend(q, k, v, "softmax")
    full = agent_attention(q, q, k, v)
    return naive.gap(full, truth), naive.gap(attend(q, k, v, get("agent-attention", agents=9)), truth)


def upsampled(small: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bilinear interpolation written out: cell centres map to cell centres, edges repeat."""
    out = small.new_zeros(*small.shape[:2], *shape)
    for y in range(shape[0]):
        for x in range(shape[1]):
            at = [min(max((c + 0.5) * s / n - 0.5, 0.0), s - 1.0) for c, n, s in zip((y, x), shape, small.shape[2:], strict=True)]
            (top, left), (dy, dx) = [int(c) for c in at], [c - int(c) for c in at]
            low, right = min(top + 1, small.shape[2] - 1), min(left + 1, small.shape[3] - 1)
            above = (1 - dx) * small[:, :, top, left] + dx * small[:, :, top, right]
            below = (1 - dx) * small[:, :, low, left] + dx * small[:, :, low, right]
            out[:, :, y, x] = (1 - dy) * above + dy * below
    return out


def bias_by_hand(layer: AgentAttention, side: str) -> Tensor:
    part = {name: getattr(layer, f"{side}_{name}") for name in ("grid", "row", "column", "cls")}
    return torch.cat((part["cls"], (upsampled(part["grid"], layer.shape) + part["row"] + part["column"]).flatten(2)), -1)


def agent_layer(layer: AgentAttention, x: Tensor, pool: Callable[[Tensor], Tensor], biased: bool) -> Tensor:
    """The layer's formula by hand, with agents pooled by `pool` from queries (B, heads, H*W, D)."""
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
    a, scale = pool(q[:, :, layer.cls :]), q.shape[-1] ** -0.5
    none = torch.zeros(1, dtype=x.dtype)
    gather, spread = (bias_by_hand(layer, "gather"), bias_by_hand(layer, "spread").transpose(1, 2)) if biased else (none, none)
    out = (q @ a.transpose(-1, -2) * scale + spread).softmax(-1) @ (a @ k.transpose(-1, -2) * scale + gather).softmax(-1) @ v
    plane = v.transpose(1, 2).flatten(-2)[:, layer.cls :].transpose(1, 2).unflatten(-1, layer.shape)
    local = F.pad(layer.conv(plane).flatten(2).transpose(1, 2), (0, 0, layer.cls, 0))
    return layer.out(out.transpose(1, 2).flatten(-2) + local)  # type: ignore[no-any-return]


@check(
    "agent-attention",
    "the layer pools on its grid: on a 9 x 6 image constant in 3 x 2 cells its agents are the cells' queries",
    below=1e-10,
    control="agents pooled along the sequence",
)
def _() -> tuple[float, float]:
    layer = AgentAttention(16, 2, (9, 6), agents=9, bias=False).double()
    x = torch.randn(1, 3, 3, 16, dtype=F64).repeat_interleave(3, 1).repeat_interleave(2, 2).flatten(1, 2)
    corners = [(3 * row) * 6 + 2 * column for row in range(3) for column in range(3)]
    line = agent_layer(layer, x, lambda q: q.unflatten(2, (9, 6)).mean(3), False)
    return naive.gap(layer(x), agent_layer(layer, x, lambda q: q[:, :, corners], False)), naive.gap(layer(x), line)


@check(
    "agent-attention",
    "layer with class token: biases are a 7 x 7 map upsampled + row + column parts + the token's; no shortcut, as the functional",
    below=1e-10,
    control="biases left out",
)
def _() -> tuple[float, float]:
    layer = AgentAttention(16, 2, (6, 9), agents=9, cls=True).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith(("gather", "spread")):
                parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 55, 16, dtype=F64)
    cells = [[(2 * row + i) * 9 + 3 * column + j for i in range(2) for j in range(3)] for row in range(3) for column in range(3)]

    def pool(q: Tensor) -> Tensor:
        return torch.stack([q[:, :, cell].mean(2) for cell in cells], 2)

    q, k, v = qkv(20)
    a = q[:, :, :5]
    same = naive.gap(agent_attention(q, a, k, v, shortcut=0.0), attend(q, k, v, "agent-attention", agents=a))
    return max(same, naive.gap(layer(x), agent_layer(layer, x, pool, True))), naive.gap(layer(x), agent_layer(layer, x, pool, False))


def set_input() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 11, 6, dtype=F64)
    return x, torch.randperm(11)


@check(
    "set-transformer",
    "permuting the set permutes SAB and ISAB outputs and leaves PMA unchanged",
    below=1e-12,
    control="with positions added",
)
def _() -> tuple[float, float]:
    x, order = set_input()
    layers: list[nn.Module] = [SAB(6, 8, 2).double(), ISAB(6, 8, 2, 4).double()]
    pool = nn.Sequential(nn.Linear(6, 8), PMA(8, 2, 3)).double()
    place = torch.arange(11, dtype=F64)[:, None] / 11

    def off(positions: Tensor | float) -> float:
        gaps = [naive.gap(layer(x[:, order] + positions), layer(x + positions)[:, order]) for layer in layers]
        return max(*gaps, naive.gap(pool(x[:, order] + positions), pool(x + positions)))

    return off(0.0), off(place)


@check("set-transformer", "padding with masked junk (NaN included) changes nothing", below=1e-12, control="padding not masked")
def _() -> tuple[float, float]:
    x, _ = set_input()
    model = SetTransformer(6, 2, dim=8, heads=2, inducing=4).double()
    truth = model(x)
    keep = torch.ones(3, 14, dtype=torch.bool)
    keep[:, 11:] = False
    junk = torch.cat((x, torch.full((3, 3, 6), 1e3, dtype=F64)), 1)
    poisoned = torch.cat((x, torch.full((3, 3, 6), math.nan, dtype=F64)), 1)
    encoded = model.encoder[0](poisoned, keep)[:, :11]
    clean = model.encoder[0](x)
    return max(naive.gap(model(junk, keep), truth), naive.gap(encoded, clean)), naive.gap(model(junk), truth)


@check(
    "set-transformer",
    "ISAB never builds n x n: largest tensor at n = 4096, m = 16, over n^2",
    below=0.1,
    control="attention of the set to itself, written out",
)
def _() -> tuple[float, float]:
    x = torch.randn(1, 4096, 16)
    layer = ISAB(16, 16, 2, 16)
    with torch.no_grad():
        own = largest_tensor(lambda: layer(x))
        whole = largest_tensor(lambda: (x @ x.transpose(1, 2)).softmax(-1) @ x)
    return own / 4096**2, whole / 4096**2


def max_regression(attention: bool, steps: int = 300) -> float:
    """Mean absolute error of predicting the maximum of 1..10 reals in [0, 100], after a short training run."""
    torch.manual_seed(1)

    def draw(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        x = 100 * torch.rand(batch, 10, 1)
        keep = torch.arange(10) < torch.randint(1, 11, (batch, 1))
        return x / 100, keep, x.masked_fill(~keep[..., None], -1).amax(1) / 100

    encoder: nn.Module
    head: nn.Module
    if attention:
        encoder, pool, head = SAB(1, 64, 4), PMA(64, 4, 1), nn.Linear(64, 1)
        model = nn.ModuleList([encoder, pool, head])
    else:
        encoder, head = (
            nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()),
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)),
        )
        model = nn.ModuleList([encoder, head])

    def predict(x: Tensor, keep: Tensor) -> Tensor:
        if attention:
            return head(pool(encoder(x, keep), keep))[:, 0]
        h = encoder(x) * keep[..., None]
        return head(h.sum(1) / keep.sum(1, keepdim=True))

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        x, keep, y = draw(128)
        optimizer.zero_grad()
        (predict(x, keep) - y).abs().mean().backward()
        optimizer.step()
    with torch.no_grad():
        x, keep, y = draw(2000)
        return float((predict(x, keep) - y).abs().mean()) * 100


@check(
    "set-transformer",
    "mean absolute error of predicting the maximum of 1..10 numbers in [0, 100], after a short run of SAB + PMA",
    below=5.0,
    control="the mean-pooled net itself",
)
def _() -> tuple[float, float]:
    return max_regression(True), max_regression(False)


@check("soft", "with all 49 tokens as landmarks P A^+ P^T is the full Gaussian matrix", below=1e-9, control="P P^T, no inverse")
def _() -> tuple[float, float]:
    q, _, _ = qkv(49, 16)
    mechanism = get("soft", ridge=0.0, iterations=40)
    truth = gaussian(q / 2, q / 2)
    p = gaussian(q / 2, q / 2)
    return naive.gap(attend(q, q, eye(49), mechanism, landmarks=q), truth), naive.gap(p @ p.transpose(-1, -2), truth)


@check("soft", "Newton's inverse after 20 steps: max |A+ A - I|", below=1e-8, control="5 steps")
def _() -> tuple[float, float]:
    q, _, _ = qkv(49, 16)
    a = gaussian(q / 2, q / 2)
    one = torch.eye(49, dtype=F64)
    return tuple(naive.gap(NewtonInverse.apply(a, 0.0, 1.8, steps) @ a, one.expand_as(a)) for steps in (20, 5))  # type: ignore[return-value]


@check("soft", "its backward equals autograd through torch.linalg.inv, the ridge included", below=1e-9, control="without the ridge")
def _() -> tuple[float, float]:
    q, _, _ = qkv(12, 16)
    a = gaussian(q / 2, q / 2).requires_grad_()
    seed = torch.randn_like(a)
    one = torch.eye(12, dtype=F64)
    (truth,) = torch.autograd.grad((torch.linalg.inv(a + 0.01 * one) * seed).sum(), a)
    return tuple(
        naive.gap(torch.autograd.grad((NewtonInverse.apply(a, ridge, 1.8, 30) * seed).sum(), a)[0], truth) for ridge in (0.01, 0.0)
    )  # type: ignore[return-value]


@check(
    "soft",
    "smooth 14 x 14 grid, 2 x 2 pooled landmarks: relative error of the Gaussian matrix",
    below=0.01,
    control="dot-product kernel e^{q.k}",
)
def _() -> tuple[float, float]:
    row, column = torch.meshgrid(torch.arange(14, dtype=F64), torch.arange(14, dtype=F64), indexing="ij")
    waves = [f(w * axis / 14 * math.pi) for w in (0.5, 1.0) for axis in (row, column) for f in (torch.sin, torch.cos)]
    q = (torch.stack(waves, -1) + 0.05 * torch.randn(14, 14, 8, dtype=F64)).reshape(1, 1, 196, 8)
    marks = F.avg_pool2d(q.reshape(1, 14, 14, 8).permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)[:, None]
    truth = gaussian(q / 8**0.25, q / 8**0.25)
    out = attend(q, q, eye(196, 1), get("soft", ridge=0.0, iterations=40), landmarks=marks)
    dots = torch.exp(q @ q.transpose(-1, -2) / math.sqrt(8))
    return float((out - truth).norm() / truth.norm()), float((dots - truth).norm() / truth.norm())


@check(
    "soft",
    "SOFT++ bounds the spectral norm of the matrix of 400 near-identical tokens",
    below=20.0,
    control="no normalisation",
)
def _() -> tuple[float, float]:
    q = torch.ones(1, 1, 400, 8, dtype=F64) + 0.05 * torch.randn(1, 1, 400, 8, dtype=F64)
    marks = q[:, :, ::8]

    def norm(symmetric: bool) -> float:
        return float(torch.linalg.matrix_norm(attend(q, q, eye(400, 1), get("soft", symmetric=symmetric), landmarks=marks), 2))

    return norm(True), norm(False)
