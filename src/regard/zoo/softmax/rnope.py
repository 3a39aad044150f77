"""RNoPE-SWA: layers of rotary sliding windows between full layers without positions (id 113; Yang et al., 2025)."""

from __future__ import annotations

from torch import Tensor

from regard.algebra import Causal, Recipe, Rope, Weighted, Window
from regard.catalog.registry import register
from regard.errors import RegardError


@register("rnope", kind="function")
def rnope_layers(
    layers: int, window: int = 4096, ratio: int = 4, base: float = 10000.0, first_full: bool = False, qk_norm: str = ""
) -> list[Weighted]:
    """Descriptions for `Decoder(rnope_layers(layers), layers=layers)`: of every `ratio` layers one is full and position-free, the last of them
    (the first with first_full), the others see the last `window` tokens under RoPE of `base`. qk_norm: "layer" or "rms", on all of them.

    Decoding keeps n tokens in the full layers and min(n, window) in the others.
    """
    if layers < 1 or ratio < 1:
        raise RegardError(f"layers={layers}, ratio={ratio}: expected positive integers")
    near = Weighted(position=Rope(base), mask=Causal() & Window(window), recipe=Recipe(qk_norm=qk_norm))
    full = Weighted(recipe=Recipe(rope=False, qk_norm=qk_norm))
    return [full if at % ratio == (0 if first_full else ratio - 1) else near for at in range(layers)]


def attention_mass(weights: Tensor, needle: tuple[int, int], query: tuple[int, int], begin: int = 10) -> dict[str, float]:
    """Where the last position's attention goes, mean over leading dimensions of weights (..., L, L): "begin" (the first tokens), "needle" and
    "query" (spans [from, to)), and "context", the rest."""
    last = weights[..., -1, :].detach().double()
    spans = {"begin": slice(0, begin), "needle": slice(*needle), "query": slice(*query)}
    found = {name: float(last[..., span].sum(-1).mean()) for name, span in spans.items()}
    return {**found, "context": float(last.sum(-1).mean()) - sum(found.values())}
