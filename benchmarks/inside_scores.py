"""A part of `benchmarks/inside.py`: how few directions of a head carry the scores by which it fires, and what is left of its weight without them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from regard import taps
from regard.interpret import omega_svd, score_components, sparse_set, trace
from regard.interpret.stream import Part, parts_of

Head = tuple[int, int]


def firing(parts: Sequence[Part]) -> list[tuple[int, int, int, int]]:
    """(layer, head, destination, source) of weights of half or more on a token that is neither the first nor the destination, for a positive score."""
    found = []
    for part in parts:
        for h, i, j in (part.pattern >= 0.5).nonzero().tolist():
            if 0 < j < i and float(part.logits[h, i, j]) > 0:
                found.append((part.layer, h, i, j))
    return found


@torch.no_grad()
def decomposed(model: Any, text: torch.Tensor, repeated: torch.Tensor, induction: Head, previous: Any, count: int = 300) -> dict[str, Any]:
    """text, repeated: rows of tokens, the second one twice the same. previous: how much each head looks at the token before, by (layer, head)."""
    parts = parts_of(model, text, turned=True)
    with taps.read(model, ["q", "k"]) as seen:
        model(text)
    pairs = firing(parts)
    draw, drawn = random.Random(0), torch.Generator().manual_seed(0)
    sizes: dict[str, list[int]] = {"0.7": [], "0.99": [], "0.7 of random": []}
    without: dict[str, list[float]] = {"whole": [], "sparse": [], "others": [], "random": []}
    for layer, h, i, j in draw.sample(pairs, min(count, len(pairs))):
        part = parts[layer]
        directions = omega_svd(part.weights, h, (part.turns[i], part.turns[j]))
        terms = score_components(directions, part.x[i], part.x[j])
        used = sparse_set(terms)
        q, k = seen["q", layer][0, h], seen["k", layer][0, h // part.group]
        basis = torch.linalg.qr(torch.randn(len(terms), len(terms), generator=drawn))[0]
        sizes["0.7"].append(len(used))
        sizes["0.99"].append(len(sparse_set(terms, 0.99)))
        turned = basis[:, sparse_set((q[i] @ basis) * (k[j] @ basis))]
        sizes["0.7 of random"].append(turned.shape[1])
        others = [n for n in range(len(terms)) if n not in set(used.tolist())]
        x = torch.cat((part.x[i], torch.ones(1)))
        left = torch.cat((part.weights.wq[h], part.weights.bq[h, None])) @ part.turns[i]

        def weight(lost: torch.Tensor) -> float:
            return float(((q[i] - lost) @ k[: i + 1].T * part.weights.scale).softmax(-1)[j])

        def along(taken: list[int]) -> torch.Tensor:
            u = directions.u[:, taken]
            return (u @ (u.T @ x)) @ left

        without["whole"].append(weight(along([])))
        without["sparse"].append(weight(along(used.tolist())))
        drawn_sets = [draw.sample(others, min(len(used), len(others))) for _ in range(3)]
        without["others"].append(statistics.fmean(weight(along(taken)) for taken in drawn_sets))
        without["random"].append(weight(turned @ (turned.T @ q[i])))
    out: dict[str, Any] = {"pairs": len(pairs), "looked": len(sizes["0.7"]), "channels": parts[0].turns.shape[-1]}
    out["directions"] = {name: statistics.median(found) for name, found in sizes.items()}
    out["weight"] = {name: statistics.fmean(found) for name, found in without.items()}
    layer, head = induction
    own = parts_of(model, repeated)[layer]
    half, end = repeated.shape[1] // 2, repeated.shape[1]
    weights = [(float(own.pattern[head, i, i - half + 1]), i) for i in range(half + 2, end)]
    best, dst = max(weights)
    out["induction"] = {"head": induction, "weight": best}
    if best >= 0.5 and float(own.logits[head, dst, dst - half + 1]) > 0:
        edges = trace(model, repeated, layer, head, dst, dst - half + 1, depth=1).edges
        sent = [e for e in edges if e.side == "src"][:5]
        out["senders"] = [(e.sender, e.weight, previous[e.sender] if isinstance(e.sender, tuple) else None) for e in sent]
    return out


def told(one: dict[str, Any]) -> list[str]:
    """The part's lines of the page."""
    sizes, weight, asked = one["directions"], one["weight"], one["induction"]
    lines = [
        f"Scores in singular directions (`interpret.trace`, Omega turned by the distance): of {one['pairs']} pairs that fire (weight of half or more, not on the "
        f"first token or itself) in 64 tokens, {one['looked']} were looked at.",
        "",
        f"| | its singular directions | as many others of them | random directions of the head's {one['channels']} |",
        "|---|---|---|---|",
        f"| directions for 70% of a score (median) | {sizes['0.7']:g} | | {sizes['0.7 of random']:g} |",
        f"| directions for 99% | {sizes['0.99']:g} | | |",
        f"| weight left without those for 70% (mean; {weight['whole']:.2f} before) | {weight['sparse']:.2f} | {weight['others']:.2f} | {weight['random']:.2f} |",
        "",
        "That few directions suffice says little by itself: in a random basis fewer do, for its positive terms overshoot what negative ones take back. What they "
        "tell is who wrote them:",
        "",
    ]
    layer, head = asked["head"]
    if "senders" in one:
        names = ", ".join(
            f"layer {s[0]} head {s[1]} ({part:.2f}; looks {before:.0%} at the token before)" if before is not None else f"{s} ({part:.2f})"
            for s, part, before in one["senders"]
        )
        lines += [
            f"What layer {layer} head {head} (induction, weight {asked['weight']:.2f}) reads at the source was written by: {names}.",
            "",
        ]
    else:
        lines += [f"Layer {layer} head {head} (induction) fires nowhere with half its weight, so it was not traced.", ""]
    return lines
