"""Selected attention on a GPU, bf16: against dense SDPA and against FlexAttention with the same block mask. Ratios, and the selection's share.

python benchmarks/gpu_sparse.py --out benchmarks/results/gpu_sparse.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu import DEVICE, DRY, DTYPE, HEADS, header, milliseconds, write
from torch import Tensor

import regard
from regard.algebra import Sizes
from regard.algebra.select import Selection
from regard.engine.problem import view_of


def flex(q: Tensor, k: Tensor, v: Tensor, chosen: Selection) -> Callable[[], Tensor]:
    """FlexAttention under causality and the chosen blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    keep, block_q, block_k = chosen.keep, chosen.block_q, chosen.block_k

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & keep[b, h, i // block_q, j // block_k]

    mask = create_block_mask(seen, q.shape[0], q.shape[1], q.shape[2], k.shape[2], device=DEVICE, BLOCK_SIZE=128)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256] if DRY else [8192, 16384, 32768])
    given = parser.parse_args()
    result = header()
    for length in given.lengths:
        q, k, v = (torch.randn(1, HEADS, length, 128, device=DEVICE, dtype=DTYPE) for _ in range(3))
        dense = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
        for name, options in {
            "moba": {"block_size": 32 if DRY else 512, "top_k": 4},
            "flexprefill": {"gamma": 0.6, "max_budget": length // 16},
            "proxyattn": {"gamma": 0.2},
        }.items():
            mechanism = regard.get(name, **options)
            sizes, scaled = Sizes(1, HEADS, HEADS, length, length, 128, 128), q * 128**-0.5

            def choose() -> Selection | None:
                return mechanism.select.select(scaled, k, view_of(regard.Causal(), sizes, {}, q.device))

            chosen = choose()
            own = milliseconds(lambda: regard.attend(q, k, v, mechanism, mask=regard.Causal()))
            row = {"dense_ms": dense, "ratio": own / dense, "selection": milliseconds(choose) / own}
            if chosen is not None and chosen.block_q >= 128 and not DRY:
                row |= {"density": chosen.density, "against_flex": milliseconds(flex(q, k, v, chosen)) / own}
            result.setdefault(str(length), {})[name] = {key: round(value, 4) for key, value in row.items()}
            print(length, name, result[str(length)][name], flush=True)
    write(given.out, result)


if __name__ == "__main__":
    main()
