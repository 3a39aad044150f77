"""Token Recycling: guesses are the tokens that once came second to tenth (id 147; Luo et al., 2024).

M[v] = the k most probable next tokens when v was last read;   root = the newest token,   child of rank r = M[parent, r]
after a pass: M[x] = top-k of the logits at x, for every node x, accepted or not (of equal tokens the last node's)
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.generate.host import Seen
from regard.generate.state import State, Strategy
from regard.generate.tree import Draft, Paths, Shape

DEFAULT_80 = Shape.read(
    "0 1 2 3 4 5 6 7 00 01 02 03 04 05 06 07 10 11 12 13 20 21 22 30 31 40 50 60 70 000 001 002 003 004 005 006 007 010 011 012 020 021 "
    "030 040 050 060 070 100 101 110 200 300 400 500 0000 0001 0002 0003 0004 0010 0011 0020 0030 0040 0100 0200 1000 2000 3000 "
    "00000 00001 00002 00010 00020 00100 01000 10000 000000 000001 000100"
)


@register("token-recycling", kind="strategy")
class TokenRecycling(Strategy):
    """Training-free guesses from a table of successors, (V, k) int32, which grows better from prompt to prompt.

    k: successors kept a token. tree: paths of ranks below k, or a `Shape` (None: 80 nodes, 6 deep). The table is shared by the rows of a
    batch, belongs to one vocabulary, and starts as zeros; `table = None` forgets it.
    """

    def __init__(self, k: int = 8, tree: Shape | Paths | None = None):
        self.shape = DEFAULT_80 if tree is None else tree if isinstance(tree, Shape) else Shape.of(tree)
        if k < 1 or int(self.shape.ranks.max()) >= k:
            raise RegardError(f"k={k} and a tree with rank {int(self.shape.ranks.max())}: expected k of at least 1 and ranks below k")
        self.k = k
        self.table: Tensor | None = None

    def begin(self, state: State) -> None:
        vocab = state.host.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator, union-attr, index]
        if self.k > vocab:
            raise RegardError(f"k={self.k}: expected at most the {vocab} tokens there are")
        if self.table is None:
            self.table = torch.zeros(vocab, self.k, dtype=torch.int32, device=state.root.device)
        if self.table.shape != (vocab, self.k):
            raise RegardError(
                f"the table knows {len(self.table)} tokens and the model {vocab}; expected another TokenRecycling for this model"
            )

    def draft(self, state: State) -> Draft:
        assert self.table is not None
        parents, ranks = (x.to(state.root.device) for x in (self.shape.parents, self.shape.ranks))
        tokens = state.root[:, None].repeat(1, len(parents))
        for first, stop in self.shape.levels:
            tokens[:, first:stop] = self.table[tokens[:, parents[first:stop]], ranks[first:stop]].to(tokens.dtype)
        return Draft(tokens, parents[None])

    def learn(self, state: State, draft: Draft, seen: Seen, path: Tensor, count: Tensor) -> None:
        assert self.table is not None
        read, top = draft.tokens.flatten(), seen.logits.topk(self.k, -1).indices.flatten(0, 1)
        words, which = read.unique(return_inverse=True)
        last = torch.zeros_like(words).scatter_reduce(0, which, torch.arange(len(read), device=read.device), "amax")
        self.table[words] = top[last].to(torch.int32)
