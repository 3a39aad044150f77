"""Weighted attention on a GPU, bf16: the generated kernel against SDPA's backends, FlexAttention and, where installed, entmax and adasplash.

python benchmarks/gpu_weighted.py --out benchmarks/results/gpu_weighted.json

Ratios are the peer's time over regard's: above 1 regard is faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu import DEVICE, DIMS, DRY, DTYPE, HEADS, header, milliseconds, with_gradients, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import regard

NAMES = ("softmax", "sigmoid", "relu", "softpick", "sparsemax", "entmax", "cog-attention", "ssmax")
ROOTS = ("sparsemax", "entmax")


def sdpa(backend: SDPBackend, causal: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


def flex(causal: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's softmax: the one normalizer it has."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    masks: dict[int, object] = {}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        if causal and length not in masks:
            masks[length] = create_block_mask(lambda b, h, i, j: j <= i, None, None, length, length, device="cuda")
        return compiled(q, k, v, block_mask=masks.get(length))  # type: ignore[no-any-return]

    return run


def adasplash() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    try:
        from adasplash import adasplash as peer
    except ImportError:
        return None
    return lambda q, k, v: peer(q, k, v, alpha=1.5, is_causal=True)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64] if DRY else [2048, 8192, 16384])
    given = parser.parse_args()
    result = header()
    for length in given.lengths:
        for dim in DIMS:
            for causal in (True, False):
                tensors = [torch.randn(1, HEADS, length, dim, device=DEVICE, dtype=DTYPE) for _ in range(3)]
                peers: dict[str, Callable[..., Tensor] | None] = {
                    "cudnn": None if DRY else sdpa(SDPBackend.CUDNN_ATTENTION, causal),
                    "flash": sdpa(SDPBackend.FLASH_ATTENTION, causal),
                    "flex": None if DRY else flex(causal),
                    "adasplash": adasplash() if causal and not DRY else None,
                }
                for what, made in (("forward", lambda f, t: lambda: f(*t)), ("both", lambda f, t: with_gradients(f, *t))):
                    times = {who: milliseconds(made(run, tensors)) for who, run in peers.items() if run is not None}
                    for name in NAMES[:2] if DRY else NAMES:
                        mechanism = regard.get(name, alpha=1.5) if name == "entmax" else regard.get(name)
                        mask = regard.Causal() if causal else None
                        own = milliseconds(
                            made(lambda q, k, v, m=mechanism, x=mask: regard.attend(q, k, v, m, mask=x, executor="triton"), tensors)
                        )
                        row = {who: round(t / own, 3) for who, t in times.items() if who != "adasplash" or name in ROOTS}
                        key = f"{length} x {dim} {'causal' if causal else 'full'} {what}"
                        result.setdefault(key, {})[name] = row
                        print(key, name, row, flush=True)
    write(given.out, result)


if __name__ == "__main__":
    main()
