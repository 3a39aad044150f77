"""The layers of the dynamical systems framework: attention with a learned normaliser, and the LSTM."""

from __future__ import annotations

from golden.vectors import Vectors, case, stepped
from torch import nn

from regard.nn.state_layers import QLSTM, NormalizedAttention


def compared(g: Vectors, made: nn.Module, *names: tuple[str, str]) -> None:
    g.layer(made, **g.fill(made, *names))
    out, _ = stepped(made, g("x"))
    g.same(out, "out")


@case("n0", "n1", "n2")
def normalised(g: Vectors) -> None:
    made = NormalizedAttention(g["dim"], g["heads"], g["key_dim"], bias=g["bias"]).to(g.dtype)
    compared(g, made, ("qk", "Wqk"), (r"^v\.", "Wv."), ("eta", "Wn"), ("^out", "out_proj"))


@case("q0", "q1")
def lstm(g: Vectors) -> None:
    made = QLSTM(g["dim"], g["expansion"], g["kernel"], g["reversed"]).to(g.dtype)
    compared(g, made, (r"cell\.", ""))
