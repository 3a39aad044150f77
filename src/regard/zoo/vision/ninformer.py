"""NiNformer: a gate made by mixing tokens, in place of attention (id 140; Abdullah and Jeon, 2024).

mixer(v): v1 = v + T(LN(v)^T)^T, v2 = v1 + M(LN(v1)), T and M MLPs over tokens and channels;   MGU(x) = (W x + b) mixer(x)
block: x <- x + MGU(LN x), x <- x + MLP(LN x), with one LayerNorm for both places, as released
Not reproduced: less computation than attention. Of CIFAR-10's 64 tokens of 256 a unit takes 37.7 million products, attention 18.9.
"""

from __future__ import annotations

from torch import Tensor, nn

from regard.catalog.registry import register
from regard.nn.images.patch_net import FeedForward, PatchNet
from regard.nn.parts import takes


class MLPMixer(nn.Module):
    """An MLP-Mixer layer on (B, N, dim), N fixed."""

    def __init__(self, dim: int, tokens: int, token_hidden: int, channel_hidden: int, dropout: float = 0.0, eps: float = 1e-5):
        super().__init__()
        self.token_norm, self.token_mlp = nn.LayerNorm(dim, eps), FeedForward(tokens, token_hidden, dropout)
        self.channel_norm, self.channel_mlp = nn.LayerNorm(dim, eps), FeedForward(dim, channel_hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mlp(self.token_norm(x).mT).mT
        return x + self.channel_mlp(self.channel_norm(x))  # type: ignore[no-any-return]


@register("ninformer", kind="module")
class MixerGatingUnit(nn.Module):
    """x (B, N, dim) -> the same shape, N = tokens; quadratic in N through weights alone. Hidden widths default to 2 dim."""

    def __init__(
        self,
        dim: int,
        tokens: int,
        token_hidden: int | None = None,
        channel_hidden: int | None = None,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.dim, self.tokens = dim, tokens
        self.mixer = MLPMixer(dim, tokens, token_hidden or 2 * dim, channel_hidden or 2 * dim, dropout, eps)
        self.proj = nn.Linear(dim, dim)

    @takes(x="batch tokens dim")
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) * self.mixer(x)  # type: ignore[no-any-return]


class NiNBlock(nn.Module):
    """x + MGU(norm x), then x + MLP(norm x). shared_norm: one LayerNorm for both, as released."""

    def __init__(self, dim: int, tokens: int, hidden: int, dropout: float = 0.0, shared_norm: bool = True, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps)
        self.unit = MixerGatingUnit(dim, tokens, hidden, hidden, dropout, eps)
        self.mlp = FeedForward(dim, hidden, dropout)
        self.second = None if shared_norm else nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.unit(self.norm(x))
        return x + self.mlp((self.second or self.norm)(x))  # type: ignore[no-any-return]


class NiNformer(PatchNet):
    """Images of one size to logits; defaults of CIFAR-10: 64 patches of 4 x 4, dim 256, hidden 512, 4 blocks, dropout 0.5."""

    def __init__(
        self,
        dim: int = 256,
        hidden: int = 512,
        layers: int = 4,
        dropout: float = 0.5,
        *,
        side: int = 32,
        channels: int = 3,
        patch: int = 4,
        classes: int = 10,
    ):
        super().__init__(lambda: NiNBlock(dim, (side // patch) ** 2, hidden, dropout), dim, layers, channels, patch, classes)
