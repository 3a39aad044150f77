"""Checks of dependencyvit."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.patch_mixers import mlp
from regard.lab.checks.shared.planes import gelu, image, layer_norm
from regard.lab.verification import check
from regard.zoo.vision.dependencyvit import DependencyViT, ReversedAttention, dependency_tree, parts


def scattered(layer: ReversedAttention, x: Tensor, message: Tensor, forward: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Each child adds its value to every parent; forward: each parent to its children."""
    b, n, c = x.shape
    d = c // layer.heads
    qkv = x @ layer.qkv.weight.T
    chosen = torch.softmax(x @ layer.select.weight.T / layer.temperature, -1)
    sent = message / (1 + torch.exp(-(gelu(x @ layer.control[0].weight.T) @ layer.control[2].weight.T)[..., 0]))  # type: ignore[operator]
    rows: list[Tensor] = []
    masks: list[Tensor] = []
    for at in range(b):
        heads, mask = [], torch.zeros(n, n, dtype=F64)
        for h in range(layer.heads):
            q, k, v = (qkv[at, :, part * c + h * d : part * c + (h + 1) * d] for part in range(3))
            y = [torch.zeros(d, dtype=F64) for _ in range(n)]
            for i in range(n):
                e = torch.stack([torch.exp((q[i] * k[j]).sum() / math.sqrt(d)) for j in range(n)])
                f = e / e.sum()
                weight = chosen[at, i, h] * sent[at, i]
                if forward:
                    y[i] = (f[:, None] * v).sum(0)
                    continue
                for j in range(n):
                    y[j] = y[j] + f[j] * weight * v[i]
                mask = mask + F.one_hot(torch.tensor(i), n) * (f * weight)[:, None]
            heads.append(torch.stack(y))
            masks = masks if h else [*masks, mask]
        masks[-1] = mask
        rows.append(torch.cat(heads, 1))
    return torch.stack(rows) @ layer.out.weight.T + layer.out.bias, sent, torch.stack(masks)


@check(
    "dependencyvit",
    "outputs, messages and dependencies, values and gradients == a scatter of every child to every parent",
    below=1e-11,
    control="softmax attention, from parents to children",
)
def _() -> tuple[float, float]:
    layer, x, message = drawn(ReversedAttention(6, 3, 0.5)), image(2, 5, 6), torch.rand(2, 5, dtype=F64)
    found, truth = layer(x, message), scattered(layer, x, message)
    gaps = [naive.gap(a, b) for a, b in zip(found, truth, strict=True)]
    gaps.append(gap_with_gradients(found[0], truth[0], (x, *layer.parameters())))
    gaps.append(naive.gap(layer(x)[0], layer(x, torch.ones(2, 5, dtype=F64))[0]))
    return max(gaps), naive.gap(found[0], scattered(layer, x, message, forward=True)[0])


@check(
    "dependencyvit",
    "what children send, off their messages, and received by tokens all alike",
    below=1e-12,
    control="sums over parents' rows",
)
def _() -> tuple[float, float]:
    layer, x = drawn(ReversedAttention(6, 3)), image(2, 10, 6)
    _, sent, dependency = layer(x)
    assert float(dependency.detach().sum(2).std(1).min()) > 0
    return naive.gap(dependency.sum(1), sent), naive.gap(dependency.sum(2), sent)


@check("dependencyvit", "what a token of no message changes in the others' outputs by its value", below=0.0, control="of a whole message")
def _() -> tuple[float, float]:
    def felt(size: float) -> float:
        layer, x = drawn(ReversedAttention(6, 3)), image(1, 5, 6)
        message = torch.ones(1, 5, dtype=F64)
        message[0, 2] = size
        with torch.no_grad():
            before = layer(x, message)[0]
            layer.qkv.register_forward_hook(
                lambda module, inputs, out: out + F.pad(torch.ones(6), (12, 0)) * (torch.arange(5) == 2)[:, None]
            )
            return naive.gap(layer(x, message)[0], before)

    return felt(0.0), felt(1.0)


@check(
    "dependencyvit",
    "the net, whole and pruned twice by what tokens receive or send: logits, which tokens are left, all tokens' features == by hand",
    below=1e-10,
    control="pruned behind the MLP",
)
def _() -> tuple[float, float]:
    images, gaps, other = torch.randn(2, 2, 12, 12, dtype=F64), [], 0.0
    for prune, rank in (((), "receive"), ((1, 3), "receive"), ((1, 3), "send")):
        net = drawn(DependencyViT(6, 3, 3, prune, 0.3, rank, side=12, patch=4, channels=2, classes=3, temperature=0.5), 0.2)

        def by_hand(
            late: bool, net: DependencyViT = net, prune: tuple[int, ...] = prune, rank: str = rank
        ) -> tuple[Tensor, Tensor, Tensor]:
            x = F.conv2d(images, net.patches.weight, net.patches.bias, 4).flatten(2).mT + net.places
            message, numbers = torch.ones(2, 9, dtype=F64), torch.arange(9).expand(2, -1)
            everything = x.clone()
            for at, block in enumerate(net.blocks, 1):
                y, message, mask = scattered(block.attention, layer_norm(x, block.norm1, 1e-6), message)  # type: ignore[arg-type]
                x = x + block.scale1.weight * y  # type: ignore[union-attr, operator]
                full = x + block.scale2.weight * mlp(layer_norm(x, block.norm2, 1e-6), block.mlp)  # type: ignore[union-attr, operator, arg-type]
                if at in prune:
                    for b in range(2):
                        everything[b, numbers[b]] = x[b]
                    worth = mask.abs().sum(2) if rank == "receive" else message
                    step = prune.index(at) + 1
                    left = math.floor((1 - 0.3 * step) / (1 - 0.3 * (step - 1)) * x.shape[1])
                    kept = torch.stack(
                        [torch.tensor(sorted(sorted(range(x.shape[1]), key=lambda i: -float(worth[b, i]))[:left])) for b in range(2)]
                    )
                    x = torch.stack([(full if late else x)[b, kept[b]] for b in range(2)])
                    message, numbers = message.gather(1, kept), numbers.gather(1, kept)
                    full = x if late else x + block.scale2.weight * mlp(layer_norm(x, block.norm2, 1e-6), block.mlp)  # type: ignore[union-attr, operator, arg-type]
                    full = full + block.scale2.weight if late else full  # type: ignore[union-attr, operator]
                x = full
            for b in range(2):
                everything[b, numbers[b]] = x[b]
            pooled = (layer_norm(x, net.norm, 1e-6) * message[..., None]).mean(1)
            return pooled @ net.head.weight.T + net.head.bias, numbers, layer_norm(everything, net.norm, 1e-6)

        with torch.no_grad():
            truth = by_hand(False)
            assert torch.equal(net.run(images)[1], truth[1]) and truth[1].shape[1] == (9 if not prune else 3)
            gaps += [naive.gap(net(images), truth[0]), naive.gap(net.dense(images), truth[2])]
            other = naive.gap(net(images), by_hand(True)[0])
    return max(gaps), other


@check("dependencyvit", "parents, root and parts of planted trees that are not found", below=0.0, control="the transpose")
def _() -> tuple[float, float]:
    wanted = torch.tensor([[2, 0, 2, 2, 3, 3]])  # 2 is the root; 1 hangs on 0, 4 and 5 on 3
    mask = 0.01 * torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(0))
    for child, parent in enumerate(wanted[0].tolist()):
        mask[0, parent, child] += 1.0
    mask[0, 2] += 0.5

    def wrong(m: Tensor) -> float:
        parent, root = dependency_tree(m)
        groups = parts(parent, root)
        return float((parent != wanted).sum() + (root != 2).sum() + (groups != torch.tensor([[0, 0, 2, 3, 3, 3]])).sum())

    return wrong(mask), wrong(mask.mT)
