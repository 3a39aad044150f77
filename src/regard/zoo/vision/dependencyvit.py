"""DependencyViT: tokens push messages to their parents, and a tree of the image emerges (id 123; Ding et al., 2023).

F_h = softmax_j(q_i . k_j / sqrt(d)): child i spreads one unit over parents j;  p_i = softmax_h(W_s x_i / 0.1);  m_i <- m_i sigmoid(MLP(x_i))
y_j^h = sum_i F_h[i, j] p_i^h m_i v_i^h, that is (F^T p m) V;  dependency D[j, i] = sum_h F_h[i, j] p_i^h m_i, parent(i) = argmax_j D[j, i]
Lite: at layers 2, 5, 8, 11 a further 16% of the first tokens are left out, those that receive least (or send least).
The sizes and orders that the paper leaves open are those of an implementation for timm, for the official repository holds no code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.patch_net import DropPath, FeedForward, depth_rates, small_values
from regard.nn.images.planes import Patches
from regard.nn.parts import LayerScale, takes


@register("dependencyvit", kind="module")
class ReversedAttention(nn.Module):
    """x (B, N, dim), message (B, N) (None: ones) -> (y (B, N, dim), message of this layer (B, N), dependency D (B, N, N), parents by children).

    temperature: of the choice of heads. bias: of the head selector and the message controller. dropout: of F; proj_dropout: of y. Holds F, for sums
    run over children.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        temperature: float = 0.1,
        qkv_bias: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        proj_dropout: float = 0.0,
    ):
        super().__init__()
        if dim % heads or temperature <= 0:
            raise RegardError(f"dim={dim}, heads={heads}, temperature={temperature}; expected a multiple of heads, and a positive number")
        self.dim, self.heads, self.temperature = dim, heads, temperature
        self.select = nn.Linear(dim, heads, bias)
        self.control = nn.Sequential(nn.Linear(dim, dim // 2, bias), nn.GELU(), nn.Linear(dim // 2, 1, bias))
        self.qkv, self.out = nn.Linear(dim, 3 * dim, qkv_bias), nn.Linear(dim, dim)
        self.drop, self.out_drop = nn.Dropout(dropout), nn.Dropout(proj_dropout)

    @takes(x="batch tokens dim", message="batch tokens")
    def forward(self, x: Tensor, message: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        chosen = torch.softmax(self.select(x) / self.temperature, -1).mT  # (B, H, N)
        sent = torch.sigmoid(self.control(x))[..., 0]
        sent = sent if message is None else message * sent
        spread = self.drop(torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, -1))  # children by parents
        pushed = spread.mT * (chosen * sent[:, None])[:, :, None]
        y = self.out_drop(self.out((pushed @ v).transpose(1, 2).flatten(-2)))
        return y, sent, pushed.sum(1)


class DependencyBlock(nn.Module):
    """x + s_1 attention(LN x), pruning, x + s_2 MLP(LN x); s start at `scale`. keep: the share of tokens that go on, or 1. rank: by what tokens
    "receive" or "send"."""

    def __init__(
        self,
        dim: int,
        heads: int,
        ratio: float,
        keep: float,
        rank: str,
        scale: float,
        temperature: float,
        dropout: float,
        drop_path: float,
        eps: float,
    ):
        super().__init__()
        self.norm1, self.norm2, self.keep, self.rank = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps), keep, rank
        self.attention, self.mlp = (
            ReversedAttention(dim, heads, temperature, proj_dropout=dropout),
            FeedForward(dim, int(ratio * dim), dropout),
        )
        self.scale1, self.scale2, self.drop = LayerScale(dim, scale), LayerScale(dim, scale), DropPath(drop_path)

    def forward(self, x: Tensor, message: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """x and messages of the tokens that go on, all tokens before pruning, which of them go on (None: all), and the dependencies."""
        y, message, dependency = self.attention(self.norm1(x), message)
        x = before = x + self.drop(self.scale1(y))
        kept = None
        if self.keep < 1:
            worth = dependency.detach().abs().sum(2) if self.rank == "receive" else message.detach()
            kept = worth.topk(math.floor(self.keep * x.shape[1]), 1).indices.sort(1).values
            x, message = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])), message.gather(1, kept)
        return x + self.drop(self.scale2(self.mlp(self.norm2(x)))), message, before, kept, dependency


class DependencyViT(nn.Module):
    """Images (B, channels, side, side) -> logits (B, classes): the mean over tokens of normed tokens times their messages.

    The defaults are tiny's; small has dim 384. prune: layers, from 1, behind whose attention tokens are left out, (2, 5, 8, 11) in Lite, each a further
    `share` of the first tokens. rank: "receive" (what a token is sent, in size) or "send" (its message). `dense(x)`: all tokens' features.
    """

    def __init__(
        self,
        dim: int = 192,
        depth: int = 12,
        heads: int = 12,
        prune: Sequence[int] = (),
        share: float = 0.16,
        rank: str = "receive",
        *,
        side: int = 224,
        patch: int = 16,
        channels: int = 3,
        classes: int = 1000,
        ratio: float = 4.0,
        scale: float = 1e-6,
        temperature: float = 0.1,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        places = sorted(set(prune))
        if any(not 1 <= layer <= depth for layer in places) or not 0 < share * max(len(places), 1) < 1 or rank not in ("receive", "send"):
            raise RegardError(
                f"prune={tuple(prune)}, share={share}, rank={rank!r}; expected layers 1..{depth}, less than all tokens, 'receive' or 'send'"
            )
        self.channels, self.count = channels, (side // patch) ** 2
        self.patches, self.places = Patches(channels, dim, patch), nn.Parameter(0.02 * torch.randn(1, self.count, dim))
        keep = {layer: (1 - at * share) / (1 - (at - 1) * share) for at, layer in enumerate(places, 1)}
        (rates,) = depth_rates(drop_path, [depth])
        made = [
            DependencyBlock(dim, heads, ratio, keep.get(at, 1.0), rank, scale, temperature, dropout, rate, eps)
            for at, rate in enumerate(rates, 1)
        ]
        self.blocks, self.norm, self.head = nn.ModuleList(made), nn.LayerNorm(dim, eps), nn.Linear(dim, classes)
        for part in (self.blocks, self.head):
            part.apply(small_values)

    @takes(images="batch channels height width")
    def run(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
        """Tokens that are left (B, n, dim), normed and times their messages; their numbers among all (B, n); messages (B, n); dependencies of each layer; and
        all tokens (B, N, dim) as they were when they were left out, or at the end."""
        x = self.patches(images).flatten(2).mT
        if x.shape[1] != self.count:
            raise RegardError(f"images make {x.shape[1]} patches; expected {self.count}")
        x = x + self.places
        message: Tensor | None = None
        numbers, everything, found = torch.arange(self.count, device=x.device).expand(len(x), -1), x, []
        for block in self.blocks:
            x, message, before, kept, dependency = block(x, message)
            found.append(dependency)
            if kept is not None:
                everything = everything.scatter(1, numbers[..., None].expand_as(before), before)
                numbers = numbers.gather(1, kept)
        assert message is not None
        everything = everything.scatter(1, numbers[..., None].expand_as(x), x)
        return self.norm(x) * message[..., None], numbers, message, found, everything

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.run(images)[0].mean(1))  # type: ignore[no-any-return]

    def dense(self, images: Tensor) -> Tensor:
        """(B, N, dim): every token, normed, those left out as they were then."""
        return self.norm(self.run(images)[4])  # type: ignore[no-any-return]


def dependency_tree(dependency: Tensor) -> tuple[Tensor, Tensor]:
    """D (B, N, N), parents by children -> (parent of each token (B, N), never itself, and the root (B,), which receives most and is its own)."""
    apart = dependency.masked_fill(torch.eye(dependency.shape[-1], dtype=torch.bool, device=dependency.device), -torch.inf)
    root, parent = dependency.sum(2).argmax(1), apart.argmax(1)
    return parent.scatter(1, root[:, None], root[:, None]), root


def parts(parent: Tensor, root: Tensor) -> Tensor:
    """The subtree of each token (B, N): the token below the root through which it hangs; the root's own number for the root, and for those whose parents go round in a circle
    the least number of the circle."""
    n, at = parent.shape[1], torch.arange(parent.shape[1], device=parent.device).expand_as(parent)
    for _ in range(n):
        up = parent.gather(1, at)
        at = torch.where((up == root[:, None]) | (at == root[:, None]), at, up)
    circle, least = at, at
    for _ in range(n):
        circle = torch.where((parent.gather(1, circle) == root[:, None]) | (circle == root[:, None]), circle, parent.gather(1, circle))
        least = torch.minimum(least, circle)
    return least
