"""Medusa: heads on the last hidden state guess the tokens after the next (id 121; Cai et al., 2024).

p^(k) = softmax(W2_k (h + SiLU(W1_k h + b_k))),   k = 1..K; head k at t guesses token t + 1 + k;   W1 = 0 and W2 the output layer's at first
Medusa-1: sum_k c^k CE(p^(k)_t, y_{t+1+k}), the model frozen;   Medusa-2: CE of the model + weight * that, or KL(before || model) for CE
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.generate.state import State, Strategy
from regard.generate.tree import Draft, Paths, Shape, best_shape
from regard.generate.tuning import states

MC_SIM_7B_63 = Shape.read(
    "0 1 2 3 4 5 6 7 8 9 00 01 02 03 04 05 06 07 08 09 10 11 12 13 14 15 16 20 21 22 30 31 40 50 60 70 80 90 000 001 002 003 004 005 006 "
    "007 008 009 010 011 012 020 021 030 040 050 060 070 100 101 200 0000 0001"
)


class ResBlock(nn.Module):
    """x + SiLU(W x + b), which is x + SiLU(b) at first."""

    def __init__(self, dim: int, zero_bias: bool):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.zeros_(self.linear.weight)
        if zero_bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


@register("medusa", kind="strategy")
class Medusa(nn.Module, Strategy):
    """Heads of a transformers decoder, and their guesses as a tree: rank r of depth k is the (r + 1)-th token of head k.

    heads: K. layers: residual blocks a head. tree: paths of ranks, at most K deep (None: the paper's 63 nodes, cut to K). zero_bias: first
    biases of zero, so that every head begins as the output layer (the released code draws them). Hidden states are those that the output
    layer reads. `accept=Typical()` of `generate` is the paper's lossy rule.
    """

    def __init__(self, model: nn.Module, heads: int = 5, layers: int = 1, tree: Shape | Paths | None = None, zero_bias: bool = True):
        super().__init__()
        if heads < 1 or layers < 0:
            raise RegardError(f"heads={heads}, layers={layers}: expected at least 1, and 0 or more")
        if tree is None:
            tree = Shape.of([path for path in MC_SIM_7B_63.paths if len(path) <= heads])
        self.shape = tree if isinstance(tree, Shape) else Shape.of(tree)
        if len(self.shape.levels) > heads:
            raise RegardError(f"tree: {len(self.shape.levels)} deep; expected at most heads={heads}")
        out: Any = model.get_output_embeddings()  # type: ignore[operator]
        vocab, dim = out.weight.shape
        self.heads = nn.ModuleList()
        for _ in range(heads):
            last = nn.Linear(dim, vocab, bias=False, device=out.weight.device, dtype=out.weight.dtype)
            last.weight.data.copy_(out.weight.data)
            blocks = [ResBlock(dim, zero_bias).to(out.weight) for _ in range(layers)]
            self.heads.append(nn.Sequential(*blocks, last))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (K, ..., V)."""
        return torch.stack([head(hidden) for head in self.heads])

    def draft(self, state: State) -> Draft:
        if state.hidden is None:  # nothing was read yet
            return Draft(state.root[:, None], torch.zeros(1, 1, dtype=torch.long, device=state.root.device))
        parents, ranks = (x.to(state.root.device) for x in (self.shape.parents, self.shape.ranks))
        tokens = state.root[:, None].repeat(1, len(parents))
        for head, (first, stop) in zip(self.heads, self.shape.levels, strict=False):
            own = ranks[first:stop]
            tokens[:, first:stop] = head(state.hidden).topk(int(own.max()) + 1, -1).indices[:, own]
        return Draft(tokens, parents[None])

    def loss(self, hidden: Tensor, labels: Tensor, decay: float = 0.8) -> Tensor:
        """Medusa-1: sum over k of decay^k * mean CE; hidden (B, L, D), labels (B, L) the same tokens (-100: not counted)."""
        total = hidden.new_zeros(())
        for k, head in enumerate(self.heads, 1):
            if hidden.shape[1] > k + 1 and bool((labels[:, k + 1 :] != -100).any()):
                total = total + decay**k * F.cross_entropy(head(hidden[:, : -(k + 1)]).flatten(0, 1), labels[:, k + 1 :].flatten())
        return total

    def joint_loss(
        self, model: Any, ids: Tensor, labels: Tensor | None = None, weight: float = 0.2, decay: float = 0.8, before: Tensor | None = None
    ) -> Tensor:
        """Medusa-2: the model's own loss + weight * `loss`. before (B, L, V): logits of the model as it was; KL(before || now) in place of CE."""
        labels = ids if labels is None else labels
        hidden, logits = states(model, ids)
        if before is None:
            own = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        else:
            own = F.kl_div(
                logits.log_softmax(-1).flatten(0, 1), before.log_softmax(-1).flatten(0, 1), reduction="batchmean", log_target=True
            )
        return own + weight * self.loss(hidden, labels, decay)

    @torch.no_grad()
    def accuracies(self, model: Any, ids: Tensor, ranks: int = 10) -> Tensor:
        """(K, ranks): how often the token of each rank of each head is the text's."""
        hidden, _ = states(model, ids)
        rows = []
        for k, head in enumerate(self.heads, 1):
            guesses = head(hidden[:, : -(k + 1)]).topk(ranks, -1).indices
            rows.append((guesses == ids[:, k + 1 :, None]).double().mean((0, 1)))
        return torch.stack(rows)

    def search_tree(self, model: Any, ids: Tensor, nodes: int = 63, ranks: int = 10) -> Shape:
        """The tree of so many nodes whose paths are likeliest by `accuracies`; `self.shape` takes it."""
        return best_shape(self.accuracies(model, ids, ranks), nodes)
