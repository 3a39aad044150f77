"""Two small nets of timm's make over images of 32 x 32 pixels, trained by scripts/train_vision.py on handwritten digits and photographs.

"digits-vit": a VisionTransformer of 0.7M parameters (6 blocks, 3 heads, 96 channels, 64 patches of 4 x 4 and a class token).
"digits-resnet": a ResNet of 0.7M parameters (four basic blocks of 24, 48, 96 and 192 channels).
Images as `regard.tasks.digits` makes them; logits of the ten digits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ..errors import RegardError
from ..nn.images import timm_host

SHAPES: dict[str, dict[str, Any]] = {
    "digits-vit": {
        "img_size": 32, "patch_size": 4, "in_chans": 3, "num_classes": 10, "embed_dim": 96, "depth": 6, "num_heads": 3, "mlp_ratio": 4.0
    },
    "digits-resnet": {"layers": [1, 1, 1, 1], "channels": [24, 48, 96, 192], "in_chans": 3, "num_classes": 10, "stem_width": 24},
}  # fmt: skip


def made(name: str, **shape: Any) -> Any:
    """The net with random weights; shape: timm's arguments, those of SHAPES[name] where none are given."""
    models = timm_host.load("timm").models
    shape = {**SHAPES[name], **shape}
    if name == "digits-vit":
        return models.vision_transformer.VisionTransformer(**shape)
    return models.resnet.ResNet(models.resnet.BasicBlock, **shape)


def load(name: str, folder: Path) -> Any:
    """The trained net of a folder in float32 and evaluation mode; RegardError for a damaged file."""
    try:
        model = made(name, **json.loads((folder / "config.json").read_text(encoding="utf-8")))
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict({key: x.float() if x.is_floating_point() else x for key, x in weights.items()})
    except (OSError, ValueError, KeyError, RuntimeError) as why:
        raise RegardError(f"{folder} does not hold the model {name!r} as it came: {' '.join(str(why).split())[:200]}") from None
    return model.eval()
