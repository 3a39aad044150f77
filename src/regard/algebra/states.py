"""Mechanisms whose state is more than one matrix a head: slots read by softmax, and states for spans of growing length."""

from __future__ import annotations

from dataclasses import field

from ..errors import RegardError
from .mechanism import Mechanism, Recipe, Recurrent
from .part import Input, described


@described
class Slots(Mechanism):
    """Keys and values are written into m slots that forget: K_t = diag(f_t) K_{t-1} + s_t k_t^T, V_t likewise, o_t = softmax(K_t q_t) V_t.

    Inputs `log_forget` (B, H, L, m), <= 0, and `write` s (B, H, L, m), by default 1 - f. gates: "forget", or "sum": `log_forget` is not
    used, `write` holds logits whose exponentials are divided by what they sum to so far (ABC).
    window: None, or w: the last w tokens are read as they are, in one softmax with the slots, and a token is written when it leaves them.
    rope: base of the rotary positions of q and k inside the window (None: none). scaled: scores times `scale` (D^-1/2 unless given).
    """

    gates: str = "forget"
    window: int | None = None
    rope: float | None = None
    scaled: bool = False
    inputs: tuple[Input, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gates not in ("forget", "sum"):
            raise RegardError(f"Slots(gates={self.gates!r}): expected forget or sum")
        if self.window is not None and self.window < 0:
            raise RegardError(f"Slots(window={self.window}): expected None or at least 0")

    @property
    def causal_only(self) -> bool:
        return True


@described
class LogLinear(Mechanism):
    """A recurrence that keeps a state for each span of the past, spans doubling with their age: o_t = sum_l scale_t^(l) read(S_t^(l)).

    Token j stands for t in level bit_length(t xor j) (0 for t itself): a Fenwick tree, so that at most log2(t) + 2 states are alive.
    inner: a recurrence with decay "none", "head" or "token", written by "add" or "delta", without readout. Input `level_scales`
    (B, H, L, levels), levels >= ceil(log2 L) + 1, is multiplied to what each level gives; ones give the inner recurrence.
    """

    inner: Recurrent = field(default_factory=Recurrent)
    inputs: tuple[Input, ...] = (Input("level_scales", "bhkf"),)
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = self.inner
        if (
            inner.decay == "channel"
            or inner.write == "dplr"
            or inner.readout != "none"
            or inner.keys != "features"
            or inner.turn is not None
        ):
            raise RegardError(
                "LogLinear(inner=...): expected a recurrence with decay none, head or token, written by add or delta, and no readout, keys or turn"
            )

    @property
    def causal_only(self) -> bool:
        return True
