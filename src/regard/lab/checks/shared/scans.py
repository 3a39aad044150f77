"""Selective scans and maps in four orders, token by token and pixel by pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.nn.selective_scan import SelectiveScan


def scanned(x: Tensor, layer: SelectiveScan) -> Tensor:
    """Token by token, a way and channel at a time: x (B, ways, C, L)."""
    rank, n = layer.sizes[:2]
    out = torch.zeros_like(x)
    for way in range(x.shape[1]):
        read = torch.einsum("dc,bcl->bdl", layer.read[way], x[:, way])
        delta = torch.log1p(torch.exp(torch.einsum("cr,brl->bcl", layer.step[way], read[:, :rank]) + layer.bias[way, :, None]))
        b, c = read[:, rank : rank + n], read[:, rank + n :]
        h = torch.zeros(len(x), x.shape[2], n, dtype=x.dtype)
        rows = []
        for t in range(x.shape[3]):
            decay = torch.exp(-delta[:, :, t, None] * torch.exp(layer.log_a[way]))
            h = decay * h + (delta[:, :, t] * x[:, way, :, t])[..., None] * b[:, None, :, t]
            rows.append((h * c[:, None, :, t]).sum(-1) + layer.skip[way] * x[:, way, :, t])
        out = out + F.one_hot(torch.tensor(way), x.shape[1])[:, None, None] * torch.stack(rows, -1)[:, None]
    return out


def four_orders(height: int, width: int) -> list[list[tuple[int, int]]]:
    """The pixels in the order of each way: by rows, by columns, and both from the end."""
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    return [rows, columns, rows[::-1], columns[::-1]]


def scanned_map(x: Tensor, layer: SelectiveScan, ways: tuple[int, ...] = (0, 1, 2, 3)) -> Tensor:
    """The sum over `ways` of what the scans of a map (B, C, H, W) give at each pixel."""
    orders = four_orders(*x.shape[2:])
    read = torch.stack([torch.stack([x[:, :, i, j] for i, j in order], -1) for order in orders], 1)
    found = scanned(read, layer)
    pixels = [[sum(found[:, way, :, orders[way].index((i, j))] for way in ways) for j in range(x.shape[3])] for i in range(x.shape[2])]
    return torch.stack([torch.stack(row, -1) for row in pixels], -2)


def dense_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """One channel's scan as a lower-triangular matrix, y_t = sum_s C_t . prod_{s < r <= t} exp(dt_r A) B_s dt_s x_s: x, delta (L,), a (n,), b, c (n, L)."""
    length = len(x)
    rows = []
    for t in range(length):
        terms = [(c[:, t] * torch.exp(delta[s + 1 : t + 1].sum() * a) * b[:, s]).sum() * delta[s] * x[s] for s in range(t + 1)]
        rows.append(torch.stack(terms).sum())
    return torch.stack(rows)
