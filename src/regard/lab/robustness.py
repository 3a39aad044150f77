"""How well a mechanism that learned clean sequences of pixels reads them under noise, brighter, and with pixels gone (EFLA's question)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra import Mechanism
from ..nn.classifier import SequenceClassifier
from ..results import Column, Result
from ..tasks.pixels import pixel_sequences
from ..tasks.training import fit

CORRUPTIONS: dict[str, dict[str, Any]] = {
    "clean": {},
    "noise 0.3": {"noise": 0.3},
    "noise 0.6": {"noise": 0.6},
    "scale 4": {"scale": 4.0},
    "scale 16": {"scale": 16.0},
    "drop 0.3": {"drop": 0.3},
}


@dataclass(frozen=True)
class Robustness(Result):
    """accuracy: by mechanism and corruption, on held-out digits."""

    accuracy: dict[str, dict[str, float]]

    def columns(self) -> dict[str, Column]:
        """A row a mechanism."""
        kinds = next(iter(self.accuracy.values()), {})
        return {"mechanism": list(self.accuracy), **{kind: [own[kind] for own in self.accuracy.values()] for kind in kinds}}


def robustness(
    mechanisms: Mapping[str, str | Mechanism],
    *,
    steps: int = 400,
    batch: int = 64,
    dim: int = 32,
    layers: int = 2,
    lr: float = 3e-3,
    seed: int = 0,
    corruptions: Mapping[str, Mapping[str, Any]] = CORRUPTIONS,
) -> Robustness:
    """Train a `SequenceClassifier` a mechanism on clean digits, 64 pixels each, with the same draws, and measure it on the corrupted ones."""
    x, labels = pixel_sequences()
    found: dict[str, dict[str, float]] = {}
    for name, mechanism in mechanisms.items():
        torch.manual_seed(seed)
        model = SequenceClassifier(mechanism, classes=10, length=x.shape[1], features=1, dim=dim, layers=layers)

        def draw(generator: torch.Generator) -> Tensor:
            return torch.randint(len(x), (batch,), generator=generator)

        def loss(at: Tensor, model: SequenceClassifier = model) -> Tensor:
            return F.cross_entropy(model(x[at]), labels[at])

        fit(model, draw, loss, steps, lr=lr, seed=seed, optimizer="adamw")
        with torch.no_grad():
            tested = {kind: pixel_sequences(True, **how) for kind, how in corruptions.items()}
            found[name] = {kind: float((model(y).argmax(-1) == told).double().mean()) for kind, (y, told) in tested.items()}
    return Robustness(found)
