"""Small classifiers of tokens of patches, and MLPs written out."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from regard.lab.checks.shared.planes import gelu
from regard.lab.checks.shared.training import Draw, accuracy, middle, trained
from regard.tasks.patches import exclusive_or


class MeanOfTokens(nn.Module):
    """Linear, a block, the mean over tokens, linear."""

    def __init__(self, inner: int, block: nn.Module, dim: int, classes: int = 2):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(inner, dim), block, nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)).mean(1))  # type: ignore[no-any-return]


def patch_accuracy(block: Callable[[], nn.Module], draw: Draw = exclusive_or, steps: int = 150, dim: int = 16, lr: float = 1e-2) -> float:
    """Median over three seeds of the accuracy with one block."""
    return middle(lambda seed: accuracy(trained(lambda: MeanOfTokens(9, block(), dim), draw, steps, seed=seed, lr=lr), draw))


def mlp(x: Tensor, layers: nn.Module) -> Tensor:
    """W_2 gelu(W_1 x + b_1) + b_2 of a FeedForward's own parameters."""
    first, second = layers[0], layers[3]  # type: ignore[index]
    return gelu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias  # type: ignore[no-any-return]
