"""One attention call of a model: what came, told apart into what a mechanism needs and what the model's own attention would have read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegardError
from .host import mask_form, named_by, own_attention, own_eager
from .sight import Sight, look

READ = frozenset({"scaling", "dropout", "is_causal", "softcap", "s_aux", "sinks", "position_bias", "sliding_window", "indices"})
PLAIN = frozenset({"module", "query", "key", "value", "attention_mask", "output_attentions", "deterministic"})
CHOSEN = ("block_indices",)  # choices of keys that plain attention gets in its mask, and only others by name


@dataclass
class Call:
    """q (B, H, Lq, D), k, v (B, Hkv, Lk, D) of one dtype, and everything else by the name the model gave it."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Any
    given: dict[str, Any]

    def check(self) -> None:
        """Raise for arguments that change the model's own attention and that no part here stands for."""
        eager = own_eager(self.module)
        read = (named_by(eager) if eager is not None else frozenset()) | set(CHOSEN)
        for name in read - READ - PLAIN:
            if self.given.get(name) is not None:
                raise RegardError(
                    f"{type(self.module).__name__} gives its attention {name}=..., which changes it in a way that no part of regard stands "
                    "for; expected layers without it (layers=[...])"
                )

    def own(self) -> tuple[Tensor, Any]:
        """What the model's own attention gives, exactly: (B, Lq, H, Dv), and its weights or None."""
        found: tuple[Tensor, Any] = own_attention(self.module)(
            self.module, self.query, self.key, self.value, self.attention_mask, **self.given
        )
        return found

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v in the dtype in which SDPA would take them: autocast's, where it is on."""
        q, k, v = self.query, self.key, self.value
        kind = q.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
        return q, k, v

    @property
    def scale(self) -> float | None:
        return self.given.get("scaling")

    @property
    def dropout(self) -> float:
        return float(self.given.get("dropout") or 0.0) if self.module.training else 0.0

    @property
    def softcap(self) -> float | None:
        return self.given.get("softcap")

    @property
    def sinks(self) -> Tensor | None:
        """(B or 1, H, Lq or 1, 1)."""
        found = self.given.get("s_aux") if self.given.get("sinks") is None else self.given["sinks"]
        return None if found is None else found.reshape(1, -1, 1, 1) if found.dim() < 4 else found

    @property
    def window(self) -> int | None:
        found = self.given.get("sliding_window")
        found = getattr(self.module, "sliding_window", None) if found is None else found
        return int(found) if isinstance(found, int) and found > 0 else None

    @property
    def wants_weights(self) -> bool:
        """Whether somebody asked the model for its attention weights."""
        if self.given.get("output_attentions"):
            return True
        try:
            from transformers.utils.output_capturing import _active_collector
        except ImportError:
            return False
        return any("attentions" in key for key in _active_collector.get() or ())

    def bias(self, sight: Sight) -> Tensor | None:
        """Everything the model adds to scores, (B or 1, H or 1, Lq or 1, Lk or 1)."""
        found = self.given.get("position_bias")
        if found is None:
            return sight.bias
        found = found if found.shape[-1] == 1 else found[..., : sight.k_len]
        return found if sight.bias is None else found + sight.bias

    def sight(self, places: bool) -> Sight:
        """What the queries see; places: whether it must be known where they stand."""
        flag = self.given.get("is_causal")
        causal = bool(getattr(self.module, "is_causal", True) if flag is None else flag)
        mask = self.attention_mask
        if self.given.get("indices") is not None:
            mask = self.indexed(mask, self.given["indices"])
        return look(mask, self.query.shape[2], self.key.shape[2], causal, mask_form(self.module), self.window, places)

    def indexed(self, mask: Tensor | None, indices: Tensor) -> Tensor:
        """The mask, and of what it shows only the keys at indices (B, Lq, n)."""
        table = torch.zeros(*indices.shape[:2], self.key.shape[2], dtype=torch.bool, device=indices.device)
        table = table.scatter(-1, indices.long(), True)[:, None]
        if mask is None:
            return table
        return mask & table if mask.dtype == torch.bool else mask.masked_fill(~table, torch.finfo(mask.dtype).min)
