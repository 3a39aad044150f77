"""LongSpec: a one-layer draft with a window of its own that reads the target's last keys and values (id 119; Yang et al., 2025).

h += SelfAttn(norm h), the last 512 tokens;  h += CrossAttn(norm h) over the target's last layer's cache;  h += MLP(norm h);  logits = lm_head(h)
trained with positions j for j < sink, j + offset behind, and a cache that is p tokens stale;   tree: of all continuations of a level the c_l likeliest
tree attention: prefix without a mask (O_p, lse_p), tail under the tree's (O_t, lse_t):  w = sigmoid(lse_p - lse_t),  O = w O_p + (1 - w) O_t
Not built: the released rule of stochastic acceptance (sampling goes through `Sampled`, whose distribution is exact) and the Triton kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal, Weighted, Window
from regard.cache.rows import cache_argument
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.generate.hybrid import hybrid_tree_attention
from regard.generate.state import State, Strategy
from regard.generate.tree import Draft


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]


@register("longspec", kind="strategy")
class LongSpec(nn.Module, Strategy):
    """The draft of a transformers decoder with rotary positions (Llama and its like), which shares its embedding and output layer.

    window: tokens that the draft's own attention sees before a token. levels: nodes at each depth of the tree. It keeps the window's keys
    and values alone, `kept` of a row; train with `loss`, the target frozen.
    """

    def __init__(self, model: nn.Module, window: int = 512, levels: Sequence[int] = (4, 16, 16, 16, 16)):
        super().__init__()
        host: Any = model
        config = host.config.get_text_config()
        decoder = host.get_decoder()
        if window < 1 or not levels or min(levels) < 1 or not hasattr(decoder, "rotary_emb"):
            raise RegardError(
                f"window={window}, levels={list(levels)}, {type(model).__name__}: expected positive numbers, and a decoder with rotary positions"
            )
        dim, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.window, self.levels = getattr(config, "head_dim", None) or dim // heads, window, tuple(levels)
        self.target = (host,)  # not a part of the draft
        wide, narrow = heads * self.head_dim, kv * self.head_dim
        self.q, self.k, self.v, self.out = nn.Linear(dim, wide), nn.Linear(dim, narrow), nn.Linear(dim, narrow), nn.Linear(wide, dim, False)
        self.cross_q, self.cross_out = nn.Linear(dim, wide), nn.Linear(wide, dim, False)
        self.gate, self.up, self.down = (
            nn.Linear(*size, bias=False) for size in ((dim, config.intermediate_size),) * 2 + ((config.intermediate_size, dim),)
        )
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(dim, config.rms_norm_eps) for _ in range(3))
        for linear in (one for one in self.modules() if isinstance(one, nn.Linear)):
            nn.init.normal_(linear.weight, std=config.initializer_range)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.to(host.get_input_embeddings().weight)
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.read: list[int] = []

    def heads(self, x: Tensor, linear: nn.Linear) -> Tensor:
        return linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # type: ignore[no-any-return]

    def angles(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.target[0].get_decoder().rotary_emb(x, places)
        return found

    def head(self, h: Tensor) -> Tensor:
        y = self.norm3(h)
        return self.target[0].get_output_embeddings()(h + self.down(F.silu(self.gate(y)) * self.up(y)))  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, keys: Tensor, values: Tensor, stale: int = 1, places: Tensor | None = None) -> Tensor:
        """Training: ids (B, L), the target's last keys and values (B, Hkv, L, D) on them -> logits (B, L, V). The query at t sees the target's
        tokens up to t - stale; the first `stale` queries see none and get nothing."""
        n = ids.shape[1]
        if not 1 <= stale < n:
            raise RegardError(f"stale={stale}: expected 1 to {n - 1} for {n} tokens")
        places = torch.arange(n, device=ids.device).expand_as(ids) if places is None else places
        h = self.target[0].get_input_embeddings()(ids)
        cos, sin = self.angles(h, places)
        y = self.norm1(h)
        own = attend(
            turned(self.heads(y, self.q), cos, sin),
            turned(self.heads(y, self.k), cos, sin),
            self.heads(y, self.v),
            Weighted(mask=Causal() & Window(self.window + 1)),
        )
        h = h + self.out(own.transpose(1, 2).flatten(2))
        q = turned(self.heads(self.norm2(h), self.cross_q), cos, sin)[:, :, stale:]
        cross = attend(q, keys[:, :, :-stale], values[:, :, :-stale], Weighted(mask=Causal()))
        return self.head(h + self.cross_out(F.pad(cross.transpose(1, 2).flatten(2), (0, 0, stale, 0))))

    def places(self, length: int, limit: int, generator: torch.Generator | None = None) -> Tensor:
        """Training positions (length,) of texts below 1,200 tokens: a sink of 0 to 4 tokens where they are, the others behind a random offset."""
        at = torch.arange(length)
        room = min(30000, limit - 1000) - length
        if length >= 1200 or room < 0:
            return at
        sink, offset = (int(torch.randint(n, (), generator=generator)) for n in (5, room + 1))
        return torch.where(at < sink, at, at + offset)

    def loss(self, ids: Tensor, stale: int | None = None, places: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Mean cross-entropy of next tokens; stale is drawn from 1 to 4, places by `places`, where they are not given."""
        from transformers import DynamicCache

        model, cache = self.target[0], DynamicCache()
        own: Any = cache
        stale = int(torch.randint(1, 5, (), generator=generator)) if stale is None else stale
        if places is None:
            places = self.places(ids.shape[1], model.config.get_text_config().max_position_embeddings, generator)
        where = places.to(ids.device).expand_as(ids)
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()[None, None].expand(len(ids), 1, -1, -1)
        with torch.no_grad():
            model(input_ids=ids, position_ids=where, attention_mask=mask, use_cache=True, **{cache_argument(model): cache})
        logits = self(ids, own.layers[-1].keys, own.layers[-1].values, stale, where)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def begin(self, state: State) -> None:
        if state.host.model is not self.target[0]:
            raise RegardError("this draft belongs to another model; expected the one that it was made for")
        none = torch.zeros(
            1, self.k.weight.shape[0] // self.head_dim, 0, self.head_dim, device=state.root.device, dtype=self.k.weight.dtype
        )
        self.kept, self.read = [(none, none) for _ in state.texts], [0 for _ in state.texts]

    def remember(self, row: int, text: list[int]) -> None:
        """Keys and values of the tokens since the last step; of all the last `window` and the newest stay."""
        start = max(self.read[row], len(text) - self.window - 1)
        ids = torch.tensor([text[start:]], device=self.k.weight.device)
        h = self.target[0].get_input_embeddings()(ids)
        y = self.norm1(h)
        fresh = (
            turned(self.heads(y, self.k), *self.angles(h, torch.arange(start, len(text), device=ids.device)[None])),
            self.heads(y, self.v),
        )
        self.kept[row] = tuple(torch.cat((a, b), 2)[:, :, -(self.window + 1) :] for a, b in zip(self.kept[row], fresh, strict=True))  # type: ignore[assignment]
        self.read[row] = len(text)

    def draft(self, state: State) -> Draft:
        rows = [self.tree(state, row) for row in range(len(state.texts))]
        return Draft(torch.cat([tokens for tokens, _ in rows]), torch.cat([parents for _, parents in rows]))

    def tree(self, state: State, row: int) -> tuple[Tensor, Tensor]:
        """Tokens and parents (1, n) of one row's tree."""
        self.remember(row, state.texts[row])
        k, v = self.kept[row]
        layers, valid = state.host.cache.layers, state.host.valid[row]
        seen = [x[row : row + 1, :, valid] for x in (layers[-1].keys, layers[-1].values)] if layers and bool(valid.any()) else []
        prefix, newest = k.shape[2] - 1, len(state.texts[row]) - 1
        tokens, parents = state.root[row : row + 1][None], torch.zeros(1, 1, dtype=torch.long, device=k.device)
        level, score = torch.zeros(1, dtype=torch.long, device=k.device), torch.zeros(1, device=k.device)
        known = torch.ones(1, 1, dtype=torch.bool, device=k.device)  # whom each node descends from
        tree_k, tree_v = k[:, :, prefix:], v[:, :, prefix:]
        for below, width in enumerate(self.levels):
            h = self.target[0].get_input_embeddings()(tokens[:, level])
            y, (cos, sin) = self.norm1(h), self.angles(h, torch.full((1, len(level)), newest + below, device=k.device))
            if below:
                tree_k = torch.cat((tree_k, turned(self.heads(y, self.k), cos, sin)), 2)
                tree_v = torch.cat((tree_v, self.heads(y, self.v)), 2)
            all_k, all_v = torch.cat((k[:, :, :prefix], tree_k), 2), torch.cat((v[:, :, :prefix], tree_v), 2)
            own = hybrid_tree_attention(turned(self.heads(y, self.q), cos, sin), all_k, all_v, prefix, known[None, level])
            h = h + self.out(own.transpose(1, 2).flatten(2))
            if seen:
                q = turned(self.heads(self.norm2(h), self.cross_q), cos, sin)
                h = h + self.cross_out(attend(q, seen[0], seen[1], Weighted()).transpose(1, 2).flatten(2))
            chances = self.head(h)[0].float().log_softmax(-1) + score[:, None]
            score, best = chances.flatten().topk(min(width, chances.numel()))
            up = level[best // chances.shape[1]]
            level = torch.arange(tokens.shape[1], tokens.shape[1] + len(best), device=k.device)
            known = torch.cat((F.pad(known, (0, len(best))), torch.cat((known[up], torch.eye(len(best), device=k.device).bool()), 1)))
            tokens, parents = torch.cat((tokens, (best % chances.shape[1])[None]), 1), torch.cat((parents, up[None]), 1)
        return tokens, parents
