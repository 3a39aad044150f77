"""Checks of test-time-registers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.planes import gelu, layer_norm
from regard.lab.checks.shared.shipped_vit import accuracy, shipped, unseen
from regard.lab.checks.shared.vits import out_of, projected, scores, small_vit, tokens_by_hand
from regard.lab.verification import check
from regard.zoo.vision.test_time_registers import TestTimeRegisters, find_register_neurons, outlier_metrics, watched

PLANTED = {2: [5], 3: [9, 20]}


def planted() -> tuple[Any, Tensor]:
    """A ViT of six blocks, three of whose units fire on patches that share a direction and write it with great size; images, each with one or
    two such patches, whose embeddings are about as large as the others'."""
    torch.manual_seed(0)
    vit = small_vit(6, dim=64, heads=4, spread=0.02)
    direction = torch.randn(64, dtype=F64)
    direction = 8 * (direction - direction.mean()) / (direction - direction.mean()).norm()
    with torch.no_grad():
        rest = 0.15 * torch.randn_like(vit.patch_embed.proj.weight)
        rest = rest - rest.mean((1, 2, 3), keepdim=True)
        rest = rest - direction[:, None, None, None] * torch.einsum("c,cijk->ijk", direction, rest) / 64
        vit.patch_embed.proj.weight.copy_(rest + 0.1 / 48 * direction[:, None, None, None])
        for layer, units in PLANTED.items():
            mlp = vit.blocks[layer].mlp
            for unit in units:
                mlp.fc1.weight[unit] = direction / 2
                mlp.fc1.bias[unit] = -11.0
                mlp.fc2.weight[:, unit] = direction
        for block in vit.blocks[4:]:  # whose heads look for the direction
            for head in range(4):
                block.attn.qkv.bias[16 * head] = 3.0
                block.attn.qkv.weight[64 + 16 * head] += direction / 8
    images = 0.3 * torch.randn(8, 3, 16, 16, dtype=F64)
    for at in range(8):
        for _ in range(1 + at % 2):
            i, j = (4 * torch.randint(4, (2,))).tolist()
            images[at, :, i : i + 4, j : j + 4] += 2.0
    return vit, images


def outliers(vit: Any, images: Tensor) -> Tensor:
    norms = watched(vit, images).norms[-1][:, 1:]
    return norms > 4 * norms.median(1, keepdim=True).values


@check("test-time-registers", "planted units that the three of highest score are not", below=0.0, control="a model without planted units")
def _() -> tuple[float, float]:
    vit, images = planted()
    norms = watched(vit, images).norms[-1][:, 1:]

    def missed(threshold: float) -> float:
        found = find_register_neurons(vit, images, threshold, top=3)
        return 3.0 - sum(unit in found.get(layer, []) for layer, units in PLANTED.items() for unit in units)

    quiet = small_vit(6, dim=32, heads=4)
    assert float((norms.amax(1) / norms.median(1).values).min()) > 5
    other = find_register_neurons(quiet, images, 0.0, top=3)
    return missed(float(4 * norms.median())), 3.0 - sum(unit in other.get(layer, []) for layer, units in PLANTED.items() for unit in units)


@check("test-time-registers", "largest norm of a patch behind a later block, over the median", below=1.5, control="without registers")
def _() -> tuple[float, float]:
    vit, images = planted()
    moved = TestTimeRegisters(vit, PLANTED)
    size = moved.all_tokens(images).detach().norm(dim=-1)
    assert float(size[:, -1].min() / size[:, 1:-1].median()) > 5
    return float(outlier_metrics(moved, images)["norms"][3:].max()), float(outlier_metrics(vit, images)["norms"][3:].max())


@check(
    "test-time-registers",
    "attention of the class token on former outliers in later blocks, over what it was",
    below=0.2,
    control="registers without the units",
)
def _() -> tuple[float, float]:
    vit, images = planted()
    found = outliers(vit, images)
    before = outlier_metrics(vit, images, found)["share"][4:].sum()
    own, idle = (outlier_metrics(TestTimeRegisters(vit, units), images, found)["share"][4:].sum() for units in (PLANTED, {}))
    return float(own / before), float(idle / before)


@check(
    "test-time-registers",
    "tokens with two registers, all that may become of patches, shared and single peaks, a scale, and another place == unit by unit by hand",
    below=1e-10,
    control="patches left alone",
)
def _() -> tuple[float, float]:
    vit, images, neurons = small_vit(3), torch.randn(2, 3, 16, 16, dtype=F64), {0: [3, 7], 2: [1]}

    def by_hand(count: int, patches: str, shared: bool, scale: float, place: int | None) -> Tensor:
        x = torch.cat((tokens_by_hand(vit, images), torch.zeros(2, count, 16, dtype=F64)), 1)
        for layer, block in enumerate(vit.blocks):
            q, k, v = projected(block.attn, layer_norm(x, block.norm1, 1e-6))
            x = x + out_of(block.attn, scores(block.attn, q, k).softmax(-1) @ v)
            m = block.mlp
            act = gelu(layer_norm(x, block.norm2, 1e-6) @ m.fc1.weight.T + m.fc1.bias).detach().clone()
            source, units = act.clone(), neurons.get(layer, [])
            for b in range(2):
                for unit in units:
                    values = source[b][:, units].flatten().tolist() if shared else source[b, :, unit].tolist()
                    peak = scale * max(values, key=abs)
                    own = source[b, 1:17, unit]
                    if patches == "zero":
                        act[b, 1:17, unit] = 0
                    elif patches == "mean":
                        act[b, 1:17, unit] = own.mean()
                    elif patches == "outliers":
                        act[b, 1:17, unit] = torch.where(own > own.mean() + own.std(), own.mean(), own)
                    if place is None:
                        act[b, 17:, unit] = peak
                    else:
                        act[b, 1 + place, unit] = peak
            x = x + act @ m.fc2.weight.T + m.fc2.bias
        return x

    gaps = []
    with torch.no_grad():
        for patches in ("zero", "mean", "outliers", "same"):
            for shared in (False, True):
                net = TestTimeRegisters(vit, neurons, 2, 1.3, patches, shared)
                gaps.append(naive.gap(net.all_tokens(images), by_hand(2, patches, shared, 1.3, None)))
        net = TestTimeRegisters(vit, neurons, 0, place=5)
        gaps.append(naive.gap(net.all_tokens(images), by_hand(0, "zero", False, 1.0, 5)))
        return max(gaps), naive.gap(TestTimeRegisters(vit, neurons).all_tokens(images), by_hand(1, "same", False, 1.0, None))


@check("test-time-registers", "no units and no register, off the model", below=0.0, control="an idle register")
def _() -> tuple[float, float]:
    vit, images = small_vit(3), torch.randn(2, 3, 16, 16, dtype=F64)
    truth = vit(images)
    return naive.gap(TestTimeRegisters(vit, {}, 0)(images), truth), naive.gap(TestTimeRegisters(vit, {}, 1)(images), truth)


@check(
    "test-time-registers",
    "accuracy that the ViT on digits loses to a unit that makes outliers of a fifth of the patches, found by its score, with a register for it",
    below=0.05,
    control="without",
)
def _() -> tuple[float, float]:
    vit, drawn = shipped(), unseen()
    whole, unit = accuracy(vit, drawn), 7
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mlp = vit.blocks[2].mlp
        mlp.fc1.weight[unit] = 5 * torch.randn(96, generator=g)
        mlp.fc1.bias[unit] = 0.0
        before = watched(vit, drawn.images[:50]).acts[2][:, 1:, unit]
        mlp.fc1.bias[unit] = -before.flatten().quantile(0.8)  # gelu(x) is near x where it is large
        far = torch.randn(96, generator=g)
        mlp.fc2.weight[:, unit] = 60 * far / far.norm()
    sizes = watched(vit, drawn.images[:50]).norms[2, :, 1:]
    found = find_register_neurons(vit, drawn.images[:50], 3 * float(sizes.median()), layer=2, top=1)
    assert found == {2: [unit]}
    return whole - accuracy(TestTimeRegisters(vit, found), drawn), whole - accuracy(vit, drawn)
