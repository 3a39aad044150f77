"""VATP: an entry is worth its attention times the size of its value (id 73; Guo et al., 2024).

I_k = S_k |v_k|_1;   kept: the R newest, and of the others the H highest, the first 20 tokens before all
h2o: S_k = attention received so far;   scissorhands: that of the last 400 prompt queries / 400, and that of every step since
| o - sum over kept a_k v_k |_1 <= sum over dropped a_k |v_k|_1, which this order makes least
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.cache.policies import note
from regard.cache.policy import Policy, newest, oldest
from regard.cache.view import View
from regard.catalog.registry import register
from regard.errors import RegardError


@register("vatp", kind="policy")
class VATP(Policy):
    """Entries go after the prompt and at every step. heavy, recent: shares of a row's prompt (rounded down), 0.25 each in the paper.

    base "scissorhands": 10 newest and 2 int(heavy L) - 10 others. sink: first tokens that stay. window: queries that scissorhands looks at, and what
    it divides by, however many there are. values=False is the base itself, without values and sinks. Query heads of a key head add up.
    """

    looks = True

    def __init__(
        self,
        base: str = "h2o",
        sink: int = 20,
        heavy: float = 0.25,
        recent: float = 0.25,
        window: int = 400,
        values: bool = True,
        decode: bool = True,
    ):
        if (
            base not in ("h2o", "scissorhands")
            or sink < 0
            or window < 1
            or not 0 <= heavy <= 1
            or not 0 <= recent <= 1
            or heavy + recent == 0
        ):
            raise RegardError(
                f"base={base!r}, sink={sink}, heavy={heavy}, recent={recent}, window={window}: expected 'h2o' or 'scissorhands', sinks of 0 or "
                "more, shares from 0 to 1 that are not both 0, and a window"
            )
        super().__init__(min(1.0, heavy + recent), decode)
        self.base, self.sink, self.heavy, self.newest, self.window, self.values = base, sink, heavy, recent, window, values

    def observe(self, view: View) -> None:
        last = self.window if self.base == "scissorhands" and view.first else None
        mass = view.mass(last)
        note(view, "mass", mass / self.window if last else mass)

    def sizes(self, view: View) -> tuple[Tensor, Tensor]:
        """Newest and other entries of each row, (B,)."""
        length = view.memory["prompt"].double()
        heavy = (length * self.heavy).floor().long()
        if self.base == "scissorhands":
            return torch.full_like(heavy, 10), (2 * heavy - 10).clamp_min(0)
        return (length * self.newest).floor().long(), heavy

    def worth(self, view: View) -> Tensor:
        """(B, h, length) before newest and first tokens are told apart."""
        mass: Tensor = view.part.notes["mass"]
        return mass * view.part.values.float().abs().sum(-1) if self.values else mass

    def scores(self, view: View) -> Tensor:
        worth = self.worth(view)
        if self.values:
            worth = worth.masked_fill(oldest(view, self.sink), torch.finfo(worth.dtype).max)
        return worth.masked_fill(newest(view, self.sizes(view)[0]), torch.inf)

    def counts(self, view: View, scores: Tensor) -> Tensor:
        recent, heavy = self.sizes(view)
        return (recent + heavy).clamp_min(1)[:, None].expand(-1, scores.shape[1])
