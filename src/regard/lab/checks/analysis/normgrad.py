"""Checks of normgrad."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.nn.decoder import Block
from regard.zoo.analysis.normgrad import class_sensitivity, combine, meta_saliency, saliency


class Net(nn.Module):
    """A convolution under study, then what makes classes of it."""

    def __init__(self, kernel: int = 3, stride: int = 1, padding: int = 1, dilation: int = 1):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 5, kernel, stride, padding, dilation)
        self.last, self.norm = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.conv(F.gelu(self.first(x))))
        return self.out(F.gelu(self.norm(self.last(y))).mean((2, 3)))


class Vit(nn.Module):
    """Four tokens of a picture row each, one block of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.out = nn.Linear(21, 16), Block(16, Attention(16, 2, causal=False), 32, norm="layer"), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.embed(x.flatten(2)[:, :, :21])).mean(1))


def net(*sizes: int) -> Net:
    return Net(*sizes).to(F64).eval()


@check(
    "normgrad",
    "true layer, convolutions (k, stride, pad, dilation) of 3 kinds and a linear one: length of each place's own weight gradient",
    below=1e-10,
    control="the gradient's length alone",
)
def _() -> tuple[float, float]:
    gaps, others = [], []
    for sizes in ((1, 1, 0, 1), (3, 2, 1, 1), (3, 1, 2, 2)):
        model, x = net(*sizes), torch.randn(1, 3, 7, 6, dtype=F64)
        found = saliency(model, x, 2, "conv", "true_layer")
        z = F.gelu(model.first(x))
        y = model.conv(z)
        height, width = y.shape[-2:]
        truth = torch.zeros(1, 1, height, width, dtype=F64)
        for i, j in itertools.product(range(height), range(width)):  # the kernel of place (i, j) alone is replaced by a copy
            copied = model.conv.weight.detach().clone().requires_grad_()
            one = torch.zeros_like(y)
            one[:, :, i, j] = 1
            mixed = y * (1 - one) + F.conv2d(z, copied, model.conv.bias, *(sizes[1:])) * one
            score = model.out(F.gelu(model.norm(model.last(F.gelu(mixed)))).mean((2, 3)))[0, 2]
            truth[0, 0, i, j] = torch.autograd.grad(score, copied)[0].norm()
        gaps.append(naive.gap(found, truth))
        others.append(naive.gap(saliency(model, x, 2, "conv", "bias"), truth))
    vit, x = Vit().to(F64), torch.randn(2, 4, 3, 7, dtype=F64)
    for layer in ("block.mixer.q", "block.mixer.v", "block.mixer.out", "embed"):
        module = vit.get_submodule(layer)
        kept: dict[str, Tensor] = {}
        handle = module.register_forward_hook(lambda _, args, out: (kept.update(x=args[0], y=out), out.retain_grad())[-1])  # noqa: B023
        vit(x)[:, 1].sum().backward()
        handle.remove()
        truth = torch.stack(
            [
                torch.stack([torch.outer(g, t).norm() for g, t in zip(*pair, strict=True)])
                for pair in zip(kept["y"].grad, kept["x"], strict=True)
            ]
        )
        gaps.append(naive.gap(saliency(vit, x, 1, layer, "true_layer"), truth.detach()))
    return max(gaps), min(others)


@check(
    "normgrad",
    "each rule at a convolution's output, by loops over places; the parts g x^T add up to an inserted identity's gradient",
    below=1e-12,
    control="each rule's map against the next rule's",
)
def _() -> tuple[float, float]:
    model, x = net(3, 2, 1, 1), torch.randn(2, 3, 7, 6, dtype=F64)
    y = model.conv(F.gelu(model.first(x))).detach().requires_grad_()
    identity = torch.eye(5, dtype=F64).view(5, 5, 1, 1).requires_grad_()

    def rest(z: Tensor) -> Tensor:
        return model.out(F.gelu(model.norm(model.last(F.gelu(z)))).mean((2, 3))).gather(1, torch.tensor([[1], [3]])).sum()

    (g,) = torch.autograd.grad(rest(y), y)
    (whole,) = torch.autograd.grad(rest(F.conv2d(y, identity)), identity)
    parts = torch.einsum("bihw,bjhw->ij", g, y)
    means = g.mean((2, 3))
    truth = {
        name: torch.zeros(2, 1, *y.shape[-2:], dtype=F64)
        for name in (
            "normgrad",
            "selective_normgrad",
            "gradient",
            "gradient_x_input",
            "linear_approximation",
            "grad_cam",
            "bias",
            "scaling",
        )
    }
    for b, i, j in itertools.product(range(2), range(y.shape[2]), range(y.shape[3])):
        a, s = [float(t) for t in y.detach()[b, :, i, j]], [float(t) for t in g[b, :, i, j]]
        dot = sum(p * q for p, q in zip(a, s, strict=True))
        values = (
            sum(p * p for p in a) ** 0.5 * sum(q * q for q in s) ** 0.5,
            sum(max(p * q, 0) ** 2 for p, q in zip(a, s, strict=True)) ** 0.5,
            max(abs(q) for q in s),
            abs(dot),
            dot,
            max(0.0, sum(p * float(m) for p, m in zip(a, means[b], strict=True))),
            sum(q * q for q in s) ** 0.5,
            sum((p * q) ** 2 for p, q in zip(a, s, strict=True)) ** 0.5,
        )
        for name, value in zip(truth, values, strict=True):
            truth[name][b, 0, i, j] = value
    found = {name: saliency(model, x, torch.tensor([1, 3]), "conv", name) for name in truth}
    names = list(truth)
    wrong = min(naive.gap(found[a], truth[b]) for a, b in zip(names, names[1:] + names[:1], strict=True))
    return max(naive.gap(whole[:, :, 0, 0], parts), *[naive.gap(found[name], truth[name]) for name in names]), wrong


@check(
    "normgrad",
    "meta-saliency: the map of the model behind one SGD step by hand; lr 0 gives the plain map, and the model is left to the bit",
    below=1e-12,
    control="without the step",
)
def _() -> tuple[float, float]:
    model, x = net().train(), torch.randn(2, 3, 7, 6, dtype=F64)
    target = torch.tensor([1, 3])
    model.first.weight.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def method() -> Tensor:
        return saliency(model, x, target, "conv")

    found, still = meta_saliency(method, model, x, target, lr=0.5), meta_saliency(method, model, x, target, lr=0.0)
    away = meta_saliency(method, model, x, target, lr=0.5, negate_loss=True)
    same = (
        all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        and model.training
        and not model.first.weight.requires_grad
    )
    same = same and all(p.grad is None for p in model.parameters())
    truths = []
    for sign in (1, -1):
        other = net()
        other.load_state_dict(before)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.5)
        (sign * F.cross_entropy(other(x), target)).backward()
        optimizer.step()
        truths.append(saliency(other, x, target, "conv"))
    plain = net()
    plain.load_state_dict(before)
    own = max(naive.gap(found, truths[0]), naive.gap(away, truths[1]), naive.gap(still, saliency(plain, x, target, "conv")))
    return own if same else 1.0, naive.gap(still, truths[0])


@check(
    "normgrad",
    "layers fused: minimum to 0 and maximum to 1, weights over their sum, sum and product",
    below=1e-12,
    control="divided by the maximum",
)
def _() -> tuple[float, float]:
    a, b = 1 + torch.rand(2, 1, 4, 4, dtype=F64), 3 + torch.rand(2, 1, 2, 2, dtype=F64)
    wide = F.interpolate(b, (4, 4), mode="bilinear", align_corners=False)

    def unit(m: Tensor) -> Tensor:
        return torch.stack([(one - one.min()) / (one.max() - one.min()) for one in m])

    truth = 0.25 * unit(a) + 0.75 * unit(wide), unit(a) ** (1 / 3) * unit(wide) ** (2 / 3)
    own = max(naive.gap(combine([a, b], [1, 3]), truth[0]), naive.gap(combine([a, b], "linear", "product"), truth[1]))
    return own, naive.gap(0.25 * a / a.amax((1, 2, 3), True) + 0.75 * wide / wide.amax((1, 2, 3), True), truth[0])


@check(
    "normgrad",
    "class sensitivity: the correlation of the two maps, by torch.corrcoef",
    below=1e-12,
    control="of likeliest and second class",
)
def _() -> tuple[float, float]:
    model, x = net(), torch.randn(3, 3, 7, 6, dtype=F64)

    def method(classes: Tensor) -> Tensor:
        return saliency(model, x, classes, "conv", "grad_cam")

    order = model(x).argsort(1)
    pair = [method(order[:, at]).flatten(1) for at in (-1, 0, -2)]
    truth = torch.stack([torch.corrcoef(torch.stack((a, b)))[0, 1] for a, b in zip(pair[0], pair[1], strict=True)])
    other = torch.stack([torch.corrcoef(torch.stack((a, b)))[0, 1] for a, b in zip(pair[0], pair[2], strict=True)])
    return naive.gap(class_sensitivity(method, model, x), truth), naive.gap(other, truth)
