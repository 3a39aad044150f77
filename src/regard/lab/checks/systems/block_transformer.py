"""Checks of block-transformer."""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.verification import check
from regard.tasks.training import fit
from regard.zoo.systems.block_transformer import BlockTransformerLM


def small(strategy: str = "prefix", block_len: int = 4, parts: int | None = None) -> BlockTransformerLM:
    model = BlockTransformerLM(20, block_len, 16, 2, 2, 2, 32, strategy, parts, positions=64, start=3).double().eval()
    for p in model.parameters():
        p.data.normal_(std=0.5)
    return model


def whole(stack: Any, x: Tensor) -> Tensor:
    """Hidden states of a GPT-NeoX stack, by hand: parallel branches, a quarter of each head's channels turned."""
    n, _d = x.shape
    for layer in stack.layers:
        own, mlp = layer.attention, layer.mlp
        size = own.head_size
        turn = max(int(size * 0.25), 2) // 2 * 2
        y = layer.input_layernorm(x)
        angles = torch.arange(n)[:, None].double() / 10000.0 ** (torch.arange(0, turn, 2).double() / turn)
        cos, sin = (torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))
        outs = []
        for q, k, v in (own.query_key_value(y).view(n, -1, 3, size).permute(1, 2, 0, 3)).unbind(0):
            q, k = (
                torch.cat((t[:, :turn] * cos + torch.cat((-t[:, turn // 2 : turn], t[:, : turn // 2]), -1) * sin, t[:, turn:]), -1)
                for t in (q, k)
            )
            s = (q @ k.T / size**0.5).masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf)
            outs.append(s.softmax(-1) @ v)
        z = layer.post_attention_layernorm(x)
        x = x + own.dense(torch.cat(outs, -1)) + mlp.dense_4h_to_h(torch.nn.functional.gelu(mlp.dense_h_to_4h(z)))
    return stack.final_layer_norm(x)  # type: ignore[no-any-return]


def by_hand(model: BlockTransformerLM, ids: Tensor, late: int = 0) -> Tensor:
    """Logits of one text (L,), block by block; late: blocks by which the context comes too early."""
    size, blocks, outs = model.block_len, len(ids) // model.block_len, []
    e = torch.stack([torch.cat([model.embedder.weight[t] for t in ids[size * b : size * (b + 1)]]) for b in range(blocks)])
    c = whole(model.block_decoder, e)
    for b in range(1, blocks):
        p = (model.expand.weight @ c[b - 1 + late] + model.expand.bias).view(model.parts, -1)
        own = model.embed.weight[ids[size * b : size * (b + 1) - 1]]
        if model.strategy == "prefix":
            h = whole(model.token_decoder, torch.cat((p, own)))[model.parts - 1 :]
        else:
            h = whole(model.token_decoder, torch.cat((model.embed.weight[model.start][None], own)) + p)
        outs.append(h @ model.head.weight.T)
    return torch.cat(outs)


@check(
    "block-transformer",
    "prefix and summation, blocks of 1 and 4, 1 to 3 parts: gap of logits to the stacks by hand",
    below=1e-6,
    control="each block's own context",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    own, other = [], []
    for strategy, block_len, parts in (("prefix", 4, None), ("prefix", 4, 3), ("prefix", 1, 1), ("summation", 4, None)):
        model, ids = small(strategy, block_len, parts), torch.randint(1, 20, (2, 20))
        found = model(ids)
        own += [naive.gap(found[row], by_hand(model, ids[row])) for row in range(2)]
        other.append(naive.gap(found[0], by_hand(model, ids[0], late=1)))
    return max(own), min(other)


@check(
    "block-transformer",
    "pairs (logit, token) that depend on one another and should not, or should and do not",
    below=0.0,
    control="a plain causal model's pairs",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    wrong = plain = 0
    for strategy in ("prefix", "summation"):
        model, ids = small(strategy), torch.randint(1, 20, (1, 16))
        before = model(ids)[0]
        for j in range(16):
            other = ids.clone()
            other[0, j] = other[0, j] % 19 + 1
            moved = (model(other)[0] - before).abs().amax(-1) > 1e-9
            expected = torch.tensor([j // 4 < i // 4 or j < i for i in range(4, 16)])
            last = torch.tensor([j < i for i in range(4, 16)])
            wrong += int((moved != expected).sum())
            plain += int((moved != last.roll(1)).sum())
    return float(wrong), float(plain)


@check(
    "block-transformer",
    "14 tokens behind prompts of 9 and 7 tokens, padded: gap of step logits to the whole text's; caches of an entry a block and of one block",
    below=1e-6,
    control="the block's first token left out",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    own, other = [], []
    for strategy in ("prefix", "summation"):
        model = small(strategy)
        ids = torch.randint(1, 20, (2, 12))
        mask = torch.arange(12) >= torch.tensor([[3], [5]])
        state, text, there = model.prefill(ids, mask), ids, mask
        for at in range(14):
            logits = model.step(state)
            assert state.local.get_seq_length() == at % 4 + (model.parts if strategy == "prefix" else 1)
            full = torch.nn.functional.pad(text, (0, -text.shape[1] % 4 or 4), value=1)
            truth = model(full, torch.nn.functional.pad(there, (0, full.shape[1] - there.shape[1]), value=True))
            own.append(naive.gap(logits, truth[:, text.shape[1] - 4]))
            if at % 4 > 1:
                other.append(naive.gap(logits, model.inside(state.tokens[:, 1:], state.context)[:, -1]))
            token = logits.argmax(-1)
            model.take(state, token)
            text, there = torch.cat((text, token[:, None]), 1), torch.nn.functional.pad(there, (0, 1), value=True)
            assert state.blocks.get_seq_length() == text.shape[1] // 4
        for row, cut in ((0, 3), (1, 5)):
            assert torch.equal(model.generate(ids[row : row + 1, cut:], 14)[0, 12 - cut :], text[row, 12:])
    return max(own), min(other)


def texts(generator: torch.Generator) -> Tensor:
    """(16, 24) tokens: three blocks at random, then each block is the one three before it."""
    return torch.randint(1, 12, (16, 12), generator=generator).repeat(1, 2)


@functools.cache
def loss_of(seed: int, informed: bool) -> float:
    """Of the copied half after 200 steps; not informed: the token decoder gets no context."""
    torch.manual_seed(seed)
    model = BlockTransformerLM(12, 4, 32, 2, 1, 2, 64, positions=64)
    if not informed:
        model.expand.weight.data.zero_()
        model.expand.requires_grad_(False)

    def loss(ids: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model(ids)[:, 8:].flatten(0, 1), ids[:, 12:].flatten())

    return statistics.mean(fit(model, texts, loss, 200, lr=5e-3, seed=seed)[-20:])


@check(
    "block-transformer",
    "blocks that repeat what stood three blocks before, 200 steps: loss less that of a token decoder without context",
    below=-0.1,
    control="another seed without context",
)
def _() -> tuple[float, float]:
    return loss_of(0, True) - loss_of(0, False), loss_of(1, False) - loss_of(0, False)


@check(
    "block-transformer",
    "from a GPT-NeoX of 4 layers: gap of its halves, one after the other, to its own hidden states",
    below=1e-6,
    control="halves changed",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    vanilla = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=20, **sizes)).double().eval()
    model, ids = BlockTransformerLM.from_vanilla(vanilla).eval(), torch.randint(1, 20, (1, 9))
    for stack in (model.block_decoder, model.token_decoder):
        stack.norm, stack.final_layer_norm = stack.final_layer_norm, torch.nn.Identity()
    x = model.embed(ids)[0]
    found = [
        model.token_decoder.norm(whole(b, whole(a, x))) @ model.head.weight.T
        for a, b in ((model.block_decoder, model.token_decoder), (model.token_decoder, model.block_decoder))
    ]
    return tuple(naive.gap(one, vanilla(ids).logits[0]) for one in found)  # type: ignore[return-value]
