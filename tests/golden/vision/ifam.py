"""iFAM: the losses of maps of parts."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.nn.images import part_maps

LOSSES = {"t0": part_maps.total_variation, "p0": part_maps.presence, "e0": part_maps.background_at_borders, "h0": part_maps.entropy}


@case("t0", "e0", "h0")
def maps(g: Vectors) -> None:
    g.layer(lambda x: LOSSES[g.config](x.softmax(1)))


@case("p0")
def presence(g: Vectors) -> None:
    """The official loss takes all maps that it is given; the trainer gives it the parts'."""
    g.layer(lambda x: part_maps.presence(x.softmax(1)))


@case("o0")
def orthogonal(g: Vectors) -> None:
    g.layer(lambda x: part_maps.orthogonality(x.mT))
