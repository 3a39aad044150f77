"""Pretrained models that come with regard: small, byte-level, for experiments that need trained weights and no download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MissingDependency, RegardError, nearest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

BEGIN = 0  # the byte every training text began with
HOME = Path(__file__).parent


def names() -> list[str]:
    """The models that `load` knows."""
    return sorted(folder.parent.name for folder in HOME.glob("*/config.json"))


def path(name: str = "tiny") -> Path:
    """The folder of a model: config.json, model.safetensors, training.json; for `AutoModelForCausalLM.from_pretrained`."""
    if name not in names():
        raise RegardError(f"model {name!r} does not come with regard; expected one of {', '.join(names())}.{nearest(name, names())}")
    return HOME / name


def load(name: str = "tiny", **options: Any) -> LlamaForCausalLM:
    """A model in float32 and eval mode, as transformers' `from_pretrained` makes it with `options`.

    "tiny": a Llama of 2.6M parameters over bytes (4 layers, 8 heads over 4 key heads, 256 channels, context 4096), trained by
    scripts/train_tiny.py on Python's documentation and sources and on encyclopedia prose. MissingDependency without transformers.
    """
    folder = path(name)
    try:
        from transformers import LlamaForCausalLM
    except ImportError as missing:
        raise MissingDependency("regard.models needs transformers: pip install 'regard[hf]'") from missing
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})
    return model.eval()


def encode(text: str | bytes) -> Tensor:
    """Input ids (1, n + 1): the beginning-of-text byte, then the UTF-8 bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return torch.tensor([[BEGIN, *raw]])


def decode(ids: Tensor) -> str:
    """The text of ids (n,) or (1, n), without beginning-of-text bytes; bytes that are no UTF-8 become replacement characters."""
    return bytes(x for x in ids.flatten().tolist() if x != BEGIN).decode(errors="replace")


__all__ = ["decode", "encode", "load", "names", "path"]
