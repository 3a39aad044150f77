"""Self-attention of a diffusers UNet over merged tokens, without training: what reads them is a function."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegardError
from ..nn.images.merging import Matching, match

Attend = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]  # q, agents or None, k, v (B, H, n, D) -> (B, H, n, Dv)


class MergedAttention:
    """A patch of the first attention of every `BasicTransformerBlock` of a UNet, until `.restore()` or the end of a `with` block.

    ratio: share of a map's tokens that are merged away before attention and get what their likest one got behind it; agent_ratio: of those merged
    away to make agents (at most all but one of a region), which exist where they are fewer than half of what attends. max_downsample: maps of
    at most this stride of the image. stride: of the regions one token of which is kept, drawn anew at each call where the batch is even
    (draws: whether; seed: of the draws), the first one elsewhere.
    """

    def __init__(
        self,
        unet: nn.Module,
        attend: Attend,
        ratio: float,
        agent_ratio: float,
        max_downsample: int = 1,
        stride: tuple[int, int] = (2, 2),
        draws: bool = True,
        seed: int = 0,
    ):
        if not 0 < ratio < 1 or not 0 <= agent_ratio <= 1 or max_downsample < 1:
            raise RegardError(
                f"ratio={ratio}, agent_ratio={agent_ratio}, max_downsample={max_downsample}: expected shares, and a positive number"
            )
        blocks = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock" and hasattr(m, "attn1")]
        if not blocks:
            raise RegardError(f"{type(unet).__name__} has no BasicTransformerBlock; expected a UNet of diffusers with transformer blocks")
        for block in blocks:
            attn: Any = block.attn1
            if any(getattr(attn, name, None) is not None for name in ("group_norm", "spatial_norm", "norm_q", "norm_k")):
                raise RegardError("attn1 norms its queries or its input; expected plain self-attention")
        self.attend, self.ratio, self.agent_ratio, self.max_downsample = attend, ratio, agent_ratio, max_downsample
        self.stride, self.draws, self.draw = stride, draws, torch.Generator().manual_seed(seed)
        self.shape = (0, 0)
        self.own: list[tuple[Any, Any]] = [(block.attn1, block.attn1.processor) for block in blocks]  # type: ignore[union-attr]
        self.handles = [unet.register_forward_pre_hook(self.see, with_kwargs=True)]
        for block in blocks:
            processor = Processor(self, block.attn1.processor)  # type: ignore[union-attr]
            block.attn1.set_processor(processor)  # type: ignore[union-attr, operator]
            self.handles.append(block.register_forward_pre_hook(processor.before, with_kwargs=True))

    def see(self, module: nn.Module, args: Any, options: dict[str, Any]) -> None:
        sample = args[0] if args else options["sample"]
        self.shape = tuple(sample.shape[2:])

    def matching(self, x: Tensor) -> Matching | None:
        """Of a block's input (B, N, C); None for maps that are left alone."""
        h, w = self.shape
        down = math.ceil(math.sqrt(h * w // x.shape[1]))
        if down > self.max_downsample:
            return None
        shape = math.ceil(h / down), math.ceil(w / down)
        draw = None
        if self.draws and len(x) % 2 == 0:
            regions = shape[0] // self.stride[0], shape[1] // self.stride[1]
            draw = torch.randint(self.stride[0] * self.stride[1], regions, generator=self.draw)
        return match(x, shape, self.stride, draw)

    def restore(self) -> None:
        """Give the blocks their own attention back."""
        for handle in self.handles:
            handle.remove()
        for attn, processor in self.own:
            attn.set_processor(processor)

    def __enter__(self) -> MergedAttention:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()


class Processor:
    """What diffusers calls in place of a block's attention."""

    def __init__(self, patch: MergedAttention, own: Any):
        self.patch, self.own = patch, own
        self.found: Matching | None = None

    def before(self, block: nn.Module, args: Any, options: dict[str, Any]) -> None:
        self.found = self.patch.matching(args[0] if args else options["hidden_states"])

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **rest: Any,
    ) -> Tensor:
        if self.found is None or encoder_hidden_states is not None:
            return self.own(attn, hidden_states, encoder_hidden_states, attention_mask, **rest)  # type: ignore[no-any-return]
        if attention_mask is not None:
            raise RegardError("attention_mask for merged tokens: expected none")
        n = hidden_states.shape[1]
        count, more = int(n * self.patch.ratio), min(int(n * self.patch.agent_ratio), self.found.moves.shape[1])
        x = self.found.merge(hidden_states, count)
        agents = self.found.merge(hidden_states, more) if 2 * (n - more) < x.shape[1] else None
        q, k, v = (self.heads(attn, project(x)) for project in (attn.to_q, attn.to_k, attn.to_v))
        out = self.patch.attend(q, None if agents is None else self.heads(attn, attn.to_q(agents)), k, v)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2))) / attn.rescale_output_factor
        return self.found.unmerge(out, count)

    @staticmethod
    def heads(attn: Any, x: Tensor) -> Tensor:
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
