"""Masks that read a tensor of the call: packed documents, padding, each head's own tokens, and a table of pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .mask import Mask
from .part import Input, described


@described
class Segments(Mask):
    """Packed documents: i and j carry the same id. Input `segments` (B, Lk), integers; pads may have an id of their own."""

    inputs: tuple[Input, ...] = (Input("segments", "bk", dtype="int"),)

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        ids = env["segments"].flatten(0, -2) if env["segments"].dim() > 2 else env["segments"]
        b = b if ids.shape[0] > 1 else torch.zeros_like(b)
        return (i >= 0) & (ids[b, i.clamp(min=0)] == ids[b, j])

    @property
    def side_shapes(self) -> tuple[tuple[str, str], ...]:
        return (("mask_ids_q", "bq"), ("mask_ids_k", "bk"))

    def sides(self, inputs: Mapping[str, Tensor], q_len: int, device: torch.device) -> dict[str, Tensor]:
        ids = torch.unique(inputs["segments"], return_inverse=True)[1]  # small numbers, which float32 tells apart
        ids = ids.flatten(0, -2) if ids.dim() > 2 else ids
        ahead = max(0, q_len - ids.shape[1])  # queries before the first token are of no document
        rows = torch.nn.functional.pad(ids, (ahead, 0), value=-1)
        return {"mask_ids_q": rows[:, None, rows.shape[1] - q_len :, None], "mask_ids_k": ids[:, None, None]}

    def predicate(self, b: Any, h: Any, i: Any, j: Any, sides: Mapping[str, Any]) -> Any:
        return sides["mask_ids_q"] == sides["mask_ids_k"]


@described
class Padding(Mask):
    """Keys marked True in the input `keep` (B, Lk), a bool tensor."""

    inputs: tuple[Input, ...] = (Input("keep", "bk", dtype="bool"),)

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        keep = env["keep"].flatten(0, -2) if env["keep"].dim() > 2 else env["keep"]
        return keep[b if keep.shape[0] > 1 else torch.zeros_like(b), j] & (i == i)

    def in_sight(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return inputs["keep"].flatten(0, -2) if inputs["keep"].dim() > 2 else inputs["keep"]

    @property
    def side_shapes(self) -> tuple[tuple[str, str], ...]:
        return (("mask_keep", "bk"),)

    def sides(self, inputs: Mapping[str, Tensor], q_len: int, device: torch.device) -> dict[str, Tensor]:
        return {"mask_keep": self.in_sight(inputs)[:, None, None]}

    def predicate(self, b: Any, h: Any, i: Any, j: Any, sides: Mapping[str, Any]) -> Any:
        return sides["mask_keep"] > 0


@described
class Kept(Mask):
    """Keys marked True in the input `kept` (B, H, Lk), a bool tensor: each head's own choice of tokens."""

    inputs: tuple[Input, ...] = (Input("kept", "bhk", dtype="bool"),)

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        kept = env["kept"]
        at = [index if size > 1 else torch.zeros_like(index) for index, size in zip((b, h), kept.shape, strict=False)]
        return kept[at[0], at[1], 0, j] & (i == i)

    def in_sight(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return inputs["kept"].any(2).any(1)

    @property
    def side_shapes(self) -> tuple[tuple[str, str], ...]:
        return (("mask_kept", "bhk"),)

    def sides(self, inputs: Mapping[str, Tensor], q_len: int, device: torch.device) -> dict[str, Tensor]:
        return {"mask_kept": inputs["kept"]}

    def predicate(self, b: Any, h: Any, i: Any, j: Any, sides: Mapping[str, Any]) -> Any:
        return sides["mask_kept"] > 0


@described
class Explicit(Mask):
    """A bool tensor broadcastable to (B, H, Lq, Lk): True is visible. `attend(mask=tensor)` makes one; input `visible`."""

    inputs: tuple[Input, ...] = (Input("visible", "bhqk", dtype="bool"),)

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
        table = env["visible"]
        at = [index if size > 1 else torch.zeros_like(index) for index, size in zip((b, h, i - env["offset"], j), table.shape, strict=True)]
        return table[tuple(at)]

    def in_sight(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return inputs["visible"].any(2).any(1)

    @property
    def side_shapes(self) -> tuple[tuple[str, str], ...]:
        return (("mask_visible", "bhqk"),)

    def sides(self, inputs: Mapping[str, Tensor], q_len: int, device: torch.device) -> dict[str, Tensor]:
        return {"mask_visible": inputs["visible"]}

    def predicate(self, b: Any, h: Any, i: Any, j: Any, sides: Mapping[str, Any]) -> Any:
        return sides["mask_visible"] > 0
