"""Linear attention on images: what each paper's layer puts around its mechanism, the block, and a small pyramid of such blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...algebra import Sizes
from ...catalog import get
from ...catalog.registry import entry
from ...engine.door import attend
from ...errors import RegardError
from ..attention import Attention
from ..inputs import Inputs
from .planes import BatchNorm, StridedTokens, query_and_rest


@dataclass(frozen=True)
class Dress:
    """What a layer adds to its mechanism. local: width of a depthwise convolution of v, added to the output (0: none); shared: its weights
    are the same for all heads; dynamic: 3 x 3 kernels a sample and channel, made from the mean token, in its place. norm: LayerNorm
    before the gate. gate: "" or what the output is multiplied by, "linear" (x W) or "silu" (silu(x W)). key_position: a learned table
    added to k."""

    local: int = 0
    shared: bool = False
    dynamic: bool = False
    norm: bool = False
    gate: str = ""
    key_position: bool = False


DRESSES = {
    "mala": Dress(local=5, gate="linear"),
    "nalaformer": Dress(local=5, norm=True, gate="silu"),
    "rala": Dress(local=5, gate="linear"),
    "flatten": Dress(local=5, shared=True, key_position=True),
    "slab": Dress(local=5, shared=True, key_position=True),
    "inline-attention": Dress(dynamic=True),
    "l2vit": Dress(),
}


class DynamicConv(nn.Module):
    """A 3 x 3 depthwise convolution whose kernels are made from the mean token: x (B, N, C), plane (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.first, self.last = nn.Conv1d(dim, dim, 1, groups=heads), nn.Conv1d(dim, 9 * dim, 1, groups=heads)

    def kernels(self, x: Tensor) -> Tensor:
        """(B, C, 3, 3)."""
        made = self.last(F.gelu(self.first(x.mean(1)[..., None])))
        return made.unflatten(1, (-1, 9)).unflatten(-2, (3, 3))[..., 0]  # type: ignore[no-any-return]

    def forward(self, x: Tensor, plane: Tensor) -> Tensor:
        b, c = plane.shape[:2]
        kernels = self.kernels(x).reshape(b * c, 1, 3, 3)
        return F.conv2d(plane.reshape(1, b * c, *plane.shape[2:]), kernels, padding=1, groups=b * c).view_as(plane)


class GridAttention(nn.Module):
    """A linear mechanism as its paper's vision layer: x (B, H*W (+ cls), dim) or (B, dim, H, W) -> the same shape, both directions.

    mechanism: "mala", "nalaformer", "rala", "flatten", "slab", "inline-attention" or "l2vit" with its paper's `Dress`, or any name with a
    `dress` of yours. shape: the grid (H, W). cls: a class token stands first, which local convolutions leave out. rotary: whether
    mechanisms that can turn their features do. sr_ratio: above 1, keys and values are read off the grid through a convolution of that stride
    and a LayerNorm; before its own convolution v is stretched back linearly along the tokens. options: hyperparameters of the mechanism.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        shape: tuple[int, int],
        mechanism: str = "mala",
        *,
        dress: Dress | None = None,
        cls: bool = False,
        rotary: bool = True,
        qkv_bias: bool = True,
        sr_ratio: int = 1,
        **options: object,
    ):
        super().__init__()
        if dim % heads:
            raise RegardError(f"dim={dim} is not a multiple of heads={heads}")
        turning = rotary and "grid_width" in entry(mechanism).hyperparameters.parameters and "grid_width" not in options
        if turning and cls:
            raise RegardError(f"cls=True: {mechanism!r} turns features by their place on the grid; pass rotary=False with a class token")
        if sr_ratio > 1 and (cls or turning):
            raise RegardError(f"sr_ratio={sr_ratio}: keys are read off a smaller grid; expected cls=False and rotary=False")
        self.mechanism = get(mechanism, **({"grid_width": shape[1]} if turning else {}), **options)
        self.dim, self.heads, self.shape, self.cls = dim, heads, shape, int(cls)
        self.dress = dress = DRESSES.get(mechanism, Dress()) if dress is None else dress
        self.qkv, self.out = nn.Linear(dim, 3 * dim, qkv_bias), nn.Linear(dim, dim)
        self.reduce = StridedTokens(dim, shape, sr_ratio) if sr_ratio > 1 else None
        self.gate = nn.Linear(dim, dim) if dress.gate else None
        self.norm = nn.LayerNorm(dim) if dress.norm else None
        width = dim // heads if dress.shared else dim
        self.local = nn.Conv2d(width, width, dress.local, padding=dress.local // 2, groups=width) if dress.local else None
        self.dynamic = DynamicConv(dim, heads) if dress.dynamic else None
        tokens = shape[0] * shape[1] // sr_ratio**2 + self.cls
        self.key_position = nn.Parameter(torch.zeros(1, tokens, dim)) if dress.key_position else None
        self.inputs = Inputs(self.mechanism, Sizes(1, heads, heads, tokens, tokens, dim // heads, dim // heads), dim)

    def neighbours(self, x: Tensor, v: Tensor) -> Tensor | float:
        """What the convolution makes of v (B, H, N, D): (B, N, dim), zero for the class token."""
        if self.local is None and self.dynamic is None:
            return 0.0
        flat = v[:, :, self.cls :].transpose(-1, -2)
        if self.reduce is not None:
            flat = F.interpolate(flat.flatten(1, 2), size=x.shape[1], mode="linear").unflatten(1, flat.shape[1:3])
        plane = flat.unflatten(-1, self.shape)  # (B, heads, D, H, W)
        if self.dynamic is not None:
            found = self.dynamic(x, plane.flatten(1, 2))
        elif self.dress.shared:
            found = self.local(plane.flatten(0, 1)).unflatten(0, plane.shape[:2]).flatten(1, 2)  # type: ignore[misc]
        else:
            found = self.local(plane.flatten(1, 2))  # type: ignore[misc]
        return F.pad(found.flatten(2).transpose(1, 2), (0, 0, self.cls, 0))

    def forward(self, x: Tensor) -> Tensor:
        plane = x.dim() == 4
        tokens = x.flatten(2).transpose(1, 2) if plane else x
        if tokens.shape[1:] != (self.shape[0] * self.shape[1] + self.cls, self.dim) or (plane and x.shape[2:] != self.shape):
            raise RegardError(
                f"x has shape {tuple(x.shape)}; expected tokens of a {self.shape} grid{' + 1' * self.cls}, {self.dim} channels"
            )
        q, k, v = self.qkv(tokens).chunk(3, -1) if self.reduce is None else query_and_rest(self.qkv, tokens, self.reduce(tokens))
        k = k if self.key_position is None else k + self.key_position
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        out = attend(q, k, v, self.mechanism, **self.inputs(tokens)).transpose(1, 2).flatten(-2) + self.neighbours(tokens, v)
        out = out if self.norm is None else self.norm(out)
        if self.gate is not None:
            out = out * (F.silu(self.gate(tokens)) if self.dress.gate == "silu" else self.gate(tokens))
        out = self.out(out)
        return out.transpose(1, 2).unflatten(-1, self.shape) if plane else out


class GridMLP(nn.Module):
    """Linear, GELU, a residual 3 x 3 depthwise convolution, Linear; as 1 x 1 convolutions of (B, C, H, W)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)
        self.local = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.up(x))
        return self.down(x + self.local(x))  # type: ignore[no-any-return]


class Over(nn.Module):
    """LayerNorm over the channels of (B, C, H, W), then `inner` on tokens (B, H*W, C)."""

    def __init__(self, dim: int, inner: nn.Module):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(dim), inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(self.norm(x.flatten(2).transpose(1, 2)))
        return out.transpose(1, 2).unflatten(-1, x.shape[2:])  # type: ignore[no-any-return]


class LocalConcentration(nn.Module):
    """L2ViT's module: depthwise 7 x 7, GELU, BatchNorm, depthwise 7 x 7, on (B, C, H, W)."""

    def __init__(self, dim: int, width: int = 7):
        super().__init__()
        convs = [nn.Conv2d(dim, dim, width, padding=width // 2, groups=dim) for _ in range(2)]
        self.layers = nn.Sequential(convs[0], nn.GELU(), BatchNorm(dim), convs[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class WindowAttention(nn.Module):
    """Softmax attention inside windows of size x size, without shift or bias, on (B, C, H, W); the last are filled up with zeros."""

    def __init__(self, dim: int, heads: int, size: int = 7):
        super().__init__()
        self.size, self.inner = size, Attention(dim, heads, causal=False, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        s = self.size
        x = F.pad(x, (0, -w % s, 0, -h % s))
        rows, columns = x.shape[2] // s, x.shape[3] // s
        parts = x.unflatten(2, (rows, s)).unflatten(4, (columns, s)).permute(0, 2, 4, 3, 5, 1)
        out = self.inner(parts.flatten(0, 2).flatten(1, 2)).unflatten(0, (-1, rows, columns)).unflatten(3, (s, s))
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)[:, :, :h, :w]


class GridBlock(nn.Module):
    """x += DWConv(x); x += attention(norm x); with `concentration` x += LCM(norm x); x += mlp(norm x), on (B, C, H, W).

    mechanism: a name of `GridAttention`, "softmax" (all tokens), or "window": 7 x 7 windows, a second convolution before the mlp.
    """

    def __init__(
        self, dim: int, heads: int, shape: tuple[int, int], mechanism: str = "mala", ratio: float = 4.0, concentration: bool = False
    ):
        super().__init__()
        self.place = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.again = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if mechanism == "window" else None
        if mechanism == "window":
            self.mixer: nn.Module = nn.Sequential(ChannelNorm(dim), WindowAttention(dim, heads))
        elif mechanism == "softmax":
            self.mixer = Over(dim, Attention(dim, heads, causal=False))
        else:
            self.mixer = Over(dim, GridAttention(dim, heads, shape, mechanism))
        self.concentration = nn.Sequential(ChannelNorm(dim), LocalConcentration(dim)) if concentration else None
        self.mlp = nn.Sequential(ChannelNorm(dim), GridMLP(dim, int(dim * ratio)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.place(x)
        x = x + self.mixer(x)
        if self.concentration is not None:
            x = x + self.concentration(x)
        x = x if self.again is None else x + self.again(x)
        return x + self.mlp(x)  # type: ignore[no-any-return]


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]


class GridNet(nn.Module):
    """Images (B, channels, side, side) -> logits (B, classes): a strided stem, stages of blocks halving the grid between them, mean, linear.

    stages: for each stage its blocks by name, such as (("mala",), ("mala", "softmax")). L2ViT: ("window", "l2vit") in each stage with
    concentration=True. dims, heads: a number a stage.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        classes: int,
        stages: Sequence[Sequence[str]] = (("mala",), ("mala",)),
        dims: Sequence[int] = (32, 64),
        heads: Sequence[int] = (2, 4),
        patch: int = 1,
        ratio: float = 2.0,
        concentration: bool = False,
    ):
        super().__init__()
        if not len(stages) == len(dims) == len(heads):
            raise RegardError(f"stages, dims and heads name {len(stages)}, {len(dims)} and {len(heads)} stages; expected as many of each")
        if side % (patch * 2 ** (len(stages) - 1)):
            raise RegardError(f"side={side}: expected a multiple of patch x 2^(stages - 1) = {patch * 2 ** (len(stages) - 1)}")
        layers: list[nn.Module] = [nn.Conv2d(channels, dims[0], patch, patch) if patch > 1 else nn.Conv2d(channels, dims[0], 3, padding=1)]
        for at, names in enumerate(stages):
            if at:
                layers.append(nn.Conv2d(dims[at - 1], dims[at], 2, 2))
            size = side // patch // 2**at
            layers += [
                GridBlock(dims[at], heads[at], (size, size), name, ratio, concentration and name not in ("window", "softmax"))
                for name in names
            ]
        self.layers = nn.Sequential(*layers)
        self.norm, self.head = ChannelNorm(dims[-1]), nn.Linear(dims[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(x)).mean((2, 3)))  # type: ignore[no-any-return]
