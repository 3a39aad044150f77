"""Softmax in groups that landmark tokens open, and texts with landmarks (Mohtashami and Jaggi, 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra.blocks import HIDDEN


def grouped_softmax(s: Tensor, block: int, first: int = 0, retrieved: Tensor | None = None) -> Tensor:
    """Weights (..., n, L) of logits s (..., n, L), rows at positions first .. first + n - 1; every block + 1-st token is a landmark.

    block: ordinary tokens a block. retrieved (..., n, blocks) bool: past blocks that may be read (None: all of them).
    """
    rows, length, size = s.shape[-2], s.shape[-1], block + 1
    i = torch.arange(first, first + rows, device=s.device)[:, None]
    j = torch.arange(length, device=s.device)
    own, mark = (i // size) == (j // size), j % size == block
    count = -(-length // size)
    past = torch.arange(count, device=s.device) < i // size
    if retrieved is not None:
        past = past & retrieved
    padded = F.pad(s, (0, count * size - length), value=HIDDEN).unflatten(-1, (count, size))
    inside = padded[..., :block].softmax(-1).nan_to_num(0.0)  # p_b of every block; used for past ones alone
    marks = padded[..., block].masked_fill(~past, HIDDEN)
    near = s.masked_fill(~(own & (j <= i) & ~mark), HIDDEN)
    p0 = torch.cat((near, marks), -1).softmax(-1).nan_to_num(0.0)  # a landmark's own row may see nothing
    far = F.pad(p0[..., length:, None] * inside, (0, 1)).flatten(-2)[..., :length]
    return p0[..., :length] + far


def placed_softmax(s: Tensor, landmarks: Tensor, first: int = 0) -> Tensor:
    """`grouped_softmax` of logits s (B, H, n, L) with landmarks (B, L), bool, wherever they stand: each ends its block. A landmark whose block
    has no ordinary token takes weight that goes nowhere."""
    marks = landmarks[:, None, None]  # (B, 1, 1, L)
    block = (marks.long().cumsum(-1) - marks.long()).expand(s.shape[0], 1, 1, -1)
    rows, count = s.shape[-2], int(block.max()) + 1
    i = torch.arange(first, first + rows, device=s.device)
    own, past = block[:, 0, 0, i][:, None, :, None] == block, block < block[:, 0, 0, i][:, None, :, None]
    near = own & (torch.arange(s.shape[-1], device=s.device) <= i[:, None]) & ~marks
    p0 = s.masked_fill(~(near | (past & marks)), HIDDEN).softmax(-1).nan_to_num(0.0)
    index = block.expand(s.shape)
    top = torch.full_like(s[..., :1], HIDDEN).expand(*s.shape[:-1], count)
    top = top.scatter_reduce(-1, index, s.detach().masked_fill(marks, HIDDEN), "amax")
    e = torch.exp(s - torch.where(top.isfinite(), top, 0.0).gather(-1, index)).masked_fill(marks, 0.0)
    total = torch.zeros_like(top).scatter_add(-1, index, e)
    opened = torch.zeros_like(top).scatter_add(-1, index, torch.where(marks, p0, 0.0))
    inside = e / torch.where(total > 0, total, 1.0).gather(-1, index)
    return torch.where(near, p0, torch.where(past, opened.gather(-1, index) * inside, 0.0))


def with_landmarks(tokens: Tensor, block: int, landmark: int) -> Tensor:
    """Token ids (B, n) with `landmark` after every `block` of them."""
    whole = tokens.shape[1] // block * block
    blocks = F.pad(tokens[:, :whole].unflatten(1, (-1, block)), (0, 1), value=landmark).flatten(1)
    return torch.cat((blocks, tokens[:, whole:]), 1)
