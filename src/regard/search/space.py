"""What can be searched: for each layer the attention, heads and width of the MLP; for the whole depth and width."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import RegardError


@dataclass(frozen=True)
class LayerArch:
    """attention: a name of the registry. hidden: width of the MLP."""

    attention: str
    heads: int
    hidden: int


@dataclass(frozen=True)
class Arch:
    """dim: channels of the residual stream."""

    dim: int
    layers: tuple[LayerArch, ...]


@dataclass(frozen=True)
class Space:
    """Choices of every part. LINEAR mechanisms cost O(L d d_head), all others O(L^2 d)."""

    attentions: tuple[str, ...] = ("softmax", "cosformer")
    depths: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    dims: tuple[int, ...] = (32, 64)
    heads: tuple[int, ...] = (2, 4)
    hiddens: tuple[int, ...] = (64, 128)

    def __post_init__(self) -> None:
        if not all((self.attentions, self.depths, self.dims, self.heads, self.hiddens)) or any(
            d % h for d in self.dims for h in self.heads
        ):
            raise RegardError(f"{self}: expected at least one choice of everything, and widths that are multiples of the heads")

    def layer(self, draw: random.Random) -> LayerArch:
        return LayerArch(draw.choice(self.attentions), draw.choice(self.heads), draw.choice(self.hiddens))

    def sample(self, draw: random.Random) -> Arch:
        return Arch(draw.choice(self.dims), tuple(self.layer(draw) for _ in range(draw.choice(self.depths))))

    def mutate(self, arch: Arch, draw: random.Random, p: float = 0.15) -> Arch:
        """Each part redrawn with probability p."""
        depth = draw.choice(self.depths) if draw.random() < p else len(arch.layers)
        layers = [arch.layers[n] if n < len(arch.layers) else self.layer(draw) for n in range(depth)]
        for n, one in enumerate(layers):
            fresh = self.layer(draw)
            changes = {name: getattr(fresh, name) for name in ("attention", "heads", "hidden") if draw.random() < p}
            layers[n] = replace(one, **changes)
        return Arch(draw.choice(self.dims) if draw.random() < p else arch.dim, tuple(layers))

    def cross(self, a: Arch, b: Arch, draw: random.Random) -> Arch:
        """Layer by layer and in width, one of either."""
        depth = len(draw.choice((a, b)).layers)
        layers = tuple(draw.choice([x.layers[n] for x in (a, b) if n < len(x.layers)]) for n in range(depth))
        return Arch(draw.choice((a.dim, b.dim)), layers)

    def every(self) -> Iterator[Arch]:
        """All of a small space."""
        for dim, depth in itertools.product(self.dims, self.depths):
            one = [LayerArch(*x) for x in itertools.product(self.attentions, self.heads, self.hiddens)]
            for layers in itertools.product(one, repeat=depth):
                yield Arch(dim, layers)

    def features(self, arch: Arch) -> list[float]:
        """One-hot kinds of attention, ordinal sizes, zeros for layers that are not there."""
        top = max(self.depths)
        found = [arch.dim / max(self.dims), len(arch.layers) / top]
        for n in range(top):
            one = arch.layers[n] if n < len(arch.layers) else None
            found += [float(one is not None and one.attention == name) for name in self.attentions]
            found += [one.heads / max(self.heads), one.hidden / max(self.hiddens)] if one else [0.0, 0.0]
        return found


def flops(arch: Arch, length: int) -> float:
    """Multiply-adds of a sequence: projections 4 L d^2, mixing 2 L^2 d or, where a state carries it, 4 L d d_head, MLP 3 L d hidden."""
    from ..algebra import Recurrent
    from ..catalog import get

    total, d = 0.0, arch.dim
    for one in arch.layers:
        mixing = 4 * length * d * (d // one.heads) if isinstance(get(one.attention), Recurrent) else 2 * length * length * d
        total += 4 * length * d * d + mixing + 3 * length * d * one.hidden
    return total
