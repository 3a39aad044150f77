"""Sparse Transformer: factorised causal patterns that reach every key in two hops (id 269; Child et al., 2019).

strided: A1 = last l + 1 keys, A2 = keys at multiples of l back;  fixed: A1 = own block of l, A2 = last c columns of each block
"""

from ...algebra import Causal, Columns, FixedBlock, Mask, PerHead, Strided, Weighted, Window
from ...catalog.registry import register
from ...errors import RegardError


def patterns(pattern: str, stride: int, count: int, start: int | None = None) -> tuple[Mask, Mask]:
    """The two sets (A1, A2) as masks. start: which columns of a block the fixed A2 reads (None: the last `count`)."""
    if pattern == "strided":
        return Causal() & Window(stride + 1), Causal() & Strided(stride)
    if pattern != "fixed":
        raise RegardError(f"pattern={pattern!r}; expected strided or fixed")
    if count > stride:
        raise RegardError(f"count={count}: expected at most stride={stride}")
    return Causal() & FixedBlock(stride), Causal() & Columns(stride, count, stride - count if start is None else start)


@register("sparse-transformer")
def sparse_transformer(pattern: str = "fixed", stride: int = 128, count: int = 32, integration: str = "merged", layer: int = 0) -> Weighted:
    """stride: l, about sqrt(n). count: c, for the fixed pattern. integration: "merged" (a head reads the union), "heads" (heads
    alternate between the sets) or "interleaved" (layer r reads set r mod 2; pass `layer`)."""
    first, second = patterns(pattern, stride, count)
    if integration == "merged":
        return Weighted(mask=first | second)
    if integration == "heads":
        return Weighted(mask=PerHead((first, second)))
    if integration == "interleaved":
        return Weighted(mask=(first, second)[layer % 2])
    raise RegardError(f"integration={integration!r}; expected merged, heads or interleaved")
