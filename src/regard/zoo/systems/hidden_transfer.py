"""Hidden transfer: pseudo tokens are born halfway through the model and guess what comes after the next (id 120; Wu et al., 2024).

z_i = W_i h_n^{t_i} + b_i at position n + i joins after layer t_i, i = 1..k; from there on it is a token that sees what n sees, n, and
z_1..z_i of the same n; nobody else sees it. Its logits guess token n + i + 1.   loss = sum_i KL(p of the token at n + i || p of z_i)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.generate.host import Seen
from regard.generate.state import State, Strategy
from regard.generate.tree import Draft, Paths, Shape, within


@register("hidden-transfer", kind="strategy")
class HiddenTransfer(nn.Module, Strategy):
    """Maps of a transformers decoder with rotary positions, and their guesses as a tree.

    layers: t_1 <= ... <= t_k, how many layers come before each birth (1 to the number of layers - 1). tree: paths of ranks at most k deep
    (None: those whose ranks + 1 multiply to 6 at most). Only the maps learn; at first they are the identity, or drawn by torch (identity=False).
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int], tree: Shape | Paths | None = None, bias: bool = True, identity: bool = True
    ):
        super().__init__()
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        count, dim = len(decoder.layers), model.get_input_embeddings().embedding_dim  # type: ignore[operator, union-attr]
        if not layers or list(layers) != sorted(layers) or layers[0] < 1 or layers[-1] >= count:
            raise RegardError(f"layers={list(layers)}: expected numbers from 1 to {count - 1} that do not fall, one a guess")
        if not hasattr(decoder, "rotary_emb"):
            raise RegardError(
                f"{type(decoder).__name__} has no rotary positions of its own; hidden transfer gives them to tokens born late"
            )
        self.layers = tuple(layers)
        self.shape = within(len(layers), 6) if tree is None else tree if isinstance(tree, Shape) else Shape.of(tree)
        if len(self.shape.levels) > len(layers):
            raise RegardError(f"tree: {len(self.shape.levels)} deep; expected at most {len(layers)}, a level a layer")
        self.maps = nn.ModuleList(nn.Linear(dim, dim, bias=bias) for _ in layers).to(model.get_input_embeddings().weight)  # type: ignore[operator, union-attr]
        for one in list[Any](self.maps) if identity else []:
            nn.init.eye_(one.weight)
            if bias:
                nn.init.zeros_(one.bias)
        self.guesses: Tensor | None = None

    @contextmanager
    def born(self, model: Any, places: Tensor) -> Iterator[None]:
        """While open, every token of a pass at places (B, n) spawns its k pseudo tokens, which follow all real ones, guess by guess.
        The pass needs a mask (B, 1, n, keys)."""
        decoder = model.get_decoder()
        n = places.shape[1]
        handles = []

        def ahead(number: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
                hidden, born = args[0], sum(at < number for at in self.layers)
                for one in (self.maps[i] for i, at in enumerate(self.layers) if at == number):
                    hidden, born = torch.cat((hidden, one(hidden[:, :n])), 1), born + 1
                where = torch.cat([places + i for i in range(born + 1)], 1)
                kwargs = {**kwargs, "position_ids": where, "position_embeddings": decoder.rotary_emb(hidden, where)}
                return (hidden, *args[1:]), {**kwargs, "attention_mask": grown(kwargs["attention_mask"], n, born)}

            return hook

        try:
            for number, layer in enumerate(decoder.layers):
                if number >= self.layers[0]:
                    handles.append(layer.register_forward_pre_hook(ahead(number), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, model: Any, ids: Tensor) -> Tensor:
        """Texts ids (B, L) -> logits (B, 1 + k, L, V): of the tokens, which are the model's own, and of each one's pseudo tokens."""
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril().expand(len(ids), -1, -1, -1)
        with self.born(model, places):
            logits: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        return logits.unflatten(1, (1 + len(self.layers), -1))

    def loss(self, model: Any, ids: Tensor) -> Tensor:
        """Sum over the guesses of KL(model at n + i || guess i of n), mean over batch and n."""
        logits = self(model, ids).log_softmax(-1)
        total = logits.new_zeros(())
        for i in range(1, min(len(self.layers), ids.shape[1] - 1) + 1):
            guess, truth = logits[:, i, :-i].flatten(0, 1), logits[:, 0, i:].detach().flatten(0, 1)
            total = total + F.kl_div(guess, truth, reduction="batchmean", log_target=True)
        return total

    def begin(self, state: State) -> None:
        self.guesses = None

    def draft(self, state: State) -> Draft:
        if self.guesses is None:
            return Draft(state.root[:, None], torch.zeros(1, 1, dtype=torch.long, device=state.root.device))
        parents, ranks = (x.to(state.root.device) for x in (self.shape.parents, self.shape.ranks))
        order = self.guesses.topk(int(ranks.max()) + 1, -1).indices
        tokens = state.root[:, None].repeat(1, len(parents))
        for depth, (first, stop) in enumerate(self.shape.levels):
            tokens[:, first:stop] = order[:, depth, ranks[first:stop]]
        return Draft(tokens, parents[None])

    def watch(self, state: State, draft: Draft) -> Any:
        return self.born(state.host.model, state.host.length[:, None] + draft.depths)

    def learn(self, state: State, draft: Draft, seen: Seen, path: Tensor, count: Tensor) -> None:
        last = path.gather(1, count[:, None] - 1)[:, 0]
        every = seen.logits.unflatten(1, (1 + len(self.layers), -1))
        self.guesses = every[torch.arange(len(last), device=last.device), 1:, last]


def grown(mask: Tensor, n: int, born: int) -> Tensor:
    """A mask (B, 1, n, keys) with rows and columns for the pseudo tokens of each of the n tokens, `born` apiece."""
    hides = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    shows = True if mask.dtype == torch.bool else 0.0
    own = torch.full((n, n), hides, dtype=mask.dtype, device=mask.device).fill_diagonal_(shows)
    none = torch.full_like(own, hides)
    tail = torch.cat([torch.cat([own if 0 < j <= i else none for j in range(1, born + 1)] or [none[:, :0]], 1) for i in range(born + 1)])
    return torch.cat((mask.repeat(1, 1, born + 1, 1), tail.expand(len(mask), 1, -1, -1)), -1)
