"""Checks of L2ViT, FLatten, SLAB and efficient attention."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from ...catalog import get
from ...engine import attend, weights
from ...errors import RegardError
from ...mechanisms.recurrent.flatten import focused
from ...nn import EfficientAttention, GridAttention, LocalConcentration, PRepBN, WindowAttention
from .. import naive
from ..memory import largest_tensor
from ..verification import check
from .comparing import F64, gap_with_gradients
from .weighted import qkv


@check("l2vit", "== tau relu(q) relu(k)^T v / max(row sum, 100), with gradients", below=1e-10, control="without the clamp")
def _() -> tuple[float, float]:
    q, k, v = qkv(64, 16)
    tau = torch.tensor([0.3, 0.7], dtype=F64)
    leaves = q, k, v, tau = tuple(x.requires_grad_() for x in (q, k, v, tau))
    w = q.clamp_min(0) @ k.clamp_min(0).mT
    total = w.sum(-1, keepdim=True)
    out = attend(q, k, v, "l2vit", tau=tau)
    truth = tau[:, None, None] * (w / total.clamp_min(100)) @ v
    return gap_with_gradients(out, truth, leaves), naive.gap(out, tau[:, None, None] * (w / total) @ v)


@check(
    "l2vit", "row sums over tau: small scores below 1, for q x 100 at 1: the larger miss", below=1e-9, control="q x 100 with q's own sums"
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(64, 16)
    q, k = q.abs() * 0.1, k.abs()
    small, large = (weights(c * q, k, "l2vit").sum(-1) * 4 for c in (1, 100))  # type: ignore[union-attr]
    true = (0.1 * (q / 0.1) @ k.mT).sum(-1) / 100
    return max(naive.gap(large, torch.ones_like(large)), naive.gap(small, true)), naive.gap(small, torch.ones_like(small))


@check("l2vit", "Jacobian between windows: zero for the window block", below=0, control="for the linear block")
def _() -> tuple[float, float]:
    x = torch.randn(1, 8, 14, 14, dtype=F64)

    def leak(layer: torch.nn.Module) -> float:
        moved = x.clone()
        moved[..., :7, :7] += 1.0
        return naive.gap(layer(moved)[..., 7:, 7:], layer(x)[..., 7:, 7:])

    return leak(WindowAttention(8, 2).double()), leak(GridAttention(8, 2, (14, 14), "l2vit").double())


@check("l2vit", "local concentration commutes with shifts, away from borders", below=1e-10, control="the shift by another pixel")
def _() -> tuple[float, float]:
    layer = LocalConcentration(4).double().eval()
    x = torch.randn(1, 4, 30, 30, dtype=F64)
    y, shifted = layer(x), layer(x.roll((1, 2), (2, 3)))
    found = [naive.gap(shifted[..., 10:20, 10:20], y.roll(by, (2, 3))[..., 10:20, 10:20]) for by in ((1, 2), (2, 1))]
    return found[0], found[1]


@check("flatten", "linear path with gradients == the quadratic order, norms over all heads' channels", below=1e-8, control="norms a head")
def _() -> tuple[float, float]:
    q, k, v = qkv(49, 16)
    a = torch.randn(2, 16, dtype=F64)
    leaves = q, k, v, a = tuple(x.requires_grad_() for x in (q, k, v, a))

    def truth(dims: tuple[int, ...]) -> Tensor:
        def focus(x: Tensor) -> Tensor:
            x = (x.clamp_min(0) + 1e-6) / torch.log1p(torch.exp(a))[:, None]
            return x**3 * (x**2).sum(dims, keepdim=True).sqrt() / (x**6).sum(dims, keepdim=True).sqrt()

        w = focus(q) @ focus(k).mT
        return w / (w.sum(-1, keepdim=True) + 49e-6) @ v

    out = attend(q, k, v, "flatten", sharpness=a)
    return gap_with_gradients(out, truth((1, 3)), leaves), naive.gap(out, truth((3,)))


@check("flatten", "|f_3(x)| == |x|", below=1e-12, control="the power over its own norm")
def _() -> tuple[float, float]:
    x = torch.rand(500, 16, dtype=F64) + 1e-3
    found = [float((y.norm(dim=-1) - x.norm(dim=-1)).abs().max()) for y in (focused(x, 3.0), F.normalize(x**3, dim=-1))]
    return found[0], found[1]


@check(
    "flatten",
    "gap of cosines between pairs of the same and of another largest channel, p = 3 over p = 1",
    above=3,
    control="p = 1.2 over p = 1",
)
def _() -> tuple[float, float]:
    x, y = torch.rand(2, 2000, 16, dtype=F64)
    same = x.argmax(-1) == y.argmax(-1)

    def apart(power: float) -> float:
        near = F.cosine_similarity(focused(x, power), focused(y, power), dim=-1)
        return float(near[same].mean() - near[~same].mean())

    return apart(3) / apart(1), apart(1.2) / apart(1)


@check(
    "flatten",
    "14 x 14 grid, D = 16: rank of the implied matrix with the depthwise convolution",
    above=196,
    control="of the kernel part alone",
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(196, 16)
    kernel = weights(q, k, "flatten")[0, 0]  # type: ignore[index]
    conv = torch.nn.Conv2d(1, 1, 5, padding=2, bias=False).double()
    toeplitz = conv(torch.eye(196, dtype=F64).view(196, 1, 14, 14)).detach().view(196, 196).T
    return int(torch.linalg.matrix_rank(kernel + toeplitz)), int(torch.linalg.matrix_rank(kernel))


@check(
    "flatten",
    "the layer: positions on keys, one convolution of v for all heads == by hand",
    below=1e-10,
    control="convolution of the output",
)
def _() -> tuple[float, float]:
    layer = GridAttention(16, 2, (5, 6), "flatten").double()
    assert layer.key_position is not None and layer.local is not None
    torch.nn.init.normal_(layer.key_position)
    x = torch.randn(2, 30, 16, dtype=F64)
    q, k, v = layer.qkv(x).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in (q, k + layer.key_position, v))
    out = attend(q, k, v, "flatten")

    def conv(y: Tensor) -> Tensor:
        assert layer.local is not None
        return torch.stack([layer.local(y[:, h].mT.unflatten(-1, (5, 6))).flatten(2).mT for h in (0, 1)], 1)

    truth, other = (layer.out((out + conv(y)).transpose(1, 2).flatten(-2)) for y in (v, out))
    y = layer(x)
    return naive.gap(y, truth), naive.gap(y, other)


@check("slab", "linear attention with gradients == the quadratic order", below=1e-10, control="eps 0.1")
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(49, 16))

    def truth(eps: float) -> Tensor:
        w = q.clamp_min(0) @ k.clamp_min(0).mT
        return w / (w.sum(-1, keepdim=True) + eps) @ v

    out = attend(q, k, v, "slab")
    return gap_with_gradients(out, truth(1e-6), leaves), naive.gap(out, truth(0.1))


def trained_norm(steps: int = 12) -> PRepBN:
    norm = PRepBN(8, steps=10, eta=0.7).double().train()
    torch.nn.init.normal_(norm.rep.norm.weight)
    torch.nn.init.normal_(norm.rep.norm.bias)
    for _ in range(steps):
        norm(2 * torch.randn(4, 9, 8, dtype=F64) + 1)
    return norm


@check("slab", "Linear(RepBN(x)) in eval == the one fused Linear", below=1e-10, control="folded without eta x")
def _() -> tuple[float, float]:
    norm, linear = trained_norm().eval(), torch.nn.Linear(8, 5).double()
    x = torch.randn(3, 9, 8, dtype=F64)
    truth, fused = linear(norm(x)), norm.fuse(linear)(x)
    c, h = norm.rep.affine()
    plain = ((c - norm.rep.eta) * x + h) @ linear.weight.T + linear.bias
    gamma, beta = norm.rep.folded()
    batch = norm.rep.norm
    assert batch.running_mean is not None and batch.running_var is not None
    one = F.batch_norm(x.flatten(0, 1), batch.running_mean, batch.running_var, gamma, beta, eps=batch.eps).view_as(x)
    return max(naive.gap(fused, truth), naive.gap(one, norm(x))), naive.gap(plain, truth)


@check("slab", "training: step 0 is LayerNorm, half way the mean, after `steps` RepBN", below=1e-10, control="shares in reverse")
def _() -> tuple[float, float]:
    x = torch.randn(3, 9, 8, dtype=F64)
    gaps, others = [], []
    for step, share in ((0, 1.0), (5, 0.5), (12, 0.0)):
        norm = trained_norm(step)
        twin = copy.deepcopy(norm.rep)
        layer, rep = F.layer_norm(x, (8,)), twin(x)
        y = norm(x)
        gaps.append(naive.gap(y, share * layer + (1 - share) * rep))
        others.append(naive.gap(y, (1 - share) * layer + share * rep))
    return max(gaps), max(others)


@check(
    "efficient-attention",
    "softmax form with gradients == softmax_d(q) softmax_n(k)^T v, whose rows sum to 1",
    below=1e-10,
    control="the axes swapped",
)
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(30))
    w = torch.softmax(q, -1) @ torch.softmax(k, -2).mT
    other = torch.softmax(q, -2) @ torch.softmax(k, -1).mT
    out = attend(q, k, v, "efficient-attention")
    rows = naive.gap(weights(q, k, "efficient-attention").sum(-1), torch.ones(1, 2, 30))  # type: ignore[union-attr]
    return max(gap_with_gradients(out, w @ v, leaves), rows), naive.gap(out, other @ v)


@check("efficient-attention", "scaling form == dot-product attention over N, exactly", below=1e-12, control="the softmax form")
def _() -> tuple[float, float]:
    q, k, v = qkv(30)
    truth = q @ k.mT @ v / 30
    found = [naive.gap(attend(q, k, v, get("efficient-attention", norm=norm)), truth) for norm in ("scaling", "softmax")]
    return found[0], found[1]


@check(
    "efficient-attention",
    "causal: chunks and steps == the softmax over positions up to each token",
    below=1e-10,
    control="over all positions",
)
def _() -> tuple[float, float]:
    from ...algebra import Causal

    q, k, v = qkv(150)
    truth = torch.stack(
        [torch.softmax(q[:, :, t], -1)[:, :, None] @ torch.softmax(k[:, :, : t + 1], -2).mT @ v[:, :, : t + 1] for t in range(150)], 2
    )
    found = [attend(q, k, v, "efficient-attention", mask=Causal(), executor=e) for e in ("chunk", "step")]
    whole = attend(q, k, v, "efficient-attention")
    return max(naive.gap(x, truth[:, :, :, 0]) for x in found), naive.gap(whole, truth[:, :, :, 0])


@check("efficient-attention", "the block at 128 x 128: largest tensor over N^2", below=0.25, control="the matrix written out at 64 x 64")
def _() -> tuple[float, float]:
    block = EfficientAttention(8, 16, 2, 16)
    maps = block.maps(torch.randn(1, 8, 6, 7))
    if naive.gap(maps.sum((-1, -2)), torch.ones(1, 2, 8)) > 1e-5:
        raise RegardError("maps do not sum to one")
    big, small = torch.randn(1, 8, 128, 128), torch.randn(1, 8, 64, 64)
    q, k = block.tokens(block.q(small)), block.tokens(block.k(small))
    return largest_tensor(lambda: block(big)) / 128**4, largest_tensor(lambda: weights(q, k, "efficient-attention")) / 64**4
