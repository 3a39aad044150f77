"""SSA: sparse and full attention with the same weights, trained towards each other (id 206; Shen et al., 2025).

L = CE + 10 mean over layers [SmoothL1(o_f, sg(o_s)) + SmoothL1(sg(o_f), o_s)];  each step one stream, drawn for the whole model, goes on
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal, Chosen, Mask, Recipe, Selection, Selector, Weighted, bind
from regard.algebra.blocks import heads_of
from regard.algebra.compressed import grouped_blocks
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.engine.given import given_mask
from regard.errors import RegardError
from regard.nn.attention import Attention

FULL = Weighted(mask=Causal())
MODES = ("sparse", "full")


def block_top(block_size: int, top_k: int) -> Chosen:
    """NSA's choice without its other branches: mean keys of blocks, summed over a group, the own block always in."""
    return Chosen(bind(grouped_blocks, block_size=block_size, top_k=top_k), by_sequence=True)


def alignment(full: Tensor, sparse: Tensor) -> Tensor:
    """Smooth L1 both ways, each with the other held fixed."""
    return F.smooth_l1_loss(full, sparse.detach()) + F.smooth_l1_loss(full.detach(), sparse)


@register("ssa", kind="module")
class SSAAttention(Attention):
    """x (B, L, dim) -> (B, L, dim), causal, with a sigmoid gate a head on the output.

    block_size, top_k: of the choice, or any other `select`. `mode` ("sparse" or "full") says which stream goes on, here and in `step`;
    in training both are computed and their distance is left in `.distance`. `use(mode, top_k)` changes the stream or the blocks at will.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, *, head_dim: int | None = None, block_size: int = 16, top_k: int = 16,
        select: Selector | None = None, rope: bool = True,
    ):  # fmt: skip
        self.block_size, self.own_choice = block_size, select is None
        sparse = Weighted(mask=Causal(), select=select or block_top(block_size, top_k), recipe=Recipe(out_gate="heads"))
        super().__init__(dim, heads, sparse, kv_heads=kv_heads, head_dim=head_dim, rope=rope)
        self.sparse, self.mode = sparse, "sparse"
        self.distance: Tensor | None = None

    def use(self, mode: str, top_k: int | None = None) -> None:
        """mode: the stream. top_k: another number of blocks for this layer's own choice."""
        if mode not in MODES:
            raise RegardError(f"mode={mode!r}; expected one of {', '.join(MODES)}")
        if top_k is not None and not self.own_choice:
            raise RegardError(f"top_k={top_k}: this layer was given a select; expected None")
        if top_k is not None:
            self.sparse = Weighted(mask=Causal(), select=block_top(self.block_size, top_k), recipe=self.recipe)
        self.mode, self.mechanism = mode, self.sparse if mode == "sparse" else Weighted(mask=Causal(), recipe=self.recipe)

    def streams(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        """Both outputs (B, H, L, Dv) of the same q, k, v, under causality and `mask`."""
        outs: dict[str, Tensor] = {}
        for name, one in (("sparse", self.sparse), ("full", FULL)):
            if isinstance(mask, Tensor):
                mechanism, seen, given = given_mask(one, mask, inputs)
                outs[name] = attend(q, k, v, mechanism, mask=seen, **given)
            else:
                outs[name] = attend(q, k, v, one, mask=mask, **inputs)
        return outs

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Mask | Tensor | None = None, **inputs: Any) -> Tensor:
        """As `Attention.forward`; mask and inputs hold for both streams."""
        if context is not None:
            raise RegardError("context: SSA aligns two streams over the tokens of x itself; expected None")
        if not self.training:
            return super().forward(x, None, mask, **inputs)
        q, k, v, _ = self.heads_of(x, x, 0, None)
        outs = self.streams(q, k, v, mask, **inputs)
        both = {name: o if self.head_gate is None else o * self.head_gate(x) for name, o in outs.items()}
        self.distance = alignment(both["full"], both["sparse"])
        return self.out(both[self.mode].transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def ssa_layers(model: nn.Module) -> list[SSAAttention]:
    found = [m for m in model.modules() if isinstance(m, SSAAttention)]
    if not found:
        raise RegardError(f"{type(model).__name__} has no SSAAttention layer")
    return found


def use(model: nn.Module, mode: str, top_k: int | None = None) -> None:
    """The stream, and the number of blocks, of all SSA layers of a model."""
    for layer in ssa_layers(model):
        layer.use(mode, top_k)


def training_loss(model: nn.Module, tokens: Tensor, generator: torch.Generator, weight: float = 10.0) -> tuple[Tensor, Tensor]:
    """(cross-entropy + weight x mean distance, that distance) of tokens (B, L + 1), under a stream drawn with probability 1/2."""
    use(model, MODES[int(torch.randint(2, (), generator=generator))])
    logits = model(tokens[:, :-1])
    distances = [layer.distance for layer in ssa_layers(model) if layer.distance is not None]
    apart = torch.stack(distances).mean()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + weight * apart, apart


def captured_mass(q: Tensor, k: Tensor, chosen: Selection | None) -> Tensor:
    """(B, H, L): the full softmax's mass inside the chosen blocks; 1 - it is delta in |o_f - o_s| <= 2 delta max |v|."""
    s = q @ heads_of(k, q.shape[1]).transpose(-1, -2) * q.shape[-1] ** -0.5
    length = k.shape[-2]
    p = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device).tril(length - q.shape[-2]), float("-inf")).softmax(-1)
    if chosen is None:
        return p.sum(-1)
    keep = chosen.keep.repeat_interleave(chosen.block_q, -2)[..., : q.shape[-2], :]
    return (p * keep.repeat_interleave(chosen.block_k, -1)[..., :length]).sum(-1)
