"""A small decoder language model around any mechanism: pre-norm, SwiGLU, optional rotary positions, byte-level by default."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Mechanism, Padding
from ..catalog.making import placeable, placed
from ..errors import RegardError
from .attention import LayerState
from .mixers import mixer
from .parts import GatedMLP, LayerScale, Momentary, head_norm, whole


class Block(Momentary):
    """x + attention(norm(x)), then x + mlp(norm(x)). `mixer` may be any module with forward(x) and step(x, state); one that says
    `residual = True` brings its own norm and residual; one that gives (y, cost) leaves the cost of its last pass in `cost`."""

    cost: Tensor | None = None

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, layer_scale: float | None = None, norm: str = "rms", mlp: str = "swiglu"):
        super().__init__()
        self.whole = bool(getattr(mixer, "residual", False))
        self.norm1, self.norm2 = nn.Identity() if self.whole else head_norm(norm, dim), head_norm(norm, dim)
        self.mixer, self.mlp = mixer, GatedMLP(dim, hidden, mlp)
        scales = [nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2)]
        self.scale1, self.scale2 = scales

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        """given: for the mixer, such as mask=Padding(), keep=..."""
        self.check(given)
        y = self.mixer(x if self.whole else self.norm1(x), **given)
        y, self.cost = y if isinstance(y, tuple) else (y, None)
        x = y if self.whole else x + self.scale1(y)
        return x + self.scale2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]

    def check(self, given: Mapping[str, Any]) -> None:
        """RegardError where the mixer reads no mask and one is given."""
        if given and "mask" not in inspect.signature(self.mixer.forward).parameters:
            raise RegardError(f"{type(self.mixer).__name__} takes no mask, so no padding; expected whole sequences, or another mechanism")

    @whole
    def step(self, x: Tensor, state: Any, **given: Any) -> tuple[Tensor, Any]:
        self.check(given)
        y, state = self.mixer.step(x if self.whole else self.norm1(x), state, **given)  # type: ignore[operator]
        x = y if self.whole else x + self.scale1(y)
        return x + self.scale2(self.mlp(self.norm2(x))), state


@placeable
class Decoder(nn.Module):
    """tokens (B, L) -> logits (B, L, vocab).

    mechanism: one for all layers, or a sequence with one a layer (names, also of layers such as "mega", descriptions, or ready modules). rope: rotary positions where
    the mechanism has none. hidden: width of the MLP (None: 8/3 dim, rounded to 16). norm: of `head_norm`; mlp: "swiglu", or "sglu"
    without activation. Embedding and output share weights. device, dtype: of the parameters.
    """

    @placed
    def __init__(
        self,
        mechanism: str | Mechanism | Sequence[str | Mechanism | nn.Module] = "softmax",
        *,
        vocab: int = 256,
        dim: int = 128,
        layers: int = 2,
        heads: int = 4,
        kv_heads: int | None = None,
        hidden: int | None = None,
        rope: bool = True,
        context_len: int = 1024,
        layer_scale: float | None = None,
        norm: str = "rms",
        mlp: str = "swiglu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        one_for_all = isinstance(mechanism, (str, Mechanism))
        chosen: list[str | Mechanism | nn.Module] = [mechanism] * layers if one_for_all else list(mechanism)  # type: ignore[list-item, arg-type]
        if len(chosen) != layers:
            raise RegardError(f"mechanism names {len(chosen)} layers; expected layers={layers}")
        hidden = hidden or -(-dim * 8 // 3 // 16) * 16
        self.embed = nn.Embedding(vocab, dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList()
        for one in chosen:
            layer = one if isinstance(one, nn.Module) else mixer(one, dim, heads, kv_heads=kv_heads, rope=rope, context_len=context_len)
            self.blocks.append(Block(dim, layer, hidden, layer_scale, norm, mlp))
        self.norm = head_norm(norm, dim)
        for block in self.blocks:  # residual branches start small, so that depth does not change the scale of the stream
            block.mlp.down.weight.data.div_((2 * layers) ** 0.5)  # type: ignore[union-attr, operator]

    def logits(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.embed.weight.T  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep (B, L) bool: tokens that are no padding (None: all)."""
        given = {} if keep is None else {"mask": Padding(), "keep": keep}
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, **given)
        return self.logits(x)

    @whole
    def step(self, tokens: Tensor, states: list[LayerState] | None = None, keep: Tensor | None = None) -> tuple[Tensor, list[LayerState]]:
        """New tokens (B, n) after those in `states` -> (logits (B, n, vocab), new states). keep: of all tokens so far, as in `forward`."""
        given = {} if keep is None else {"mask": Padding(), "keep": keep}
        x, new = self.embed(tokens), []
        for at, block in enumerate(self.blocks):
            x, state = block.step(x, states[at] if states else None, **given)  # type: ignore[operator]
            new.append(state)
        return self.logits(x), new

    @torch.no_grad()
    def generate(self, prompt: Tensor, count: int, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """prompt (B, n) -> (B, n + count): the prompt once, then one token at a time from the states. temperature 0 is greedy."""
        if prompt.shape[1] < 1:
            raise RegardError("prompt is empty; expected at least one token")
        tokens = [prompt]
        logits, states = self.step(prompt)
        for _ in range(count):
            last = logits[:, -1]
            if temperature == 0:
                new = last.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)
            tokens.append(new)
            logits, states = self.step(new, states)
        return torch.cat(tokens, 1)
