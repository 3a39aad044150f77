"""Checks of duoattention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from regard.cache.policies import Full
from regard.lab import naive
from regard.lab.checks.shared.byhand import rotary_heads
from regard.lab.checks.shared.decoding import llama
from regard.lab.verification import check
from regard.tasks.passkeys import passkeys
from regard.zoo.systems.duoattention import DuoAttention, identify_heads

GATES = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.8, 0.7]])


def masked(model: Any, ids: Tensor, gates: Tensor, sink: int, recent: int, mix: bool = False) -> Tensor:
    """Final hidden states (B, L, D), key heads in loops: heads with gate 1 see all, with 0 first and newest tokens; mix: gates between them weigh
    that against the full head of the untouched model."""
    x, n = model.model.embed_tokens(ids), ids.shape[1]
    teacher = x
    cos, sin = model.model.rotary_emb(x, torch.arange(n)[None])
    i, j = torch.arange(n)[:, None], torch.arange(n)
    for at, layer in enumerate(model.model.layers):
        own, outs = layer.self_attn, list[list[Tensor]]()
        for number, stream in enumerate((teacher, x)):
            y, heads = layer.input_layernorm(stream), []
            q, k, v = rotary_heads(own, y, cos, sin)
            for h in range(q.shape[1]):
                g = h // (q.shape[1] // k.shape[1])
                s = q[:, h] @ k[:, g].transpose(1, 2) * own.head_dim**-0.5
                near = (j <= i) & ((j < sink) | (i - j <= recent))
                full, part = (s.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, g] for seen in (j <= i, near))
                a = gates[at, g]
                if number == 0 and mix:
                    heads.append(full)
                else:
                    other = outs[0][h].detach() if mix else full
                    heads.append(a * other + (1 - a) * part)
            outs.append(heads)
        if mix:
            teacher = teacher + own.o_proj(torch.cat(outs[0], -1))
            teacher = teacher + layer.mlp(layer.post_attention_layernorm(teacher))
        x = x + own.o_proj(torch.cat(outs[1], -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    hidden = model.model.norm(x)
    return torch.cat((model.model.norm(teacher), hidden)) if mix else hidden


@check(
    "duoattention",
    "prompts in chunks of 7 and 12 steps of decoding: logits equal dense attention under each head's mask",
    below=1e-5,
    control="all heads streaming",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(layers=3, sharp=2), torch.randint(1, 50, (2, 40))
    with DuoAttention(GATES, 0.5, sink=3, recent=9, chunk=7)(model) as session:
        out = model.generate(ids, max_new_tokens=13, do_sample=False, output_logits=True, return_dict_in_generate=True)
    whole = (float(GATES.double().flatten().quantile(0.5)) <= GATES).double()
    assert whole.tolist() == [[1, 0], [0, 0], [1, 1]]
    found = torch.stack(out.logits, 1)
    truths = [model.lm_head(masked(model, out.sequences[:, :-1], gates, 3, 9))[:, 39:] for gates in (whole, torch.zeros_like(whole))]
    sizes = {
        (at, head): part.keys.shape[2] for at, one in enumerate(session.cache.layers) for part in one.parts for head in part.heads.tolist()
    }
    assert sizes == {(at, g): 52 if whole[at, g] else 12 for at in range(3) for g in range(2)}  # bytes follow the formula
    return naive.gap(found, truths[0]), naive.gap(found, truths[1])


@check("duoattention", "no sparsity, or few tokens: gap of logits to the base model", below=1e-9, control="half of the heads stream")
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(layers=3, sharp=2), torch.randint(1, 50, (2, 20))

    def logits(policy: Any) -> Tensor:
        with policy(model):
            return torch.stack(
                model.generate(ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True).logits, 1
            )

    truth = logits(Full())
    own = max(
        naive.gap(logits(policy), truth)
        for policy in (DuoAttention(GATES, 0.0, sink=2, recent=3), DuoAttention(GATES, 1.0, sink=8, recent=22))
    )
    return own, naive.gap(logits(DuoAttention(GATES, 0.5, sink=2, recent=3)), truth)


@check(
    "duoattention",
    "training by hand, both streams: gap of two losses, with gates that have gone one step of AdamW against their slopes between them",
    below=1e-5,
    control="all tokens asked for",
)
def _() -> tuple[float, float]:
    model, ids = llama(layers=2), torch.randint(1, 50, (2, 24))
    asked = torch.zeros(2, 24, dtype=torch.bool)
    asked[0, 20:] = asked[1, 22:] = True
    start, losses = torch.tensor([[0.4, 0.7], [0.3, 0.9]]), []
    identify_heads(
        model, lambda step: (ids, asked), 2, lr=0.1, sink=2, recent=4, first=start, progress=lambda step, loss: losses.append(loss)
    )
    gaps = []
    for which in (asked, torch.ones_like(asked)):
        gates, truth = start.double().requires_grad_(), []
        for _ in range(2):
            hidden = masked(model, ids, gates, 2, 4 - 1, mix=True)  # in training a query counts among the recent tokens
            loss = (hidden[:2].detach() - hidden[2:]).square().mean(-1)[which].sum() / which.sum() + 0.05 * gates.abs().mean()
            truth.append(float(loss.detach()))
            slope = torch.autograd.grad(loss, gates)[0]
            gates = (gates - 0.1 * slope.sign()).detach().clamp(0, 1).requires_grad_()
        gaps.append(max(abs(a - b) for a, b in zip(losses, truth, strict=True)))
    return gaps[0], gaps[1]


@functools.cache
def planted() -> Any:
    """One layer, four heads: two read the token marked 1 wherever it stands when asked by token 2, two read their neighbours."""
    model = llama(vocab=20, layers=1, kv_heads=4)
    host, own = model.model, model.model.layers[0].self_attn
    host.embed_tokens.weight.data.mul_(0)
    host.embed_tokens.weight.data[:, 3:] = torch.randn(20, 29)
    host.embed_tokens.weight.data[:, 3:] *= 5.4 / host.embed_tokens.weight.data[:, 3:].norm(dim=1, keepdim=True)
    host.embed_tokens.weight.data[1:3, 3:] = 0
    host.embed_tokens.weight.data[:, 0] = 4
    host.embed_tokens.weight.data[1, 1] = host.embed_tokens.weight.data[2, 2] = 5.4  # all tokens are of one length
    for proj in (own.q_proj, own.k_proj):
        proj.weight.data.zero_()
    for h in (0, 1):  # the slowest pair of channels, which hardly turns
        own.q_proj.weight.data[8 * h + 3, 2] = own.k_proj.weight.data[8 * h + 3, 1] = 3
    for h in (2, 3):  # all pairs alike: the score falls with the distance
        own.q_proj.weight.data[8 * h : 8 * h + 4, 0] = own.k_proj.weight.data[8 * h : 8 * h + 4, 0] = 2.5
    own.v_proj.weight.data.normal_()
    own.o_proj.weight.data.normal_()
    host.layers[0].mlp.down_proj.weight.data.zero_()
    return model


def searched(asked_all: bool) -> Tensor:
    def batch(step: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(3, 20, (2, 56))
        ids[torch.arange(2), torch.randint(6, 30, (2,))] = 1
        ids[:, -4:] = 2
        return ids, torch.ones_like(ids, dtype=torch.bool) if asked_all else ids == 2

    return identify_heads(planted(), batch, 150, 0.05, sink=4, recent=16)[0]


@check(
    "duoattention",
    "two heads that read one far token, two that read neighbours, 150 steps: least gate of the first less the largest of the second",
    above=0.7,
    control="all tokens asked for, which drown the few that need it",
)
def _() -> tuple[float, float]:
    found = [searched(asked_all) for asked_all in (False, True)]
    return tuple(float(gates[:2].min() - gates[2:].max()) for gates in found)


@check("duoattention", "passkey data: asked tokens that repeat a string that stands in the text", above=1.0, control="tokens before them")
def _() -> tuple[float, float]:
    filler = torch.arange(100, 600)
    ids, asked = passkeys(filler, 400, 4, 6, (torch.tensor([7, 8]), torch.tensor([9])), torch.Generator().manual_seed(0))
    assert ids.shape == asked.shape and int(asked.sum()) == 24 and (ids == 7).sum() == 4 and (ids == 9).sum() == 4
    text = ids[0].tolist()
    body, hits, others = text[: text.index(9)], 0, 0
    assert abs(body.index(7) - 0.05 * 352) < 2
    for start in (ids[0] == 9).nonzero()[:, 0].tolist():
        key = text[start + 1 : start + 7]
        hits += any(body[at : at + 8] == [7, 8, *key] for at in range(len(body)))
        others += any(body[at : at + 8] == [7, 8, *text[start : start + 6]] for at in range(len(body)))
        assert bool(asked[0, start + 1 : start + 7].all()) and not asked[0, start]
    return hits / 4, others / 4
