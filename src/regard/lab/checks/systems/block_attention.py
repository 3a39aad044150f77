"""Checks of block-attention."""

from __future__ import annotations

import torch

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.decoding import llama
from regard.lab.verification import check
from regard.zoo.systems.block_attention import BlockKVStore, block_attention_mask, block_logits

SIZES = (7, 12, 5)


@check(
    "block-attention",
    "logits of the last block from the store, passages in two orders and one of them twice, and a step of decoding: gap to one masked pass",
    below=1e-5,
    control="keys left as they were encoded",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, passages, final = llama(layers=3, sharp=2), [torch.randint(1, 50, (n,)) for n in SIZES], torch.randint(1, 50, (6,))
    store, own = BlockKVStore(model), 0.0
    plain = BlockKVStore(model)
    plain.turned = lambda k, places: k  # type: ignore[method-assign]
    other = 0.0
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 1)):
        chosen = [passages[at] for at in order]
        text, lengths = torch.cat([*chosen, final]), [len(one) for one in chosen]
        mask = torch.zeros(len(text), len(text), dtype=torch.bool)
        blocks = [at for at, n in enumerate([*lengths, 6]) for _ in range(n)]
        for i in range(len(text)):
            for j in range(i + 1):
                mask[i, j] = blocks[i] == 3 or blocks[i] == blocks[j]
        assert torch.equal(block_attention_mask(lengths, 6), mask)
        truth = model(text[None], attention_mask=mask[None, None], use_cache=False).logits
        assert torch.equal(block_logits(model, chosen, final), truth)
        found, cache = store.prefill(chosen, final)
        own = max(own, naive.gap(found, truth[:, -6:]))
        other = max(other, naive.gap(plain.prefill(chosen, final)[0], truth[:, -6:]))
        step = model(torch.tensor([[9]]), past_key_values=cache, use_cache=True).logits
        longer = torch.nn.functional.pad(mask, (0, 1, 0, 1), value=True)
        longer[:-1, -1] = False
        after = model(torch.cat((text, torch.tensor([9])))[None], attention_mask=longer[None, None], use_cache=False).logits
        own = max(own, naive.gap(step[:, -1], after[:, -1]))
    return own, other


@check("block-attention", "turning by an offset and a place is turning by their sum: gap", below=1e-12, control="the place alone")
def _() -> tuple[float, float]:
    store, k = BlockKVStore(llama()), torch.randn(1, 2, 9, 8, dtype=F64)
    places = torch.arange(9)
    raw = store.turned(store.turned(k, places), -places)
    found, truth = store.turned(raw, places + 31), store.turned(store.turned(k, places), torch.full((9,), 31))
    return max(naive.gap(raw, k), naive.gap(found, truth)), naive.gap(store.turned(k, places), truth)


@check("block-attention", "one block: gap of logits to full attention", below=1e-9, control="two blocks")
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(), torch.randint(1, 50, (15,))
    truth = model(ids[None], use_cache=False).logits
    found, _ = BlockKVStore(model).prefill([], ids)
    return naive.gap(found, truth), naive.gap(BlockKVStore(model).prefill([ids[:4], ids[4:9]], ids[9:])[0], truth[:, 9:])


@check(
    "block-attention", "tokens read at a second question about the same passages, less the question's", below=0.0, control="at the first"
)
def _() -> tuple[float, float]:
    model, passages = llama(), [torch.randint(1, 50, (n,)) for n in SIZES]
    store, seen = BlockKVStore(model), []
    for n in (6, 4):
        before = store.forwarded
        store.prefill(passages[::-1] if n == 4 else passages, torch.randint(1, 50, (n,)))
        seen.append(store.forwarded - before - n)
    assert seen[0] == sum(SIZES)
    return float(seen[1]), float(seen[0])


@check(
    "block-attention", "another first passage: change of what is kept of the second", below=0.0, control="of the same tokens read behind it"
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, passages = llama(), [torch.randint(1, 50, (n,)) for n in SIZES]
    store = BlockKVStore(model)
    store.prefill(passages, torch.tensor([1]))
    before = [x.clone() for x in store.block(passages[1]).keys]
    other = BlockKVStore(model)
    other.prefill([passages[0] % 49 + 1, passages[1]], torch.tensor([1]))
    change = max(naive.gap(a, b) for a, b in zip(before, other.block(passages[1]).keys, strict=True))
    whole = model(torch.cat(passages[:2])[None], use_cache=True).past_key_values.layers[1].values[:, :, 7:]
    return change, naive.gap(whole, store.block(passages[1]).values[1])
