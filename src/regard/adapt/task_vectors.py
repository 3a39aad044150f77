"""What fine-tuning changed in a model's weights, tensor by tensor."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import RegardError


class TaskVectors:
    """vectors[i][name] = tuned_i - base, for the floating-point parameters of `base`; a block that was dropped is missing.

    tuned: models of base's architecture, or state dicts. dtype: what vectors are kept in (the released code: float16); None: base's own.
    """

    def __init__(self, base: nn.Module, tuned: Iterable[nn.Module | dict[str, Tensor]], dtype: torch.dtype | None = None):
        blocks = {name: p.detach() for name, p in base.named_parameters() if p.is_floating_point()}
        self.names, self.vectors = list(blocks), list[dict[str, Tensor]]()
        for number, one in enumerate(tuned):
            state = one.state_dict() if isinstance(one, nn.Module) else one
            wrong = [name for name, p in blocks.items() if name not in state or state[name].shape != p.shape]
            if wrong:
                raise RegardError(f"tuned[{number}]: {', '.join(wrong[:4])} missing or of another shape; expected base's parameters")
            self.vectors.append({name: (state[name].to(p) - p).to(dtype or p.dtype) for name, p in blocks.items()})
        if not self.vectors or not blocks:
            raise RegardError(f"{len(self.vectors)} fine-tunes of {len(blocks)} blocks; expected at least one of each")

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for vector in self.vectors for t in vector.values())

    def strongest(self, scores: Tensor, count: int) -> TaskVectors:
        """The `count` blocks of each vector with the largest |scores| (n, m), coefficients or their gradients at 0; the others go."""
        if scores.shape != (len(self.vectors), len(self.names)) or not 1 <= count <= len(self.names):
            raise RegardError(
                f"scores {tuple(scores.shape)}, count={count}: expected ({len(self.vectors)}, {len(self.names)}) and 1 to {len(self.names)}"
            )
        fewer = copy.copy(self)
        kept = [{self.names[j] for j in row.topk(count).indices.tolist()} for row in scores.detach().abs()]
        fewer.vectors = [{name: t for name, t in vector.items() if name in names} for vector, names in zip(self.vectors, kept, strict=True)]
        return fewer
