"""Rows of a transformers cache: which of the newest entries stay, and where they stand."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from ..errors import RegardError


def cache_argument(model: Any) -> str:
    """What the model's forward calls its cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def check_dynamic(cache: Any) -> None:
    """Raise unless every layer of the cache grows by a row a token, so that rows can be kept and dropped."""
    for layer in cache.layers:
        if not hasattr(layer, "keys") or not hasattr(layer, "crop") or getattr(layer, "max_cache_len", None) is not None:
            raise RegardError(f"the cache has a layer {type(layer).__name__}; expected layers that keep a key and a value a token and grow")


def keep_rows(cache: Any, start: int, index: Tensor) -> None:
    """Keep the entries before `start`, and of those from it on the ones at index (B, m), counted from `start`, in that order."""
    check_dynamic(cache)
    stop = start + index.shape[1]
    for layer in cache.layers:
        if not layer.is_initialized:
            continue
        for name in ("keys", "values"):
            rows = getattr(layer, name)
            at = index[:, None, :, None].to(rows.device).expand(-1, rows.shape[1], -1, rows.shape[3])
            rows[:, :, start:stop] = rows[:, :, start:].gather(2, at)
            setattr(layer, name, rows[:, :, :stop])


__all__ = ["cache_argument", "check_dynamic", "keep_rows"]
