"""Where a conversion stands, in one safetensors file that is whole or is not there."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import RegardError

FILE = "conversion.safetensors"


@dataclass
class Place:
    """stage: the stage that is next or under way; step: its steps done; losses: a list a stage so far. weights: every parameter that changed, by
    name; moments: what the optimizer keeps, "parameter/key"."""

    stage: int = 0
    step: int = 0
    losses: list[list[float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)


def described(x: Any) -> Any:
    """A recipe in words, the same in every process."""
    if is_dataclass(x) and not isinstance(x, type):
        return [type(x).__qualname__, *([f.name, described(getattr(x, f.name))] for f in fields(x))]
    if isinstance(x, (list, tuple)):
        return [described(y) for y in x]
    return f"{x.__module__}.{x.__qualname__}" if callable(x) else x


def fingerprint(recipe: Any, seed: int, model: nn.Module) -> str:
    """SHA-256 of the recipe, the seed, and the names, shapes and first values of a model's parameters."""
    digest = hashlib.sha256(json.dumps([described(list(recipe)), seed]).encode())
    for name, p in model.named_parameters():
        digest.update(f"{name}{tuple(p.shape)}{p.detach().flatten()[:16].double().tolist()}".encode())
    return digest.hexdigest()


def write(folder: Path, place: Place, mark: str) -> None:
    """The file under a temporary name, then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{FILE}.", suffix=".part", dir=folder)
    os.close(handle)
    try:
        tensors = {f"weights/{k}": x.detach().cpu().contiguous() for k, x in place.weights.items()}
        tensors |= {f"moments/{k}": x.detach().cpu().contiguous() for k, x in place.moments.items()}
        about = {"mark": mark, "stage": place.stage, "step": place.step, "losses": place.losses}
        save_file({k: x.clone() for k, x in tensors.items()}, part, metadata={"conversion": json.dumps(about)})
        os.replace(part, folder / FILE)
    finally:
        Path(part).unlink(missing_ok=True)


def read(folder: Path, mark: str) -> Place | None:
    """What was written there, or None; RegardError for a damaged file, and for one of another model, recipe or seed."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["conversion"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as why:
        raise RegardError(f"{path} is damaged ({' '.join(str(why).split())[:120]}); delete it, and the conversion begins anew") from None
    if about["mark"] != mark:
        raise RegardError(f"{path} is of another model, recipe or seed; expected another folder, or that file deleted")
    kinds = {kind: {k.partition("/")[2]: x for k, x in tensors.items() if k.startswith(f"{kind}/")} for kind in ("weights", "moments")}
    return Place(about["stage"], about["step"], about["losses"], **kinds)


@torch.no_grad()
def put(weights: dict[str, Tensor], parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Values of parameters by name; RegardError for those that are not there."""
    known = dict(parameters)
    missing = [name for name in weights if name not in known or known[name].shape != weights[name].shape]
    if missing:
        raise RegardError(
            f"the model has no parameter {missing[0]!r} of shape {tuple(weights[missing[0]].shape)}; expected the model that was converted"
        )
    for name, x in weights.items():
        known[name].copy_(x)
