"""FFTNet: tokens mixed by a filter of their spectrum that depends on their mean (id 275; Fein-Ashley et al., 2025).

y = irfft(act(rfft(LN(x)) W)),   W = W_base (1 + delta(mean_t LN(x))),   modReLU: z -> relu(|z| + b) z / |z|
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes


def modrelu(z: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """relu(|z| + b) z / |z|: the phase stays, what is shorter than -b becomes zero."""
    size = z.abs()
    return z * (F.relu(size + bias) / size.clamp_min(eps))


@register("fftnet", kind="module")
class SpectralMixer(nn.Module):
    """x (B, N, dim) -> the same, both directions, in O(N log N): x + dropout(mixed(LN(x))).

    heads: of dim / heads channels, each with one filter value a frequency. seq_len: for which the filter is made; other lengths interpolate
    it. adaptive: whether the filter depends on x. activation: "modrelu" (the paper's), "gelu" (the released code's, with the bias added to
    the spectrum) or "none". `mix` is the part between norm and residual.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        seq_len: int,
        adaptive: bool = True,
        activation: str = "modrelu",
        dropout: float = 0.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.dim = dim
        if dim % heads or seq_len < 2:
            raise RegardError(f"dim={dim}, heads={heads}, seq_len={seq_len}: expected a multiple of heads, and at least 2 tokens")
        if activation not in ("modrelu", "gelu", "none"):
            raise RegardError(f"activation={activation!r}; expected modrelu, gelu or none")
        self.heads, self.bins, self.activation, self.eps = heads, seq_len // 2 + 1, activation, eps
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)
        self.base = nn.Parameter(torch.ones(heads, self.bins))
        self.bias = nn.Parameter(torch.full((heads, self.bins), -0.1))
        self.context = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 2 * heads * self.bins)) if adaptive else None

    def filters(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(W, b) (B, heads, bins of this length) of normed x."""
        scale, shift = self.base.expand(len(x), -1, -1), self.bias.expand(len(x), -1, -1)
        if self.context is not None:
            delta = self.context(x.mean(1)).unflatten(-1, (2, self.heads, self.bins))
            scale, shift = scale * (1 + delta[:, 0]), shift + delta[:, 1]
        bins = x.shape[1] // 2 + 1
        if bins != self.bins:
            scale, shift = (F.interpolate(y, size=bins, mode="linear", align_corners=True) for y in (scale, shift))
        return scale, shift

    def mix(self, x: Tensor) -> Tensor:
        n, given = x.shape[1], x.dtype
        wide = torch.promote_types(given, torch.float32)  # there are no half-precision transforms on a CPU
        scale, shift = (y[..., None].to(wide) for y in self.filters(x))
        spectrum = torch.fft.rfft(x.to(wide).unflatten(-1, (self.heads, -1)).transpose(1, 2), dim=-2, norm="ortho") * scale
        if self.activation == "modrelu":
            spectrum = modrelu(spectrum, shift, self.eps)
        elif self.activation == "gelu":
            spectrum = spectrum + shift
            size = spectrum.abs()
            spectrum = spectrum * (F.gelu(size) / size.clamp_min(self.eps))
        return torch.fft.irfft(spectrum, n=n, dim=-2, norm="ortho").transpose(1, 2).flatten(-2).to(given)

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.mix(self.norm(x)))  # type: ignore[no-any-return]


class FNetMixer(nn.Module):
    """The fixed transform to compare with: x + Re(FFT over tokens and channels of LN(x))."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.fft.fft2(self.norm(x)).real  # type: ignore[no-any-return]


class SpectralEncoder(nn.Module):
    """Tokens (B, N) (or features (B, N, inputs) with vocab=None) -> logits (B, classes): layers of mixer and MLP, the mean, a linear map."""

    def __init__(
        self, classes: int, dim: int, heads: int, layers: int, seq_len: int, vocab: int | None = None, inputs: int = 1, **options: object
    ):
        super().__init__()
        self.embed = nn.Linear(inputs, dim) if vocab is None else nn.Embedding(vocab, dim)
        self.mixers = nn.ModuleList([SpectralMixer(dim, heads, seq_len, **options) for _ in range(layers)])  # type: ignore[arg-type]
        self.mlps = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(layers)]
        )
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for mixer, mlp in zip(self.mixers, self.mlps, strict=True):
            x = mixer(x)
            x = x + mlp(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]
