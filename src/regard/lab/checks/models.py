"""Checks of layers and models of linear attention: ViG, RPE kernels, FFTNet, Mega, MiniMax-01 and M1."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import Sizes
from ...mechanisms.recurrent.rpe_kernel import NormalizedPerformerRPE, kernel_attention_rpe, normalised_features
from ...nn import BiGLA2D, Decoder, MegaLayer, MiniMaxConfig, MiniMaxLike, MultiHeadEMA, SpectralMixer, both_directions
from ...nn.mega import MU, SIGMA, laplace, relu_squared
from ...nn.minimax import layer_factor
from ...nn.spectral import modrelu
from ...parallel import lasp_plus, lightning_packed
from .. import naive
from ..experiments.policy import cispo_loss, group_advantages, grpo_loss, policy_run, ppo_loss
from ..verification import check
from .grids import gap_with_gradients
from .weighted import qkv

F64 = torch.float64


def gated_matrix(q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """Causal weights of gated linear attention, pair by pair."""
    total = log_decay.cumsum(-2)
    gap = (total[..., :, None, :] - total[..., None, :, :]).clamp_max(0)
    return torch.einsum("...ic,...jc,...ijc->...ij", q, k, gap.exp()).tril() * q.shape[-1] ** -0.5


@check("vig", "8 x 8 tokens, with gradients == the mean of two matrices of gates", below=1e-9, control="one direction")
def _() -> tuple[float, float]:
    q, k, v = qkv(64)
    ahead, back = (-torch.rand(1, 2, 64, 8, dtype=F64) for _ in range(2))
    leaves = q, k, v, ahead, back = tuple(x.requires_grad_() for x in (q, k, v, ahead, back))
    first = gated_matrix(q, k, ahead)
    second = gated_matrix(q.flip(-2), k.flip(-2), back.flip(-2)).flip(-1, -2)
    out = both_directions(q, k, v, ahead, back)
    return gap_with_gradients(out, (first + second) @ v / 2, leaves), naive.gap(out, first @ v)


@check(
    "vig",
    "reversing tokens and swapping gates reverses the output; gates of one: every pair once, the diagonal too",
    below=1e-10,
    control="gates not swapped",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(64)
    ahead, back = (-torch.rand(1, 2, 64, 8, dtype=F64) for _ in range(2))
    out = both_directions(q, k, v, ahead, back).flip(-2)
    swapped, same = (
        both_directions(*(x.flip(-2) for x in (q, k, v, *pair)))  # type: ignore[arg-type]
        for pair in ((back, ahead), (ahead, back))
    )
    free = both_directions(q, k, v, 0 * ahead, 0 * back)
    w = q @ k.mT * 8**-0.5
    truth = (w + torch.diag_embed(w.diagonal(dim1=-2, dim2=-1))) @ v / 2
    return max(naive.gap(swapped, out), naive.gap(free, truth)), naive.gap(same, out)


@check("vig", "the layer: share of tokens that one changed pixel does not reach, any resolution", below=0, control="its convolution alone")
def _() -> tuple[float, float]:
    layer = BiGLA2D(16, 2).double()
    shares = []
    for grid in ((8, 8), (5, 11)):
        x = torch.randn(1, grid[0] * grid[1], 16, dtype=F64)
        other = x.clone()
        other[:, 7] += 1
        shares.append(float(((layer(x, grid) - layer(other, grid)).abs().amax(-1) == 0).double().mean()))
        local = float(((layer.local(x, grid) - layer.local(other, grid)).abs().amax(-1) == 0).double().mean())
    return max(shares), local


@check("vig", "the layer == its formula by hand, with a class token", below=1e-10, control="without the gate of local features")
def _() -> tuple[float, float]:
    layer = BiGLA2D(16, 2, cls=True).double()
    x = torch.randn(2, 13, 16, dtype=F64)
    plane = F.silu(layer.conv(x[:, 1:].mT.unflatten(-1, (3, 4)))).flatten(2).mT
    local = torch.cat((x[:, :1], plane), 1)
    q, k, v = layer.qkv(local).split([8, 8, 16], -1)
    gates = layer.gates(local)
    heads = [y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q, k, v, *gates.chunk(2, -1))]
    a, b = (torch.log(torch.sigmoid(g)) / 16 for g in heads[3:])
    first, second = gated_matrix(*heads[:2], a), gated_matrix(heads[0].flip(-2), heads[1].flip(-2), b.flip(-2)).flip(-1, -2)  # type: ignore[arg-type]

    def rms(y: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    o = rms(((first + second) @ heads[2] / 2).transpose(1, 2)).flatten(-2)
    near = rms(local.unflatten(-1, (2, 8))).flatten(-2)
    r = torch.sigmoid(layer.mix(local))
    y = layer(x, (3, 4))
    return naive.gap(y, layer.out(r * o + (1 - r) * near)), naive.gap(y, layer.out(o))


def toeplitz_truth(fq: Tensor, fk: Tensor, v: Tensor, bias: Tensor, causal: bool, wrap: bool = False) -> Tensor:
    n = v.shape[2]
    i = torch.arange(n)
    offset = (i[None] - i[:, None]) % n if wrap else i[None] - i[:, None]
    w = torch.exp(bias[:, offset + (0 if wrap else n - 1)]) * (fq @ fk.mT)
    w = w.tril() if causal else w
    return w / w.sum(-1, keepdim=True) @ v


@check(
    "kernelized-attention-rpe",
    "N = 48 and 37, both directions and causal, with gradients == the Toeplitz-weighted matrix",
    below=1e-8,
    control="offsets taken modulo N",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for n in (48, 37):
        for causal in (False, True):
            fq, fk = torch.rand(2, 1, 2, n, 12, dtype=F64) + 0.1
            v, bias = torch.randn(1, 2, n, 5, dtype=F64), torch.randn(2, 2 * n - 1, dtype=F64)
            leaves = fq, fk, v, bias = tuple(x.requires_grad_() for x in (fq, fk, v, bias))
            out = kernel_attention_rpe(fq, fk, v, bias, causal)
            own.append(gap_with_gradients(out, toeplitz_truth(fq, fk, v, bias, causal), leaves))
            other = min(other, naive.gap(out, toeplitz_truth(fq, fk, v, bias, causal, wrap=True)))
    return max(own), other


@check(
    "kernelized-attention-rpe",
    "a 6 x 7 grid, biases of both differences == the matrix",
    below=1e-10,
    control="differences of columns alone",
)
def _() -> tuple[float, float]:
    fq, fk = torch.rand(2, 1, 2, 42, 12, dtype=F64) + 0.1
    v, bias = torch.randn(1, 2, 42, 5, dtype=F64), torch.randn(2, 11, 13, dtype=F64)
    at = torch.arange(42)
    rows, columns = (x[None] - x[:, None] for x in (at // 7, at % 7))

    def truth(rows: Tensor) -> Tensor:
        w = torch.exp(bias[:, rows + 5, columns + 6]) * (fq @ fk.mT)
        return w / w.sum(-1, keepdim=True) @ v

    out = kernel_attention_rpe(fq, fk, v, bias, grid=(6, 7))
    return naive.gap(out, truth(rows)), naive.gap(out, truth(0 * rows))


@check(
    "kernelized-attention-rpe",
    "b = 0 is plain kernel attention, b = -1000 away from 0 gives v; any length",
    below=1e-10,
    control="b = -1 away from 0",
)
def _() -> tuple[float, float]:
    fq, fk = torch.rand(2, 1, 2, 48, 12, dtype=F64) + 0.1
    v = torch.randn(1, 2, 48, 5, dtype=F64)
    w = fq @ fk.mT
    far = torch.ones(2, 95, dtype=F64)
    far[:, 47] = 0
    gaps = (
        naive.gap(kernel_attention_rpe(fq, fk, v, 0 * far), w / w.sum(-1, keepdim=True) @ v),
        naive.gap(kernel_attention_rpe(fq, fk, v, -1000 * far), v),
    )
    layer = NormalizedPerformerRPE(2, 8, 12, reach=10).double()
    q, k, v2 = qkv(33)
    layer.bias.data.normal_()
    long = layer.bias[:, torch.arange(-32, 33).clamp(-9, 9) + 9]
    same = naive.gap(layer(q, k, v2), toeplitz_truth(*normalised_features(q, k, layer.projection.double()), v2, long, False))
    return max(*gaps, same), naive.gap(kernel_attention_rpe(fq, fk, v, -far), v)


@check(
    "kernelized-attention-rpe",
    "q, k times 1 to 8: mean L1 distance of estimated weights from softmax's, the worst",
    below=0.35,
    control="features of unnormalised q and k, times 4",
)
def _() -> tuple[float, float]:
    from ...algebra.feature_map import orthogonal_gaussian, positive_random

    q, k, _ = qkv(48, 16)
    projection = orthogonal_gaussian(Sizes(1, 2, 2, 48, 48, 16, 5), 64).double()

    def distance(w: Tensor, s: Tensor) -> float:
        return float((w / w.sum(-1, keepdim=True) - torch.softmax(s, -1)).abs().sum(-1).mean())

    own = []
    for c in (1, 2, 4, 8):
        fq, fk = normalised_features(c * q, c * k, projection)
        own.append(distance(fq @ fk.mT, F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT))
    fq, fk = (positive_random(4 * x, projection, 0.0, False, False) for x in (q, k))
    return max(own), distance(fq @ fk.mT + 1e-300, 16 * q @ k.mT)


@check(
    "fftnet",
    "N = 32 and 33: filter 1 without activation gives x back, and norms are kept",
    below=1e-12,
    control="the real part of a Fourier transform over tokens (FNet)",
)
def _() -> tuple[float, float]:
    own = []
    for n in (32, 33):
        mixer, x = SpectralMixer(12, 3, n, adaptive=False, activation="none").double(), torch.randn(2, n, 12, dtype=F64)
        own += [naive.gap(mixer.mix(x), x), abs(float(torch.fft.fft(x, dim=1, norm="ortho").norm() - x.norm()))]
    return max(own), naive.gap(torch.fft.fft(x, dim=1, norm="ortho").real, x)


@check("fftnet", "without activation == the circulant matrix of irfft(W)", below=1e-10, control="the Toeplitz matrix")
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for n in (32, 33):
        mixer, x = SpectralMixer(12, 3, n, activation="none").double(), torch.randn(1, n, 12, dtype=F64)
        kernel = torch.fft.irfft(mixer.filters(x)[0][0], n=n)  # (heads, n)
        at = torch.arange(n)
        circulant = kernel[:, (at[:, None] - at) % n]
        heads = x[0].unflatten(-1, (3, 4)).transpose(0, 1)
        out = mixer.mix(x)[0].unflatten(-1, (3, 4)).transpose(0, 1)
        own.append(naive.gap(out, circulant @ heads))
        other = min(other, naive.gap(out, circulant.tril() @ heads))
    return max(own), other


@check("fftnet", "the whole module commutes with circular shifts", below=1e-10, control="shifting by another step")
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for n, kind in ((32, "modrelu"), (33, "modrelu"), (33, "gelu"), (20, "modrelu")):
        mixer, x = SpectralMixer(12, 3, 33 if n == 20 else n, activation=kind).double(), torch.randn(2, n, 12, dtype=F64)
        shifted = mixer(x.roll(5, 1))
        if kind == "modrelu":  # a real bias on the spectrum, as released, is tied to the origin
            own.append(naive.gap(shifted, mixer(x).roll(5, 1)))
            other = min(other, naive.gap(shifted, mixer(x).roll(4, 1)))
    return max(own), other


@check(
    "fftnet",
    "modReLU keeps phases, is zero below -b, and ReLU(x + b) on reals >= 0",
    below=1e-12,
    control="ReLU of real and imaginary parts",
)
def _() -> tuple[float, float]:
    z, b = torch.randn(1000, dtype=torch.complex128), torch.tensor(-0.5, dtype=F64)
    out = modrelu(z, b)
    alive = z.abs() > 0.5
    phases = float((out[alive].angle() - z[alive].angle()).abs().max())
    zero = float(out[~alive].abs().max())
    real = torch.rand(100, dtype=F64)
    split = torch.complex(F.relu(z.real + b), F.relu(z.imag + b))
    return max(phases, zero, naive.gap(modrelu(real + 0j, b).real, F.relu(real + b))), float(
        (split[alive].angle() - z[alive].angle()).abs().max()
    )


@check("fftnet", "filters of two inputs differ by", above=1e-3, control="without adaptation")
def _() -> tuple[float, float]:
    x = torch.randn(2, 32, 12)
    found = []
    for adaptive in (True, False):
        w = SpectralMixer(12, 3, 32, adaptive=adaptive).filters(x)[0]
        found.append(naive.gap(w[0], w[1]))
    return found[0], found[1]


def ema_loop(layer: MultiHeadEMA, x: Tensor, way: int = 0) -> Tensor:
    p, a = torch.sigmoid(layer.delta[way]), torch.sigmoid(layer.alpha[way])
    h, outs = torch.zeros(*x.shape[::2], layer.ndim, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = p * layer.beta[way] * x[:, t, :, None] + (1 - p * a) * h
        outs.append((layer.gamma[way] * h).sum(-1) / layer.ndim**0.5)
    return torch.stack(outs, 1)


@check("mega", "EMA by FFT, by steps, and in both directions == the recurrence", below=1e-10, control="a circular convolution")
def _() -> tuple[float, float]:
    x = torch.randn(2, 21, 6, dtype=F64)
    one, two = MultiHeadEMA(6, 4).double(), MultiHeadEMA(6, 4, bidirectional=True).double()

    def close(layer: MultiHeadEMA, y: Tensor) -> Tensor:
        return F.silu(y + layer.omega * x)

    first, state = one.step(x[:, :8])
    second, _ = one.step(x[:, 8:], state)
    truth = close(one, ema_loop(one, x))
    both = close(two, ema_loop(two, x) + ema_loop(two, x.flip(1), 1).flip(1))
    circular = torch.fft.irfft(torch.fft.rfft(one.kernel(21)[0]) * torch.fft.rfft(x.mT), n=21).mT
    gaps = [naive.gap(one(x), truth), naive.gap(torch.cat((first, second), 1), truth), naive.gap(two(x), both)]
    return max(gaps), naive.gap(close(one, circular), truth)


@check("mega", "Laplace at sqrt(1/2): distance of value and slope from relu^2's", below=1e-4, control="mu = 0.5")
def _() -> tuple[float, float]:
    def miss(mu: float) -> float:
        x = torch.tensor(math.sqrt(0.5), dtype=F64, requires_grad=True)
        values = [laplace(x, mu, SIGMA), relu_squared(x)]
        slopes = [torch.autograd.grad(v, x)[0] for v in values]
        return max(float((values[0] - values[1]).detach().abs()), float((slopes[0] - slopes[1]).abs()))

    return miss(MU), miss(0.5)


def mega_truth(layer: MegaLayer, x: Tensor, ema: bool = True) -> Tensor:
    """A causal layer from its formulas, one sequence."""
    normed = layer.norm(x)
    assert layer.ema is not None
    m = layer.ema.close(ema_loop(layer.ema, normed), normed) if ema else normed
    u, z, r, hx = layer.m(m).split([layer.dim, layer.zdim, layer.hdim, layer.dim], -1)
    z, v = F.silu(z), F.silu(layer.v(normed))
    q, k = layer.kappa[0] * z + layer.mu[0], layer.kappa[1] * z + layer.mu[1]
    n = x.shape[1]
    i = torch.arange(n)
    reach = (len(layer.offsets) + 1) // 2
    bias = layer.offsets[(i[:, None] - i).clamp(1 - reach, reach - 1) + reach - 1]
    seen = i[:, None] >= i
    if layer.chunk is not None:
        seen = seen & (i[:, None] // layer.chunk == i // layer.chunk)
    if layer.attn == "softmax":
        w = (q @ k.mT / layer.zdim**0.5 + bias).masked_fill(~seen, -math.inf).softmax(-1)
    else:
        s = q @ k.mT / seen.sum(-1, keepdim=True) + bias
        w = ((1 + torch.erf((s - 0.707107) / (0.282095 * 2**0.5))) / 2 if layer.attn == "laplace" else F.relu(s) ** 2) * seen
    h = F.silu(hx + (F.silu(r) * (w @ v)) @ layer.h.weight.T)
    return x + torch.sigmoid(u) * (h - x)


@check(
    "mega",
    "softmax, Laplace and relu^2, whole and in chunks of 8: the layer and its steps == the formulas",
    below=1e-5,
    control="without the averages",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for attn in ("softmax", "laplace", "relu2"):
        for chunk in (None, 8):
            layer, x = MegaLayer(12, 6, ndim=4, attn=attn, chunk=chunk).double(), torch.randn(2, 21, 12, dtype=F64)
            truth, state, outs = mega_truth(layer, x), None, []
            for t in range(21):
                y, state = layer.step(x[:, t : t + 1], state)
                outs.append(y)
            own += [naive.gap(layer(x), truth), naive.gap(torch.cat(outs, 1), truth)]
            other = min(other, naive.gap(layer(x), mega_truth(layer, x, ema=False)))
    return max(own), other


@check(
    "mega",
    "chunks of 8: what a token of the first chunk changes in the second: zero without averages; future tokens: zero with them",
    below=0,
    control="with averages, past tokens",
)
def _() -> tuple[float, float]:
    x = torch.randn(1, 16, 12, dtype=F64)

    def moved(layer: MegaLayer, token: int, rows: slice) -> float:
        other = x.clone()
        other[:, token] += 1
        return naive.gap(layer(other)[:, rows], layer(x)[:, rows])

    bare, full = MegaLayer(12, 6, ndim=4, chunk=8, ema=False).double(), MegaLayer(12, 6, ndim=4, chunk=8).double()
    ahead = moved(MegaLayer(12, 6, ndim=4).double(), 9, slice(0, 9))
    # The transform's rounding spreads over all outputs, hence a threshold of zero needs the sum of both to be rounded.
    return max(moved(bare, 3, slice(8, 16)), round(ahead, 12)), moved(full, 3, slice(8, 16))


@check(
    "mega",
    "a decoder of Mega layers with chunks generates what full passes would; state bytes stay within a chunk",
    below=0,
    control="without chunks",
)
def _() -> tuple[float, float]:
    def grown(chunk: int | None) -> float:
        model = Decoder([MegaLayer(16, 8, ndim=4, chunk=chunk) for _ in range(2)], vocab=20, dim=16, layers=2, heads=2)
        out = model.generate(torch.randint(20, (1, 17)), 3)
        if not torch.equal(model(out[:, :-1])[:, 16:].argmax(-1), out[:, 17:]):
            return math.nan
        sizes = [sum(s.bytes for s in model.step(torch.randint(20, (1, n)))[1]) for n in (24, 48)]
        return float(sizes[1] - sizes[0])

    return grown(8), grown(None)


def small(**options: object) -> MiniMaxLike:
    config = MiniMaxConfig(**{"vocab": 30, "dim": 32, "layers": 4, "heads": 4, "kv_heads": 2, "period": 4, "hidden": 24, **options})  # type: ignore[arg-type]
    return MiniMaxLike(config).double()


@check(
    "minimax-01",
    "3 lightning to 1 softmax with experts, left padding: prefill and decoding with one state a layer == the full pass",
    below=1e-9,
    control="padding read as tokens",
)
def _() -> tuple[float, float]:
    model = small(alpha=(1.2, 1.1, 1.3), beta=(0.7, 0.8, 0.9))
    tokens = torch.randint(30, (2, 21))
    keep = torch.ones(2, 21, dtype=torch.bool)
    keep[0, :6] = False
    whole = model(tokens, keep=keep)
    out, states = model.step(tokens[:, :13], keep=keep[:, :13])
    outs = [out]
    for t in range(13, 21):
        out, states = model.step(tokens[:, t : t + 1], states, keep=keep[:, : t + 1])
        outs.append(out)
    alone = model(tokens[:1, 6:])
    rest = keep[..., None]
    gaps = [naive.gap(torch.cat(outs, 1) * rest, whole * rest), naive.gap(whole[:1, 6:], alone)]
    return max(gaps), naive.gap(model(tokens)[:1, 6:], alone)


@check(
    "minimax-01",
    "the first block by hand: silu of q, k, v, slopes, norm of all heads, sigmoid gate, scaled residuals",
    below=1e-7,
    control="without the gate",
)
def _() -> tuple[float, float]:
    model = small(experts=1, alpha=(1.0, 1.3, 1.1), beta=(1.0, 0.6, 0.9))
    block, x = model.blocks[0], torch.randn(1, 12, 32, dtype=F64)
    mixer = block.mixer
    h = block.norm1(x)  # type: ignore[operator]
    q, k, v = (F.silu(layer(h)).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (mixer.q, mixer.k, mixer.v))  # type: ignore[operator, union-attr]
    i = torch.arange(12, dtype=F64)
    rate = torch.tensor([2 ** (-8 * (n + 1) / 4) * (1 - 0 + 1e-5) for n in range(4)], dtype=F64)
    past = torch.exp(-rate[:, None, None] * (i[:, None] - i).clamp_min(0)).tril()
    o = ((q @ k.mT * past) @ v).transpose(1, 2).flatten(-2)
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.merge_norm.weight  # type: ignore[union-attr]

    def truth(gate: Tensor | float) -> Tensor:
        y = mixer.out(normed * gate)  # type: ignore[operator, union-attr]
        h2 = block.norm2(1.3 * h + 0.6 * y)  # type: ignore[operator]
        return 1.1 * h2 + 0.9 * block.mlp(h2)  # type: ignore[operator, no-any-return]

    out = block(x, None)
    return naive.gap(out, truth(torch.sigmoid(mixer.gate(h)))), naive.gap(out, truth(1.0))  # type: ignore[operator, union-attr]


@check(
    "minimax-01",
    "LASP+ on 4 virtual ranks of unequal lengths, and packed documents == one device, decays 0.9 and 1",
    below=1e-10,
    control="prefixes without the decay between",
)
def _() -> tuple[float, float]:
    from ...mechanisms.recurrent.lightning import lightning_blocks
    from ...parallel.lasp import local_state

    own, other = [], 0.0
    for decay in (0.9, 1.0):
        q, k, v = qkv(60)
        slope = torch.full((2,), -math.log(decay), dtype=F64)
        edges = [0, 7, 30, 42, 60]
        shards = [tuple(x[:, :, a:b] for x in (q, k, v)) for a, b in itertools.pairwise(edges)]
        truth = lightning_blocks(q, k, v, slope)[0]
        outs, _moved = lasp_plus(shards, slope)  # type: ignore[arg-type]
        own.append(naive.gap(torch.cat(outs, 2), truth))
        packed = lightning_packed(q, k, v, slope, torch.tensor(edges))
        apart = torch.cat([lightning_blocks(*shard, slope)[0] for shard in shards], 2)  # type: ignore[arg-type]
        own.append(naive.gap(packed, apart))
        bare = torch.stack([local_state(k, v, slope) for _, k, v in shards[:3]]).sum(0)
        at = torch.arange(1, 19, dtype=F64)
        wrong = lightning_blocks(*shards[3], slope)[0] + (shards[3][0] * torch.exp(-slope[:, None] * at)[..., None]) @ bare  # type: ignore[arg-type]
        other = max(other, naive.gap(wrong, truth[:, :, 42:]))
    return max(own), other


@check(
    "minimax-01",
    "bytes of state: what 100 more tokens add, less their keys and values in the softmax layer",
    below=0,
    control="in every layer",
)
def _() -> tuple[float, float]:
    model = small()
    sizes = [sum(s.bytes for s in model.step(torch.randint(30, (1, n)))[1]) for n in (50, 150)]
    one = 100 * 2 * 2 * 8 * 8
    return abs(sizes[1] - sizes[0] - one), abs(sizes[1] - sizes[0] - 4 * one)


@check(
    "minimax-01",
    "experts: equal to the sum over the top 2 by hand; balance is 1 for an even router; slopes fall to the last layer as released",
    below=1e-9,
    control="experts unweighed",
)
def _() -> tuple[float, float]:
    from ...nn import Experts

    layer, x = Experts(16, 24, 4, 2).double(), torch.randn(3, 7, 16, dtype=F64)
    out = layer(x)
    p = torch.softmax(layer.router(x).float(), -1)
    top, which = p.topk(2, -1)
    top = (top / top.sum(-1, keepdim=True)).double()

    def truth(weighed: bool) -> Tensor:
        every = torch.stack([e(x) for e in layer.experts], -2)
        got = every.gather(-2, which[..., None].expand(-1, -1, -1, 16))
        return (got * (top[..., None] if weighed else 0.5)).sum(-2)

    even = Experts(16, 24, 4, 2).double()
    even.router.weight.data.zero_()
    even(x)
    factors = abs(layer_factor(0, 80) - 1.00001) + abs(layer_factor(79, 80) - 1e-5 - 1e-5 / 79)
    balanced = abs(float(even.balance.detach()) - 1)
    return max(naive.gap(out, truth(True)), balanced, round(factors, 9)), naive.gap(out, truth(False))


@check(
    "minimax-01",
    "image patches stand before the text: logits with them == those of their features as tokens",
    below=1e-10,
    control="patches after the text",
)
def _() -> tuple[float, float]:
    model = small(patch_dim=6)
    tokens, patches = torch.randint(30, (1, 5)), torch.randn(1, 3, 6, dtype=F64)
    assert model.vision is not None

    def through(x: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(x, None)
        return model.logits(x)

    image, text = model.vision(patches), model.embed(tokens)
    own = naive.gap(model(tokens, patches), through(torch.cat((image, text), 1)))
    return own, naive.gap(model(tokens, patches)[:, -5:], through(torch.cat((text, image), 1))[:, :5])


def policy_inputs() -> tuple[Tensor, Tensor, Tensor]:
    logp = (-torch.rand(6, 5, dtype=F64)).requires_grad_()
    return logp, group_advantages(torch.randn(2, 3, dtype=F64)).flatten(), torch.ones(6, 5, dtype=torch.bool)


@check(
    "minimax-m1",
    "equal policies: the gradients of CISPO, PPO and GRPO == REINFORCE with group advantages",
    below=1e-12,
    control="rewards not normalised",
)
def _() -> tuple[float, float]:
    logp, a, mask = policy_inputs()
    truth = -a[:, None].expand(6, 5) / 30
    own = [naive.gap(torch.autograd.grad(loss(logp, logp.detach(), a, mask), logp)[0], truth) for loss in (cispo_loss, ppo_loss, grpo_loss)]
    raw = torch.autograd.grad(cispo_loss(logp, logp.detach(), 2 * a + 1, mask), logp)[0]
    return max(own), naive.gap(raw, truth)


@check(
    "minimax-m1",
    "a token of ratio 3, A > 0, eps_high 0.2: gradient less 1.2 A; with dropping, and for PPO and GRPO, 0",
    below=1e-12,
    control="without the stop-gradient",
)
def _() -> tuple[float, float]:
    logp, a, mask = policy_inputs()
    a = a.abs() + 0.1
    old = logp.detach().clone()
    old[0, 0] -= math.log(3)

    def slope(loss: Tensor) -> float:
        return float(torch.autograd.grad(loss, logp)[0][0, 0]) * 30

    zero = [
        slope(cispo_loss(logp, old, a, mask, 0.2, 0.2, drop=True)),
        slope(ppo_loss(logp, old, a, mask)),
        slope(grpo_loss(logp, old, a, mask)),
    ]
    own = max(abs(slope(cispo_loss(logp, old, a, mask)) + 1.2 * float(a[0])), *map(abs, zero))
    ratio = torch.exp(logp - old).clamp_max(1.2)
    leaky = slope(-(ratio * a[:, None] * logp).mean())
    ratio3 = slope(-(torch.exp(logp - old) * a[:, None] * logp).mean())
    return own, max(abs(leaky + 1.2 * float(a[0])), abs(ratio3 + 1.2 * float(a[0])))


@check(
    "minimax-m1",
    "equal rewards in a group: loss and gradient are 0; rewards x 7: gradients unchanged",
    below=1e-9,
    control="advantages not divided by their spread",
)
def _() -> tuple[float, float]:
    logp, _, mask = policy_inputs()
    rewards = torch.randn(2, 3, dtype=F64)

    def grad(a: Tensor) -> Tensor:
        return torch.autograd.grad(cispo_loss(logp, logp.detach(), a.flatten(), mask), logp)[0]

    equal = group_advantages(torch.full((2, 3), 0.7, dtype=F64))
    own = max(float(grad(equal).abs().max()), naive.gap(grad(group_advantages(7 * rewards)), grad(group_advantages(rewards))))
    centred = rewards - rewards.mean(-1, keepdim=True)
    return own, naive.gap(grad(7 * centred), grad(centred))


@check(
    "minimax-m1",
    "8 layers, one of softmax: state after 4096 tokens over an all-softmax stack's, less 1/8",
    below=0.00625,
    control="two softmax layers of eight",
)
def _() -> tuple[float, float]:
    def share(period: int) -> float:
        sizes = {}
        for p in (period, 1):
            model = MiniMaxLike(MiniMaxConfig(vocab=30, dim=32, layers=8, heads=4, kv_heads=4, period=p, hidden=16, experts=1))
            with torch.no_grad():
                states = model.step(torch.randint(30, (1, 4096)))[1]
            sizes[p] = sum(s.bytes for s in states)
            if sizes[p] != model.cost(4096)[1]:
                return math.nan
        fixed = 4 * 32 * 8 * (8 - 8 // period)
        return abs((sizes[period] - fixed) / sizes[1] - 1 / 8)

    return share(8), share(4)


@check("minimax-m1", "40 rounds on sums of digits: mean reward of the last five", above=0.8, control="rewards drawn at random")
def _() -> tuple[float, float]:
    from ..experiments import policy

    own = sum(policy_run("cispo").rewards[-5:]) / 5
    real, torch_rand = policy.group_advantages, torch.randn
    try:  # the same run, told nothing of the rewards
        policy.group_advantages = lambda r, eps=1e-6: real(torch_rand(r.shape), eps)  # type: ignore[assignment]
        blind = sum(policy_run("cispo").rewards[-5:]) / 5
    finally:
        policy.group_advantages = real
    return own, blind
