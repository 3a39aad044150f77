"""Graph transformer: attention along edges, Laplacian positions, an edge stream (id 153; Dwivedi & Bresson, 2020).

w_ij = (Q h_i * K h_j) / sqrt(D) (* E e_ij),  a_ij = exp(clamp(sum_c w_ij, -5, 5)) / (sum over edges j -> i + eps),
h_i' = O_h concat_k sum_j a_ij V h_j,  e_ij' = O_e concat_k w_ij;  then residuals, a norm and a ReLU network for h and e
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes


def laplacian_positions(edges: Tensor, nodes: int, k: int, flip: bool = False) -> Tensor:
    """(nodes, k): eigenvectors of I - D^-1/2 A D^-1/2 for the k smallest eigenvalues after the first. edges (2, E), taken in both directions.
    flip: a random sign an eigenvector, as at every training step. Fewer than k exist in small graphs: the rest is 0."""
    a = torch.zeros(nodes, nodes, dtype=torch.float64)
    a[edges[0], edges[1]] = a[edges[1], edges[0]] = 1
    side = a.sum(-1).clamp_min(1).rsqrt()
    _, vectors = torch.linalg.eigh(torch.eye(nodes, dtype=torch.float64) - side[:, None] * a * side)
    found = vectors[:, 1 : k + 1]
    found = found * (2 * torch.randint(2, (found.shape[1],)) - 1) if flip else found
    return nn.functional.pad(found, (0, k - found.shape[1]))


def all_pairs(sizes: Tensor) -> Tensor:
    """Edges (2, E) of complete graphs with self loops, laid one after another: the "full graph" mode. sizes (graphs,)."""
    start = sizes.cumsum(0) - sizes
    return torch.cat(
        [torch.cartesian_prod(torch.arange(n), torch.arange(n)).T + first for n, first in zip(sizes.tolist(), start.tolist(), strict=True)],
        1,
    )


NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "": lambda dim: nn.Identity()}


class Stream(nn.Module):
    """x -> norm(x + branch), then norm(x + W_2 relu(W_1 x)): nodes and edges have one each."""

    def __init__(self, dim: int, dropout: float, norm: str = "batch"):
        super().__init__()
        if norm not in NORMS:
            raise RegardError(f"norm={norm!r}; expected batch, layer or ''")
        self.norm1, self.norm2, self.dropout = NORMS[norm](dim), NORMS[norm](dim), nn.Dropout(dropout)
        self.out, self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.out(branch)))
        return self.norm2(x + self.dropout(self.down(torch.relu(self.up(x)))))  # type: ignore[no-any-return]


@register("graph-transformer", kind="module")
class GraphTransformerLayer(nn.Module):
    """h (N, dim), edges (2, E) as (source j, target i), e (E, dim) or None -> (h, e). Several graphs lie one after another; cost O(E dim).

    edge_stream: the layer reads and updates e. norm: "batch", "layer" or "". bias: of Q, K, V and E. eps: added to the sum of a node's
    weights (None: 1e-6 with an edge stream, 0 without, as released). A node without incoming edges reads 0.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        edge_stream: bool = False,
        dropout: float = 0.0,
        norm: str = "batch",
        bias: bool = False,
        eps: float | None = None,
    ):
        super().__init__()
        self.dim = dim
        if dim % heads:
            raise RegardError(f"dim={dim} is not a multiple of heads={heads}")
        self.heads, self.eps = heads, (1e-6 if edge_stream else 0.0) if eps is None else eps
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias) for _ in range(3))
        self.e = nn.Linear(dim, dim, bias) if edge_stream else None
        self.nodes, self.edges = Stream(dim, dropout, norm), Stream(dim, dropout, norm) if edge_stream else None

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def attend(self, h: Tensor, edges: Tensor, e: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What nodes gather (N, dim), and the edges' vectors w (E, dim), before any projection."""
        q, k, v = (self.split(layer(h)) for layer in (self.q, self.k, self.v))
        source, target = edges
        w = q[target] * k[source] * q.shape[-1] ** -0.5
        w = w if self.e is None or e is None else w * self.split(self.e(e))
        strength = torch.exp(w.sum(-1, keepdim=True).clamp(-5, 5))
        total = torch.zeros_like(q[..., :1]).index_add(0, target, strength)
        gathered = torch.zeros_like(v).index_add(0, target, strength * v[source])
        return self.divided(gathered, total).flatten(-2), w.flatten(-2)

    def divided(self, gathered: Tensor, total: Tensor) -> Tensor:
        """What a node gathered over the sum of its weights; 0 where nothing points at it."""
        return gathered / (total + self.eps).masked_fill(total == 0, 1.0)

    def attend_dense(self, h: Tensor, adjacency: Tensor, e: Tensor | None = None) -> Tensor:
        """The same over a bool matrix adjacency[i, j] (edge j -> i) with e (N, N, dim): what nodes gather, at O(N^2)."""
        q, k, v = (self.split(layer(h)).transpose(0, 1) for layer in (self.q, self.k, self.v))
        w = q[:, :, None] * k[:, None] * q.shape[-1] ** -0.5
        w = w if self.e is None or e is None else w * self.split(self.e(e)).movedim(-2, 0)
        strength = torch.where(adjacency, torch.exp(w.sum(-1).clamp(-5, 5)), 0.0)
        return self.divided(strength @ v, strength.sum(-1, keepdim=True)).transpose(0, 1).flatten(-2)

    @takes(h="nodes dim")
    def forward(self, h: Tensor, edges: Tensor, e: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if (self.e is not None) != (e is not None):
            raise RegardError(
                f"edge features are {'missing' if e is None else 'given'}; this layer was built with edge_stream={self.e is not None}"
            )
        gathered, w = self.attend(h, edges, e)
        h = self.nodes(h, gathered)
        return h, None if self.edges is None or e is None else self.edges(e, w)


class GraphTransformer(nn.Module):
    """Node features (N, inputs), edges (2, E), graph numbers (N,) -> logits a graph (or a node, with readout=""): the input is W_h x + W_pe positions.

    readout: "mean" or "sum" over a graph's nodes, or "" for node outputs.
    """

    def __init__(self, inputs: int, dim: int, heads: int, layers: int, outputs: int, positions: int = 8, readout: str = "mean"):
        super().__init__()
        if readout not in ("mean", "sum", ""):
            raise RegardError(f"readout={readout!r}; expected mean, sum or ''")
        self.readout, self.embed, self.place = readout, nn.Linear(inputs, dim), nn.Linear(positions, dim)
        self.layers = nn.ModuleList([GraphTransformerLayer(dim, heads) for _ in range(layers)])
        self.head = nn.Sequential(nn.Linear(dim, dim // 2), nn.ReLU(), nn.Linear(dim // 2, outputs))

    def forward(self, x: Tensor, edges: Tensor, positions: Tensor, graph: Tensor | None = None) -> Tensor:
        h = self.embed(x) + self.place(positions)
        for layer in self.layers:
            h, _ = layer(h, edges)
        if self.readout and graph is not None:
            count = int(graph.max()) + 1
            pooled = h.new_zeros(count, h.shape[1]).index_add(0, graph, h)
            h = pooled if self.readout == "sum" else pooled / torch.bincount(graph, minlength=count).clamp_min(1)[:, None]
        return self.head(h)  # type: ignore[no-any-return]


def block_model(
    count: int, blocks: int = 3, inside: float = 0.6, across: float = 0.1, hint: float = 0.2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A stochastic block model: features (count, blocks) that show the block of a share `hint` of nodes, edges (2, E) in both directions with
    self loops, and each node's block (count,): the synthetic task is to tell the blocks."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(blocks, (count,), generator=generator)
    chance = torch.where(label[:, None] == label, inside, across)
    a = (torch.rand(count, count, generator=generator) < chance).triu(1)
    a = a | a.T | torch.eye(count, dtype=torch.bool)
    shown = torch.rand(count, generator=generator) < hint
    return nn.functional.one_hot(label, blocks) * shown[:, None].float(), a.nonzero().T, label
