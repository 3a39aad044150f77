"""Kernels that a small net draws from coordinates (slow nets), the standardisations that go without running statistics, and recursive gates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import RegardError


def standardised(x: Tensor, batch: bool = False, eps: float = 1e-5) -> Tensor:
    """x (B, C, H, W) less its mean and over its deviation: of each channel of each map, or, batch, of each channel over all of the batch."""
    dims = (0, 2, 3) if batch else (2, 3)
    if x[:, 0].numel() // (1 if batch else max(len(x), 1)) < 2 and x.numel():
        raise RegardError(f"x is {tuple(x.shape)}: one value a channel to standardise; expected more pixels")
    gap = x - x.mean(dims, keepdim=True)
    return gap * (gap.square().mean(dims, keepdim=True) + eps).rsqrt()


class GroupedStandard(nn.Module):
    """G-IBS: channels in `groups` groups, the first, third, ... standardised over the batch, the others each map for itself."""

    def __init__(self, channels: int, groups: int = 12, eps: float = 1e-5):
        super().__init__()
        if channels % groups:
            raise RegardError(f"channels={channels}; expected a multiple of groups={groups}")
        self.channels, self.groups, self.eps = channels, groups, eps

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(self.groups, 1)
        return torch.cat([standardised(part, at % 2 == 0, self.eps) for at, part in enumerate(parts)], 1)


def grid_of(shape: Sequence[int], like: Tensor) -> Tensor:
    """Coordinates (D, *shape), each from -1 to 1."""
    axes = [torch.linspace(-1, 1, n, dtype=like.dtype, device=like.device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


class SlowNet(nn.Module):
    """Coordinates (dims, *shape) -> a kernel (out, *shape): h_0 = g_0, h_l = g_l (U_l h_(l-1) + a_l) + bias map, W = U h_L + a, g_l(c) = sin(V_l c + b).

    V_l starts as linear layers do, times 2 pi omega gamma, gamma ~ Gamma(alpha / (l + 1), beta); U times sqrt(1 / number of coordinates of `shape`).
    context: of channels of a map that the kernel depends on (0: none): after each layer h <- (s stop(h) + t h / |h|) * linear_l(gelu(fc(u))), u the mean over
    the batch of a 1 x 1 convolution of the map's means over cells of the kernel's shape, |h| over a channel, s from 1 and t from 0.1.
    place: whether there is a bias map, zero at first; at other shapes it is interpolated.
    """

    def __init__(
        self,
        out: int,
        shape: Sequence[int],
        hidden: int = 64,
        layers: int = 2,
        omega: float = 2000.0,
        alpha: float = 6.0,
        beta: float = 1.0,
        context: int = 0,
        place: bool = True,
    ):
        super().__init__()
        if layers < 1 or hidden < 1 or min(shape) < 1:
            raise RegardError(f"layers={layers}, hidden={hidden}, shape={tuple(shape)}; expected positive numbers")
        self.shape, self.context, dims = tuple(shape), context, len(shape)
        self.filters = nn.ModuleList(nn.Linear(dims, hidden) for _ in range(layers + 1))
        for at, layer in enumerate(self.filters):
            rates = (torch.tensor(x, device="cpu") for x in (alpha / (at + 1), beta))
            gamma = torch.distributions.Gamma(*rates).sample((hidden, dims))  # type: ignore[arg-type]
            layer.weight.data.mul_(2 * math.pi * omega * gamma.to(layer.weight))  # type: ignore[operator, union-attr, arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.linears = nn.ModuleList(full_linear(hidden) for _ in range(layers))
        self.last = nn.Linear(hidden, out)
        nn.init.kaiming_uniform_(self.last.weight, nonlinearity="linear")
        self.last.weight.data.mul_(math.prod(shape) ** -0.5)
        nn.init.zeros_(self.last.bias)
        self.place = nn.Parameter(torch.zeros(self.shape)) if place else None
        if context:
            self.reduce, self.fc = nn.Linear(context, hidden), nn.Linear(hidden, hidden)
            self.fast = nn.ModuleList(full_linear(hidden) for _ in range(layers))
            self.kept, self.unit = nn.Parameter(torch.ones(layers, hidden)), nn.Parameter(torch.full((layers, hidden), 0.1))

    def heard(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """gelu(fc(mean over the batch of conv(cells of x))): (*shape, hidden)."""
        cells = F.adaptive_avg_pool2d(x, tuple(shape)).movedim(1, -1)  # type: ignore[arg-type]
        return F.gelu(self.fc(self.reduce(cells).mean(0)))

    def wave(self, at: int, c: Tensor) -> Tensor:
        """sin(V_l c + b), whose phases may be many turns: in float32 at least."""
        layer: nn.Linear = self.filters[at]  # type: ignore[assignment]
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        with torch.autocast(c.device.type, enabled=False):
            return torch.sin(F.linear(c.to(wide), layer.weight.to(wide), layer.bias.to(wide))).to(layer.weight.dtype)

    def bias_at(self, shape: tuple[int, ...]) -> Tensor | float:
        if self.place is None or shape == self.shape:
            return 0.0 if self.place is None else self.place[..., None]
        mode = "linear" if len(shape) == 1 else "bilinear"
        return F.interpolate(self.place[None, None], shape, mode=mode, align_corners=True)[0, 0, ..., None]

    def forward(self, coordinates: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        if (x is None) != (self.context == 0):
            raise RegardError(
                f"x is {type(x).__name__}; expected a map (batch, {self.context}, height, width) if context, and none without"
            )
        c = (
            grid_of(self.shape, self.last.weight.to(torch.promote_types(self.last.weight.dtype, torch.float32)))
            if coordinates is None
            else coordinates
        )
        if c.shape[0] != len(self.shape) or c.dim() != len(self.shape) + 1:
            raise RegardError(f"coordinates {tuple(c.shape)}; expected ({len(self.shape)}, ...) with as many sizes behind")
        c, shape = c.movedim(0, -1), tuple(c.shape[1:])
        bias, told = self.bias_at(shape), None if x is None else self.heard(x, shape)
        h = self.wave(0, c)
        for at, linear in enumerate(self.linears):
            h = self.wave(at + 1, c) * linear(h) + bias
            if told is not None:
                size = h.flatten(0, -2).norm(dim=0).clamp_min(1e-12)
                h = (self.kept[at] * h.detach() + self.unit[at] * h / size) * self.fast[at](told)
        return self.last(h).movedim(-1, 0)  # type: ignore[no-any-return]


def full_linear(hidden: int) -> nn.Linear:
    """Weights uniform within sqrt(3 / hidden), biases 1."""
    layer = nn.Linear(hidden, hidden)
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
    nn.init.ones_(layer.bias)
    return layer


class RecursiveGate(nn.Module):
    """RGU on (B, C, side, side): W_y(gelu(IS((W_k x) (W_q W_v x))) + bias map), W 1 x 1 convolutions with biases, IS each map's own standardisation."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.k, self.v, self.q, self.y = (nn.Conv2d(channels, channels, 1) for _ in range(4))
        for layer in (self.k, self.v, self.q, self.y):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.place = nn.Parameter(torch.zeros(side, side))

    def forward(self, x: Tensor) -> Tensor:
        return self.y(F.gelu(standardised(self.k(x) * self.q(self.v(x)))) + self.place)  # type: ignore[no-any-return]
