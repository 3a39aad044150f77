"""ProxyAttn: few proxy heads rank the blocks, every head says how many it needs (id 276; Wang et al., 2025).

I_c(u, w) = max over sampled (i, j) of block pair (u, w) of softmax(q_c k_c^T), q_c, k_c means over a group of heads
head h keeps the best ceil(r_h available) blocks of a row, r_h: the share that holds gamma of its last queries' mass
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import Causal, Chosen, Selection, Sizes, View, Weighted, bind
from regard.algebra.blocks import block_sums, heads_of, top_k
from regard.algebra.probes import last_mass
from regard.catalog.registry import register
from regard.errors import RegardError


@register("proxyattn")
def proxyattn(groups: int | None = None, gamma: float = 0.95, block_size: int = 128, stride: int = 8, min_blocks: int = 1) -> Weighted:
    """groups: proxy heads (None: one a key head). stride: every so many queries and keys are scored. min_blocks: a row's least.
    Scores evaluated: groups (L / stride)^2 + heads block_size L. A prompt after others runs dense."""
    if block_size % stride:
        raise RegardError(f"block_size={block_size} is not a multiple of stride={stride}")
    constants = {"groups": groups, "gamma": gamma, "block_size": block_size, "stride": stride, "min_blocks": min_blocks}
    return Weighted(
        mask=Causal(),
        select=Chosen(
            bind(proxy_plan, **constants),
            ahead=True,
            decode=False,
            by_sequence=True,
            cost=bind(proxy_cost, groups=groups, block_size=block_size, stride=stride),
        ),
    )


def evaluations(heads: int, length: int, groups: int, block_size: int, stride: int) -> int:
    """Token pairs scored by the plan."""
    sampled = -(-length // stride)
    return groups * sampled * sampled + heads * min(block_size, length) * length


def proxy_cost(sizes: Sizes, *, groups: int | None, block_size: int, stride: int) -> int:
    return 2 * sizes.batch * sizes.head_dim * evaluations(sizes.heads, sizes.k_len, groups or sizes.kv_heads, block_size, stride)


def block_importance(q: Tensor, k: Tensor, groups: int, block_size: int, stride: int) -> Tensor:
    """(B, groups, n, n): the largest sampled probability of each block pair, by proxy heads."""
    proxy_q, proxy_k = (x.unflatten(1, (groups, -1)).mean(2)[..., ::stride, :] for x in (q, heads_of(k, q.shape[1])))
    at = torch.arange(0, k.shape[-2], stride, device=q.device)
    per, later = block_size // stride, at > at[:, None]
    count, rows = -(-len(at) // per), []
    for start in range(0, len(at), per):  # a row of blocks at a time, as far as it sees
        stop = min(start + per, len(at))
        s = proxy_q[..., start:stop, :] @ proxy_k[..., :stop, :].transpose(-1, -2)
        s[..., start:].masked_fill_(later[start:stop, start:stop], float("-inf"))
        p = torch.nn.functional.pad(s.softmax(-1).amax(-2), (0, -stop % per))
        rows.append(torch.nn.functional.pad(p.unflatten(-1, (-1, per)).amax(-1), (0, count - start // per - 1)))
    return torch.stack(rows, -2)


def head_shares(q: Tensor, k: Tensor, gamma: float, block_size: int) -> Tensor:
    """(B, H): the share of available blocks that reaches mass gamma in the last block of queries."""
    mass = block_sums(last_mass(q, k, min(block_size, q.shape[-2]))[0], block_size)
    ordered = mass.sort(-1, descending=True).values.cumsum(-1)
    return ((ordered < gamma * (1 - 1e-12)).sum(-1) + 1).clamp(max=mass.shape[-1]).to(q.dtype) / mass.shape[-1]


def proxy_plan(
    q: Tensor, k: Tensor, view: View, *, groups: int | None, gamma: float, block_size: int, stride: int, min_blocks: int
) -> Selection | None:
    """Which key blocks each block of queries reads (q times scale)."""
    heads, length = q.shape[1], k.shape[-2]
    if gamma >= 1 or q.shape[-2] != length:
        return None
    groups = groups or k.shape[1]
    importance = block_importance(q, k, groups, block_size, stride).repeat_interleave(heads // groups, 1)
    count = importance.shape[-1]
    available = torch.arange(1, count + 1, device=q.device)
    causal = torch.arange(count, device=q.device) < available[:, None]
    wanted = (head_shares(q, k, gamma, block_size)[..., None] * available - 1e-9).ceil().clamp(min=min_blocks)
    forced = torch.eye(count, dtype=torch.bool, device=q.device) | (torch.arange(count, device=q.device) == 0)
    return Selection(top_k(importance, causal, wanted[..., None]) | (forced & causal), block_size, block_size)
