"""Bigram-Backcopy (Guo et al., 2024): a trigger is followed by the token before it, any other token by a draw of its bigrams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RegardError

BOS = 0


@dataclass(frozen=True)
class Backcopy:
    """table (vocab, vocab): bigrams, none from or to BOS = 0. triggers: token ids."""

    table: Tensor
    triggers: Tensor

    def draw(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Tokens (count, length + 1), BOS first; the first token is of the chain's marginal without triggers."""
        start = stationary(self.table).index_fill(0, self.triggers, 0.0)
        tokens = [torch.full((count,), BOS), torch.multinomial(start, count, True, generator=generator)]
        for _ in range(length - 1):
            new = torch.multinomial(self.table[tokens[-1]], 1, generator=generator)[:, 0]
            tokens.append(torch.where(torch.isin(tokens[-1], self.triggers), tokens[-2], new))
        return torch.stack(tokens, 1)


def stationary(table: Tensor) -> Tensor:
    """The marginal of a chain: 200 steps from the even one, averaged over two to quiet periods."""
    p = torch.full((len(table),), 1.0 / (len(table) - 1), dtype=table.dtype).index_fill(0, torch.tensor(BOS), 0.0)
    for _ in range(200):
        p = 0.5 * (p + p @ table)
    return p / p.sum()


def backcopy(table: Tensor | None = None, triggers: int = 3, vocab: int = 24, alpha: float = 0.3, seed: int = 7) -> Backcopy:
    """The task: bigrams over `vocab` tokens besides BOS (None: rows drawn from Dirichlet(alpha)), its most frequent ones as triggers."""
    if table is None:
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        rows = torch.distributions.Dirichlet(torch.full((vocab,), alpha)).sample((vocab,))
        torch.random.set_rng_state(state)
        table = F.pad(rows, (1, 0, 1, 0))
        table[BOS, 1:] = 1.0 / vocab
    if table.dim() != 2 or table.shape[0] != table.shape[1] or bool((table < 0).any()) or bool(table[:, BOS].any()):
        raise RegardError(f"table has shape {tuple(table.shape)}; expected (vocab, vocab) of probabilities, none of token 0")
    if not 0 < triggers < len(table) - 1:
        raise RegardError(f"triggers={triggers}; expected 1 to {len(table) - 2}")
    return Backcopy(table, stationary(table).topk(triggers).indices)


def text_bigrams(text: str) -> Tensor:
    """The character bigrams of a text, BOS before them: the paper's table is that of tiny Shakespeare, 65 characters."""
    letters = {c: n + 1 for n, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([letters[c] for c in text])
    table = torch.zeros(len(letters) + 1, len(letters) + 1)
    table.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)
    table[BOS, 1:] = torch.bincount(ids, minlength=len(letters) + 1)[1:].float()
    empty = table.sum(1) == 0
    table[empty] = table[BOS].clone()
    return table / table.sum(1, keepdim=True)
