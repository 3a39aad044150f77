"""CAB: the compositional index, and efficiency lengths of costs."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.tasks.pattern_scores import compositional_index, efficiency_length


@case("i0")
def index(g: Vectors) -> None:
    x, mu, sigma, w = (g(name).tolist() for name in ("x", "mu", "sigma", "w"))
    own = {f"t{n}": {f"m{at}": x[at] for at in task} for n, task in enumerate(g["tasks"])}
    places = {(task, name): int(name[1:]) for task, measures in own.items() for name in measures}
    norms = {key: (mu[at], sigma[at]) for key, at in places.items()}
    found = compositional_index({"net": own}, {key: w[at] > 0 for key, at in places.items()}, norms)
    g.same(g("out").new_tensor(found["net"]), "out")


@case("m0", "m1", "t0", "t1")
def lengths(g: Vectors) -> None:
    found = efficiency_length(*(g.exact(name).tolist() for name in ("lengths", "vanilla", "other")), skip=g["skip"])
    g.same(g("out").new_tensor(found), "out", 1e-7)
