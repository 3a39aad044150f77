"""Checks of lambda-vit."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared import shipped_vit
from regard.lab.checks.shared.comparing import F64, flops, gap_with_gradients
from regard.lab.checks.shared.planes import layer_norm
from regard.lab.checks.shared.training import accuracy
from regard.lab.checks.shared.vits import block_by_hand, mlp_of, out_of, projected, scores, small_vit, tokens_by_hand
from regard.lab.verification import check
from regard.nn.images import timm_host
from regard.tasks.images import distant_signs
from regard.zoo.vision.lambda_vit import dilute, entropy_without, layer_entropy, select_layers, transfer_entropy


def by_hand(vit: Any, images: Tensor, lam: dict[int, float], twice: bool = True) -> Tensor:
    x = tokens_by_hand(vit, images)
    for at in range(3):
        block = vit.blocks[at]
        block = getattr(block, "block", block)
        q, k, v = projected(block.attn, layer_norm(x, block.norm1, 1e-6))
        out, own = out_of(block.attn, scores(block.attn, q, k).softmax(-1) @ v), lam.get(at, 1.0)
        x = ((2 - own) if twice else 1) * x + own * out
        x = x + mlp_of(block, x)
    return layer_norm(x, vit.norm, 1e-6)[:, 0] @ vit.head.weight.T + vit.head.bias


@check(
    "lambda-vit",
    "values and gradients with lam = 1, 0.3 and 0 in two of three blocks == by hand; lam by epoch; the stripped model says the same as lam = 0",
    below=1e-11,
    control="the residual not doubled",
)
def _() -> tuple[float, float]:
    vit, images = small_vit(3), torch.randn(2, 3, 16, 16, dtype=F64)
    leaves, diluted, gaps = tuple(vit.parameters()), dilute(vit, [0, 2]), []
    for epoch, lam in ((0, 1.0), (209.3, 0.3), (299, 0.0), (400, 0.0)):
        assert math.isclose(diluted.at(epoch), lam, abs_tol=1e-12)
        truth = by_hand(vit, images, {0: diluted.lam, 2: diluted.lam})
        used = (
            leaves
            if lam
            else tuple(p for p, g in zip(leaves, torch.autograd.grad(vit(images).sum(), leaves, allow_unused=True)) if g is not None)
        )
        gaps.append(gap_with_gradients(vit(images), truth, used))
    closed, other = vit(images), by_hand(vit, images, {0: 0.0, 2: 0.0}, twice=False)
    diluted.strip()
    return max(*gaps, naive.gap(vit(images), closed)), naive.gap(other, closed)


@check("lambda-vit", "parameters a stripped layer has less, off 4 C^2 + 6 C", below=0.0, control="lam = 0 alone")
def _() -> tuple[float, float]:
    def left(strip: bool) -> float:
        vit = small_vit(3)
        before, diluted = sum(p.numel() for p in vit.parameters()), dilute(vit, [1])
        diluted.lam = 0.0
        if strip:
            diluted.strip()
        return abs(before - sum(p.numel() for p in vit.parameters()) - (4 * 16**2 + 6 * 16))

    return left(True), left(False)


@check("lambda-vit", "entropy of normal features of known spreads, off sum log s, over it", below=0.02, control="standard normal features")
def _() -> tuple[float, float]:
    s = 0.5 + 3 * torch.rand(16, dtype=F64)
    wanted, x = float(s.log().sum()), torch.randn(50, 400, 16, dtype=F64)
    return abs(float(layer_entropy(x * s)) / wanted - 1), abs(float(layer_entropy(x)) / wanted - 1)


@check(
    "lambda-vit",
    "entropies with silent layers and what they transfer, off a model whose projections there are zero",
    below=1e-10,
    control="other layers",
)
def _() -> tuple[float, float]:
    vit, images = small_vit(3), torch.randn(8, 3, 16, 16, dtype=F64)

    def entropy(silent: tuple[int, ...]) -> float:
        x = tokens_by_hand(vit, images)
        for at, block in enumerate(vit.blocks):
            x = x + mlp_of(block, x) if at in silent else block_by_hand(block, x)
        y = layer_norm(x, vit.norm, 1e-6).flatten(0, 1)
        return float((y - y.mean(0)).square().mean(0).sqrt().log().sum())

    own = [abs(entropy_without(vit, images, (0, 2)) - entropy((0, 2)))]
    own.append(abs(transfer_entropy(vit, images, (1,)) - abs(entropy(()) - entropy((1,)))))
    return max(own), abs(entropy_without(vit, images, (0, 2)) - entropy((1, 2)))


@check(
    "lambda-vit",
    "place among three layers at which NOSE takes one whose attention is zero, planted in each",
    below=0.0,
    control="not planted",
)
def _() -> tuple[float, float]:
    images, places = torch.randn(8, 3, 16, 16, dtype=F64), []
    fresh = select_layers(small_vit(3), images, 3)
    for at in range(3):
        vit = small_vit(3)
        for p in vit.blocks[at].attn.proj.parameters():
            nn.init.zeros_(p)
        places.append(select_layers(vit, images, 3).index(at))
    return float(max(places)), float(max(fresh.index(at) for at in range(3)))


@check(
    "lambda-vit",
    "accuracy of comparing two signs far apart after two of three layers' attention faded over 100 steps, their model trained 100 steps before",
    above=0.9,
    control="the same layers silenced at once, without more steps",
)
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    vit = timm_host.load("timm").models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, in_chans=2, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2.0, num_classes=2
    )
    optimizer, generator = torch.optim.Adam(vit.parameters(), 2e-3), torch.Generator().manual_seed(0)

    def step() -> None:
        x, y = distant_signs(64, generator)
        optimizer.zero_grad()
        F.cross_entropy(vit(x), y).backward()
        optimizer.step()

    for _ in range(150):
        step()
    diluted = dilute(vit, [0, 2])
    diluted.lam = 0.0
    abrupt = accuracy(vit.eval(), distant_signs)
    vit.train()
    for epoch in range(150):
        diluted.at(epoch, last=100)
        step()
    return accuracy(vit.eval(), distant_signs), abrupt


@check(
    "lambda-vit",
    "parameters of DeiT-B without the attention of layers 0, 1, 3, 4 and 6, off 86,567,656 - 5 (4 C^2 + 6 C), 2.36 million a layer; products below 86%",
    below=0.0,
    control="lam = 0 alone",
)
def _() -> tuple[float, float]:
    def off(strip: bool) -> float:
        with torch.device("meta"):
            vit, x = timm_host.load("timm").create_model("deit_base_patch16_224").eval(), torch.zeros(1, 3, 224, 224)
            before, diluted = flops(lambda: vit(x)), dilute(vit, [0, 1, 3, 4, 6])
            diluted.lam = 0.0
            if strip:
                diluted.strip()
                assert 0.84 < flops(lambda: vit(x)) / before < 0.86
            return abs(sum(p.numel() for p in vit.parameters()) - (86_567_656 - 5 * (4 * 768**2 + 6 * 768)))

    return off(True), off(False)


@check(
    "lambda-vit",
    "accuracy that the ViT on digits loses when the layer of six whose silence costs its entropy least loses its attention, without training",
    below=0.05,
    control="the layer whose silence costs most",
)
def _() -> tuple[float, float]:
    drawn = shipped_vit.unseen(500)
    whole = shipped_vit.accuracy(shipped_vit.shipped(), drawn)

    def lost(layer: int) -> float:
        vit = shipped_vit.shipped()
        for p in vit.blocks[layer].attn.proj.parameters():
            nn.init.zeros_(p)
        return whole - shipped_vit.accuracy(vit, drawn)

    ranks = select_layers(shipped_vit.shipped(), drawn.images[:64], 6)
    return lost(ranks[0]), max(lost(layer) for layer in range(6))
