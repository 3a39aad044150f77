"""MoH: gates of shared and routed heads, and the balance loss."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.systems.moh import MoHAttention

NAMES = (("^route", "wg"), ("^share", "wg_1"), ("^weigh", "wg_0"), (r"\bout\.", "proj."))


@case("c0", "c1", "c2", "c3", "c4")
def layer(g: Vectors) -> None:
    options = {name: g[name] for name in ("head_dim", "qkv_bias", "qk_norm") if g.get(name) is not None}
    made = MoHAttention(g["dim"], g["heads"], g["shared"], g["routed"], **options).to(g.dtype)
    g.layer(made, **g.fill(made, *NAMES))
    if g["routed"]:
        assert made.aux_loss is not None
        g.same(made.aux_loss, "aux")
    made.eval()
    made.skip = True
    g.same(made(g("x")), "out")
