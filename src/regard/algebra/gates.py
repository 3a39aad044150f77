"""Gates of recurrences that several systems share."""

import torch.nn.functional as F
from torch import Tensor


def log_gate(x: Tensor, tau: float, low: float | None = None) -> Tensor:
    gate = F.logsigmoid(x) / tau
    return gate if low is None else gate.clamp_min(low)
