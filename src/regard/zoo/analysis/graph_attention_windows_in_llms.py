"""Graph attention windows: node tokens of a language model see the nodes within k hops alone (id 124; Guan et al., 2025).

Node rows: M_k = 1[(E + E^T)^k > 0], E with self loops, of nodes; every other pair stays causal. k = 1 is message passing along edges, k = None
full connection. The last node, which is asked about, keeps its causal row, and earlier nodes see it where an edge joins them.
Report: attention of text on nodes, of nodes on nodes, of the last node by hops (mean over a ring), correlation with the adjacency, the first token.

Unlike the paper's code, every node has a self loop, and without `bidirectional` no edge shows a later node; k = None connects all
nodes, where theirs leaves the raw edges. Not reproduced: the gain of training in an intermediate window and reading without one.

Not built: LoRA of a 7B backbone, and accuracy on its data sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.interpret.tables import HeadTable, heads_of
from regard.nn.attention import Attention
from regard.nn.decoder import Block
from regard.plots import Plot, figure
from regard.results import Column, Result
from regard.tasks.ego_graphs import ego_graphs, hop_distance
from regard.tasks.training import fit


@register("graph-attention-windows-in-llms", kind="function")
def graph_window(
    edges: Sequence[Tensor],
    nodes: Sequence[Tensor],
    length: int,
    k: int | None = 2,
    *,
    bidirectional: bool = True,
    last: str = "causal",
    keep: Tensor | None = None,
    low: float | None = None,
) -> Tensor:
    """edges: of each example (E, 2) node numbers; nodes: of each the places (n,) of its nodes' tokens, rising -> (B, 1, T, T) bool, True is seen.

    bidirectional: nodes see later nodes within the window too. last: "causal" as above, or "window": as every other node. keep (B, T): False
    for padding. low: (-6000 in the paper's code) then a float32 mask to add instead: 0, `low` between nodes out of the window, and the least
    float32 for what causality or padding hides.
    """
    if last not in ("causal", "window") or (k is not None and k < 1) or len(edges) != len(nodes) or not nodes:
        raise RegardError(
            f"last={last!r}, k={k}, {len(edges)} graphs, {len(nodes)} rows of nodes; expected causal or window, 1 or more, as many"
        )
    if keep is not None and tuple(keep.shape) != (len(nodes), length):
        raise RegardError(f"keep {tuple(keep.shape)}; expected ({len(nodes)}, {length})")
    masks, windowed = [], []
    for pairs, at in zip(edges, nodes, strict=True):
        n = len(at)
        if n < 1 or bool((at.diff() < 1).any()) or int(at[0]) < 0 or int(at[-1]) >= length:
            raise RegardError(f"nodes {at.tolist()}; expected rising places from 0 to {length - 1}")
        hops = hop_distance(pairs, n)
        block = torch.ones_like(hops, dtype=torch.bool) if k is None else hops <= k
        if last == "causal" and k is not None:
            block[:, -1] = hops[:, -1] <= 1
            block[-1] = True
        block = block if bidirectional else block.tril()
        mask = torch.ones(length, length, dtype=torch.bool, device=at.device).tril()
        inside = torch.zeros_like(mask)
        mask[at[:, None], at], inside[at[:, None], at] = block, True
        masks.append(mask)
        windowed.append(inside)
    seen, within = torch.stack(masks)[:, None], torch.stack(windowed)[:, None]
    kept = torch.ones_like(seen) if keep is None else keep.bool()[:, None, None].expand_as(seen)
    if low is None:
        return seen & kept
    out = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)
    return out.masked_fill(within & ~seen, low).masked_fill(~kept, torch.finfo(torch.float32).min)


@dataclass(frozen=True)
class GraphReport(Result):
    """All (layers, heads): mean mass of text behind the nodes on nodes, of nodes on nodes, of nodes on the first token; correlation of attention
    between different nodes with adjacency (NaN where either is constant). rings (layers, heads, hops + 1): mean attention of the last node on a
    node so far away, over the examples that have one (NaN: none)."""

    text_to_node: Tensor
    node_to_node: Tensor
    sink: Tensor
    correlation: Tensor
    rings: Tensor

    def columns(self) -> dict[str, Column]:
        return heads_of({name: HeadTable(x) for name, x in vars(self).items() if name != "rings"})

    def plot(self) -> Plot:
        """Rings by hops, a line a layer (mean over heads)."""
        lines = {f"layer {i}": [(float(h), float(v)) for h, v in enumerate(r.mean(0)) if v == v] for i, r in enumerate(self.rings)}
        return figure("Attention of the last node", "hops", "mean attention", lines)


def graph_attention_report(attns: Sequence[Tensor], edges: Sequence[Tensor], nodes: Sequence[Tensor]) -> GraphReport:
    """attns: of each layer (B, H, T, T), as transformers gives them; edges, nodes: as `graph_window`. The first token must be no node's."""
    a = torch.stack(list(attns))
    if a.dim() != 5 or a.shape[3] != a.shape[4] or a.shape[1] != len(nodes) or len(edges) != len(nodes):
        raise RegardError(f"attns {tuple(a.shape)} for {len(nodes)} rows of nodes; expected (layers, B, H, T, T)")
    farthest = max(len(at) for at in nodes)
    kept: list[tuple[Tensor, ...]] = []
    for b, (pairs, at) in enumerate(zip(edges, nodes, strict=True)):
        w, n = a[:, b], len(at)
        block, hops = w[:, :, at[:, None], at], hop_distance(pairs, n)
        off = ~torch.eye(n, dtype=torch.bool, device=at.device)
        x, y = block[:, :, off], (hops == 1)[off].to(w)
        x, y = x - x.mean(-1, keepdim=True), y - y.mean()
        correlation = (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum()).sqrt()
        rings = torch.stack([block[:, :, -1, hops[-1] == r].mean(-1) for r in range(farthest)], -1)
        kept.append((w[:, :, int(at[-1]) + 1 :, at].sum(-1).mean(-1), block.sum(-1).mean(-1), w[:, :, at, 0].mean(-1), correlation, rings))
    return GraphReport(*[torch.stack(x).nanmean(0) for x in zip(*kept, strict=True)])


def attention_shift(attns: Sequence[Tensor], changed: Sequence[Tensor], nodes: Sequence[Tensor]) -> Tensor:
    """(layers, heads): Jensen-Shannon divergence, in nats, between what the last node gives to the nodes in two runs, each normalised over them."""
    shifts = []
    for b, at in enumerate(nodes):
        p, q = (torch.stack([x[b, :, at[-1], at] for x in runs]) for runs in (attns, changed))
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        mean = (p + q) / 2
        shifts.append(sum((torch.xlogy(x, x) - torch.xlogy(x, mean)).sum(-1) / 2 for x in (p, q)))
    return torch.stack(shifts).mean(0)  # type: ignore[arg-type]


class WindowedDecoder(nn.Module):
    """ids (B, T), mask (B, 1, T, T) -> logits (B, classes) at the last token: `layers` pre-norm blocks with learned positions."""

    def __init__(self, vocab: int, classes: int, dim: int = 32, heads: int = 4, layers: int = 2, length: int = 32):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab, dim), nn.Parameter(0.02 * torch.randn(length, dim))
        self.blocks = nn.ModuleList(Block(dim, Attention(dim, heads, causal=False), 2 * dim, norm="layer") for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids) + self.place[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.out(self.norm(x[:, -1]))  # type: ignore[no-any-return]


def window_experiment(
    k: int | None,
    *,
    steps: int = 300,
    batch: int = 64,
    lr: float = 3e-3,
    first: int = 5,
    second: int = 5,
    graphs: tuple[int, int] = (1024, 256),
    seed: int = 0,
) -> tuple[float, float]:
    """Accuracy of a small decoder trained with the window k, read with k and with the full window, untrained for it. graphs: to train and test on."""
    n = first + second + 1

    def windows(edges: Tensor, size: int | None) -> Tensor:
        return graph_window(list(edges), [torch.arange(1, n + 1)] * len(edges), n + 2, size)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WindowedDecoder(5, 2, length=n + 2)

        generator = torch.Generator().manual_seed(seed)
        edges, ids, labels = ego_graphs(graphs[0], generator, first, second)
        masks = windows(edges, k)

        def loss(rows: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model(ids[rows], masks[rows]), labels[rows])

        fit(model, lambda g: torch.randint(graphs[0], (batch,), generator=g), loss, steps, lr=lr, seed=seed)
        edges, ids, labels = ego_graphs(graphs[1], generator, first, second)
        with torch.no_grad():
            right = [float((model(ids, windows(edges, s)).argmax(1) == labels).double().mean()) for s in (k, None)]
    return right[0], right[1]
