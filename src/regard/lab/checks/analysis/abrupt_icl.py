"""Checks of abrupt-icl."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.verification import check
from regard.tasks.item_labels import Asked, ItemLabels, item_labels
from regard.zoo.analysis.abrupt_icl import Emergence, InductionNet, abruptness, accuracy, emergence, nested_logits, progress


def linears(layers: nn.Module) -> list[nn.Linear]:
    return [layer for layer in layers.children() if isinstance(layer, nn.Linear)]


@functools.cache
def run(layers: int = 2, classes: int = 512, bursty: float = 1.0, steps: int = 1000) -> Emergence:
    data = item_labels(classes, 8, 24, torch.Generator().manual_seed(0), slots=4)
    options = {"pairs": 4, "batch": 64, "optimizer": "adam", "lr": 3e-3, "weight_decay": 0.0, "every": 100}
    return emergence(data, bursty=bursty, steps=steps, layers=layers, **options)


@check(
    "abrupt-icl",
    "512 classes in bursts, 1000 steps: least accuracy on classes never seen and on labels turned (in weights at most 0.3; a plateau at one of two labels)",
    above=0.9,
    control="one layer",
)
def _() -> tuple[float, float]:
    found, alone = run(), run(layers=1)
    rise = [x for s, x in zip(found.steps, found["novel"], strict=True) if 100 <= s <= 300]
    flat = found.plateau() >= 200 and all(0.3 < x < 0.7 for x in rise) and max(found["in_context"][2:4]) > 0.85
    own = min(found["novel"][-1], found["flip"][-1])
    return own if flat and found["weights"][-1] <= 0.3 else 0.0, max(alone["novel"][-1], alone["flip"][-1])


@check(
    "abrupt-icl",
    "16 classes without bursts, 400 steps: accuracy where the context says nothing (on new classes at most 0.25, on turned labels 0.1)",
    above=0.95,
    control="512 classes in bursts",
)
def _() -> tuple[float, float]:
    found = run(classes=16, bursty=0.0, steps=400)
    good = found["novel"][-1] <= 0.25 and found["flip"][-1] <= 0.1
    return found["weights"][-1] if good else 0.0, run()["weights"][-1]


@check(
    "abrupt-icl",
    "as copying comes, layer 1 looks from labels to their items and layer 2 from the query to its label: least of both weights at the end",
    above=0.6,
    control="on the plateau, the weight on items",
)
def _() -> tuple[float, float]:
    found = run()
    return min(found["previous"][-1], found["target"][-1]), found["previous"][2]


@check(
    "abrupt-icl",
    "nested logits, N = 8, L = 32: steps from 90% to 10% of the loss over the plateau; losses equal autograd's descent",
    below=0.35,
    control="the last logit alone",
)
def _() -> tuple[float, float]:
    gap = 0.0
    for depth in (3, 1):
        b1, b2, xi = (torch.tensor(0.7, dtype=F64, requires_grad=True) for _ in range(3))
        found = nested_logits(3, 5, lr=0.4, start=0.7, steps=40, depth=depth)
        for loss in found:
            p1 = b1.exp() / (b1.exp() + 5)
            p2 = (b2 * p1).exp() / ((b2 * p1).exp() + 5) if depth == 3 else torch.ones((), dtype=F64)
            truth = (1 + 4 * torch.exp(-xi * p2)).log()
            gap = max(gap, abs(float(truth.detach()) - loss))
            slopes = torch.autograd.grad(truth, (b1, b2, xi), allow_unused=True, materialize_grads=True)
            b1, b2, xi = ((x - 0.4 * s).detach().requires_grad_() for x, s in zip((b1, b2, xi), slopes, strict=True))
    return abruptness(nested_logits()) if gap < 1e-12 else 1.0, abruptness(nested_logits(depth=1))


@check(
    "abrupt-icl",
    "net == by hand with gradients, 3 layers of narrow keys, an MLP of two widths; first values",
    below=1e-10,
    control="scaled scores",
)
def _() -> tuple[float, float]:
    net, x = drawn(InductionNet(9, 5, layers=3, key_dim=4, hidden=(7, 6))), torch.randn(2, 7, 9, dtype=F64, requires_grad=True)

    def hand(scale: float) -> Tensor:
        h = x
        for q, k, v in zip(linears(net.q), linears(net.k), linears(net.v), strict=True):
            rows = []
            for t in range(7):
                s = scale * torch.einsum("bd,bsd->bs", h[:, t] @ q.weight.T, h[:, : t + 1] @ k.weight.T)
                rows.append(torch.einsum("bs,bsd->bd", s.exp() / s.exp().sum(1, keepdim=True), h[:, : t + 1] @ v.weight.T))
            h = h + torch.stack(rows, 1)
        h = h[:, -1]
        for layer in linears(net.mlp):
            h = (h @ layer.weight.T + layer.bias).clamp_min(0)
        return h @ net.readout.weight.T + net.readout.bias

    leaves = (x, *net.parameters())
    fresh = InductionNet(64, 8)
    std = max(abs(float(p.detach().std()) * 8 - 1) for name, p in fresh.named_parameters() if "weight" in name)
    shape = (
        len(fresh.mlp) == 3
        and linears(fresh.q)[0].weight.shape == (64, 64)
        and not any(float(layer.bias.abs().sum()) for layer in linears(fresh.mlp))
    )
    own = gap_with_gradients(net(x), hand(1.0), leaves)
    return own if std < 0.1 and shape else 1.0, naive.gap(net(x), hand(0.5))


def by_label(asked: Asked, data: ItemLabels) -> float:
    """How many numbers of the sequences are not as they should be, by loops: places, labels, embeddings of labels, distance of items from centres."""
    wrong, labels = 0.0, len(data.embeddings)
    places, content = asked.tokens[..., : 2 * data.slots + 1], asked.tokens[..., 2 * data.slots + 1 :]
    for b in range(len(asked.tokens)):
        at = places[b].argmax(1).tolist()
        wrong += at != list(range(at[0], at[0] + len(at))) or bool((places[b].sum(1) != 1).any())
        right = {int(k): int(n) for k, n in zip(asked.items[b], asked.labels[b], strict=True)}
        for n, (k, label) in enumerate(zip(asked.items[b].tolist(), asked.labels[b].tolist(), strict=True)):
            wrong += label != k % labels or not torch.equal(content[b, 2 * n + 1], data.embeddings[label])
            off = (content[b, 2 * n] * math.sqrt(1 + data.noise**2) - data.classes[k]).norm() / data.noise
            wrong += not 0.3 < float(off) < 2
        wrong += int(asked.label[b]) != int(asked.item[b]) % labels or int(asked.label[b]) != right.get(
            int(asked.item[b]), int(asked.label[b])
        )
        wrong += not 0.3 < float((content[b, -1] * math.sqrt(1 + data.noise**2) - data.classes[asked.item[b]]).norm() / data.noise) < 2
    return wrong


@check(
    "abrupt-icl",
    "sequences by loops: shifts, labels, noise, bursts, distinct labels, power of classes, new classes; numbers that are wrong",
    below=0.0,
    control="held to the labels of sequences whose labels were turned",
)
def _() -> tuple[float, float]:
    draw = torch.Generator().manual_seed(4)
    data = item_labels(32, 8, 24, draw, noise=0.3, power=1.0, slots=9, novel=16)
    burst = data.draw(300, draw, pairs=8, copies=4)
    wrong = by_label(burst, data)
    starts = burst.tokens[:, 0, :19].argmax(1)
    wrong += int(starts.min()) != 0 or int(starts.max()) != 2
    for items, item in zip(burst.items.tolist(), burst.item.tolist(), strict=True):
        wrong += item not in items or any(items.count(k) % 4 for k in items)
    apart = data.draw(300, draw, pairs=8, copies=1, distinct=True)
    wrong += by_label(apart, data) + sum(sorted(row) != list(range(8)) for row in apart.labels.tolist())
    loose = data.draw(4000, draw, pairs=6, copies=3, bursty=0.0)
    counts = torch.bincount(torch.cat((loose.items.flatten(), loose.item)), minlength=32).double()
    odds = 1 / torch.arange(1, 33, dtype=F64)
    wrong += int((counts / counts.sum() - odds / odds.sum()).abs().max() > 0.01)
    half = data.draw(2000, draw, pairs=6, copies=3, bursty=0.5)
    inside = (half.items == half.item[:, None]).any(1).double().mean()
    expected = 0.5 + 0.5 * (loose.items == loose.item[:, None]).any(1).double().mean()
    wrong += int((inside - expected).abs() > 0.04)
    fresh = data.draw(500, draw, pairs=6, copies=2, novel=1.0, flip=True)
    content = fresh.tokens[:, :, 19:]
    near = torch.cdist(content[:, 0::2], data.classes).min()
    right = (fresh.items == fresh.item[:, None]).any(1).all() and torch.equal(fresh.label, fresh.item % 8) and int(fresh.items.max()) == 15
    wrong += int(not right) + int(near < 0.5) + int(not torch.equal(content[:, 1], data.embeddings[fresh.items[:, 0] % 8]))
    turned = data.draw(300, draw, pairs=8, copies=4, flip=True)
    straight = Asked(turned.tokens, (turned.label - 1) % 8, turned.items, (turned.labels - 1) % 8, turned.item)
    same = torch.equal(turned.label, (turned.item + 1) % 8) and torch.equal(turned.labels, (turned.items + 1) % 8)
    shown = torch.equal(turned.tokens[:, 1, 19:], data.embeddings[turned.labels[:, 0]])
    return wrong + int(not (same and shown)), by_label(straight, data)


@check("abrupt-icl", "accuracy and progress of a drawn net, place by place", below=1e-6, control="the second layer's map for the first")
def _() -> tuple[float, float]:
    data = item_labels(16, 8, 12, torch.Generator().manual_seed(1), slots=4, novel=8)
    net, asked = drawn(InductionNet(data.width, 8), 0.1).float(), data.draw(20, torch.Generator().manual_seed(2), pairs=4)
    found = progress(net, asked)
    x, maps = asked.tokens, []
    for q, k, v in zip(linears(net.q), linears(net.k), linears(net.v), strict=True):
        s = torch.einsum("btd,bsd->bts", x @ q.weight.T, x @ k.weight.T)
        maps.append(s.masked_fill(~torch.ones(9, 9).tril().bool(), -math.inf).softmax(-1).detach())
        x = x + maps[-1] @ (x @ v.weight.T)
    hand = dict.fromkeys(("previous", "copied", "target", "in_context"), 0.0)
    other, right = 0.0, 0.0
    given = [int(row.argmax()) for row in net(asked.tokens)]
    for b in range(20):
        right += (given[b] == int(asked.label[b])) / 20
        hand["in_context"] += (given[b] in asked.labels[b].tolist()) / 20
        for n in range(4):
            hand["previous"] += float(maps[0][b, 2 * n + 1, 2 * n]) / 80
            other += float(maps[1][b, 2 * n + 1, 2 * n]) / 80
            hand["copied"] += float(maps[1][b, 8, 2 * n + 1]) / 20
            if int(asked.items[b, n]) == int(asked.item[b]):
                hand["target"] += float(maps[1][b, 8, 2 * n + 1]) / 20
    gap = max(abs(found[name] - x) for name, x in hand.items())
    loss = F.cross_entropy(net(asked.tokens), asked.label).isfinite()
    return max(gap, abs(accuracy(net, asked) - right)) if loss else 1.0, abs(found["previous"] - other)
