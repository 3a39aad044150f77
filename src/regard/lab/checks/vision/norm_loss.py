"""Checks of norm-loss."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.nn import Attention
from regard.zoo.vision.norm_loss import decoupled_norm, norm_loss, row_spread


def layers() -> nn.ModuleList:
    """Rows of a transposed convolution are its outputs, dimension 1; each reads the inputs of its group."""
    made = [
        nn.Linear(20, 7),
        nn.Conv2d(3, 5, 3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose1d(6, 3, 2),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.MultiheadAttention(4, 2),
    ]
    return nn.ModuleList([*made, nn.LayerNorm(5), nn.Embedding(3, 4)]).to(F64)


def rows(weight: Tensor, kind: nn.Module) -> list[tuple[tuple[slice | int, ...], Tensor]]:
    """(where it stands, the row), one by one."""
    if isinstance(kind, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        width = weight.shape[0] // kind.groups
        places = itertools.product(range(kind.groups), range(weight.shape[1]))
        return [(at, weight[at]) for at in ((slice(g * width, (g + 1) * width), o) for g, o in places)]
    return [((o,), weight[o]) for o in range(len(weight))]


@check(
    "norm-loss",
    "value and gradient of linear, convolutional, transposed and attention weights (no biases, norms, embeddings) == 2 (|w| - 1) w / |w| by rows",
    below=1e-12,
    control="the squared norm of each weight",
)
def _() -> tuple[float, float]:
    model = layers()
    for weight in model.parameters():
        nn.init.normal_(weight)
    loss = norm_loss(model, 0.3)
    loss.backward()  # type: ignore[no-untyped-call]
    total, gaps, decay = 0.0, [], 0.0
    touched = {id(m.weight): m for m in list(model)[:5]} | {id(model[5].in_proj_weight): model[5], id(model[5].out_proj.weight): model[5]}  # type: ignore[union-attr]
    for p in model.parameters():
        if id(p) not in touched:
            gaps.append(0.0 if p.grad is None else 1.0)
            continue
        truth = torch.zeros_like(p)
        for at, row in rows(p.detach(), touched[id(p)]):
            size = row.square().sum().sqrt()
            total += 0.3 * float((1 - size) ** 2)
            truth[at] = 0.6 * (size - 1) * row / size
        assert p.grad is not None
        gaps.append(naive.gap(p.grad, truth))
        decay = max(decay, naive.gap(p.grad, 0.6 * p))
    return max(*gaps, abs(float(loss.detach()) - total)), decay


@check(
    "norm-loss",
    "50 steps of SGD (rate 0.1, lam 1), and decoupled: |w| - 1 = 0.8^50 (|w_0| - 1), directions kept",
    below=1e-10,
    control="weight decay",
)
def _() -> tuple[float, float]:
    def run(kind: str) -> float:
        layer = nn.Linear(20, 7).to(F64)
        start = layer.weight.detach().clone()
        optimizer = torch.optim.SGD(layer.parameters(), 0.1, weight_decay=2.0 if kind == "decay" else 0)
        if kind == "decoupled":
            decoupled_norm(optimizer, layer, 1.0)
        for _ in range(50):
            optimizer.zero_grad()
            (norm_loss(layer, 1.0) if kind == "loss" else 0 * layer.weight.sum()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        before, after = start.norm(dim=1, keepdim=True), layer.weight.detach().norm(dim=1, keepdim=True)
        return max(naive.gap(after - 1, 0.8**50 * (before - 1)), naive.gap(layer.weight / after, start / before))

    return max(run("loss"), run("decoupled")), run("decay")


class Classifier(nn.Module):
    """Two layers of attention over 8 tokens, then a linear layer of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([Attention(16, 2, causal=False) for _ in range(2)]), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


@check(
    "norm-loss",
    "largest distance of a row's norm from one, all weights of a two-layer attention classifier trained 200 steps (accuracy below 0.9 counts as infinite)",
    below=0.1,
    control="weight decay of the same strength",
)
def _() -> tuple[float, float]:
    def run(own: bool) -> float:
        torch.manual_seed(0)
        model, generator = Classifier(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0 if own else 0.3)
        right = 0.0
        for step in range(200):
            x = torch.randn(64, 8, 16, generator=generator)
            label = (x[:, :, 0].mean(1) > 0).long()
            optimizer.zero_grad()
            out = model(x)
            (F.cross_entropy(out, label) + (norm_loss(model, 0.3) if own else 0.0)).backward()
            optimizer.step()
            right += float((out.argmax(1) == label).double().mean()) / 50 if step >= 150 else 0.0
        spread = row_spread(model)
        off = max(max(abs(row["min"] - 1), abs(row["max"] - 1)) for row in spread.values())
        return off if right >= 0.9 or not own else float("inf")

    return run(True), run(False)
