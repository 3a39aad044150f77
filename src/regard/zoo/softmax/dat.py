"""Dual attention: sensory heads read values, relational heads read how tokens relate (id 236; Altabaa & Lafferty, 2024).

    relational head:  out_i = sum_j alpha_ij (W_r r_ij + W_v s_j),   r_ij[l] = act(<W_qr^l x_i, W_kr^l x_j> / sqrt(d_r))
s are symbols: learned codes of tokens, of positions, or of relative positions s_(i-j). With act the identity,
sum_j alpha_ij r_ij[l] = <q_i^l, sum_j alpha_ij k_j^l>: the relations are never formed, and a relational head is one attention call.

`DualBlock` is the layer's block; `DualDecoder` and `DualViT` are models of them for language and images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.algebra import Causal, Input, Rope, RowLocal, Weighted, bind
from regard.algebra.normalizer import exp_shifted
from regard.algebra.part import Function
from regard.catalog.registry import register
from regard.engine import step, weights
from regard.engine.door import attend
from regard.engine.reference import repeat_heads
from regard.engine.stream import State
from regard.errors import RegardError
from regard.nn.attention import Attention, LayerState
from regard.nn.parts import takes, whole
from regard.nn.symbols import PositionalSymbols, RelativeSymbols, SymbolicAttention


def by_offset(alpha: Tensor, count: int) -> Tensor:
    """Weights (B, H, L, L) summed by their offset i - j, clipped to the `count` offsets around 0: (B, H, L, count)."""
    if count % 2 == 0:
        raise RegardError(f"symbols has {count} offsets; expected an odd number, from -r to r")
    length, reach = alpha.shape[-1], count // 2
    at = torch.arange(length, device=alpha.device)
    place = ((at[:, None] - at).clamp(-reach, reach) + reach).expand(alpha.shape)
    return alpha.new_zeros(*alpha.shape[:-1], count).scatter_add(-1, place, alpha)


class RelationalAttention(nn.Module):
    """The relational heads: x (B, L, dim), symbols (B, L, dim) of tokens or (L, dim) of positions -> (B, L, heads * width).

    relations: R (None: heads). symmetric: W_kr = W_qr. activation: of relations, None for the identity. kv_heads: of keys and symbols.
    bias: of the projections to keys and values.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        width: int,
        *,
        relations: int | None = None,
        symmetric: bool = False,
        activation: Function | None = None,
        kv_heads: int | None = None,
        rope: bool = False,
        causal: bool = True,
        bias: bool = False,
    ):
        super().__init__()
        self.heads, self.width, self.kv_heads = heads, width, kv_heads or heads
        self.relations = relations or heads
        if heads % self.kv_heads or (heads * width) % self.relations:
            raise RegardError(
                f"heads={heads}, width={width}: expected kv_heads={self.kv_heads} to divide heads and relations={self.relations} heads * width"
            )
        self.relation_dim = heads * width // self.relations
        self.causal, self.activation, self.rope = causal, activation, Rope() if rope else None
        self.q, self.k = nn.Linear(dim, heads * width, False), nn.Linear(dim, self.kv_heads * width, bias)
        self.q_rel = nn.Linear(dim, self.relations * self.relation_dim, False)
        self.k_rel = None if symmetric else nn.Linear(dim, self.relations * self.relation_dim, False)
        self.v = nn.Linear(dim, self.kv_heads * width, bias)
        self.w_r = nn.Parameter(torch.randn(heads, width, self.relations) / self.relations**0.5)

    def queries(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q = q if self.rope is None else self.rope.rotate(q, torch.arange(first, first + x.shape[1], device=x.device))
        return q, self.q_rel(x).unflatten(-1, (self.relations, -1)).transpose(1, 2)

    def keys(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        k = self.k(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        k = k if self.rope is None else self.rope.rotate(k, torch.arange(first, first + x.shape[1], device=x.device))
        return k, (self.q_rel if self.k_rel is None else self.k_rel)(x)

    def values(self, symbols: Tensor, batch: int) -> Tensor:
        s = self.v(symbols).unflatten(-1, (self.kv_heads, -1)).movedim(-2, 0 if symbols.dim() == 2 else -3)
        return s.expand(batch, *s.shape[-3:]) if symbols.dim() == 2 else s

    def read(self, q_rel: Tensor, seen: Tensor) -> Tensor:
        """Attended relations and symbols -> outputs: seen (B, H, L, R d_r + width)."""
        keys, symbols = seen[..., : -self.width], seen[..., -self.width :]
        keys = keys.unflatten(-1, (self.relations, -1))  # (B, H, L, R, d_r)
        relations = torch.einsum("bhlrd,brld->bhlr", keys, q_rel) * self.relation_dim**-0.5
        return torch.einsum("bhlr,hwr->bhlw", relations, self.w_r) + symbols

    def stored(self, k_rel: Tensor, v: Tensor) -> Tensor:
        """What a key's value is when relations stay linear: its relational key beside its symbol's value."""
        return torch.cat((k_rel.unsqueeze(1).expand(-1, self.kv_heads, -1, -1), v), -1)

    def forward(self, x: Tensor, symbols: Tensor, relative: bool = False) -> Tensor:
        """relative: symbols are (2 r + 1, dim), one for each offset i - j in -r .. r, where those beyond share the outermost, or (L, L, dim),
        one for each pair. Relations are then formed in full."""
        (q, q_rel), (k, k_rel) = self.queries(x, 0), self.keys(x, 0)
        mask = Causal() if self.causal else None
        if not relative and self.activation is None:
            stored = self.stored(k_rel, self.values(symbols, x.shape[0]))
            return self.read(q_rel, attend(q, k, stored, mask=mask)).transpose(1, 2).flatten(-2)
        alpha = weights(q, k, "softmax", mask=mask)
        assert alpha is not None
        relations = q_rel @ k_rel.unflatten(-1, (self.relations, -1)).transpose(1, 2).transpose(-1, -2) * self.relation_dim**-0.5
        relations = relations if self.activation is None else self.activation(relations)
        out = torch.einsum("bhij,brij,hwr->bhiw", alpha, relations, self.w_r)
        if relative:
            s = self.v(symbols).unflatten(-1, (self.kv_heads, -1)).repeat_interleave(self.heads // self.kv_heads, -2)
            pairs = s.dim() == 4
            out = out + torch.einsum("bhij,ijhw->bhiw" if pairs else "bhio,ohw->bhiw", alpha if pairs else by_offset(alpha, len(s)), s)
        else:
            out = out + alpha @ repeat_heads(self.values(symbols, x.shape[0]), self.heads)
        return out.transpose(1, 2).flatten(-2)

    @whole
    def step(self, x: Tensor, symbols: Tensor, state: State | None, first: int) -> tuple[Tensor, State]:
        """New tokens and their symbols; relations must be linear and symbols belong to tokens or positions."""
        if self.activation is not None:
            raise RegardError(
                "step with an activation of relations would need all earlier relational keys a head; expected activation=None"
            )
        (q, q_rel), (k, k_rel) = self.queries(x, first), self.keys(x, first)
        seen, new = step(q, k, self.stored(k_rel, self.values(symbols, x.shape[0])), "softmax", state)
        return self.read(q_rel, seen).transpose(1, 2).flatten(-2), new


class RelationalCrossAttention(nn.Module):
    """The baselines that attend by relations: x (B, L, dim), symbols (B, L, dim) -> (B, L, dim), by alpha v(symbols), then a projection.

    disentangled False, RCA: alpha_ij = softmax_j(q_i.k_j / sqrt(d)); True, DisRCA: that softmax times act(<W_qr x_i, W_kr x_j> / sqrt(d)) a
    head, not normalised again. activation: act. kv_heads: of keys, relational keys and symbols. bias: of keys, values and the last projection.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        disentangled: bool = False,
        activation: Function = torch.relu,
        kv_heads: int | None = None,
        causal: bool = True,
        bias: bool = False,
    ):
        super().__init__()
        kv_heads = kv_heads or heads
        if dim % heads or heads % kv_heads:
            raise RegardError(f"dim={dim}, heads={heads}, kv_heads={kv_heads}: expected heads to divide dim and kv_heads to divide heads")
        self.heads, self.kv_heads, self.causal, wide = heads, kv_heads, causal, dim // heads * kv_heads
        self.q, self.k, self.v = nn.Linear(dim, dim, False), nn.Linear(dim, wide, bias), nn.Linear(dim, wide, bias)
        self.q_rel = nn.Linear(dim, dim, False) if disentangled else None
        self.k_rel = nn.Linear(dim, wide, False) if disentangled else None
        self.out = nn.Linear(dim, dim, bias)
        relation = RowLocal(bind(related, activation=activation), exp_shifted, shift="max", inputs=(Input("relation", "bhqk"),))
        self.mechanism = Weighted(normalizer=relation) if disentangled else Weighted()

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, symbols: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x), self.heads), self.split(self.k(x), self.kv_heads), self.split(self.v(symbols), self.kv_heads)
        given: dict[str, Any] = {}
        if self.q_rel is not None and self.k_rel is not None:
            k_rel = repeat_heads(self.split(self.k_rel(x), self.kv_heads), self.heads)
            given["relation"] = self.split(self.q_rel(x), self.heads) @ k_rel.transpose(-1, -2) * q.shape[-1] ** -0.5
        out = attend(q, k, v, self.mechanism, mask=Causal() if self.causal else None, **given)
        return self.out(out.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def related(s: Tensor, c: Tensor, relation: Tensor, activation: Function) -> Tensor:
    return torch.exp(s - c) * activation(relation)  # type: ignore[no-any-return]


@register("dat", kind="module")
class DualAttention(nn.Module):
    """heads_sa sensory and heads_ra relational heads: x (B, L, dim), symbols -> (B, L, dim). Each kind has its own output projection; their
    results are laid side by side. options: those of RelationalAttention."""

    def __init__(
        self,
        dim: int,
        heads_sa: int,
        heads_ra: int,
        *,
        causal: bool = True,
        rope: bool = False,
        kv_heads: int | None = None,
        **options: Any,
    ):
        super().__init__()
        self.dim = dim
        heads = heads_sa + heads_ra
        if dim % heads or not heads_sa or not heads_ra:
            raise RegardError(f"dim={dim}, heads_sa={heads_sa}, heads_ra={heads_ra}: expected heads of both kinds, whose sum divides dim")
        width = dim // heads
        self.sensory = Attention(dim, heads_sa, head_dim=width, causal=causal, rope=rope, kv_heads=kv_heads)
        self.sensory.out = nn.Linear(heads_sa * width, heads_sa * width, False)
        self.relational = RelationalAttention(dim, heads_ra, width, causal=causal, rope=rope, kv_heads=kv_heads, **options)
        self.out = nn.Linear(heads_ra * width, heads_ra * width, bool(options.get("bias", False)))

    @takes(x="batch length dim")
    def forward(self, x: Tensor, symbols: Tensor, relative: bool = False) -> Tensor:
        return torch.cat((self.sensory(x), self.out(self.relational(x, symbols, relative))), -1)

    @whole
    @takes(x="batch length dim")
    def step(self, x: Tensor, symbols: Tensor, state: tuple[LayerState, State] | None = None) -> tuple[Tensor, tuple[LayerState, State]]:
        """New tokens (B, n, dim) with their symbols (B, n, dim) or (n, dim), after those in `state`."""
        sensed, first = self.sensory.step(x, None if state is None else state[0])
        related, second = self.relational.step(x, symbols, None if state is None else state[1], first.position - x.shape[1])
        return torch.cat((sensed, self.out(related)), -1), (first, second)


class DualBlock(nn.Module):
    """x + dual(norm(x), symbols), then x + mlp(norm(x)): x (B, L, dim) -> (B, L, dim). hidden: width of the MLP (None: 4 dim); options: of `DualAttention`."""

    def __init__(self, dim: int, heads_sa: int, heads_ra: int, *, hidden: int | None = None, dropout: float = 0.0, **options: Any):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dual = DualAttention(dim, heads_sa, heads_ra, **options)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden or 4 * dim), nn.GELU(), nn.Linear(hidden or 4 * dim, dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, symbols: Tensor, relative: bool = False) -> Tensor:
        x = x + self.drop(self.dual(self.norm1(x), symbols, relative))
        return x + self.drop(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class DualStack(nn.Module):
    """Blocks that share a library of symbols, "attention" (read anew before each block), "position" or "relative": x (B, L, dim) -> (B, L, dim)."""

    def __init__(
        self, dim: int, layers: int, heads_sa: int, heads_ra: int, symbols: str, count: int, max_len: int, causal: bool, **options: Any
    ):
        super().__init__()
        makers: dict[str, Any] = {
            "attention": lambda: SymbolicAttention(dim, count, heads_sa + heads_ra),
            "position": lambda: PositionalSymbols(dim, max_len),
            "relative": lambda: RelativeSymbols(dim, count),
        }
        if symbols not in makers:
            raise RegardError(f"symbols={symbols!r}; expected one of {', '.join(makers)}")
        self.kind, self.library = symbols, makers[symbols]()
        self.blocks = nn.ModuleList([DualBlock(dim, heads_sa, heads_ra, causal=causal, **options) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "position" and x.shape[1] > len(self.library.library):
            raise RegardError(
                f"x has {x.shape[1]} tokens and symbols of {len(self.library.library)} positions; expected max_len of at least as many"
            )
        fixed = {"attention": None, "position": self.library.library[: x.shape[1]], "relative": self.library.library}[self.kind]
        for block in self.blocks:
            x = block(x, self.library(x) if fixed is None else fixed, self.kind == "relative")
        return self.norm(x)  # type: ignore[no-any-return]


class DualDecoder(nn.Module):
    """tokens (B, L) -> logits (B, L, vocab), causal, rotary positions, the embedding's weights in the output too. count: of symbols, or how far relative
    ones tell places apart."""

    def __init__(
        self, vocab: int, *, dim: int = 64, layers: int = 2, heads_sa: int = 2, heads_ra: int = 2, symbols: str = "attention", count: int = 32,
        max_len: int = 1024, **options: Any,
    ):  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.stack = DualStack(dim, layers, heads_sa, heads_ra, symbols, count, max_len, True, rope=True, **options)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.stack(self.embed(tokens)) @ self.embed.weight.T  # type: ignore[no-any-return]


class DualViT(nn.Module):
    """images (B, channels, side, side) -> logits (B, classes): patches, learned places, a class token, blocks that see everything."""

    def __init__(
        self, classes: int, side: int, patch: int, *, channels: int = 3, dim: int = 64, layers: int = 2, heads_sa: int = 2, heads_ra: int = 2,
        symbols: str = "attention", count: int = 32, **options: Any,
    ):  # fmt: skip
        super().__init__()
        if side % patch:
            raise RegardError(f"side={side}, patch={patch}: expected a patch that divides the side")
        tokens = (side // patch) ** 2 + 1
        self.patches, self.first = nn.Conv2d(channels, dim, patch, patch), nn.Parameter(torch.zeros(1, 1, dim))
        self.places = nn.Parameter(0.02 * torch.randn(tokens, dim))
        self.stack = DualStack(dim, layers, heads_sa, heads_ra, symbols, count, tokens, False, **options)
        self.head = nn.Linear(dim, classes)

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if x.shape[1] + 1 != len(self.places):
            raise RegardError(f"images give {x.shape[1]} patches; expected {len(self.places) - 1}")
        x = torch.cat((self.first.expand(x.shape[0], -1, -1), x), 1) + self.places
        return self.head(self.stack(x)[:, 0])  # type: ignore[no-any-return]


def relational_games(kind: str, count: int, objects: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Objects (count, objects, 8), two traits of four values each, one-hot, and labels (count,) 0 or 1: "same": are the
    first two equal; "occurs": does the first occur among the others; "between": does the middle object equal both its neighbours."""
    if kind not in ("same", "occurs", "between") or objects < 3:
        raise RegardError(f"kind={kind!r}, objects={objects}: expected same, occurs or between, and at least 3 objects")
    generator = torch.Generator().manual_seed(seed)
    traits = torch.randint(4, (count, objects, 2), generator=generator)
    wanted = torch.randint(2, (count,), generator=generator).bool()
    middle, first = objects // 2, traits[:, 0].clone()
    if kind == "same":
        traits[wanted, 1] = first[wanted]
    elif kind == "occurs":
        traits[wanted, 1 + int(torch.randint(objects - 1, (1,), generator=generator))] = first[wanted]
    else:
        traits[wanted, middle - 1 : middle + 2] = traits[wanted, middle : middle + 1]
    equal = (traits[:, :, None] == traits[:, None]).all(-1)
    label = {
        "same": equal[:, 0, 1],
        "occurs": equal[:, 0, 1:].any(-1),
        "between": equal[:, middle - 1, middle] & equal[:, middle, middle + 1],
    }[kind]
    return nn.functional.one_hot(traits, 4).flatten(-2).float(), label.long()
