"""Random-feature attention: frozen random query-key matrices, trained values alone (id 82; Fu et al., 2023).

f(x0, X) = sum_m (1/N) sum_i sigma(x0~^T W_m x_i~) <v_m, x_i~>,  x~ = [x; 1],  sigma = relu;  W_m ~ N(0, 1/4), or mu [I 0; 0 0] + N(0, 1/16) (biased)
Linear in v: ridge regression on phi(x0, X) in R^{M (d + 1)}. Its rival: sigma(<w_m, [x0; x_1; ..; x_N; 1]>) with as many parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.plots import Plot, figure
from regard.results import Result

Data = tuple[Tensor, Tensor, Tensor]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh, "gelu": F.gelu, "identity": lambda x: x}


def with_one(x: Tensor) -> Tensor:
    return torch.cat((x, torch.ones_like(x[..., :1])), -1)


class Ridge(nn.Module):
    """A linear readout of fixed features: `fit`, then forward(x0, X) -> (B,)."""

    readout: Tensor

    def features(self, x0: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return self.features(x0, x) @ self.readout

    @torch.no_grad()
    def fit(
        self, x0: Tensor, x: Tensor, y: Tensor, ridge: Sequence[float] = (1e-6, 1e-4, 1e-2, 1.0, 100.0), held_out: float = 0.2
    ) -> float:
        """Fit to y (n,) by ridge regression, its strength that of the least error on the last share `held_out`, then on all; the strength."""
        n = len(y)
        if n < 2 or not ridge or min(ridge) <= 0 or not 0 < held_out < 1:
            raise RegardError(
                f"y has {n} entries, ridge={list(ridge)}, held_out={held_out}; expected 2 or more, positive ones, and 0 < held_out < 1"
            )
        phi, cut = self.features(x0, x), max(1, min(n - 1, n - round(held_out * n)))

        def solved(rows: Tensor, target: Tensor, strength: float) -> Tensor:
            gram = rows @ rows.T + strength * torch.eye(len(rows), dtype=rows.dtype)
            return rows.T @ torch.linalg.solve(gram, target)

        errors = [float((phi[cut:] @ solved(phi[:cut], y[:cut], s) - y[cut:]).square().mean()) for s in ridge]
        best = ridge[errors.index(min(errors))]
        self.readout.copy_(solved(phi, y, best))
        return best


@register("random-feature-attention", kind="experiment")
class RandomFeatureAttention(Ridge):
    """x0 (B, d), X (B, N, d) -> (B,). heads: M; sigma: "relu", "tanh", "gelu" or "identity"; bias: mu, 0 for the unbiased one. std: of the
    entries of W (None: 1/2, or 1/4 with a bias). seed: of W, drawn once; or W itself, (M, d + 1, d + 1)."""

    matrices: Tensor

    def __init__(
        self,
        dim: int,
        heads: int = 1000,
        sigma: str = "relu",
        bias: float = 0.0,
        *,
        std: float | None = None,
        seed: int = 0,
        matrices: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if sigma not in ACTIVATIONS:
            raise RegardError(f"sigma={sigma!r}; expected one of {', '.join(ACTIVATIONS)}")
        spread = (0.25 if bias else 0.5) if std is None else std
        if matrices is None:
            matrices = spread * torch.randn(heads, dim + 1, dim + 1, generator=torch.Generator().manual_seed(seed), dtype=dtype)
            matrices[:, :dim, :dim] += bias * torch.eye(dim, dtype=dtype)
        if matrices.dim() != 3 or matrices.shape[1:] != (dim + 1, dim + 1):
            raise RegardError(f"matrices has shape {tuple(matrices.shape)}; expected (heads, {dim + 1}, {dim + 1})")
        self.sigma = ACTIVATIONS[sigma]
        self.register_buffer("matrices", matrices)
        self.readout = nn.Parameter(torch.zeros(len(matrices) * (dim + 1), dtype=matrices.dtype), requires_grad=False)

    def features(self, x0: Tensor, x: Tensor) -> Tensor:
        """phi (B, M (d + 1))."""
        matrices = self.matrices
        if x0.dim() != 2 or x.dim() != 3 or x0.shape[-1] + 1 != matrices.shape[-1] or x.shape[::2] != x0.shape:
            raise RegardError(f"x0 {tuple(x0.shape)}, X {tuple(x.shape)}: expected (B, d) and (B, N, d) with d = {matrices.shape[-1] - 1}")
        query, keys = with_one(x0), with_one(x)
        parts = []
        for some in matrices.split(128):
            act = self.sigma(torch.einsum("bd,mde,bne->bmn", query, some, keys))
            parts.append((act @ keys / x.shape[1]).flatten(1))
        return torch.cat(parts, 1)


class RandomFeatureMLP(Ridge):
    """x0 (B, d), X (B, N, d) -> (B,): relu of random combinations of all inputs side by side. width: None for as many as
    M (d + 1) of an attention with `heads` = M. Rows of W ~ N(0, 1 / (fan in))."""

    def __init__(
        self, dim: int, keys: int, heads: int = 1000, width: int | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        width, fan = width or heads * (dim + 1), dim * (keys + 1) + 1
        self.register_buffer("weight", torch.randn(width, fan, generator=torch.Generator().manual_seed(seed), dtype=dtype) / fan**0.5)
        self.readout = nn.Parameter(torch.zeros(width, dtype=dtype), requires_grad=False)

    def features(self, x0: Tensor, x: Tensor) -> Tensor:
        flat = with_one(torch.cat((x0, x.flatten(1)), 1))
        weight: Tensor = self.weight  # type: ignore[assignment]
        if flat.shape[1] != weight.shape[1]:
            raise RegardError(f"x0 and X hold {flat.shape[1] - 1} numbers a row; expected {weight.shape[1] - 1}")
        return torch.relu(flat @ weight.T)


def target(name: str, x0: Tensor, x: Tensor, direction: Tensor, power: int = 2) -> Tensor:
    """(B,): "f1" mean_i <b, x_i>^p, "f2" mean_i <x0, x_i>^p, "f3" mean_i <x0, x_i>^p <b, x_i>: none knows the order of the keys."""
    along, near = x @ direction, torch.einsum("bd,bnd->bn", x0, x)
    known = {"f1": along**power, "f2": near**power, "f3": near**power * along}
    if name not in known:
        raise RegardError(f"name={name!r}; expected f1, f2 or f3")
    return known[name].mean(-1)


def drawn(
    name: str, count: int, dim: int = 16, keys: int = 16, *, power: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Data:
    """(x0, X, y): points uniform on the sphere, and a target of fixed direction, centred and of variance one in its own draws' units."""
    generator = torch.Generator().manual_seed(seed)
    points = F.normalize(torch.randn(count, keys + 1, dim, generator=generator, dtype=dtype), dim=-1)
    direction = F.normalize(torch.randn(dim, generator=torch.Generator().manual_seed(17), dtype=dtype), dim=0)
    return points[:, 0], points[:, 1:], target(name, points[:, 0], points[:, 1:], direction, power)


@dataclass(frozen=True)
class Curve(Result):
    """errors: test error over the target's variance, by the number of training examples."""

    sizes: tuple[int, ...]
    errors: tuple[float, ...]

    def plot(self) -> Plot:
        """The curve."""
        points = list(zip(map(float, self.sizes), self.errors, strict=True))
        return figure("Sample complexity", "examples", "error / variance", {"test": points}, log_x=True, log_y=True)


def sample_complexity_curve(model: Ridge, train: Data, test: Data, sizes: Sequence[int]) -> Curve:
    """Fit to the first n examples for each n of `sizes`, and measure on `test`."""
    if max(sizes) > len(train[2]):
        raise RegardError(f"sizes={list(sizes)}; expected at most the {len(train[2])} examples of train")
    errors = []
    for n in sizes:
        model.fit(train[0][:n], train[1][:n], train[2][:n])
        errors.append(float((model(*test[:2]) - test[2]).square().mean() / test[2].var()))
    return Curve(tuple(sizes), tuple(errors))
