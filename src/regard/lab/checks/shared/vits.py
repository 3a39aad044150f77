"""A small ViT of timm's, and its block written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.lab.checks.shared.layers import drawn, joined, split
from regard.lab.checks.shared.planes import gelu, layer_norm
from regard.nn.images import timm_host


def small_vit(depth: int = 3, dim: int = 16, heads: int = 2, side: int = 16, patch: int = 4, spread: float = 0.15, **options: Any) -> Any:
    """In float64 and evaluation mode, 3 colours, a class token, every parameter moved off its first value."""
    timm = timm_host.load("timm")
    made = timm.models.vision_transformer.VisionTransformer(
        img_size=side, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=2.0, num_classes=3, **options
    )
    return drawn(made, spread).eval()


def projected(attn: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (split(z, attn.num_heads) for z in (y @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, -1))
    return q, k, v


def scores(attn: Any, q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / (q.shape[-1] ** 0.5)


def out_of(attn: Any, read: Tensor) -> Tensor:
    return joined(read) @ attn.proj.weight.T + attn.proj.bias


def mlp_of(block: Any, x: Tensor) -> Tensor:
    y, m = layer_norm(x, block.norm2, 1e-6), block.mlp
    return gelu(y @ m.fc1.weight.T + m.fc1.bias) @ m.fc2.weight.T + m.fc2.bias


def block_by_hand(block: Any, x: Tensor, tau: Tensor | float = 1.0) -> Tensor:
    """x + attention(LN x), then + MLP(LN x), scores over tau."""
    q, k, v = projected(block.attn, layer_norm(x, block.norm1, 1e-6))
    x = x + out_of(block.attn, torch.softmax(scores(block.attn, q, k) / tau, -1) @ v)
    return x + mlp_of(block, x)


def tokens_by_hand(vit: Any, images: Tensor) -> Tensor:
    """Class token and patches, row by row, with places."""
    p, (weight, bias) = vit.patch_embed.patch_size[0], (vit.patch_embed.proj.weight, vit.patch_embed.proj.bias)
    corners = [(i, j) for i in range(0, images.shape[2], p) for j in range(0, images.shape[3], p)]
    x = torch.stack([(images[:, None, :, i : i + p, j : j + p] * weight).sum((2, 3, 4)) + bias for i, j in corners], 1)
    return torch.cat((vit.cls_token.expand(len(x), -1, -1), x), 1) + vit.pos_embed
