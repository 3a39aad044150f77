"""Star Attention: context encoded block by block beside an anchor, then read by queries over all hosts at once (id 293; 2024).

block i > 1 is encoded behind the first `anchor` tokens, at its true positions, and keeps its own keys and values alone
query: each host's (O_h, lse_h) over its keys;   O <- O - sigmoid(lse_h - lse) (O - O_h),   lse <- lse - logsigmoid(lse - lse_h)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, FixedBlock, Mask, Sinks
from regard.catalog.registry import get, register
from regard.engine.door import attend, attend_with_stats
from regard.errors import RegardError
from regard.nn.attention import Attention
from regard.nn.decoder import Block, Decoder
from regard.parallel.hosts import Hosts, VirtualHosts

Pair = tuple[Tensor, Tensor]


def star_mask(block: int, anchor: int | None = None) -> Mask:
    """What a token of the context sees in the first phase: its block and the anchor. An anchor's copy is encoded as the anchor itself is,
    so one forward pass under this mask (in a patched model's prefill, say) leaves the same keys and values as the blocks one by one."""
    anchor = block if anchor is None else anchor
    return Causal() & (FixedBlock(block) | Sinks(anchor) if anchor else FixedBlock(block))


@dataclass
class StarState:
    """shards: by host of this process, each layer's keys and values (B, Hkv, n, D). length: tokens so far. sent: numbers that a host
    has sent in the second phase."""

    model: Decoder
    hosts: Hosts
    shards: dict[int, list[Pair]]
    length: int
    sent: int = 0

    @property
    def last(self) -> int:
        """The host that takes the tokens of queries and answers."""
        return self.hosts.count - 1


@dataclass
class Encoded:
    """Keys and values of one host while its blocks are encoded."""

    layers: list[list[Pair]] = field(default_factory=list)

    def add(self, pairs: list[Pair]) -> None:
        self.layers = self.layers or [[] for _ in pairs]
        for into, pair in zip(self.layers, pairs, strict=True):
            into.append(pair)

    def joined(self, empty: list[Pair]) -> list[Pair]:
        if not self.layers:
            return list(empty)
        return [(torch.cat([k for k, _ in pairs], 2), torch.cat([v for _, v in pairs], 2)) for pairs in self.layers]


def mixers(model: Decoder) -> list[Attention]:
    """The layers of a decoder whose attention is plain softmax."""
    found = [block.mixer for block in cast(list[Block], list(model.blocks))]
    if any(type(layer) is not Attention or layer.mechanism != get("softmax") for layer in found):
        raise RegardError("star attention runs models of full softmax attention; expected an Attention layer of 'softmax' in every block")
    return cast(list[Attention], found)


@torch.no_grad()
def encode(model: Decoder, ids: Tensor, positions: Tensor) -> list[Pair]:
    """Keys and values of every layer for tokens ids (B, n) at positions (n,), which see one another causally."""
    x, kept = model.embed(ids), []
    for block, layer in zip(cast(list[Block], list(model.blocks)), mixers(model), strict=True):
        y = block.norm1(x)
        q, k, v, _ = layer.heads_of(y, y, positions, None)
        kept.append((k, v))
        x = x + block.scale1(layer.close(attend(q, k, v, mask=Causal()), y))
        x = x + block.scale2(block.mlp(block.norm2(x)))
    return kept


@register("star-attention", kind="module")
def star_prefill(model: Decoder, ids: Tensor, block: int, anchor: int | None = None, hosts: Hosts | int = 1) -> StarState:
    """The first phase: ids (B, L) in blocks of `block` tokens, each behind the first `anchor` tokens (None: a block), contiguous blocks a host.

    hosts: how many virtual ones, or `ProcessHosts()` in each process of a group. No keys travel. Training-free; cost linear in L.
    """
    if block < 1 or (anchor is not None and not 0 <= anchor <= block) or ids.dim() != 2 or ids.shape[1] == 0:
        raise RegardError(f"block={block}, anchor={anchor}, ids {tuple(ids.shape)}: expected 0 <= anchor <= block and ids (B, L)")
    held: Hosts = VirtualHosts(hosts) if isinstance(hosts, int) else hosts
    anchor, length = block if anchor is None else anchor, ids.shape[1]
    starts = list(range(0, length, block))
    share = -(-len(starts) // held.count)
    none = [(k[:, :, :0], v[:, :, :0]) for k, v in encode(model, ids[:, :1], torch.zeros(1, dtype=torch.long, device=ids.device))]
    shards = {}
    for host in held.mine:
        found = Encoded()
        for start in starts[host * share : (host + 1) * share]:
            stop, head = min(start + block, length), anchor if start else 0
            places = torch.cat((torch.arange(head), torch.arange(start, stop))).to(ids.device)
            found.add([(k[:, :, head:], v[:, :, head:]) for k, v in encode(model, ids[:, places], places)])
        shards[host] = found.joined(none)
    return StarState(model, held, shards, length)


def own_part(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """A host's output and log-sum-exps side by side, (B, H, Lq, Dv + 1)."""
    if k.shape[2] == 0:
        return torch.cat((v.new_zeros(*q.shape[:3], v.shape[-1]), v.new_full((*q.shape[:3], 1), float("-inf"))), -1)
    out, stats = attend_with_stats(q, k, v, mask=Causal() if causal else None)
    return torch.cat((out, (stats.shift + stats.total.log()).to(out.dtype)), -1)


def joined(parts: list[Tensor]) -> Tensor:
    """The softmax output over all hosts' keys, two hosts at a time; the first host has keys."""
    out, lse = parts[0][..., :-1], parts[0][..., -1:]
    for part in parts[1:]:
        new, more = part[..., :-1], part[..., -1:]
        out = out - torch.sigmoid(more - lse) * (out - new)
        lse = lse - F.logsigmoid(lse - more)
    return out


@torch.no_grad()
def star_decode(state: StarState, ids: Tensor) -> Tensor:
    """The second phase: logits (B, n, vocab) of tokens ids (B, n) after those in `state`, over all hosts' keys exactly.

    The last host keeps the new tokens' keys; hosts exchange outputs and log-sum-exps alone. Every process of a group must call it alike.
    """
    model = state.model
    x, positions = model.embed(ids), torch.arange(state.length, state.length + ids.shape[1], device=ids.device)
    for number, (block, layer) in enumerate(zip(cast(list[Block], list(model.blocks)), mixers(model), strict=True)):
        y = block.norm1(x)
        q, k, v, _ = layer.heads_of(y, y, positions, None)
        parts = []
        for host, layers in state.shards.items():
            if host == state.last:
                layers[number] = tuple(torch.cat(both, 2) for both in zip(layers[number], (k, v), strict=True))  # type: ignore[assignment]
            parts.append(own_part(q, *layers[number], causal=host == state.last))
        state.sent += parts[0].numel()
        x = x + block.scale1(layer.close(joined(state.hosts.gather(parts)), y))
        x = x + block.scale2(block.mlp(block.norm2(x)))
    state.length += ids.shape[1]
    return model.logits(x)
