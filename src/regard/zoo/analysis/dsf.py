"""DSF: attention, state spaces and gated recurrences as one linear system whose matrices follow the tokens (id 16; Sieber et al., 2024).

h_i = Lambda_i h_{i-1} + B_i u_i,  y_i = C_i h_i + D_i u_i,  h before the first token 0;  unrolled y = Phi u, Phi_ij = C_i Lambda_i .. Lambda_{j+1} B_j
attention of weights phi(q_i).psi(k_j) / eta_i:  Lambda_i = eta_{i-1} / eta_i,  B_i = (I (x) psi(k_i)) W_V / eta_i,  C_i = W_O (I (x) phi(q_i))
softmax: phi = psi = monomials up to an order (its powers' series), eta_i = sum_j exp(q_i.k_j / sqrt(d)): exact as the order grows
S6: Lambda = exp(delta a), B = delta W_B u, C = W_C u: linear attention with psi = delta W_B u, phi = W_C u and eta_{i-1} / eta_i = Lambda_i
An affine layer's biases read one more channel of u that is 1.
Not reproduced: recall by state expansion n. 500 steps at length 32 do not separate them (0.62 right for n = 2, 0.29 for n = 64); the paper trains 64
epochs of 100,000 sequences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.attention import Attention
from regard.nn.decoder import Block
from regard.nn.parts import head_norm
from regard.nn.state_layers import NormalizedAttention, QLSTMCell
from regard.tasks.synthetic import recall
from regard.tasks.training import fit

Feature = Callable[[Tensor], Tensor]


@register("dsf", kind="module")
@dataclass(frozen=True)
class System:
    """decay (B, L, N), write (B, L, N, d), read (B, L, d', N), direct (B, L, d', d) or None, of inputs u (B, L, d). All runs give y (B, L, d')."""

    u: Tensor
    decay: Tensor
    write: Tensor
    read: Tensor
    direct: Tensor | None = None

    def __post_init__(self) -> None:
        b, length, d = self.u.shape
        n, out = self.decay.shape[-1], self.read.shape[2]
        wanted = {"decay": (b, length, n), "write": (b, length, n, d), "read": (b, length, out, n), "direct": (b, length, out, d)}
        for name, shape in wanted.items():
            x = getattr(self, name)
            if x is not None and tuple(x.shape) != shape:
                raise RegardError(f"{name} has shape {tuple(x.shape)}; expected {shape} for u {tuple(self.u.shape)}")

    @property
    def state(self) -> int:
        """Numbers in h."""
        return self.decay.shape[-1]

    @property
    def written(self) -> Tensor:
        """B_i u_i (B, L, N)."""
        return torch.einsum("blnd,bld->bln", self.write, self.u)

    def close(self, h: Tensor) -> Tensor:
        y = torch.einsum("bldn,bln->bld", self.read, h)
        return y if self.direct is None else y + torch.einsum("bled,bld->ble", self.direct, self.u)

    def recurrence(self) -> Tensor:
        """Token by token."""
        h, states = torch.zeros_like(self.decay[:, 0]), []
        for decay, new in zip(self.decay.unbind(1), self.written.unbind(1), strict=True):
            h = decay * h + new
            states.append(h)
        return self.close(torch.stack(states, 1))

    def scan(self) -> Tensor:
        """In log2(L) rounds over all tokens at once."""
        decay, h, reach = self.decay, self.written, 1
        while reach < h.shape[1]:
            h = torch.cat((h[:, :reach], h[:, reach:] + decay[:, reach:] * h[:, :-reach]), 1)
            decay = torch.cat((decay[:, :reach], decay[:, reach:] * decay[:, :-reach]), 1)
            reach *= 2
        return self.close(h)

    def phi(self) -> Tensor:
        """The block-lower-triangular map (B, L, d', L, d): y_i = sum_j Phi_ij u_j."""
        rows, length = [], self.u.shape[1]
        for i in range(length):
            carried, row = self.read[:, i], []
            for j in range(i, -1, -1):
                row.append(carried @ self.write[:, j] + (self.direct[:, i] if self.direct is not None and i == j else 0.0))
                carried = carried * self.decay[:, j, None]
            rows.append(torch.stack([*reversed(row), *[torch.zeros_like(row[0])] * (length - 1 - i)], 2))
        return torch.stack(rows, 1)

    def explicit(self) -> Tensor:
        return torch.einsum("biejd,bjd->bie", self.phi(), self.u)


def with_ones(u: Tensor) -> Tensor:
    return F.pad(u, (0, 1), value=1.0)


def from_attention(u: Tensor, q: Tensor, k: Tensor, eta: Tensor, values: nn.Linear, out: nn.Linear) -> System:
    """Features of q and k (B, H, L, n), eta (B, H, L), layers of values and output: sum_{j<=i} (q_i.k_j) v_j / eta_i a head, projected."""
    heads, size = q.shape[1], q.shape[-1]
    w_v = values.weight if values.bias is None else torch.cat((values.weight, values.bias[:, None]), 1)
    bias = u.new_zeros(len(out.weight)) if out.bias is None else out.bias
    given = with_ones(u)
    w_v = w_v if w_v.shape[1] == given.shape[-1] else F.pad(w_v, (0, 1))
    w_v, w_o = w_v.unflatten(0, (heads, -1)), out.weight.unflatten(1, (heads, -1))
    width = w_v.shape[1]
    ratio = torch.cat((torch.ones_like(eta[..., :1]), eta[..., :-1] / eta[..., 1:]), -1)
    decay = ratio.transpose(1, 2)[..., None].expand(-1, -1, -1, width * size).flatten(2)
    write = torch.einsum("bhln,hvd,bhl->blhvnd", k, w_v, 1 / eta).flatten(2, 4)
    read = torch.einsum("bhln,ohv->blohvn", q, w_o).flatten(3)
    direct = F.pad(bias[:, None], (u.shape[-1], 0)).expand(*u.shape[:2], -1, -1)
    return System(given, decay, write, read, direct)


def plain(layer: Attention, u: Tensor) -> tuple[Tensor, Tensor]:
    """q and k (B, H, L, D) of a causal layer whose values and output are projections of its input and of its heads alone."""
    bare = all(isinstance(norm, nn.Identity) for norm in (layer.out_norm, layer.merge_norm)) and not len(layer.convs)
    recipe = layer.recipe
    if not (bare and layer.causal and layer.gate is None and layer.head_gate is None and layer.heads == layer.kv_heads) or any(
        (recipe.value_activation, recipe.out_activation, recipe.merge_activation)
    ):
        raise RegardError(
            f"{layer}: expected a causal Attention layer with as many key heads as heads, and no convolution, gate, norm or activation around its values"
        )
    q, k, _, _ = layer.heads_of(u, u, 0, None)
    return q, k


def from_linear_attention(layer: Attention, u: Tensor, phi: Feature, psi: Feature | None = None, eta: str = "sum") -> System:
    """phi of queries, psi of keys (None: phi). eta: "sum", phi(q_i).sum_j psi(k_j), or "one"."""
    if eta not in ("sum", "one"):
        raise RegardError(f"eta={eta!r}; expected sum or one")
    q, k = plain(layer, u)
    q, k = phi(q), (psi or phi)(k)
    mass = (q * k.cumsum(2)).sum(-1) if eta == "sum" else torch.ones_like(q[..., 0])
    return from_attention(u, q, k, mass, layer.v, layer.out)


def monomials(x: Tensor, order: int) -> Tensor:
    """(..., d) -> all x^a / sqrt(a!) of degree up to `order`: their inner products are sum_{p <= order} (x.y)^p / p!."""
    found = []
    for degree in range(order + 1):
        for places in itertools.combinations_with_replacement(range(x.shape[-1]), degree):
            power = math.prod(math.factorial(places.count(at)) for at in set(places))
            found.append(x[..., list(places)].prod(-1) / math.sqrt(power))
    return torch.stack(found, -1)


def from_softmax_attention(layer: Attention, u: Tensor, order: int) -> System:
    """Softmax attention with its exponential cut behind the power `order`; eta is exact."""
    if order < 0:
        raise RegardError(f"order={order}; expected 0 or more")
    q, k = (x * x.shape[-1] ** -0.25 for x in plain(layer, u))
    eta = (q @ k.mT).exp().tril().sum(-1)
    return from_attention(u, monomials(q, order), monomials(k, order), eta, layer.v, layer.out)


def from_normalized_attention(layer: NormalizedAttention, u: Tensor) -> System:
    q, k, _, eta = layer.parts(u)
    return from_attention(u, q, k, eta, layer.v, layer.out)


def from_s6(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None) -> System:
    """As `regard.nn.selective_scan` takes them: x, delta (B, C, L), a (C, n), b, c (B, n, L), skip (C,)."""
    u, channels = x.mT, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    decay = torch.einsum("bcl,cn->blcn", delta, a).exp().flatten(2)
    write = torch.einsum("bcl,bnl,cd->blcnd", delta, b, channels).flatten(2, 3)
    read = torch.einsum("bnl,ce->blecn", c, channels).flatten(3)
    return System(u, decay, write, read, None if skip is None else torch.diag(skip).expand(*u.shape[:2], -1, -1))


def from_ssd(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> System:
    """x (B, H, L, d), log_decay (B, H, L), b, c (B, H, L, n): S_i = e^{log_decay} S_{i-1} + b_i x_i', y_i = S_i' c_i; u and y are heads side by side."""
    heads, width, size = x.shape[1], x.shape[3], b.shape[3]
    u, own = x.transpose(1, 2).flatten(2), torch.eye(heads * width, dtype=x.dtype, device=x.device).view(heads, width, -1)
    decay = log_decay.exp().mT[..., None].expand(-1, -1, -1, width * size).flatten(2)
    write = torch.einsum("bhln,hvd->blhvnd", b, own).flatten(2, 4)
    return System(u, decay, write, torch.einsum("bhln,hve->blehvn", c, own).flatten(3))


def from_qlstm(cell: QLSTMCell, x: Tensor) -> System:
    """x (B, L, hidden): what the cell reads."""
    log_f, _, read = cell.parts(x)
    write = torch.sigmoid(cell.gates(x).chunk(3, -1)[1])
    return System(x, log_f.exp(), torch.diag_embed(write), torch.diag_embed(read))


class Recaller(nn.Module):
    """tokens (B, L) -> logits (B, L, vocab): learned places, and blocks around the mixers."""

    def __init__(self, mixers: list[nn.Module], dim: int, vocab: int, length: int):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, mixer, 4 * dim) for mixer in mixers)
        self.norm, self.head = head_norm("layer", dim), nn.Linear(dim, vocab, bias=False)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def recall_accuracy(
    mixer: Callable[[], nn.Module],
    *,
    dim: int = 64,
    layers: int = 2,
    length: int = 64,
    pairs: int = 4,
    vocab: int = 8192,
    steps: int = 10_000,
    batch: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
) -> float:
    """Multi-query recall after training: share of 500 sequences' answers that are right. mixer: makes a layer (B, L, dim) -> the same, such as
    `NormalizedAttention(dim, key_dim=n)` for state expansion n."""
    torch.manual_seed(seed)
    model = Recaller([mixer() for _ in range(layers)], dim, vocab, length)

    def loss(given: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(given[0]).flatten(0, 1), given[1].flatten(), ignore_index=-100)

    fit(model, lambda g: recall(batch, length, pairs, vocab, g), loss, steps, lr=lr, seed=seed)
    tokens, labels = recall(500, length, pairs, vocab, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        found = torch.cat([model(part).argmax(-1) for part in tokens.split(100)])
    return float((found == labels)[labels != -100].double().mean())
