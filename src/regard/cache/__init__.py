"""What a model remembers: entries of transformers' caches, kept, dropped and stored in fewer bytes. `with policy(model): model.generate(...)`."""

from typing import Any

from ..lazy import listed, load
from ..nn.images.timm_host import operators

operators()  # transformers reads torchvision where it is installed

NAMES = {
    **dict.fromkeys(("check_dynamic", "keep_rows"), "rows"),
    **dict.fromkeys(("KeptLayer", "Part"), "layer"),
    "KIVI": "kivi",
    "read_prompt": "prompt",
    "Policy": "policy",
    "Moments": "moments",
    "View": "view",
    "Session": "session",
    "Staircase": "staircase",
    **dict.fromkeys(
        ("H2O", "TOVA", "Ada", "Full", "KeyNorm", "Planned", "Pyramid", "Random", "SnapKV", "StreamingLLM", "Wrapped"), "policies"
    ),
}
__all__ = [*NAMES]


def __getattr__(name: str) -> Any:
    return load(__name__, NAMES, name, __name__)


def __dir__() -> list[str]:
    return listed(globals(), NAMES)
