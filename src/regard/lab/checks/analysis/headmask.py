"""Checks of headmask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regard.interpret.tables import HeadTable
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.heads import mixers, reversal, reversal_accuracy, reversal_loss, reverser
from regard.lab.verification import check
from regard.nn.decoder import Decoder
from regard.taps import read
from regard.zoo.analysis.head_pruning import ablation_table
from regard.zoo.analysis.headmask import HeadMask, inequality


def silent(model: Decoder, ids: Tensor) -> Tensor:
    """(layers, heads): heads whose outputs are all zero in a pass."""
    with torch.no_grad(), read(model, "heads") as seen:
        model(ids)
    return (seen.stack("heads") == 0).all(-1).all(-1).all(1)


@check(
    "headmask",
    "40 training batches: blocks without exactly 3 silent heads (0 in evaluation), or drawn otherwise than evenly (chi-squared over 30)",
    below=0,
    control="dropout of weights at the same rate: blocks without 3 silent heads",
)
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    model, ids = Decoder(vocab=10, dim=64, layers=2, heads=8), reversal(2, torch.Generator().manual_seed(0))
    wrong, counts = 0, torch.zeros(2, 8)
    with HeadMask(model, 3) as mask:
        for _ in range(40):
            mask.draw()
            now = silent(model.train(), ids)
            wrong += int((now.sum(-1) != 3).sum()) + int((now != torch.stack(list(mask.masks.values()))).sum())
            counts += now
        wrong += int(silent(model.eval(), ids).sum())
    wrong += int(silent(model.train(), ids).sum())
    wrong += int(float(((counts - 15) ** 2 / 15).sum()) > 30)
    for mixer in mixers(model):
        mixer.dropout = 3 / 8
    return wrong, int((silent(model, ids).sum(-1) != 3).sum())


@check(
    "headmask",
    "Mask-Impt silences the 3 heads of the greatest |dL/dxi| by central differences; rescaling multiplies the others by 8/5",
    below=1e-12,
    control="the heads of the least",
)
def _() -> tuple[float, float]:
    torch.manual_seed(1)
    model, ids = Decoder(vocab=10, dim=64, layers=2, heads=8).to(F64).train(), reversal(4, torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        return reversal_loss(model, ids)

    slopes = torch.zeros(2, 8, dtype=F64)
    with torch.no_grad():
        for layer, mixer in enumerate(mixers(model)):
            weight = mixer.out.weight
            for head in range(8):
                at, own = slice(8 * head, 8 * head + 8), weight.clone()
                values = []
                for step in (1e-4, -1e-4):
                    weight[:, at] = own[:, at] * (1 + step)
                    values.append(float(loss()))
                weight.copy_(own)
                slopes[layer, head] = abs(values[0] - values[1]) / 2e-4
    with HeadMask(model, 3, "impt", rescale=True) as mask:
        mask.rank(loss)
        found, chosen = silent(model, ids), torch.stack(list(mask.masks.values()))
        with torch.no_grad(), read(model, "heads", layers=[0]) as after:
            model(ids)
    with torch.no_grad(), read(model, "heads", layers=[0]) as plain:
        model(ids)
    truth = torch.zeros(2, 8, dtype=torch.bool).scatter(1, slopes.topk(3).indices, True)
    factor = naive.gap(after["heads", 0][:, ~truth[0]], plain["heads", 0][:, ~truth[0]] * 8 / 5)
    no_slopes = all(p.grad is None for p in model.parameters())
    wrong = int((found != truth).sum()) + int((chosen != truth).sum()) + int(not no_slopes)
    return wrong + factor, int((found != torch.zeros(2, 8, dtype=torch.bool).scatter(1, slopes.topk(3, largest=False).indices, True)).sum())


@check(
    "headmask",
    "reversal learned under Mask-Rand(3): worst accuracy lost by removing one head (failing where the task is not learned)",
    below=0.07,
    control="plain training",
)
def _() -> tuple[float, float]:
    ids = reversal(256, torch.Generator().manual_seed(99))

    def masked(model: Decoder) -> Callable[[int], None]:
        mask = HeadMask(model, 3)
        mask.__enter__()

        def before(step: int) -> None:
            mask.draw() if step < STEPS else mask.__exit__(None, None, None)

        return before

    def worst(model: Decoder) -> float:
        whole = reversal_accuracy(model, ids)
        found = inequality(HeadTable(torch.ones(2, 8)), ablation_table(model, lambda: reversal_accuracy(model, ids)), whole)
        assert found.worst is not None
        return found.worst if whole >= 0.95 else 1.0

    return worst(reverser(STEPS, before=masked)), worst(reverser(STEPS))


STEPS = 400


@check("headmask", "inequality of (1, 2, 5): deviation over mean and Gini coefficient by loops", below=1e-12, control="of equal heads")
def _() -> tuple[float, float]:
    x = [1.0, 2.0, 5.0]
    mean = sum(x) / 3
    spread = (sum((a - mean) ** 2 for a in x) / 3) ** 0.5 / mean
    gini = sum(abs(a - b) for a in x for b in x) / (2 * 9 * mean)

    def gap(scores: list[float]) -> float:
        found = inequality(HeadTable(torch.tensor([scores, [float("nan")] * 3], dtype=F64)))
        return max(abs(found.spread - spread), abs(found.gini - gini))

    return gap(x), gap([2.0, 2.0, 2.0])
