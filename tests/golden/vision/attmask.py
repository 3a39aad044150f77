"""AttMask: which patches are hidden."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.vision.attmask import attmask


@case("c0", "c1", "c2", "c3", "c4")
def masks(g: Vectors) -> None:
    found = attmask(g("attention"), g["mode"], g["ratio"], g["prob"], g["show"], g("u"), g("order"))
    g.same(found.long(), "out", 0.0)
