"""Lina-Speech: a codec language model of gated linear attention, voices as first states of its layers (id 181; Lemerle et al., 2024).

x_t = sum_q E_q[c_{q,t}], stream q delayed by q + 1;  x <- GLA blocks(x);  x <- x + blind cross-attention to the text;  x <- GLA blocks(x);  logits_q = W_q x
tuning: S_0 = scale sum_r u_r w_r^T for each layer, all else frozen.   State after a prompt = S_0 of what follows
Not reproduced: a cut of 15% that shuffled texts do not give (a voice is most of what toy states learn: 11% with either).
Not built: the variants with mamba, rwkv6 and rotary cross-attention, text dropped in training, a speaker encoder, the codec itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.blind import BlindCrossAttention, GLABlock, ReaderBlock

PAD, HEAD, TAIL, SPECIAL = 0, 1, 2, 3  # tokens of a stream before the codes
States = Sequence[Tensor | None]


def delayed(codes: Tensor) -> Tensor:
    """codes (B, Q, T) from 0 -> tokens (B, T + Q + 1, Q): stream q stands behind q + 1 heads and before Q - q tails."""
    count = codes.shape[1]
    streams = [F.pad(F.pad(codes[:, q] + SPECIAL, (q + 1, 0), value=HEAD), (0, count - q), value=TAIL) for q in range(count)]
    return torch.stack(streams, 2)


def undelayed(tokens: Tensor) -> Tensor:
    """tokens (B, n, Q) of `delayed` -> codes (B, Q, n - Q - 1)."""
    count = tokens.shape[2]
    length = tokens.shape[1] - count - 1
    return torch.stack([tokens[:, q + 1 : q + 1 + length, q] for q in range(count)], 1).sub(SPECIAL).clamp_min(0)


@register("lina-speech", kind="model")
class LinaLM(nn.Module):
    """text (B, S) ids, 0 padding, and tokens (B, n, n_quant) of `delayed` -> logits (B, n, n_quant, n_codes + 3), of the token to come.

    layers: GLA blocks before, and as many behind, the cross-attention. text_layers: of the reader of the text. places: channels of text places.
    """

    def __init__(
        self,
        n_txt: int,
        n_codes: int,
        n_quant: int,
        dim: int = 256,
        heads: int = 4,
        layers: int = 6,
        text_layers: int = 4,
        places: int | None = None,
        expand_v: float = 2.0,
        dropout: float = 0.1,
    ):
        super().__init__()
        if min(n_txt - 1, n_codes, n_quant, layers, text_layers) < 1 or dim % heads or dim // heads % 4 or (places or heads) % heads:
            raise RegardError(
                f"n_txt={n_txt}, n_codes={n_codes}, n_quant={n_quant}, dim={dim}, heads={heads}, places={places}: expected positive numbers, "
                "dim / heads a multiple of 4, and places a multiple of heads"
            )
        self.n_codes, self.n_quant = n_codes, n_quant
        self.text = nn.Embedding(n_txt, dim, padding_idx=PAD)
        self.codes = nn.ModuleList(nn.Embedding(n_codes + SPECIAL, dim, padding_idx=PAD) for _ in range(n_quant))
        self.reader = nn.ModuleList(ReaderBlock(dim, heads, dropout) for _ in range(text_layers))
        self.before, self.behind = (
            nn.ModuleList(GLABlock(dim, heads, expand_v=expand_v, dropout=dropout) for _ in range(layers)) for _ in range(2)
        )
        self.cross = BlindCrossAttention(dim, heads, places, dropout, expand_v)
        self.heads = nn.ModuleList(nn.Linear(dim, n_codes + SPECIAL, bias=False) for _ in range(n_quant))

    @property
    def blocks(self) -> list[GLABlock]:
        """All layers with a state, in the order of states."""
        return [*self.before, self.cross.block, *self.behind]  # type: ignore[list-item]

    def read(self, text: Tensor) -> Tensor:
        """The text's tokens (B, S, dim), each having seen all."""
        if text.dim() != 2 or not bool((text != PAD).any(1).all()):
            raise RegardError(f"text {tuple(text.shape)}: expected ids (B, S), at least one that is not {PAD} a row")
        x = self.text(text)
        for block in self.reader:
            x = block(x, text != PAD)
        return x  # type: ignore[no-any-return]

    def run(self, tokens: Tensor, read: Tensor, keep: Tensor, states: States | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits, weights of the looks at the text (B, 2, n, S), and states of all blocks behind tokens (B, n, n_quant); states: before them."""
        if tokens.dim() != 3 or tokens.shape[2] != self.n_quant or len(tokens) != len(read):
            raise RegardError(f"tokens {tuple(tokens.shape)} for {len(read)} texts: expected (B, n, {self.n_quant})")
        given = [None] * len(self.blocks) if states is None else list(states)
        if len(given) != len(self.blocks):
            raise RegardError(f"{len(given)} states: expected {len(self.blocks)}, one a block")
        x: Tensor = sum(table(tokens[..., q]) for q, table in enumerate(self.codes))  # type: ignore[assignment]
        new: list[Tensor] = []
        for block in self.before:
            x, state = block(x, given[len(new)])
            new.append(state)
        z, weights, state = self.cross(x, read, keep, given[len(new)])
        new.append(state)
        x = x + z
        for block in self.behind:
            x, state = block(x, given[len(new)])
            new.append(state)
        return torch.stack([head(x) for head in self.heads], 2), weights, new

    def forward(self, text: Tensor, tokens: Tensor, states: States | None = None) -> Tensor:
        return self.run(tokens, self.read(text), text != PAD, states)[0]

    def loss(self, text: Tensor, tokens: Tensor, states: States | None = None) -> Tensor:
        """Mean cross-entropy of tokens but the first (B, n, n_quant), heads and padding left out; padded rows end in 0."""
        logits, target = self(text, tokens[:, :-1], states), tokens[:, 1:]
        asked = (target != PAD) & (target != HEAD)
        if not bool(asked.any()):
            raise RegardError("tokens hold nothing to predict; expected `delayed` codes")
        return F.cross_entropy(logits[asked], target[asked])

    @torch.no_grad()
    def generate(
        self,
        text: Tensor,
        most: int = 1000,
        states: States | None = None,
        prompt: Tensor | None = None,
        top: int = 100,
        sampled: int = 1,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Tokens (B, n, n_quant), from the heads on, until every stream of every row has said the tail together, or `most`. prompt: tokens of
        `delayed` codes that go before. The first `sampled` streams are drawn among the `top` likeliest, the others are greedy."""
        read, keep = self.read(text), text != PAD
        out = torch.full((len(text), 1, self.n_quant), HEAD, device=text.device) if prompt is None else prompt
        new, done = out, torch.zeros(len(text), dtype=torch.bool, device=text.device)
        for _ in range(most):
            logits, _, states = self.run(new, read, keep, states)
            streams = []
            for q in range(self.n_quant):
                own = logits[:, -1, q] / temperature
                if q < sampled:
                    least = own.topk(min(top, own.shape[-1]), -1).values[:, -1:]
                    streams.append(torch.multinomial(own.masked_fill(own < least, -torch.inf).softmax(-1), 1, generator=generator)[:, 0])
                else:
                    streams.append(own.argmax(-1))
            new = torch.stack(streams, 1)[:, None]
            out = torch.cat((out, new), 1)
            done |= (new == TAIL).all((1, 2))
            if bool(done.all()):
                break
        return out


class InitialStateTuner(nn.Module):
    """First states of a frozen model's blocks, scale * sum of `rank` outer products each: `tuner.states()` go into its calls."""

    def __init__(self, model: LinaLM, rank: int = 1, scale: float = 0.02, generator: torch.Generator | None = None):
        super().__init__()
        if rank < 1:
            raise RegardError(f"rank={rank}: expected at least 1")
        like, self.scale = next(model.parameters()), scale

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator).to(like))

        self.u = nn.ParameterList(drawn(h, dk, rank) for h, dk, _ in (block.state_shape for block in model.blocks))
        self.w = nn.ParameterList(drawn(h, rank, dv) for h, _, dv in (block.state_shape for block in model.blocks))

    def states(self) -> list[Tensor]:
        """(1, H, dk, dv) of each block."""
        return [self.scale * (u @ w)[None] for u, w in zip(self.u, self.w, strict=True)]

    def fit(
        self,
        model: LinaLM,
        samples: Iterable[tuple[Tensor, Tensor]],
        lr: float = 0.1,
        accumulate: int = 4,
        watch: Callable[[float], Any] | None = None,
    ) -> InitialStateTuner:
        """Adam on batches (text, tokens), a step every `accumulate` of them; no weight of the model changes."""
        optimizer, learned = torch.optim.Adam(self.parameters(), lr), [p.requires_grad for p in model.parameters()]
        model.requires_grad_(False)
        try:
            for at, (text, tokens) in enumerate(samples):
                loss = model.loss(text, tokens, self.states())
                loss.backward()
                if watch is not None:
                    watch(loss.item())
                if at % accumulate == accumulate - 1:
                    optimizer.step()
                    optimizer.zero_grad()
        finally:
            for p, own in zip(model.parameters(), learned, strict=True):
                p.requires_grad_(own)
        return self


__all__ = ["InitialStateTuner", "LinaLM", "delayed", "undelayed"]
