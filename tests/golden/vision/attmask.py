"""AttMask: which patches are hidden, and the loss."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.vision.attmask import IBOTLoss, Views, attmask


@case("c0", "c1", "c2", "c3", "c4")
def masks(g: Vectors) -> None:
    found = attmask(g("attention"), g["mode"], g["ratio"], g["prob"], g["show"], g("u"), g("order"))
    g.same(found.long(), "out", 0.0)


@case("i0", "i1")
def loss(g: Vectors) -> None:
    made = IBOTLoss(4, 3, weights=tuple(g["weights"]), patch_momentum=0.8).to(g.dtype)
    made.centre += 0.1
    made.patch_centre -= 0.2
    leaves = g.leaves("sc", "sp", "tc", "tp", *(["lo"] if g["local"] else []))
    student, teacher = Views(leaves["sc"], leaves["sp"]), Views(leaves["tc"], leaves["tp"])
    value = made(student, teacher, g("masked").bool(), 0.04, 0.07, leaves.get("lo"))
    g.same(value, "out")
    g.same(made.centre, "centre")
    g.same(made.patch_centre, "patch_centre")
    g.gradients(g.weigh(value), leaves)
