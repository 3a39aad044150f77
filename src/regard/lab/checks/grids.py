"""Checks of linear attention for images: MALA, NaLaFormer, InLine, L2ViT, RALA, FLatten, SLAB, efficient attention."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import FeatureMap, Recurrent, bind, elu_plus_one
from ...catalog import get
from ...engine import attend, weights
from ...errors import RegardError
from ...mechanisms.recurrent.flatten import focused
from ...mechanisms.recurrent.mala import magnitude_aware, scaled_elu
from ...nn import EfficientAttention, GridAttention, LocalConcentration, PRepBN, WindowAttention
from .. import naive
from ..memory import largest_tensor
from ..verification import check
from .weighted import qkv

F64 = torch.float64


def elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, torch.exp(x))


def relu_linear(q: Tensor, k: Tensor) -> Tensor:
    w = q.clamp_min(0) @ k.clamp_min(0).mT
    return w / w.sum(-1, keepdim=True)


def gradients(out: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    return torch.autograd.grad((out * seed).sum(), leaves)


def gap_with_gradients(found: Tensor, truth: Tensor, leaves: tuple[Tensor, ...]) -> float:
    pairs = zip(gradients(found, leaves), gradients(truth, leaves), strict=True)
    return max(naive.gap(found, truth), *[naive.gap(a, b) for a, b in pairs])


def scaled(x: Tensor, factor: float) -> Tensor:
    return factor * scaled_elu(x)


@check("mala", "linear path with gradients == its matrix written out, whose rows sum to 1", below=1e-10, control="sums in place of means")
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(64, 16))
    s = 16**-0.5 * elu(q) @ elu(k).mT

    def matrix(z: Tensor) -> Tensor:
        return (1 + 1 / z) * s / 64 - z / 64

    w = matrix(s.mean(-1, keepdim=True))
    out = attend(q, k, v, get("mala", eps=0.0))
    rows = naive.gap(weights(q, k, get("mala", eps=0.0)).sum(-1), torch.ones(1, 2, 64))  # type: ignore[union-attr]
    return max(gap_with_gradients(out, w @ v, leaves), rows), naive.gap(out, matrix(s.sum(-1, keepdim=True)) @ v)


@check("mala", "phi(q) times 8: mean deviation inside rows grows", above=5, control="elu + 1 divided by its sum")
def _() -> tuple[float, float]:
    q, k, _v = qkv(64, 16)

    def spread(mechanism: Recurrent, c: float) -> float:
        changed = replace(mechanism, feature=FeatureMap(bind(scaled, factor=c), elu_plus_one))
        return float(weights(q, k, changed).std(-1).mean())  # type: ignore[union-attr]

    plain = Recurrent(FeatureMap(scaled_elu, elu_plus_one), readout="sum", eps=0.0, scaled=False)
    mala = Recurrent(FeatureMap(scaled_elu, elu_plus_one), readout=bind(magnitude_aware, eps=0.0), scaled=False)
    return spread(mala, 8) / spread(mala, 1), spread(plain, 8) / spread(plain, 1)


def turned(x: Tensor, width: int) -> Tensor:
    """Two-dimensional rotary as complex numbers, a token and a pair of channels at a time."""
    n, d = x.shape[-2:]
    out = x.clone()
    for t in range(n):
        for pair in range(d // 2):
            quarter = d // 4
            at, rate = (t // width, pair) if pair < quarter else (t % width, pair - quarter)
            angle = at * 10000 ** -(rate / max(quarter - 1, 1))
            z = torch.complex(x[..., t, 2 * pair], x[..., t, 2 * pair + 1]) * complex(math.cos(angle), math.sin(angle))
            out[..., t, 2 * pair], out[..., t, 2 * pair + 1] = z.real, z.imag
    return out


@check(
    "mala",
    "the layer on a 5 x 6 grid: rotary in the numerator alone, convolution of v, gate == loops",
    below=1e-10,
    control="z from turned features",
)
def _() -> tuple[float, float]:
    layer = GridAttention(16, 2, (5, 6), "mala").double()
    x = torch.randn(2, 30, 16, dtype=F64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    fq, fk = 8**-0.5 * elu(q), elu(k)
    tq, tk = turned(fq, 6), turned(fk, 6)
    assert layer.local is not None and layer.gate is not None
    plane = v.permute(0, 1, 3, 2).reshape(2, 16, 5, 6)
    local = F.conv2d(plane, layer.local.weight, layer.local.bias, padding=2, groups=16).flatten(2).mT

    def truth(zq: Tensor, zk: Tensor) -> Tensor:
        z = (zq @ zk.mT).mean(-1, keepdim=True)
        o = (1 + 1 / (z + 1e-6)) * (tq @ tk.mT) @ v / 30 - z * v.mean(-2, keepdim=True)
        return layer.out((o.transpose(1, 2).flatten(-2) + local) * layer.gate(x))  # type: ignore[misc]

    y = layer(x)
    return naive.gap(y, truth(fq, fk)), naive.gap(y, truth(tq, tk))


def norm_aware_weights(q: Tensor, k: Tensor, power: float | None = None, source: str = "q") -> Tensor:
    """NaLaFormer's row-normalised weights, feature by feature."""
    norm = q.square().sum(-1, keepdim=True).sqrt()
    p = 3 * (0.5 + torch.tanh(norm)) if power is None else torch.full_like(norm, power)
    fq = torch.cat(((q / norm).clamp_min(0).pow(p), (-q / norm).clamp_min(0).pow(p)), -1)
    fk = torch.cat(((k**3).clamp_min(0), (-(k**3)).clamp_min(0)), -1)
    w = fq @ fk.mT
    return w / w.sum(-1, keepdim=True)


@check("nalaformer", "linear path with gradients == its matrix written out", below=1e-8, control="power 3 for every query")
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(64, 16))
    out = attend(q, k, v, get("nalaformer", eps=0.0))
    return gap_with_gradients(out, norm_aware_weights(q, k) @ v, leaves), naive.gap(out, norm_aware_weights(q, k, 3.0) @ v)


@check("nalaformer", "mean entropy of rows falls from |q| x 0.05 to x 1, in nats", above=0.3, control="ReLU linear attention")
def _() -> tuple[float, float]:
    q, k, _ = qkv(64, 16)

    def drop(mechanism: str) -> float:
        h = [float(-torch.special.xlogy(w, w).sum(-1).mean()) for w in (weights(c * q, k, mechanism) for c in (0.05, 0.2, 0.5, 1.0))]  # type: ignore[arg-type]
        falling = all(a > b for a, b in itertools.pairwise(h))
        return h[0] - h[-1] if falling else 0.0

    return drop("nalaformer"), drop("slab")


@check("nalaformer", "keys of opposite signs in every channel: unnormalised scores", below=0, control="keys of the same signs")
def _() -> tuple[float, float]:
    q, k, _ = qkv(20, 16)
    mechanism = replace(get("nalaformer"), readout="none")  # type: ignore[type-var]
    found = [float(weights(q, sign * q.sign() * k.abs(), mechanism).diagonal(dim1=-2, dim2=-1).abs().max()) for sign in (-1, 1)]  # type: ignore[union-attr]
    return found[0], found[1]


@check("inline-attention", "linear path with gradients == its matrix, whose rows sum to 1", below=1e-10, control="without the + 1/N")
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(49, 16))
    s = 16**-0.5 / 49 * q @ k.mT
    w = s - s.mean(-1, keepdim=True) + 1 / 49
    out = attend(q, k, v, "inline-attention")
    rows = naive.gap(weights(q, k, "inline-attention").sum(-1), torch.ones(1, 2, 49))  # type: ignore[union-attr]
    return max(gap_with_gradients(out, w @ v, leaves), rows), naive.gap(out, (w - 1 / 49) @ v)


@check("inline-attention", "weights of q and of 3q differ", above=0.05, control="ReLU linear attention")
def _() -> tuple[float, float]:
    q, k, _ = qkv(49, 16)
    found = [naive.gap(weights(q, k, m), weights(3 * q, k, m)) for m in (get("inline-attention", feature="relu"), get("slab", eps=0.0))]  # type: ignore[arg-type]
    return found[0], found[1]


@check(
    "inline-attention",
    "1000 pairs of queries: least distance of rows over distance of queries",
    above=1e-4,
    control="ReLU linear attention, with q and 2q among the pairs",
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(1000, 16)
    other = torch.randn(1, 2, 1000, 16, dtype=F64)
    other[:, :, 0] = 2 * q[:, :, 0]

    def least(name: str) -> float:
        apart = (weights(q, k[:, :, :49], name) - weights(other, k[:, :, :49], name)).norm(dim=-1)  # type: ignore[operator]
        return float((apart / (q - other).norm(dim=-1)).min())

    return least("inline-attention"), least("slab")


@check(
    "inline-attention",
    "the layer with a class token: convolution by each sample's own kernels == unfolded patches",
    below=1e-10,
    control="kernels of the other sample",
)
def _() -> tuple[float, float]:
    layer = GridAttention(16, 2, (4, 5), "inline-attention", cls=True).double()
    x = torch.randn(2, 21, 16, dtype=F64)
    v = layer.qkv(x)[..., 32:]
    assert layer.dynamic is not None
    kernels = layer.dynamic.kernels(x)
    patches = F.unfold(v[:, 1:].mT.unflatten(-1, (4, 5)), 3, padding=1).unflatten(1, (16, 9))

    def local(kernels: Tensor) -> Tensor:
        return F.pad(torch.einsum("bckn,bck->bnc", patches, kernels.flatten(2)), (0, 0, 1, 0))

    bare = copy.deepcopy(layer)
    bare.dynamic = None
    bare.out, identity = torch.nn.Identity(), torch.nn.Identity()  # type: ignore[assignment]
    whole = copy.deepcopy(layer)
    whole.out = identity  # type: ignore[assignment]
    found = whole(x) - bare(x)
    return naive.gap(found, local(kernels)), naive.gap(found, local(kernels.flip(0)))


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


@check("rala", "linear path with gradients == phi(q).alpha phi(k) over its row sums", below=1e-10, control="every token equally relevant")
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(50, 16))
    fq, fk = elu(q), elu(k)
    alpha = torch.softmax(16**-0.5 * (fk * fq.mean(-2, keepdim=True)).sum(-1), -1)[..., None]

    def truth(alpha: Tensor) -> Tensor:
        w = fq @ (alpha * fk).mT
        return w / 50 / (w.mean(-1, keepdim=True) + 1e-6) @ v

    out = attend(q, k, v, "rala")
    return gap_with_gradients(out, truth(50 * alpha), leaves), naive.gap(out, truth(torch.ones_like(alpha)))


@check("rala", "q of no relevance (phi(q) = 0 on average): plain elu + 1 attention", below=1e-5, control="the same with relevance")
def _() -> tuple[float, float]:
    q, k, v = qkv(50, 16)
    fk = elu(k)

    def miss(q: Tensor) -> float:
        w = elu(q) @ fk.mT
        return naive.gap(attend(q, k, v, get("rala", eps=0.0)), w / w.sum(-1, keepdim=True) @ v)

    return miss(q - 15), miss(q)


@check("rala", "v of rank 4: rank of outputs after the gate", above=16, control="before it")
def _() -> tuple[float, float]:
    q, k, _ = qkv(196, 16)
    v = torch.randn(1, 2, 196, 4, dtype=F64) @ torch.randn(1, 2, 4, 16, dtype=F64)
    o = attend(q, k, v, "rala")[0, 0]
    gate = torch.randn(196, 16, dtype=F64) @ torch.randn(16, 16, dtype=F64)
    return int(torch.linalg.matrix_rank(o * gate)), int(torch.linalg.matrix_rank(o))


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
