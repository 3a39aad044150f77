"""The four patterns of attention: which a mechanism supports, whether a layer keeps to one, and one small net for all four.

A mechanism's description declares; a small call verifies. What the declaration and the call do not both allow is refused with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..catalog import get
from ..catalog.registry import entry
from ..errors import RegardError
from .attention import Attention
from .mixers import is_mixer, mixer, parsed

PATTERNS = ("noncausal self", "causal self", "noncausal cross", "causal cross")
REMOVED = "none"  # the slot without attention: nothing is added to the residual stream


class Removed(nn.Module):
    """Attention taken away: zeros (B, L, dim), whatever there is to read."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


class Vanilla(Attention):
    """Softmax attention that holds all its weights at once, (B, heads, L, L): what costs are measured against."""

    def __init__(self, dim: int, heads: int, causal: bool):
        super().__init__(dim, heads, causal=causal)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Any = None, **inputs: Any) -> Tensor:
        q, k, v, _ = self.heads_of(x, x if context is None else context, 0, None)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if self.causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
        return self.close(scores.softmax(-1) @ v, x)


def known(pattern: str) -> str:
    if pattern not in PATTERNS:
        raise RegardError(f"pattern={pattern!r}; expected one of {', '.join(PATTERNS)}")
    return pattern


def declared(spec: str) -> dict[str, str]:
    """What the description of "name:key=value,..." says of each pattern: "" where it supports it, else why not."""
    name, options = parsed(spec)
    found = entry(name)
    if found.kind != "mechanism":
        if found.kind == "module" and is_mixer(found.factory):
            return {
                p: "" if p == "causal self" else "a layer of its own that reads its own tokens, and earlier ones alone" for p in PATTERNS
            }
        return dict.fromkeys(PATTERNS, f"a {found.kind}, neither a mechanism nor a layer that steps through a sequence")
    mechanism = get(name, **options)
    causal = mechanism.can_be_causal or mechanism.causal_only
    past, ahead = "reads earlier tokens alone", "a row of it depends on the queries of all rows"
    all_keys = past if mechanism.past_alone else ""
    return {
        "noncausal self": all_keys,
        "causal self": "" if causal else ahead,
        "noncausal cross": all_keys,
        "causal cross": all_keys or ("" if causal else ahead),
    }


def layer_of(spec: str, pattern: str, dim: int, heads: int, context_len: int = 1024) -> nn.Module:
    """The layer of "name:key=value,..." for a pattern, or `Removed` for "none": layer(x (B, L, dim)), of the cross patterns
    layer(x, context (B, Lk, dim)) -> (B, L, dim). RegardError with the reason where the description does not support the pattern."""
    if spec == REMOVED:
        return Removed()
    why = declared(spec)[known(pattern)]
    if why:
        raise RegardError(f"mechanism {spec!r} does not support the pattern {pattern!r}: {why}")
    name, options = parsed(spec)
    if pattern == "causal self":
        return mixer(name, dim, heads, context_len=context_len, **options)
    # Under causal cross-attention a row reads all of the source, and of the targets its own query alone: no mask says it.
    return Attention(dim, heads, get(name, **options), causal=False, context_len=context_len)


@torch.no_grad()
def fault(
    layer: nn.Module, pattern: str, dim: int, *, length: int = 22, source: int = 17, tolerance: float = 1e-4, permutes: bool = False
) -> str:
    """How a layer breaks a pattern, measured on drawn tokens; "" where it keeps to it. permutes: the layer has no positions, so
    permuted queries must give permuted rows, and a permuted source the same ones.

    causal self: row i >= length / 2 of the whole == of the prefix 0..i, and `step` token by token == the whole. causal cross: the same prefixes of
    the targets, the source as it is, all of which row 0 reads. noncausal: rows read later tokens, or the whole source, with as many
    rows as queries. Gaps are sums of |difference| over (B, dim).
    """
    known(pattern)
    parameter = next(layer.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> Tensor:
        return torch.randn(2, count, dim, generator=generator).to(parameter)

    def gap(a: Tensor, b: Tensor) -> float:
        found = float((a - b).abs().sum())
        return found if math.isfinite(found) else math.inf

    x, cross = drawn(length), pattern.endswith("cross")
    context = [drawn(source)] if cross else []
    layer.eval()
    y = layer(x, *context)
    if y.shape != x.shape:
        return f"gives {tuple(y.shape)} for {tuple(x.shape)}"
    if not bool(y.isfinite().all()):
        return "gives numbers that are not finite"
    half = length // 2
    if pattern.startswith("causal"):
        for i in range(half, length):
            off = gap(layer(x[:, : i + 1], *context)[:, i], y[:, i])
            if off > tolerance:
                return f"row {i} of {length} is off by {off:.2g} without the rows after it: it depends on them"
    if pattern == "causal self":
        step, state = getattr(layer, "step", None), None
        if step is None:
            return "has no step, so it cannot decode"
        for i in range(length):
            row, state = step(x[:, i : i + 1], state)
            off = gap(row[:, 0], y[:, i])
            if off > tolerance:
                return f"step {i} is off by {off:.2g} from the whole pass"
        return ""
    if cross:
        for name, changed in (("first", slice(0, source // 2)), ("last", slice(source // 2, source))):
            other = context[0].clone()
            other[:, changed] = drawn(source)[:, changed]
            if gap(layer(x, other)[:, 0], y[:, 0]) <= tolerance:
                return f"row 0 does not read the {name} half of the source"
        longer = drawn(length + 7)
        if layer(x, longer).shape != x.shape or not bool(layer(x, longer).isfinite().all()):
            return "breaks where the source is longer than the targets"
    else:
        later = x.clone()
        later[:, half:] = drawn(length)[:, half:]
        if gap(layer(later)[:, :half], y[:, :half]) <= tolerance:
            return "rows read no later tokens"
    if permutes:
        rows, keys = torch.randperm(length, generator=generator), torch.randperm(source, generator=generator)
        off = gap(layer(x[:, rows], *(c[:, keys] for c in context)), y[:, rows])
        if off > tolerance:
            return f"permuted tokens give rows off by {off:.2g}"
    return ""


def supported(spec: str, dim: int = 16, heads: int = 2) -> dict[str, str]:
    """Each pattern, with "" where the mechanism supports it, by its description and by a small call in float64, or why it does not."""
    said = declared(spec)
    for pattern in [p for p in PATTERNS if not said[p]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                layer = layer_of(spec, pattern, dim, heads, 64).double()
                said[pattern] = fault(layer, pattern, dim)
            except RegardError as why:
                said[pattern] = " ".join(str(why).split())
    return said


class PatternBlock(nn.Module):
    """x + attention(norm(x)), x + cross(norm(x), source) where given, then x + MLP(norm(x)): LayerNorm, GELU, 4 dim wide."""

    def __init__(self, dim: int, own: nn.Module | None, cross: nn.Module | None = None):
        super().__init__()
        self.own, self.cross = own, cross
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        x = x if self.own is None else x + self.own(self.norms[0](x))
        x = x if self.cross is None else x + self.cross(self.norms[1](x), source)
        return x + self.mlp(self.norms[2](x))


class PatternNet(nn.Module):
    """One net for every pattern: an encoder of `source`, a decoder of `target`, or both, whose slots hold one attention each.

    source, target: size of the vocabulary of ids (B, L), or minus the width of features (B, L, width), or 0: there is none. outputs: width of
    the result (B, L, outputs), of the decoder where there is one. attention: pattern -> spec; patterns left out are softmax, and a pattern given
    as "" has no slot. Positions are sinusoids, so lengths are free.
    """

    def __init__(
        self,
        source: int,
        target: int,
        outputs: int,
        attention: Mapping[str, str],
        *,
        dim: int = 32,
        heads: int = 2,
        depth: int = 1,
        context_len: int = 1024,
    ):
        super().__init__()
        if not source and not target:
            raise RegardError("source=0 and target=0; expected one of the two to be there")
        for pattern in attention:
            known(pattern)

        def slot(pattern: str) -> nn.Module | None:
            spec = attention.get(pattern, "softmax")
            return layer_of(spec, pattern, dim, heads, context_len) if spec else None

        def stem(size: int) -> nn.Module | None:
            return nn.Embedding(size, dim) if size > 0 else nn.Linear(-size, dim) if size else None

        crossing = "noncausal cross" if "noncausal cross" in attention else "causal cross"
        self.dim, self.read, self.write = dim, stem(source), stem(target)
        self.encoder = nn.ModuleList(PatternBlock(dim, slot("noncausal self")) for _ in range(depth if source else 0))
        self.decoder = nn.ModuleList(
            PatternBlock(dim, slot("causal self"), slot(crossing) if source else None) for _ in range(depth if target else 0)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, outputs)

    def placed(self, x: Tensor) -> Tensor:
        """x plus sinusoids of its places: sin and cos of place / 10000^(2 n / dim)."""
        rate = torch.exp(torch.arange(0, self.dim, 2, device=x.device, dtype=x.dtype) * (-math.log(10000.0) / self.dim))
        angle = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None] * rate
        return x + torch.stack((angle.sin(), angle.cos()), -1).flatten(1)[:, : self.dim]

    def forward(self, source: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        read = None
        for name, stem, x in (("source", self.read, source), ("target", self.write, target)):
            if (stem is None) != (x is None):
                raise RegardError(f"{name} is {'missing' if x is None else 'given'}; this net {'has none' if stem is None else 'needs it'}")
        if self.read is not None:
            read = self.placed(self.read(source))
            for block in self.encoder:
                read = block(read)
        y = read
        if self.write is not None:
            y = self.placed(self.write(target))
            for block in self.decoder:
                y = block(y, read)
        return self.head(self.norm(y))  # type: ignore[no-any-return]
