"""Multi-token attention: convolutions over queries, keys and heads of logits and of weights (id 11; Golovneva et al., 2025).

C_ij = sum_{a, b} theta_ab S_(i-a)(j+b),  p = softmax(C),  then the same kind of convolution on p; future entries count as 0
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.algebra import Rope, row_softmax
from regard.catalog.registry import register
from regard.engine.reference import repeat_heads
from regard.errors import RegardError
from regard.nn.parts import takes, whole

ROWS = 256  # queries worked on at once


@dataclass
class TokenCache:
    """Keys and values so far, and the last queries that convolutions still reach, (B, H, n, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    length: int


class KeyQueryConv(nn.Module):
    """Depthwise convolution of (B, H, rows, keys) over the last `queries` rows and `keys` columns, centred, or with side="left" the last
    ones; it starts as the identity."""

    def __init__(self, heads: int, queries: int, keys: int, side: str = "both"):
        super().__init__()
        if side not in ("both", "left"):
            raise RegardError(f"side={side!r}; expected both or left")
        if queries < 1 or keys < 1 or (side == "both" and keys % 2 == 0):
            raise RegardError(f"queries={queries}, keys={keys}: expected positive sizes, the second odd where it is centred")
        self.right = keys // 2 if side == "both" else 0
        self.weight = nn.Parameter(torch.zeros(heads, 1, queries, keys))
        self.weight.data[:, :, -1, keys - 1 - self.right] = 1

    def forward(self, s: Tensor) -> Tensor:
        heads, _, queries, keys = self.weight.shape
        return F.conv2d(F.pad(s, (keys - 1 - self.right, self.right, queries - 1, 0)), self.weight, groups=heads)


class HeadMix(nn.Module):
    """Heads in groups of `group` mixed by a matrix W each, out_f = sum_h W_fh in_h, from the identity."""

    def __init__(self, heads: int, group: int):
        super().__init__()
        if heads % group:
            raise RegardError(f"heads={heads} is not a multiple of head groups of {group}")
        self.weight = nn.Parameter(torch.eye(group).repeat(heads // group, 1, 1))

    def forward(self, s: Tensor) -> Tensor:
        parts = s.unflatten(1, (self.weight.shape[0], -1))
        return torch.einsum("bghqk,gfh->bgfqk", parts, self.weight).flatten(1, 2)


@register("mta", kind="module")
class MultiTokenAttention(nn.Module):
    """Causal, x (B, L, dim) -> (B, L, dim). queries, keys: sizes of the convolution of logits (pre), post_queries, post_keys of that of
    weights (post; None: the same); convolve: True (both), "pre", "post" or False (the published model has them in every 4th layer). side:
    "both" sides of a key, or those to its "left". pre_mix, post_mix: heads in a group that are mixed (None: all, 0: no mixing). norm:
    RMSNorm a head with norm_eps, times 1 - lambda_init = 0.2 + 0.6 exp(-0.3 depth) where `depth` is given. gate: True, times sigmoid(w.o + b)
    a head, "full", sigmoid(W o + b), or False. head_dim: None for dim / heads. kv_heads: key and value heads (None: heads).

    Rows of weights are formed a block at a time and recomputed in the backward pass: memory is blocks of rows, not L x L.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        queries: int = 6,
        keys: int = 11,
        pre_mix: int | None = None,
        post_mix: int | None = None,
        norm: bool = True,
        depth: int | None = None,
        gate: bool | str = True,
        convolve: bool | str = True,
        rope: bool = False,
        *,
        post_queries: int | None = None,
        post_keys: int | None = None,
        side: str = "both",
        head_dim: int | None = None,
        kv_heads: int | None = None,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.dim = dim
        if head_dim is None and dim % heads:
            raise RegardError(f"dim={dim} is not a multiple of heads={heads}; pass head_dim=... to choose it")
        self.kv_heads = kv_heads or heads
        if heads % self.kv_heads or convolve not in (True, False, "pre", "post") or gate not in (True, False, "full"):
            raise RegardError(
                f"kv_heads={kv_heads}, convolve={convolve!r}, gate={gate!r}; expected a divisor of heads={heads}, True, False, pre or post, "
                "and True, False or full"
            )
        self.heads, width = heads, head_dim or dim // heads
        self.q, self.out = nn.Linear(dim, heads * width, bias=False), nn.Linear(heads * width, dim, bias=False)
        self.k, self.v = (nn.Linear(dim, self.kv_heads * width, bias=False) for _ in range(2))
        pre, post = ((queries, keys), (post_queries or queries, post_keys or keys))
        self.pre = KeyQueryConv(heads, *pre, side) if convolve in (True, "pre") else nn.Identity()
        self.post = KeyQueryConv(heads, *post, side) if convolve in (True, "post") else nn.Identity()
        self.reach = sum(size[0] - 1 for size, on in ((pre, self.pre), (post, self.post)) if isinstance(on, KeyQueryConv))
        self.pre_mix, self.post_mix = (HeadMix(heads, heads if n is None else n) if n != 0 else nn.Identity() for n in (pre_mix, post_mix))
        self.norm = nn.RMSNorm(width, eps=norm_eps) if norm else nn.Identity()
        self.factor = 1.0 if depth is None else 0.2 + 0.6 * math.exp(-0.3 * depth)
        self.gate = nn.Linear(width, width if gate == "full" else 1) if gate else None
        self.rope = Rope() if rope else None

    def heads_of(self, x: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            layer(x).unflatten(-1, (n, -1)).transpose(1, 2)
            for layer, n in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        if self.rope is not None:
            at = torch.arange(position, position + x.shape[1], device=x.device)
            q, k = self.rope.rotate(q, at), self.rope.rotate(k, at)
        return q, k, v

    def rows(self, q: Tensor, k: Tensor, v: Tensor, first: int, drop: int) -> Tensor:
        """Outputs of the queries after the first `drop` of q, which stand at `first`, first + 1, ...; those dropped feed convolutions."""
        k, v = repeat_heads(k, self.heads), repeat_heads(v, self.heads)
        at = torch.arange(first, first + q.shape[2], device=q.device)
        seen = (at[:, None] >= torch.arange(k.shape[2], device=q.device))[None, None]
        s = torch.where(seen, q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, 0.0)
        s = self.pre_mix(self.pre(s))
        p = row_softmax(s, seen.expand_as(s))
        p = torch.where(seen, self.post(p), 0.0)
        return self.post_mix(p)[:, :, drop:] @ v  # type: ignore[no-any-return]

    def close(self, o: Tensor) -> Tensor:
        o = self.norm(o) * self.factor
        o = o if self.gate is None else torch.sigmoid(self.gate(o)) * o
        return self.out(o.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    @takes(x="batch length dim")
    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """documents (B, L): ids of packed documents, one after another; convolutions and attention stay inside each."""
        q, k, v = self.heads_of(x, 0)
        if documents is None:
            return self.close(self.blocks(q, k, v))
        samples = []
        for b in range(x.shape[0]):
            lengths = documents[b].unique_consecutive(return_counts=True)[1].tolist()
            parts = zip(*(y[b : b + 1].split(lengths, 2) for y in (q, k, v)), strict=True)
            samples.append(torch.cat([self.blocks(*part) for part in parts], 2))
        return self.close(torch.cat(samples))

    def blocks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A document's outputs, a block of rows at a time."""
        outs = []
        for start in range(0, q.shape[2], ROWS):
            stop, first = min(start + ROWS, q.shape[2]), max(0, start - self.reach)
            given = (q[:, :, first:stop], k[:, :, :stop], v[:, :, :stop], first, start - first)
            outs.append(checkpoint(self.rows, *given, use_reentrant=False) if torch.is_grad_enabled() else self.rows(*given))
        return torch.cat(outs, 2)

    @whole
    @takes(x="batch length dim")
    def step(self, x: Tensor, state: TokenCache | None = None) -> tuple[Tensor, TokenCache]:
        """New tokens x (B, n, dim) after those in `state`; equal to `forward` over all of them."""
        q, k, v = self.heads_of(x, 0 if state is None else state.length)
        old = TokenCache(q[:, :, :0], k[:, :, :0], v[:, :, :0], 0) if state is None else state
        new = TokenCache(torch.cat((old.q, q), 2), torch.cat((old.k, k), 2), torch.cat((old.v, v), 2), old.length + x.shape[1])
        o = self.rows(new.q, new.k, new.v, new.length - new.q.shape[2], old.q.shape[2])
        return self.close(o), replace(new, q=new.q[:, :, max(0, new.q.shape[2] - self.reach) :])


def find_block(count: int, blocks: int = 6, size: int = 5, asked: int = 2, letters: int = 26, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The toy task: tokens (count, blocks * (size + 1) + asked), blocks of random letters each closed by a separator, then `asked` letters;
    the answer (count,) is the only block that holds all of them."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[Tensor] = []
    answers: list[int] = []
    while len(tokens) < count:
        text = torch.randint(letters, (blocks, size), generator=generator)
        answer = int(torch.randint(blocks, (1,), generator=generator))
        query = text[answer, torch.randperm(size, generator=generator)[:asked]]
        holds = (text[:, :, None] == query).any(1).all(-1)
        if int(holds.sum()) == 1 and query.unique().numel() == asked:
            tokens.append(torch.cat((F.pad(text, (0, 1), value=letters).flatten(), query)))
            answers.append(answer)
    return torch.stack(tokens), torch.tensor(answers)
