"""MiniMax-01's model in small: seven lightning layers to one of softmax, experts in place of MLPs, scaled residuals (id 87; MiniMax, 2025).

h = norm(x), x = alpha h + beta f(h) with f in turn lightning or softmax attention, and a mixture of experts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Mask, Padding, Recipe, Rope, Weighted
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.attention import Attention, LayerState
from regard.nn.parts import Momentary, SwiGLU, whole
from regard.zoo.linear.lightning_attention_2 import lightning, lightning_blocks


@dataclass(frozen=True)
class MiniMaxConfig:
    """Sizes of `MiniMaxLike`. period: every so manieth layer is softmax attention with rotary positions on half of each head, the others
    lightning. experts: 1 is a plain MLP; top_k: experts a token; capacity: tokens an expert takes over an even share, the rest are dropped
    over the whole batch (None: all are taken). alpha, beta: residual factors of (softmax attention, lightning, MLP). patch_dim: channels of image features to
    prepend (None: text alone). The paper: 80 layers of 6144 channels, 64 heads on 8, 32 experts of 9216, alpha = (2 * 80)^(1/4).
    """

    vocab: int = 256
    dim: int = 64
    layers: int = 8
    heads: int = 4
    kv_heads: int = 1
    period: int = 8
    hidden: int = 96
    experts: int = 4
    top_k: int = 2
    capacity: float | None = None
    alpha: tuple[float, float, float] = (1.0, 1.0, 1.0)
    beta: tuple[float, float, float] = (1.0, 1.0, 1.0)
    rope_base: float = 10000.0
    patch_dim: int | None = None

    @property
    def layer_types(self) -> tuple[str, ...]:
        return tuple("softmax" if layer % self.period == self.period - 1 else "lightning" for layer in range(self.layers))


def layer_factor(layer: int, layers: int) -> float:
    """1 - layer / (layers - 1 + 1e-5) + 1e-5: what the released model multiplies slopes by."""
    return 1 - layer / (layers - 1 + 1e-5) + 1e-5


class Experts(Momentary):
    """x (..., dim) -> the same: the `top_k` experts of a softmax router, their outputs weighed by its probabilities summing to one.

    After a forward pass `balance` holds experts * sum_e (share of tokens)_e (mean probability)_e, 1 when even: the loss that evens them.
    """

    balance: Tensor

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int, capacity: float | None = None):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise RegardError(f"top_k={top_k}: expected 1 .. experts={experts}")
        self.top_k, self.capacity = top_k, capacity
        self.router = nn.Linear(dim, experts, False)
        self.experts = nn.ModuleList([SwiGLU(dim, hidden) for _ in range(experts)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        logits = self.router(flat)
        probabilities = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        top, which = probabilities.topk(self.top_k, -1)
        top = (top / top.sum(-1, keepdim=True)).to(x.dtype)
        count = len(self.experts)
        chosen = F.one_hot(which, count).sum(1).to(probabilities.dtype)
        self.balance = count * (chosen.mean(0) / self.top_k * probabilities.mean(0)).sum()
        out = torch.zeros_like(flat)
        room = len(flat) if self.capacity is None else max(1, int(self.capacity * len(flat) * self.top_k / count))
        for at, expert in enumerate(self.experts):
            token, place = (which == at).nonzero(as_tuple=True)
            token, place = token[:room], place[:room]
            if len(token):
                out = out.index_add(0, token, expert(flat[token]) * top[token, place, None])
        return out.view_as(x)


class MiniMaxBlock(nn.Module):
    """x = alpha h + beta f(h), h = norm(x), for attention and then the experts."""

    def __init__(self, config: MiniMaxConfig, layer: int):
        super().__init__()
        kind = config.layer_types[layer]
        head_dim = config.dim // config.heads
        if kind == "lightning":
            recipe = Recipe(activation="silu", value_activation="silu", merge_norm="rms", out_gate="sigmoid", rope=False)
            mechanism: Any = replace(lightning(1 - layer_factor(layer, config.layers)), recipe=recipe)
            self.mixer = Attention(config.dim, config.heads, mechanism)
        else:
            mechanism = Weighted(position=Rope(config.rope_base, dims=head_dim // 2))
            self.mixer = Attention(config.dim, config.heads, mechanism, kv_heads=config.kv_heads)
        at = 0 if kind == "softmax" else 1
        self.factors = ((config.alpha[at], config.beta[at]), (config.alpha[2], config.beta[2]))
        self.norm1, self.norm2 = (nn.RMSNorm(config.dim, eps=1e-6) for _ in range(2))
        self.mlp: nn.Module = SwiGLU(config.dim, config.hidden)
        if config.experts > 1:
            self.mlp = Experts(config.dim, config.hidden, config.experts, config.top_k, config.capacity)

    @whole
    def step(self, x: Tensor, state: LayerState | None, mask: Mask | None, **inputs: Any) -> tuple[Tensor, LayerState]:
        h = self.norm1(x)
        y, state = self.mixer.step(h, state, mask, **inputs)
        return self.rest(h, y), state

    def rest(self, h: Tensor, y: Tensor) -> Tensor:
        (alpha, beta), (alpha_mlp, beta_mlp) = self.factors
        h = self.norm2(alpha * h + beta * y)
        return alpha_mlp * h + beta_mlp * self.mlp(h)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, mask: Mask | None, **inputs: Any) -> Tensor:
        h = self.norm1(x)
        return self.rest(h, self.mixer(h, mask=mask, **inputs))


@register("minimax-01", kind="module")
class MiniMaxLike(nn.Module):
    """tokens (B, L) (and image features (B, P, patch_dim), which come first) -> logits (B, P + L, vocab) in float32.

    keep: (B, P + L) bool, False for padding, which no layer reads or writes. `step` decodes with one state a layer: constant for lightning,
    keys and values for softmax.
    """

    def __init__(self, config: MiniMaxConfig | None = None):
        super().__init__()
        self.config = config = config or MiniMaxConfig()
        self.embed = nn.Embedding(config.vocab, config.dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.vision = None
        if config.patch_dim is not None:
            self.vision = nn.Sequential(nn.Linear(config.patch_dim, config.dim), nn.GELU(), nn.Linear(config.dim, config.dim))
        self.blocks = nn.ModuleList([MiniMaxBlock(config, layer) for layer in range(config.layers)])
        self.norm, self.head = nn.RMSNorm(config.dim, eps=1e-6), nn.Linear(config.dim, config.vocab, False)

    def start(self, tokens: Tensor, patches: Tensor | None) -> Tensor:
        x = self.embed(tokens)
        if patches is None:
            return x  # type: ignore[no-any-return]
        if self.vision is None:
            raise RegardError("patches were given to a model without patch_dim; set it in the config")
        return torch.cat((self.vision(patches), x), 1)

    def logits(self, x: Tensor) -> Tensor:
        # In float32 whatever the model's dtype: training and rollout must agree on probabilities.
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(self.norm(x).to(wide), self.head.weight.to(wide))

    def forward(self, tokens: Tensor, patches: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        x = self.start(tokens, patches)
        mask, inputs = (None, {}) if keep is None else (Padding(), {"keep": keep})
        for block in self.blocks:
            x = block(x, mask, **inputs)
        return self.logits(x)

    @whole
    def step(
        self, tokens: Tensor, states: Sequence[LayerState] | None = None, patches: Tensor | None = None, keep: Tensor | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        """New tokens after those in `states`; keep covers all tokens so far."""
        x, new = self.start(tokens, patches), []
        mask, inputs = (None, {}) if keep is None else (Padding(), {"keep": keep})
        for at, block in enumerate(self.blocks):
            x, state = block.step(x, states[at] if states else None, mask, **inputs)  # type: ignore[operator]
            new.append(state)
        return self.logits(x), new

    @property
    def balance(self) -> Tensor:
        """Mean of the experts' balance losses of the last forward pass."""
        found = [block.mlp.balance for block in self.blocks if isinstance(block.mlp, Experts)]  # type: ignore[union-attr]
        return torch.stack(found).mean() if found else torch.zeros(())  # type: ignore[arg-type]

    def cost(self, length: int) -> tuple[int, int]:
        """(flops of generating the next token, bytes of float32 state) after `length` tokens; the head and embedding are not counted."""
        c = self.config
        head_dim = c.dim // c.heads
        flops = bytes_ = 0
        for kind in c.layer_types:
            experts = min(c.top_k, c.experts) if c.experts > 1 else 1
            flops += 2 * 3 * c.dim * c.hidden * experts
            if kind == "lightning":
                flops += 2 * 5 * c.dim * c.dim + 4 * c.dim * head_dim
                bytes_ += 4 * c.dim * head_dim
            else:
                flops += 2 * c.dim * (2 * c.dim + 2 * c.kv_heads * head_dim) + 4 * c.dim * length
                bytes_ += 4 * 2 * c.kv_heads * head_dim * length
        return flops, bytes_


def local_state(k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    """What a rank's tokens alone leave behind, (B, H, D, Dv)."""
    at = torch.arange(k.shape[2], device=k.device, dtype=k.dtype)
    fade = torch.exp(-slope[:, None].to(k.dtype) * (k.shape[2] - 1 - at))[..., None]
    return (k * fade).transpose(-1, -2) @ v


def prefix_state(states: Sequence[Tensor], lengths: Sequence[int], rank: int, slope: Tensor) -> Tensor:
    """The state that rank meets, from the gathered states and lengths of all ranks."""
    total = torch.zeros_like(states[0])
    between = 0
    for u in range(rank - 1, -1, -1):
        total = total + torch.exp(-slope.to(total.dtype) * between)[:, None, None] * states[u]
        between += lengths[u]
    return total


def lasp_plus(shards: Sequence[tuple[Tensor, Tensor, Tensor]], slope: Tensor) -> tuple[list[Tensor], int]:
    """Each virtual rank's (q, k, v) (B, H, L_r, D) and slope (H,) >= 0 -> (each rank's output, bytes that the one all-gather moves to each).

    All ranks make their state and their own output at the same time; only the states travel, whatever the length.
    """
    if not shards:
        raise RegardError("no shards were given; expected one (q, k, v) a rank")
    states = [local_state(k, v, slope) for _, k, v in shards]
    lengths = [k.shape[2] for _, k, _ in shards]
    outs = []
    for rank, (q, k, v) in enumerate(shards):
        local = lightning_blocks(q, k, v, slope)[0]
        at = torch.arange(1, q.shape[2] + 1, device=q.device, dtype=q.dtype)
        fade = torch.exp(-slope[:, None].to(q.dtype) * at)[..., None]
        outs.append(local + (q * fade) @ prefix_state(states, lengths, rank, slope))
    return outs, (len(states) - 1) * states[0].numel() * states[0].element_size()


def lightning_packed(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, edges: Tensor) -> Tensor:
    """Documents packed into one sequence, q, k (1, H, N, D), v (1, H, N, Dv): edges (documents + 1,) = 0, ..., N. No document reads another.

    Documents of one length run as a batch.
    """
    if edges.dim() != 1 or int(edges[0]) != 0 or int(edges[-1]) != q.shape[2] or bool((edges.diff() <= 0).any()) or len(q) != 1:
        raise RegardError(f"edges={edges.tolist()}: expected a batch of 1 and rising positions from 0 to the length {q.shape[2]}")
    out = torch.empty_like(v)
    lengths = edges.diff()
    for length in lengths.unique().tolist():
        at = edges[:-1][lengths == length][:, None] + torch.arange(length, device=edges.device)  # (documents, length)
        a, b, c = (x[0][:, at].transpose(0, 1) for x in (q, k, v))
        out[0, :, at.flatten()] = lightning_blocks(a, b, c, slope)[0].transpose(0, 1).flatten(1, 2)
    return out
