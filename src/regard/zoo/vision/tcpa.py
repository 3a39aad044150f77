"""Token coordinated prompt attention: each token of a frozen ViT reads the prompts it matches (id 298; Liu et al., 2025).

token t picks the top-k prompts by cos(t, key_j), the class token from a pool of its own;  loss = mean(1 - cos of the chosen), a layer
[class, its prompts, patches' prompts, patches] -> softmax, then weights times the mask (released) or the mask before the softmax
rows of prompts are dropped behind the attention; prompts are new in each block.  L = CE + w sum_l loss_l
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Explicit
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.images.vit_host import after_attention, closed, embedded, frozen, heads_of
from regard.nn.parts import takes

MASKS = ("after", "before", "none")


class PromptPool(nn.Module):
    """`size` prompts of `length` tokens a layer, each with a key; both uniform in [-1, 1] at first."""

    def __init__(self, layers: int, dim: int, size: int = 20, length: int = 4, top: int = 3):
        super().__init__()
        if not 1 <= top <= size or length < 1:
            raise RegardError(f"top={top}, size={size}, length={length}; expected 1 <= top <= size, and length from 1")
        self.size, self.length, self.top = size, length, top
        self.keys = nn.Parameter(torch.empty(layers, size, dim).uniform_(-1, 1))
        self.prompts = nn.Parameter(torch.empty(layers, size, length, dim).uniform_(-1, 1))

    def match(self, tokens: Tensor, layer: int, draw: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens (B, N, dim) -> which prompts each may read (B, N, size) bool, and mean(1 - cos) of those. draw (B, N, size): numbers
        whose smallest choose in place of the cosines (the random start)."""
        cosines = F.normalize(tokens, dim=-1) @ F.normalize(self.keys[layer], dim=-1).T
        chosen = (cosines if draw is None else -draw).topk(self.top, -1).indices
        seen = torch.zeros_like(cosines, dtype=torch.bool).scatter(-1, chosen, True)
        off = 1 - cosines.gather(-1, chosen)
        return seen, off.sum() / max(off.numel(), 1)


@register("tcpa", kind="module")
class TCPA(nn.Module):
    """Images (B, C, H, W) -> (logits (B, classes), sum over layers of matching losses). Pools and the head learn; the host is frozen.

    own: pool of the class token, shared: of patches; dictionaries of `PromptPool`'s size, length and top. mask: "after" the softmax, without
    renormalising, "before" it, or "none" (VPT-deep with dropped prompts). fourier: prompts as the real part of their 2-D transform. dropout: of
    prompts. random_choice: prompts by chance, in the first epochs of training.
    """

    def __init__(
        self,
        vit: nn.Module,
        classes: int,
        own: dict[str, int] | None = None,
        shared: dict[str, int] | None = None,
        mask: str = "after",
        fourier: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.vit = frozen(vit)
        if mask not in MASKS or self.vit.num_prefix_tokens != 1:
            raise RegardError(
                f"mask={mask!r}, host with {self.vit.num_prefix_tokens} first tokens; expected one of {MASKS}, and a class token alone"
            )
        depth, dim = len(self.vit.blocks), self.vit.embed_dim
        self.own, self.shared = PromptPool(depth, dim, **(own or {})), PromptPool(depth, dim, **(shared or {}))
        self.mask, self.fourier, self.colours = mask, fourier, self.vit.patch_embed.proj.in_channels
        self.drop, self.head, self.random_choice = nn.Dropout(dropout), nn.Linear(dim, classes), False

    def train(self, mode: bool = True) -> TCPA:
        super().train(mode)
        self.vit.eval()
        return self

    def prompts(self, layer: int, batch: int) -> Tensor:
        """(B, P, dim), the class token's first."""
        made = torch.cat([pool.prompts[layer].flatten(0, 1) for pool in (self.own, self.shared)])
        made = self.drop(made.expand(batch, -1, -1))
        return torch.fft.fft2(made).real if self.fourier else made

    def visible(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Which of [class, prompts, patches] each of [class, patches] reads, (B, 1 + N, 1 + P + N) bool, and the matching loss."""
        parts, loss = [], x.new_zeros(())
        for pool, tokens in ((self.own, x[:, :1]), (self.shared, x[:, 1:])):
            draw = torch.rand(*tokens.shape[:2], pool.size, device=x.device) if self.random_choice and self.training else None
            seen, off = pool.match(tokens, layer, draw)
            parts.append(seen.repeat_interleave(pool.length, -1))
            loss = loss + off
        first, rest = parts
        sees = x.new_ones(x.shape[0], x.shape[1], x.shape[1], dtype=torch.bool)
        wide = torch.cat((F.pad(first, (0, rest.shape[-1])), F.pad(rest, (first.shape[-1], 0))), 1)
        return torch.cat((sees[..., :1], wide, sees[..., 1:]), -1), loss

    def weights(self, attn: nn.Module, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        """(B, H, 1 + N, 1 + P + N), masked as `mask` says."""
        s = attn.scale * q @ k.mT  # type: ignore[operator]
        if self.mask == "before":
            s = s.masked_fill(~seen[:, None], -torch.inf)
        p = torch.softmax(s, -1)
        return p * seen[:, None] if self.mask == "after" else p

    @takes(images="batch colours height width")
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x, total = embedded(self.vit, images), images.new_zeros(())
        for layer, block in enumerate(self.vit.blocks):
            prompts = self.prompts(layer, len(x))
            seen, loss = self.visible(x, layer)
            total = total + loss
            y = block.norm1(torch.cat((x[:, :1], prompts, x[:, 1:]), 1))
            q, k, v = heads_of(block.attn, y)
            count = prompts.shape[1]
            q, own = (torch.cat((z[..., :1, :], z[..., 1 + count :, :]), -2) for z in (q, y))
            if self.mask == "after":  # the weights that are left do not sum to one, so they are held
                read = self.weights(block.attn, q, k, seen) @ v
            elif self.mask == "before":
                read = attend(q, k, v, mask=Explicit(), visible=seen[:, None], scale=block.attn.scale)
            else:
                read = attend(q, k, v, scale=block.attn.scale)
            x = after_attention(block, x, closed(block.attn, read, own))
        return self.head(self.vit.fc_norm(self.vit.norm(x)[:, 0])), total
