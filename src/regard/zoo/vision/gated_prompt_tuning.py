"""Gated prompt tuning: prompts of a frozen ViT that change from a block of their own choice on (id 237; Yoo et al., 2023).

P_next = g_l P_out + (1 - g_l) P_in,  g_l = sigmoid(theta_l), theta_l = -gate_init at first, in all blocks but the last
attention of block l: softmax(q k^T / (sqrt(d) tau_l)),  tau_l = 1 at first, kept in [0.01, 10]
g = 0: every block sees the raw prompts;  g = 1: shallow prompt tuning.  The class token and patches always read them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.vit_host import after_attention, attention, embedded, frozen
from regard.nn.parts import takes

POOLS = ("all", "patches", "prompts", "class")


@register("gated-prompt-tuning", kind="module")
class GatedPromptTuner(nn.Module):
    """Images (B, C, H, W) -> logits (B, classes), or pooled features with classes=0; prompts, gates, temperatures and the head learn.

    kind: "gated", or the baselines "shallow" (gates open) and "deep" (prompts of its own for every block). temperature: whether tau learns
    (not with "deep"). pool: "all" tokens but the class token, prompts included (MAE's), "patches", "prompts", or the "class" token; the mean is
    normed by the host's last norm. dropout: of prompts. span: where tau is kept.
    """

    def __init__(
        self,
        vit: nn.Module,
        prompts: int = 100,
        classes: int = 0,
        kind: str = "gated",
        gate_init: float = 10.0,
        temperature: bool = True,
        pool: str = "all",
        dropout: float = 0.0,
        span: tuple[float, float] = (0.01, 10.0),
    ):
        super().__init__()
        if kind not in ("gated", "shallow", "deep") or pool not in POOLS or prompts < 1:
            raise RegardError(
                f"kind={kind!r}, pool={pool!r}, prompts={prompts}; expected gated, shallow or deep, one of {POOLS}, and at least 1"
            )
        if kind == "deep" and temperature:
            raise RegardError(
                "temperature=True with kind='deep'; expected temperature=False, for only prompts that pass through blocks have one"
            )
        self.vit = frozen(vit)
        self.count, self.kind, self.pool, self.span = prompts, kind, pool, span
        dim, depth = self.vit.embed_dim, len(self.vit.blocks)
        patch = self.vit.patch_embed.proj
        self.colours, self.prefix = patch.in_channels, self.vit.num_prefix_tokens
        if pool == "class" and not self.prefix:
            raise RegardError("pool='class' of a host without a class token; expected 'all', 'patches' or 'prompts'")
        edge = math.sqrt(6.0 / (3 * math.prod(patch.kernel_size) + dim))
        self.prompts = nn.Parameter(torch.empty(depth if kind == "deep" else 1, prompts, dim).uniform_(-edge, edge))
        self.gates = nn.Parameter(torch.full((depth - 1,), -gate_init)) if kind == "gated" else None
        self.temperatures = nn.Parameter(torch.ones(depth)) if temperature else None
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(dim, classes) if classes else nn.Identity()

    def train(self, mode: bool = True) -> GatedPromptTuner:
        super().train(mode)
        self.vit.eval()
        return self

    def put(self, x: Tensor, prompts: Tensor, replace: bool) -> Tensor:
        """Prompts behind the first tokens of x: in place of those there, or between."""
        behind = self.prefix + (self.count if replace else 0)
        return torch.cat((x[:, : self.prefix], prompts.expand(len(x), -1, -1), x[:, behind:]), 1)

    @takes(images="batch colours height width")
    def features(self, images: Tensor) -> Tensor:
        """Pooled and normed, (B, dim)."""
        x = self.put(embedded(self.vit, images), self.drop(self.prompts[:1].expand(len(images), -1, -1)), replace=False)
        at = slice(self.prefix, self.prefix + self.count)
        if self.temperatures is not None:
            with torch.no_grad():
                self.temperatures.clamp_(*self.span)
        for number, block in enumerate(self.vit.blocks):
            if self.kind == "deep" and number:
                x = self.put(x, self.drop(self.prompts[number : number + 1].expand(len(x), -1, -1)), replace=True)
            before = x[:, at]
            tau: Any = 1.0 if self.temperatures is None else self.temperatures[number]
            x = after_attention(block, x, attention(block.attn, block.norm1(x), tau))
            if self.gates is not None and number < len(self.gates):
                gate = torch.sigmoid(self.gates[number])
                x = self.put(x, gate * x[:, at] + (1 - gate) * before, replace=True)
        if self.pool == "class":
            return self.vit.norm(x)[:, 0]  # type: ignore[no-any-return]
        parts = {"all": slice(self.prefix, None), "patches": slice(at.stop, None), "prompts": at}
        return self.vit.norm(x[:, parts[self.pool]].mean(1))  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))  # type: ignore[no-any-return]
