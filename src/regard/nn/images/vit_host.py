"""The parts of a vision transformer of timm's make, run one by one: its tokens, its blocks' attention and the rest around it.

A host has `patch_embed`, `blocks` of norm1, attn (qkv, num_heads, scale, proj), norm2 and mlp, `norm`, and `num_prefix_tokens`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engine.door import attend
from ...errors import RegardError

NEEDED = ("patch_embed", "blocks", "norm", "num_prefix_tokens", "embed_dim")
OF_BLOCK = ("norm1", "attn", "norm2", "mlp")


def host_of(vit: nn.Module) -> Any:
    """The model itself, after a look at its parts."""
    missing = [name for name in NEEDED if not hasattr(vit, name)]
    block = None if missing else next(iter(vit.blocks), None)  # type: ignore[arg-type]
    missing += [name for name in OF_BLOCK if block is not None and not hasattr(block, name)]
    if block is None or missing or not hasattr(block.attn, "qkv"):
        raise RegardError(f"vit is a {type(vit).__name__} without {', '.join(missing) or 'blocks'}; expected a VisionTransformer of timm")
    return vit


def embedded(vit: Any, images: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
    """Images (B, C, H, W) -> tokens (B, prefix + N, dim) with their places, before the first block. masked (B, N) bool: patches whose embedding
    is `mask_token` (dim,) instead."""
    size, given = getattr(vit.patch_embed, "img_size", None), tuple(images.shape[2:])
    if size is not None and getattr(vit.patch_embed, "strict_img_size", True) and given != tuple(size):
        raise RegardError(
            f"images of {given[0]} x {given[1]} pixels; expected {size[0]} x {size[1]}, the host's (or a host made with dynamic_img_size=True)"
        )
    x = vit.patch_embed(images)
    if masked is not None and mask_token is not None:
        x = torch.where(masked.view(*x.shape[:-1], 1), mask_token.to(x.dtype), x)  # a host of any size keeps its grid here
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))  # type: ignore[no-any-return]


def heads_of(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, H, N, D) of normed tokens (B, N, dim)."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attn.q_norm(q), attn.k_norm(k), v


def closed(attn: Any, read: Tensor, x: Tensor) -> Tensor:
    """What heads read, (B, H, N, D), through the layer's norm, gate and projection: (B, N, dim). x: the queries' normed tokens."""
    read = attn.norm(read.transpose(1, 2).flatten(-2))
    gate = getattr(attn, "gate", None)
    return attn.proj_drop(attn.proj(read if gate is None else read * gate(x).sigmoid()))  # type: ignore[no-any-return]


def weights_of(attn: Any, x: Tensor) -> Tensor:
    """Softmax weights (B, H, N, N) on normed tokens."""
    q, k, _ = heads_of(attn, x)
    return torch.softmax(attn.scale * q @ k.mT, -1)


def attention(attn: Any, x: Tensor, temperature: Tensor | float = 1.0, source: Tensor | None = None) -> Tensor:
    """The layer on normed tokens x, scores divided by `temperature`; keys and values from x, and then from `source` (B, M, dim) if given."""
    q, k, v = heads_of(attn, x)
    if source is not None:
        _, more_k, more_v = heads_of(attn, source)
        k, v = torch.cat((k, more_k), 2), torch.cat((v, more_v), 2)
    dropped = attn.attn_drop.p if attn.training else 0.0
    return closed(attn, attend(q / temperature, k, v, scale=attn.scale, dropout_p=dropped), x)


def after_attention(block: Any, x: Tensor, out: Tensor) -> Tensor:
    """x (B, N, dim) and what its attention gave -> the block's output: both residuals, LayerScale, DropPath and the MLP."""
    x = x + block.drop_path1(block.ls1(out))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))  # type: ignore[no-any-return]


def masked_tokens(vit: Any, images: Tensor, keep: Tensor, soft: bool = False, remove: bool = False) -> Tensor:
    """Normed tokens (B, prefix + N, dim) of a ViT none of whose layers lets a token read patches of keep (B, N) = 0. soft: keep is between 0 and 1,
    and log(keep + 1e-10) is added to scores. remove: patches that no image of the batch keeps are taken out, and the tokens are fewer."""
    x = embedded(vit, images)
    prefix = vit.num_prefix_tokens
    if keep.shape != (len(x), x.shape[1] - prefix):
        raise RegardError(f"keep is {tuple(keep.shape)}; expected (batch={len(x)}, patches={x.shape[1] - prefix})")
    if remove and not soft and len(x):
        count = max(1, int(keep.count_nonzero(-1).max()))
        kept = keep.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
        x = torch.cat((x[:, :prefix], x[:, prefix:].take_along_dim(kept[..., None], 1)), 1)
        keep = keep.take_along_dim(kept, 1)
    shown = F.pad(keep.to(x.dtype), (prefix, 0), value=1.0)[:, None, None]
    for block in vit.blocks:
        normed = block.norm1(x)
        q, k, v = heads_of(block.attn, normed)
        s = block.attn.scale * q @ k.mT
        if soft:
            weights = (s + torch.log(shown + 1e-10)).softmax(-1)
        else:  # a hidden key's exponential is bounded: it is multiplied by 0, and only its gradient with respect to the mask is felt
            top = s.masked_fill(shown == 0, -torch.inf).amax(-1, keepdim=True).detach()
            e = torch.exp((s - top).clamp_max(60)) * shown
            weights = e / e.sum(-1, keepdim=True)
        x = after_attention(block, x, closed(block.attn, block.attn.attn_drop(weights) @ v, normed))
    return vit.norm(x)  # type: ignore[no-any-return]


def frozen(vit: nn.Module) -> Any:
    """The host, none of whose parameters ask for gradients, in evaluation mode."""
    host_of(vit)
    return vit.requires_grad_(False).eval()
