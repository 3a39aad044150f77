"""Sparse attention decomposition: a score as few singular directions of the head's QK matrix, traced to the heads that wrote them (id 239;
Franco and Crovella, 2024).

Omega = [[W_Q W_K^T, W_Q b_K], [b_Q W_K^T, b_Q.b_K]] = U S V^T on x~ = [x; 1];   score q_i.k_j = sum_k (x~_i.u_k) s_k (v_k.x~_j)
sparse set: the largest terms whose sum first exceeds `frac` of the score;   an earlier head's part, o~ = [its output behind the norm; 1]:
at the source sum_k sign(x~_i.u_k) sqrt(s_k) v_k.o~, at the destination sum_k sign(x~_i.u_k) sqrt(s_k) u_k.o~

Rotary positions: Omega turns with the distance, [W_Q; b_Q] R_i R_j^T [W_K; b_K]^T, and has triplets of its own at each (the paper's models
have none). Not built: projections of the whole stream (`removed` acts on one head's queries or keys, in all of its input or in one
head's part of it).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import MissingDependency, RegardError
from regard.interpret.stream import Part, parts_of
from regard.interpret.tables import Head
from regard.interpret.weights import HeadWeights
from regard.plots import Plot, bars
from regard.results import Column, Result
from regard.taps import edit


@dataclass(frozen=True)
class Directions:
    """u, v (D + 1, d): what a head reads at the destination and at the source, by their strengths s (d,), greatest first."""

    u: Tensor
    s: Tensor
    v: Tensor


def with_one(x: Tensor) -> Tensor:
    return torch.cat((x, torch.ones_like(x[..., :1])), -1)


def omega_svd(weights: HeadWeights, head: int, turns: tuple[Tensor, Tensor] | None = None) -> Directions:
    """The first d singular triplets of a head's Omega, without scores' scale: `head_weights(site)`, then this. turns (d, d): what rotary
    positions make of queries at the destination and of keys at the source (`regard.interpret.turns_of`); only the distance matters."""
    left, right = (torch.cat((w[head], b[head, None])) for w, b in ((weights.wq, weights.bq), (weights.wk, weights.bk)))
    if turns is not None:
        left, right = left @ turns[0].to(left), right @ turns[1].to(right)
    # Of the product of two thin matrices: their QR factors keep it small.
    (q1, r1), (q2, r2) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, s, vt = torch.linalg.svd(r1 @ r2.T)
    return Directions(q1 @ u, s, q2 @ vt.T)


def score_components(directions: Directions, dst: Tensor, src: Tensor) -> Tensor:
    """x (D,) of the destination and the source, as the head's projections read them -> terms (d,) whose sum is q.k."""
    return (with_one(dst) @ directions.u) * directions.s * (with_one(src) @ directions.v)


def sparse_set(terms: Tensor, frac: float = 0.7) -> Tensor:
    """Numbers of the fewest terms, the largest first (for a negative score the smallest first), whose sum exceeds frac of the score; all
    where none does, as for frac >= 1. 0.7 in tracing, 0.99 to characterise a head."""
    if terms.dim() != 1 or not len(terms) or frac <= 0:
        raise RegardError(f"terms {tuple(terms.shape)}, frac={frac}; expected (d,) and above 0")
    order = terms.argsort(descending=bool(terms.sum() > 0))
    reached = (terms[order].cumsum(0) / terms.sum() > frac).nonzero()
    return order[: int(reached[0]) + 1 if len(reached) else len(order)]


@dataclass(frozen=True)
class Edge:
    """What `sender` ((layer, head), or "mlp n" or "embedding") at `token` adds to the signal by which `receiver`, at destination dst, looks at
    src. side: "dst" or "src"; weight: its part; used: numbers of the receiver's directions."""

    sender: Head | str
    token: int
    receiver: Head
    dst: int
    src: int
    side: str
    weight: float
    used: tuple[int, ...]


@dataclass(frozen=True)
class Trace(Result):
    edges: tuple[Edge, ...]

    def columns(self) -> dict[str, Column]:
        return {name: [getattr(e, name) for e in self.edges] for name in ("sender", "token", "receiver", "dst", "src", "side", "weight")}

    def plot(self) -> Plot:
        """The greatest edges, a bar each."""
        most = sorted(self.edges, key=lambda e: -abs(e.weight))[:24]
        return bars("Who wrote what is looked for", {f"{e.sender} at {e.token} → {e.receiver}, {e.side}": e.weight for e in most})

    def graph(self) -> Any:
        """A networkx MultiDiGraph over (component, token), weights on its edges."""
        try:
            import networkx as nx
        except ImportError as missing:
            raise MissingDependency("graph() needs networkx: pip install 'regard[graphs]'") from missing
        graph = nx.MultiDiGraph()
        for e in self.edges:
            graph.add_edge((e.sender, e.token), (e.receiver, e.dst), weight=e.weight, side=e.side, src=e.src)
        return graph


def turns(part: Part, dst: int, src: int) -> tuple[Tensor, Tensor] | None:
    return None if part.turns is None else (part.turns[dst], part.turns[src])


def signals(part: Part, head: int, dst: int, src: int, frac: float) -> tuple[Tensor, Tensor, Tensor]:
    """(numbers used, destination's (D + 1,) and source's signal direction), the signs those of x~_i.u_k."""
    directions = omega_svd(part.weights, head, turns(part, dst, src))
    terms = score_components(directions, part.x[dst], part.x[src])
    if not torch.allclose(terms.sum() * part.weights.scale, part.logits[head, dst, src].to(terms), rtol=1e-3, atol=1e-3):
        raise RegardError(
            f"the score of head {head} in layer {part.layer} is not its queries' product with its keys as projected (norms of queries and keys, or "
            "biases of scores); expected plain dot products"
        )
    used = sparse_set(terms, frac)
    size = directions.s[used].sqrt() * (with_one(part.x[dst]) @ directions.u[:, used]).sign()
    return used, directions.u[:, used] @ size, directions.v[:, used] @ size


@register("sparse-attention-decomposition", kind="function")
def trace(
    model: nn.Module,
    ids: Tensor,
    layer: int,
    head: int,
    dst: int,
    src: int,
    *,
    frac: float = 0.7,
    firing: float = 0.5,
    share: float = 0.7,
    depth: int | None = None,
) -> Trace:
    """Who wrote the signal by which `head` of `layer` looks from `dst` at `src` in ids (1, L), and who made those look where they did.

    frac: of the score that the directions used must exceed. share: senders are kept, the greatest first, until they have that share of all
    positive parts. A sending head is followed to each place it looks at with a weight of `firing` or more, if that is not the first token
    and the score is positive, for `depth` levels (None: down to the first layer). RegardError for a pair that does not fire, norms
    of queries and keys, and blocks whose parts are not known."""
    parts = parts_of(model, ids, turned=True)
    if not 0 <= layer < len(parts) or not 0 <= src <= dst < ids.shape[1]:
        raise RegardError(f"layer={layer}, dst={dst}, src={src}: expected a layer below {len(parts)} and 0 <= src <= dst < {ids.shape[1]}")
    if float(parts[layer].pattern[head, dst, src]) < firing:
        found = float(parts[layer].pattern[head, dst, src])
        raise RegardError(f"head {head} of layer {layer} gives {src} a weight of {found:.3f} at {dst}; expected firing={firing} or more")
    edges: list[Edge] = []
    todo, done = [(layer, head, dst, src, 0)], set()
    while todo:
        at, h, i, j, level = todo.pop()
        if (at, h, i, j) in done or at == 0 or (depth is not None and level >= depth):
            continue
        done.add((at, h, i, j))
        part = parts[at]
        used, for_dst, for_src = signals(part, h, i, j, frac)
        for side, token, direction in (("dst", i, for_dst), ("src", j, for_src)):
            made = [(sender, float(with_one(part.behind(out, token)) @ direction)) for sender, out in senders(parts, at, token)]
            whole, reached = sum(w for _, w in made if w > 0), 0.0
            for sender, weight in sorted(made, key=lambda pair: -pair[1]):
                if weight <= 0 or reached >= share * whole:
                    break
                reached += weight
                edges.append(Edge(sender, token, (at, h), i, j, side, weight, tuple(used.tolist())))
                if isinstance(sender, tuple):
                    rows, scores = parts[sender[0]].pattern[sender[1], token], parts[sender[0]].logits[sender[1], token]
                    todo += [
                        (*sender, token, k, level + 1) for k in range(1, token + 1) if float(rows[k]) >= firing and float(scores[k]) > 0
                    ]
    return Trace(tuple(edges))


def senders(parts: Sequence[Part], layer: int, token: int) -> list[tuple[Head | str, Tensor]]:
    """What stands in the stream at a token before a layer: each head's and MLP's output, and the embedding."""
    found: list[tuple[Head | str, Tensor]] = [("embedding", parts[0].stream[token])]
    for part in parts[:layer]:
        found += [((part.layer, h), part.written[h, token]) for h in range(len(part.written))]
        found += [] if part.mlp is None else [(f"mlp {part.layer}", part.mlp[token])]
    return found


def removed(
    model: nn.Module, ids: Tensor, layer: int, head: int, used: Sequence[int], side: str, dst: int, src: int, sender: Head | None = None
) -> AbstractContextManager[Any]:
    """A `with` block in which the head's input at dst or src lacks its part along the directions `used` (of this pair): x~ - P x~ with
    P = U_S U_S^T for side "dst" (its query), V_S V_S^T for "src" (its key). sender: only this head's part of the input lacks it (one edge).
    Made for the row ids (1, L), on which the block must be run."""
    if side not in ("dst", "src"):
        raise RegardError(f"side={side!r}; expected dst or src")
    parts, position = parts_of(model, ids, turned=True), dst if side == "dst" else src
    part = parts[layer]
    directions = omega_svd(part.weights, head, turns(part, dst, src))
    basis = (directions.u if side == "dst" else directions.v)[:, list(used)]
    x = part.x[position] if sender is None else part.behind(parts[sender[0]].written[sender[1], position], position)
    lost = basis @ (basis.T @ with_one(x))
    matrix, bias = (part.weights.wq, part.weights.bq) if side == "dst" else (part.weights.wk, part.weights.bk)
    change = lost @ torch.cat((matrix[head], bias[head, None]))
    change = change if part.turns is None else change @ part.turns[position].to(change)
    group = part.group if side == "src" else 1

    def without(q: Tensor) -> Tensor:
        return q - change.to(q)

    heads = [head] if side == "dst" else list(range(head // group * group, head // group * group + group))
    return edit(model, {"q" if side == "dst" else "k": without}, layers=[layer], heads=heads, positions=[position])
